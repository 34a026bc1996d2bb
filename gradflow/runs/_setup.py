"""What an adaptive run of a flow is made of: all that stays fixed, and all that changes from step to step."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from gradflow._conserved import Conserved
from gradflow._solution import Status
from gradflow._tree import Extents, PaddedRest, join
from gradflow.flows import AbstractFlow
from gradflow.problems._switching import Switching, switching
from gradflow.runs._continue import Resumed, Step
from gradflow.runs._record import Observable, Record, bind
from gradflow.runs._run import CONSERVED, DERIVATIVE, AbstractRun, ErrorCounts, Point, Position
from gradflow.runs._until import Until
from gradflow.solvers import AbstractMethod, Field, StepControl


class Setup(AbstractRun):
    """What stays fixed during a run; all numbers are leaves."""

    flow: AbstractFlow
    frozen: PyTree
    start: PyTree
    ts: Float[Array, " T"]
    observe: dict[str, Observable]
    method: AbstractMethod
    control: StepControl
    until: Until | None
    max_steps: Int[Array, ""]
    save_params: bool = eqx.field(static=True)
    extents: Extents | None = None
    choice: str = eqx.field(static=True, default="")  # why the method was chosen, if it was
    jumps: Float[Array, " J"] | None = None  # increasing times at which the field jumps
    longest_step: Scalar | None = None
    resumed: Resumed | None = None
    continued: bool = eqx.field(static=True, default=False)
    traced: bool = eqx.field(static=True, default=False)  # whether derivatives may be asked for

    @property
    def oversteps(self) -> bool:
        """Whether the last step may lead beyond the end: pieces of a run then take the steps of the run as a whole."""
        return self.continued and self.until is None

    @property
    def title(self) -> str:
        return type(self.flow).__name__

    def params(self, state: PyTree) -> PyTree:
        return join(self.flow.params(state), self.frozen)

    @property
    def rounds_times(self) -> bool:
        return False

    def initial(self) -> PyTree:
        return self.flow.init(self.start, self.frozen)

    def loss(self, state: PyTree) -> Scalar | None:
        return self.flow.loss(state, self.frozen)

    def conserved(self, state: PyTree) -> dict[str, Conserved]:
        return self.flow.conserved(state, self.frozen)

    def errors(self, state: PyTree) -> dict[str, Scalar]:
        return self.flow.errors(state, self.frozen)

    def time_at(self, where: Point) -> Scalar:
        return self.flow.t0 + where.progress * (self.ts[-1] - self.flow.t0)

    def observables(self, where: Point, state: PyTree) -> dict[str, Observable]:
        return bind(self.observe, self.flow, self.time_at(where), state, self.frozen)

    def motion(self, where: Point, state: PyTree) -> dict[str, PyTree]:
        values = {name: quantity.value for name, quantity in self.conserved(state).items()}
        return {DERIVATIVE: self.flow.vector_field(self.time_at(where), state, self.frozen), CONSERVED: values}

    def evaluation(self) -> PyTree:
        return self.flow.vector_field(self.ts[0], self.initial(), self.frozen)

    def error_counts(self) -> tuple[int, ...]:
        controlled = self.flow.error_weights(self.flow.controlled(self.initial())).weights
        return tuple(leaf.size for leaf in jax.tree_util.tree_leaves(controlled))

    def padded(self, widths: Extents, extents: Extents, counts: ErrorCounts) -> "Setup":
        frozen, control = PaddedRest(self.frozen, widths), dataclasses.replace(self.control, num_entries=counts)
        return dataclasses.replace(self, frozen=frozen, extents=extents, control=control)

    def running(self, carry: "Carry") -> bool:
        return int(carry.code) == Status.RUNNING

    def progress(self, carry: "Carry") -> tuple[float, str]:
        start = float(self.flow.t0 if self.resumed is None else self.resumed.t)
        done = (float(carry.t) - start) / max(float(self.ts[-1]) - start, 1e-300)
        gradients = int(carry.evaluations) * self.flow.gradients_per_evaluation
        return done, f"t = {float(carry.t):.4g}, {gradients} gradients"

    def state(self, carry: "Carry") -> PyTree:
        return carry.y

    def position(self, carry: "Carry") -> Position:
        num_evaluations = (0 if self.resumed is not None else self.flow.start_cost[0]) + carry.evaluations
        counted = num_evaluations if self.method.exact_counts else jnp.asarray(-1)
        return Position(t=carry.t, rows=carry.index, steps=carry.steps, gradient_evaluations=counted)

    def save_times(self) -> Float[Array, " T"]:
        return self.ts

    def reopened(self, carry: "Carry") -> "Carry":
        more = (carry.code == Status.MAX_STEPS) & (carry.steps < self.max_steps)
        return eqx.tree_at(lambda c: c.code, carry, jnp.where(more, Status.RUNNING, carry.code))

    def field(self, t: Scalar, dt: Scalar) -> Field:
        """The flow in time counted from `t`, for a step of size `dt`."""
        begin, end = jnp.asarray(self.flow.t0, t.dtype), self.ts[-1]
        length = end - begin
        if self.continued:  # it is likely to go on for as long as it has gone on so far
            length = jnp.maximum(length, 2 * (t + dt - begin))
        progress = jnp.where(length > 0, (t + dt - begin) / jnp.where(length > 0, length, 1), 1)
        return Field(self.flow, self.frozen, t, progress, self.extents, *self.beside(t))

    def under_trace(self) -> "Setup":
        return dataclasses.replace(self, traced=True)

    def switches(self, t: Scalar, y: PyTree) -> Switching | None:
        """The switches at which derivatives jump, if any can be asked for."""
        field = self.kinked_field(t, y)
        return field if field is not None and field.plan.count else None

    def kinked_field(self, t: Scalar, y: PyTree) -> Switching | None:
        """The program of the field, where it has switches, followed or not, and derivatives can be asked for."""
        kinks = self.flow.kinks(self.start, self.frozen) if self.traced and self.extents is None else ()
        if kinks is not None and not kinks:
            return None
        field = switching(lambda flow, *arguments: flow.vector_field(*arguments), self.flow, t, y, self.frozen)
        # Of a field whose kinks are not known, what is not followed may well be smooth.
        return field if field is None or kinks else field.without_opaque()

    def beside(self, t: Scalar) -> tuple[Scalar | None, Scalar | None]:
        """The last jump up to time `t` and the first one beyond it."""
        if self.jumps is None:
            return None, None
        edges = jnp.concatenate([jnp.array([-jnp.inf], t.dtype), self.jumps, jnp.array([jnp.inf], t.dtype)])
        index = jnp.sum(self.jumps <= t)
        return edges[index], edges[index + 1]

    def limited(self, dt: Scalar) -> Scalar:
        """A step, no longer than is allowed."""
        return dt if self.longest_step is None else jnp.minimum(dt, self.longest_step.astype(dt.dtype))


class Carry(eqx.Module):
    """What changes from step to step."""

    t: Scalar
    rounding_error: Scalar  # rounding lost in `t`, added back at the next step (Kahan)
    dt: Scalar
    y: PyTree
    method_state: PyTree
    scale: PyTree
    was_zero: Bool[Array, ""]
    failures: Int[Array, ""]
    finite: Bool[Array, ""]  # at the last rejected attempt
    index: Int[Array, ""]
    record: Record
    steps: Int[Array, ""]
    accepted: Int[Array, ""]
    evaluations: Int[Array, ""]
    products: Int[Array, ""]
    code: Int[Array, ""]
    first_loss: Scalar | None
    errors: dict[str, Scalar]  # the largest so far
    step: Step | None = None
    missed: Int[Array, ""] | None = None  # jumps that a derivative misses; there are none where none is taken
