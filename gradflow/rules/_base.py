"""What `iterate` asks of a rule: a start, a step, the parameters in a state, a clock and continuous limits."""

import abc
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Scalar

from gradflow._checks import check_positive, fail
from gradflow.flows import AbstractFlow
from gradflow.protocols import UpdateForm


class AbstractRule(eqx.Module):
    """A discrete training rule, `state -> step(state)`, one learning rate, parameters `params(state)`.

    `learning_rate` is a leaf: a sweep over learning rates compiles once.
    """

    gradients_per_step: ClassVar[int] = 1

    @property
    def title(self) -> str:
        """What its runs are called."""
        return type(self).__name__

    @property
    def time_unit(self) -> str:
        """How flow time counts the iterates `k`, for the axes of figures; empty if that is not said."""
        return ""

    @property
    def orders(self) -> tuple[int, ...]:
        """Orders of the continuous limits that `flow` knows."""
        return ()

    @abc.abstractmethod
    def time(self, k: ArrayLike) -> Float[Array, "..."]:
        """Flow time at which iterate `k` sits."""

    @abc.abstractmethod
    def init(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        """State before the first step."""

    @abc.abstractmethod
    def step(self, k: Int[Array, ""], state: PyTree, frozen: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        """The next state, and the loss at the present one."""

    def gradient_evaluations(self, state: PyTree, attempted: Int[Array, ""]) -> Int[Array, ""]:
        """What a run has cost so far, in gradients; -1 if that is not known."""
        return self.gradients_per_step * attempted

    def with_cost_of(self, state: PyTree, tried: PyTree) -> PyTree:
        """The state, where a step that led to `tried` is not taken, with what that step has cost."""
        return state

    @abc.abstractmethod
    def params(self, state: PyTree) -> PyTree:
        """The trainable parameters in a state."""

    @abc.abstractmethod
    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        """The loss at a state."""

    @abc.abstractmethod
    def flow(self, order: int = 1) -> AbstractFlow:
        """The flow that the rule follows to this order in its learning rate."""

    def limits(self) -> dict[str, AbstractFlow]:
        """The flows that `compare` holds the rule against unless told otherwise, by name."""
        return {f"order {order}": self.flow(order) for order in self.orders[:1]}

    @abc.abstractmethod
    def with_learning_rate(self, learning_rate: float | Scalar) -> "AbstractRule":
        """The same rule at another learning rate."""

    def form(self) -> UpdateForm | None:
        """How the rule steps, in numbers; `None` where it is of another form, or not known."""
        return None

    def described(self) -> str:
        """What messages call it, with an article."""
        name = type(self).__name__
        return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        """Raises `ValueError` for parameters of a shape or type that the rule cannot start from, as for flows."""


class AbstractRuleOfDescentTime(AbstractRule):
    """A rule in the time of gradient descent: iterate `k` sits at `t = k * learning_rate`."""

    learning_rate: eqx.AbstractVar[Float[Array, ""]]

    @property
    def time_unit(self) -> str:
        return "t = k * learning_rate"

    def time(self, k: ArrayLike) -> Float[Array, "..."]:
        return jnp.asarray(k, self.learning_rate.dtype) * self.learning_rate


def check_learning_rate(learning_rate: ArrayLike) -> None:
    """Refuses learning rates that are not positive."""
    check_positive("learning_rate", learning_rate, "Typical values lie below 2 / sharpness.")


def unknown_order(rule: AbstractRule, order: object) -> ValueError:
    """The complaint about a continuous limit that a rule does not know."""
    return fail("order", f"be one of {rule.orders} for {type(rule).__name__}", f"{order!r}")
