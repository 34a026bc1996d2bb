"""Gradient descent `theta_{k+1} = theta_k - eta grad L(theta_k)`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Scalar

from gradflow._checks import check_callable
from gradflow._tree import join
from gradflow.flows import AbstractFlow, GradientFlow, ModifiedFlow
from gradflow.flows._gradient_flow import check_scalar
from gradflow.rules._base import AbstractRule, check_learning_rate, unknown_order


class GradientDescent(AbstractRule):
    """Gradient descent with a constant learning rate:

        theta_{k+1} = theta_k - eta grad L(theta_k)

    **Time unit**: iterate `k` sits at `t = k eta`. The gap to gradient flow on a fixed interval is of first order in
    `eta`, that to the modified flows `flow(order)` of order 2 and 3. Above `eta = 2 / sharpness` the iteration is
    unstable, which the flow never is.

    **Arguments**: `problem`, a callable `params -> scalar`; `learning_rate`, positive, may be traced.

    **Raises** `ValueError` for a learning rate that is not positive.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.GradientDescent(lambda w: 0.5 * w**2, learning_rate=0.1)
    >>> sol = gf.iterate(rule, jnp.array(1.0), 10)
    >>> round(float(sol.final), 4), round(float(sol.t_final), 4)
    (0.3487, 1.0)
    """

    problem: Callable[[Any], Any]
    learning_rate: Float[Array, ""]

    def __init__(self, problem: Callable[[Any], Any], learning_rate: Any):
        check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
        check_learning_rate(learning_rate)
        self.problem = problem
        self.learning_rate = jnp.asarray(learning_rate, float)

    @property
    def orders(self) -> tuple[int, ...]:
        return (1, 2, 3)

    def time(self, k: Any) -> Any:
        return k * self.learning_rate

    def init(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        return trainable

    def step(self, k: Int[Array, ""], state: PyTree, frozen: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        loss, gradient = jax.value_and_grad(lambda p: self.problem(join(p, frozen)))(state)
        return jax.tree_util.tree_map(lambda p, g: p - self.learning_rate.astype(p.dtype) * g, state, gradient), loss

    def params(self, state: PyTree) -> PyTree:
        return state

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(join(state, frozen))

    def flow(self, order: int = 1) -> AbstractFlow:
        if order not in self.orders:
            raise unknown_order(self, order)
        return GradientFlow(self.problem) if order == 1 else ModifiedFlow(self.problem, self.learning_rate, order=order)

    def with_learning_rate(self, learning_rate: float | Scalar) -> "AbstractRule":
        check_learning_rate(learning_rate)
        return eqx.tree_at(lambda rule: rule.learning_rate, self, jnp.asarray(learning_rate, float))

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        check_scalar(self.problem, join(trainable, frozen))
