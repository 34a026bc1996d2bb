"""`AbstractRun`: what the driver, and loops that drive many runs at once, ask of a run, whatever it is a run of."""

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Scalar

from gradflow._conserved import Conserved
from gradflow._solution import Solution
from gradflow._tree import Extents
from gradflow.runs._record import Observable, with_unreached_rows

ErrorCounts = tuple[Int[Array, "..."], ...] | None
"""Entries of each leaf that the error control sees; `None` where there is no error control."""


class Point(eqx.Module):
    """Where a run is looked at without being run."""

    progress: Float[Array, ""]  # of the time of a flow
    first: Int[Array, ""]  # step of a run in counted steps
    steps: Int[Array, ""]  # that such a run goes on from there
    push: Float[Array, ""]  # of the whole state, velocities and the like included, over the size of the parameters


def point(progress: float = 0.0, first: int = 0, steps: int = 1, push: float = 0.0) -> Point:
    return Point(jnp.asarray(progress, float), jnp.asarray(first), jnp.asarray(steps), jnp.asarray(push, float))


class Position(eqx.Module):
    """How far a run is. Counts are those of the result so far."""

    t: Scalar
    rows: Int[Array, ""]
    steps: Int[Array, ""]
    gradient_evaluations: Int[Array, ""]


class AbstractRun(eqx.Module):
    """A run that can be taken further by a number of steps; `carry` is all that changes on the way.

    `code` tells functions apart that are one object and no longer compute the same, since a variable they take from
    elsewhere has changed: a program compiled before then would return stale numbers.
    """

    frozen: eqx.AbstractVar[PyTree]
    start: eqx.AbstractVar[PyTree]
    code: str = eqx.field(static=True, kw_only=True, default="")

    # What the driver takes from beginning to end.

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """What the progress bar is labelled with."""

    def under_trace(self) -> "AbstractRun":
        """The run as it is taken where values are not concrete, so that derivatives may be asked for."""
        return self

    @abc.abstractmethod
    def begin(self) -> PyTree:
        """What there is before the first step. Compiled."""

    @abc.abstractmethod
    def advance(self, carry: PyTree, budget: Int[Array, ""]) -> PyTree:
        """At most `budget` attempted steps. Compiled."""

    @abc.abstractmethod
    def attempt(self, carry: PyTree, max_steps: Int[Array, ""]) -> PyTree:
        """One attempted step, for loops that drive many runs at once; `max_steps` of them at the most."""

    @abc.abstractmethod
    def running(self, carry: PyTree) -> bool:
        """Whether there is anything left to do."""

    @abc.abstractmethod
    def progress(self, carry: PyTree) -> tuple[float, str]:
        """The part of the run that is done, between 0 and 1, and a remark for the bar."""

    @abc.abstractmethod
    def state(self, carry: PyTree) -> PyTree:
        """The state that has been reached."""

    @abc.abstractmethod
    def position(self, carry: PyTree) -> Position:
        """How far that is. Compiled."""

    @abc.abstractmethod
    def save_times(self) -> Float[Array, " rows"]:
        """The times that the result gives for its rows."""

    def reopened(self, carry: PyTree) -> PyTree:
        """The carry of a run that ended for want of steps, where it may take more now."""
        return carry

    @abc.abstractmethod
    def summarise(self, carry: PyTree) -> Solution:
        """The result, with zeros in the rows that were not reached."""

    def finish(self, carry: PyTree) -> Solution:
        """The result, or the part of it that there is, with NaN in the rows that were not reached."""
        return with_unreached_rows(self.summarise(carry))

    # What is asked of a run that does not run: the shapes of its results, and numbers that tell it from others.

    @property
    @abc.abstractmethod
    def rounds_times(self) -> bool:
        """Whether rows are written at the nearest times that the run has, rather than at those asked for."""

    @abc.abstractmethod
    def initial(self) -> PyTree:
        """The state at the start."""

    @abc.abstractmethod
    def params(self, state: PyTree) -> PyTree:
        """The parameters in a state, with those that do not flow."""

    @abc.abstractmethod
    def loss(self, state: PyTree) -> Scalar | None:
        """The loss at a state, if there is one."""

    @abc.abstractmethod
    def observables(self, where: Point, state: PyTree) -> dict[str, Observable]:
        """What is observed at a state, as functions of the parameters alone."""

    @abc.abstractmethod
    def conserved(self, state: PyTree) -> dict[str, Conserved]:
        """Quantities of which the result reports the drift."""

    @abc.abstractmethod
    def errors(self, state: PyTree) -> dict[str, Scalar]:
        """Errors of which the result reports the largest."""

    @abc.abstractmethod
    def motion(self, where: Point, state: PyTree) -> dict[str, PyTree]:
        """What the run does from a state, and what it keeps, by what messages call it."""

    @abc.abstractmethod
    def evaluation(self) -> PyTree:
        """What is evaluated again and again, at the start: the derivative of the state, or a step."""

    @abc.abstractmethod
    def error_counts(self) -> tuple[int, ...] | None:
        """Entries of each leaf of the state at the start that the error control sees; `None` where there is none."""

    @abc.abstractmethod
    def padded(self, widths: Extents, extents: Extents, counts: ErrorCounts) -> "AbstractRun":
        """The run of parameters and of a state that have been padded; error control sees `counts` of each leaf."""


DERIVATIVE, STEP, CONSERVED = "the derivative", "a step", "what is conserved"
"""What `AbstractRun.motion` may hold."""
