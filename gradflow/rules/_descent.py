"""What rules share that step against a gradient, and keep nothing but the parameters."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from gradflow._tree import join
from gradflow.flows._gradient_flow import check_scalar
from gradflow.problems import EmpiricalRisk
from gradflow.rules._base import AbstractRule, AbstractRuleOfDescentTime, check_learning_rate


class AbstractDescent(AbstractRuleOfDescentTime):
    """`theta - eta g` with some `g`; iterate `k` sits at `t = k eta`."""

    problem: eqx.AbstractVar[Callable[[PyTree], Scalar] | EmpiricalRisk]
    learning_rate: eqx.AbstractVar[Float[Array, ""]]

    def descend(
        self, problem: Callable[[PyTree], Scalar], state: PyTree, frozen: PyTree
    ) -> tuple[PyTree, Float[Array, ""]]:
        """A step against the gradient of this problem, and its loss before it."""
        loss, gradient = jax.value_and_grad(lambda p: problem(join(p, frozen)))(state)
        return jax.tree_util.tree_map(lambda p, g: p - self.learning_rate.astype(p.dtype) * g, state, gradient), loss

    def init(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        return trainable

    def params(self, state: PyTree) -> PyTree:
        return state

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(join(state, frozen))

    def with_learning_rate(self, learning_rate: float | Scalar) -> AbstractRule:
        check_learning_rate(learning_rate)
        return eqx.tree_at(lambda rule: rule.learning_rate, self, jnp.asarray(learning_rate, float))

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        check_scalar(self.problem, join(trainable, frozen))
