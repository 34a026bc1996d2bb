"""What the rules with momentum share: their coefficient, their clock, and a state of two sets of parameters."""

import abc
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from gradflow._tree import join
from gradflow.flows import AbstractFlow
from gradflow.flows._gradient_flow import check_scalar
from gradflow.flows._second_order import check_strong_convexity
from gradflow.rules._base import AbstractRule, check_learning_rate


class AbstractMomentumRule(AbstractRule):
    """A rule whose coefficient is fixed, `momentum`, or follows from `mu`; the state holds the iterate first."""

    problem: eqx.AbstractVar[Callable[[PyTree], Scalar]]
    learning_rate: eqx.AbstractVar[Float[Array, ""]]
    mu: eqx.AbstractVar[Float[Array, ""] | None]
    momentum: eqx.AbstractVar[Float[Array, ""] | None]

    @property
    def orders(self) -> tuple[int, ...]:
        return (1,) if self.momentum is None else (1, 2, 3)

    def coefficient(self) -> Scalar:
        """The momentum coefficient, fixed or from the strong-convexity parameter."""
        if self.momentum is not None:
            return self.momentum
        assert self.mu is not None  # a rule with neither has coefficients of its own
        root = jnp.sqrt(self.mu * self.learning_rate)
        return (1 - root) / (1 + root)

    def unit_of_time(self) -> Scalar:
        """Flow time of one step: that of gradient flow for fixed momentum, `sqrt(s)` otherwise."""
        return jnp.sqrt(self.learning_rate) if self.momentum is None else self.learning_rate / (1 - self.momentum)

    @property
    def time_unit(self) -> str:
        return "t = k sqrt(s)" if self.momentum is None else "t = k s / (1 - momentum)"

    def init(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        return trainable, trainable

    def params(self, state: PyTree) -> PyTree:
        return state[0]

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(join(state[0], frozen))

    @abc.abstractmethod
    def flow(self, order: int = 1, resolution: Literal["high", "low"] = "high") -> AbstractFlow:
        """The flow of this order in the learning rate and, at order 1, of this resolution."""

    def limits(self) -> dict[str, AbstractFlow]:
        """Flows of both resolutions, or of orders 1 and 2 for a fixed coefficient."""
        if self.momentum is None:
            return {"low resolution": self.flow(1, "low"), "high resolution": self.flow(1, "high")}
        return {"order 1": self.flow(1, "low"), "second order ODE": self.flow(1, "high"), "order 2": self.flow(2)}

    def with_learning_rate(self, learning_rate: float | Scalar) -> AbstractRule:
        check_learning_rate(learning_rate)
        if self.mu is not None:
            check_strong_convexity(self.mu, learning_rate)
        return eqx.tree_at(lambda rule: rule.learning_rate, self, jnp.asarray(learning_rate, float))

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        check_scalar(self.problem, join(trainable, frozen))
