"""Gradient descent `theta_{k+1} = theta_k - eta grad L(theta_k)`."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Scalar

from gradflow._checks import check_callable
from gradflow.flows import AbstractFlow, GradientFlow, ModifiedFlow
from gradflow.protocols import UpdateForm
from gradflow.rules._base import check_learning_rate, unknown_order
from gradflow.rules._descent import AbstractDescent


class GradientDescent(AbstractDescent):
    """Gradient descent with a constant learning rate:

        theta_{k+1} = theta_k - eta grad L(theta_k)

    **Time unit**: iterate `k` sits at `t = k eta`. The gap to gradient flow on a fixed interval is of first order in
    `eta`, that to the modified flows `flow(order)` of order 2 and 3. Above `eta = 2 / sharpness` the iteration is
    unstable, which the flow never is.

    **Arguments**: `problem`, a callable `params -> scalar`; `learning_rate`, positive, may be traced.

    **Raises** `ValueError` for a problem that cannot be called and a learning rate that is not positive; so does `flow`
    for an unknown order.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.GradientDescent(lambda w: 0.5 * w**2, learning_rate=0.1)
    >>> sol = gf.iterate(rule, jnp.array(1.0), 10)
    >>> round(float(sol.final), 4), round(float(sol.t_final), 4)
    (0.3487, 1.0)
    """

    problem: Callable[[PyTree], Scalar]
    learning_rate: Float[Array, ""]

    def __init__(self, problem: Callable[[PyTree], Scalar], learning_rate: ArrayLike):
        check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
        check_learning_rate(learning_rate)
        self.problem = problem
        self.learning_rate = jnp.asarray(learning_rate, float)

    @property
    def orders(self) -> tuple[int, ...]:
        return (1, 2, 3)

    def step(self, k: Int[Array, ""], state: PyTree, frozen: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        return self.descend(self.problem, state, frozen)

    def form(self) -> UpdateForm:
        return UpdateForm(self.learning_rate)

    def flow(self, order: int = 1) -> AbstractFlow:
        if order not in self.orders:
            raise unknown_order(self, order)
        return GradientFlow(self.problem) if order == 1 else ModifiedFlow(self.problem, self.learning_rate, order=order)
