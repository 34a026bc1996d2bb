"""What the loop asks of a method of integration: a start, and one attempted step after another."""

import abc
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from gradflow._tree import Extents, within
from gradflow.solvers._control import StepControl

ROUNDINGS = 16
"""Units of rounding that the field keeps away from a jump: a flow may round time again, for a clock of its own."""


class Field(eqx.Module):
    """A flow as a method sees it, in time counted from the beginning of the step.

    A step keeps its digits however far the run has come. `progress` is the part of the run that is done at the end of
    the step, between 0 and 1. Where states have been padded to a common shape, `extents` tells how far along every
    axis their leaves are their own: beyond, nothing moves. Where the field jumps in time, `before` and `after` are the
    jumps that bound the step: the field is evaluated strictly between them, on the right side of each.
    """

    flow: Any  # some methods ask more of it than others, by the protocols of the package
    frozen: PyTree
    t: Scalar
    progress: Scalar
    extents: Extents | None = None
    before: Scalar | None = None  # the last jump up to the start of the step; minus infinity where there is none
    after: Scalar | None = None  # the first one beyond it; infinity where there is none

    def __call__(self, s: Scalar, y: PyTree) -> PyTree:
        t = self.t + jnp.asarray(s, self.t.dtype)
        if self.before is not None and self.after is not None:
            low, high = _next_to(self.before, 1), _next_to(self.after, -1)
            t = jnp.where(t < low, low, jnp.where(t > high, high, t))
        return self.inside(self.slope(t, y))

    def slope(self, t: Scalar, y: PyTree) -> PyTree:
        """The derivative of a state at a time of the flow."""
        return self.flow.vector_field(t, y, self.frozen)

    def inside(self, y: PyTree) -> PyTree:
        """A state, or a derivative of one, with zeros for the padding."""
        return y if self.extents is None else within(y, self.extents)

    def controlled(self, y: PyTree) -> PyTree:
        """The part of a state, or of its derivative, that the error control sees."""
        return self.flow.controlled(y)

    def error_weights(self, y: PyTree) -> PyTree:
        """What errors of the controlled part are measured against."""
        return self.flow.error_weights(self.flow.controlled(y)).weights

    def step_length_ratio(self, y0: PyTree, y1: PyTree) -> Scalar | None:
        """How far a step went, over the farthest that the flow allows; `None` for no limit."""
        return self.flow.step_length_ratio(self.flow.controlled(y0), self.flow.controlled(y1))

    def replace(self, y: PyTree, controlled: PyTree) -> PyTree:
        """The state `y` with its controlled part, or each of its controlled parts, replaced."""
        parts = self.flow.controlled(y)
        if controlled is None and type(parts) is tuple:
            controlled = (None,) * len(parts)
        return eqx.tree_at(self.flow.controlled, y, controlled, is_leaf=lambda x: x is None)


def _next_to(jump: Scalar, side: int) -> Scalar:
    """The time just after (`side=1`) or before (`-1`) a jump."""
    spacing = jnp.maximum(jnp.abs(jump) * jnp.finfo(jump.dtype).eps, jnp.finfo(jump.dtype).tiny)
    return jnp.where(jnp.isfinite(jump), jump + side * ROUNDINGS * spacing, jump)


class PaddedTerm(diffrax.ODETerm):
    """The terms of a padded flow, for solvers that come up with directions of their own."""

    extents: Extents


class Attempt(eqx.Module):
    """An attempted step: the new state, and what the loop goes on with."""

    y1: PyTree
    ratio: Scalar  # error over tolerance; the step is accepted when it is at most one; infinite if the step failed
    factor: Scalar  # what to multiply the step by, for the next attempt
    accepted: PyTree  # state of the method after an accepted step
    rejected: PyTree  # and after a rejected one
    dense: PyTree  # what `interpolate` needs
    finite: Bool[Array, ""]
    evaluations: Int[Array, ""]
    products: Int[Array, ""]


class AbstractMethod(eqx.Module):
    """A method of integration with its own control of step and order."""

    @property
    @abc.abstractmethod
    def exact_counts(self) -> bool:
        """Whether `Attempt.evaluations` and `Attempt.products` are exact."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What `Solution` prints."""

    @property
    @abc.abstractmethod
    def first_order(self) -> int:
        """Exponent by which the error of the first step depends on its size."""

    @abc.abstractmethod
    def begin(self, field: Field, y: PyTree, slope: PyTree, dt: Scalar) -> PyTree:
        """State of the method before the first step, from `y`, its derivative and the size of that step."""

    @abc.abstractmethod
    def attempt(
        self,
        field: Field,
        y: PyTree,
        dt: Scalar,
        control: StepControl,
        scale: PyTree,
        state: PyTree,
    ) -> Attempt:
        """One attempted step of size `dt`."""

    def scale_fraction(self, state: PyTree) -> float | Scalar:
        """Share of their present size below which small entries are held to an absolute error only."""
        return 0.0

    def piece(self, field: Field, dt: Scalar, y: PyTree, state: PyTree) -> tuple[PyTree, Bool[Array, ""]] | None:
        """The state after a step of size `dt` that knows of none before, and whether the method takes such steps where
        it stands, in `state`; `None` where it never does."""
        return None

    def renewed(self, field: Field, dt: Scalar, y: PyTree, state: PyTree) -> PyTree:
        """The state of the method after a step of size `dt` that was accepted, with what it holds of the new state `y`
        and of the field there worked out again. It is the same, but for its derivatives where those of `y` jump."""
        return state

    @abc.abstractmethod
    def interpolate(self, field: Field, dense: PyTree, s: Scalar) -> PyTree:
        """The state at time `s` from the beginning of the step that gave `dense`."""
