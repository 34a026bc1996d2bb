"""The compiled loop behind `solve`: one attempted step of a method after another.

It is written here rather than left to `diffrax.diffeqsolve` for four reasons: every evaluation of the field is counted;
a run can be cut into segments, for a progress bar and so that an interruption keeps what was computed; failures end a
run at once with its partial results; and no host callback enters the program, so that compiled programs can be cached.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from gradflow._conserved import Conserved
from gradflow._solution import Solution, Status
from gradflow._tree import Extents, PaddedRest, full_precision, held_paths, join, strong
from gradflow.flows import AbstractFlow
from gradflow.runs._continue import Checkpoint, Launch, Resumed, Step, fingerprint, relaunch
from gradflow.runs._record import Record, bind, blank_record, write_row
from gradflow.runs._run import CONSERVED, DERIVATIVE, AbstractRun, ErrorCounts, Point
from gradflow.runs._until import Until, locate
from gradflow.solvers import AbstractMethod, Attempt, Field, StepControl

CROSSING = 100
"""Times the resolution of time, a step from a state of zeros that is accepted whatever its error."""
BISECTION = 0.1
"""Factor on a step that is turned down from a state of zeros: fifteen of them go through all digits of time."""
MOST_FAILURES = 40
"""Rejections in a row after which a run is given up: each divides the step by ten at the most, by 1.1 at the least."""


class Setup(AbstractRun):
    """What stays fixed during a run; all numbers are leaves."""

    flow: AbstractFlow
    frozen: PyTree
    start: PyTree
    ts: Float[Array, " T"]
    observe: dict[str, Callable[[Any], Any]]
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

    @property
    def oversteps(self) -> bool:
        """Whether the last step may lead beyond the end: pieces of a run then take the steps of the run as a whole."""
        return self.continued and self.until is None

    @property
    def title(self) -> str:
        return type(self.flow).__name__

    def params(self, state: PyTree) -> PyTree:
        return join(self.flow.params(state), self.frozen)

    def begin(self) -> "Carry":
        return begin(self)

    def advance(self, carry: "Carry", budget: Int[Array, ""]) -> "Carry":
        return advance(dataclasses.replace(self, resumed=None), carry, budget)

    def attempt(self, carry: "Carry", max_steps: Int[Array, ""]) -> "Carry":
        return attempt(self, carry)

    def summarise(self, carry: "Carry") -> Solution:
        return summarise(self, carry)

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
        return self.flow.t0 + where.share * (self.ts[-1] - self.flow.t0)

    def observables(self, where: Point, state: PyTree) -> dict[str, Callable[[Any], Any]]:
        return bind(self.observe, self.flow, self.time_at(where), state, self.frozen)

    def motion(self, where: Point, state: PyTree) -> dict[str, Any]:
        kept = {name: quantity.value for name, quantity in self.conserved(state).items()}
        return {DERIVATIVE: self.flow.vector_field(self.time_at(where), state, self.frozen), CONSERVED: kept}

    def evaluation(self) -> PyTree:
        return self.flow.vector_field(self.ts[0], self.initial(), self.frozen)

    def error_counts(self) -> tuple[int, ...]:
        controlled = self.flow.sizes(self.flow.controlled(self.initial()))
        return tuple(leaf.size for leaf in jax.tree_util.tree_leaves(controlled))

    def padded(self, widths: Extents, extents: Extents, counts: ErrorCounts) -> "Setup":
        frozen, control = PaddedRest(self.frozen, widths), dataclasses.replace(self.control, counts=counts)
        return dataclasses.replace(self, frozen=frozen, extents=extents, control=control)

    def running(self, carry: "Carry") -> bool:
        return int(carry.code) == Status.RUNNING

    def progress(self, carry: "Carry") -> tuple[float, str]:
        start = float(self.flow.t0 if self.resumed is None else self.resumed.t)
        done = (float(carry.t) - start) / max(float(self.ts[-1]) - start, 1e-300)
        return done, f"t = {float(carry.t):.4g}, {int(carry.evaluations)} gradients"

    def field(self, t: Scalar, dt: Scalar) -> Field:
        """The flow in time counted from `t`, for a step of size `dt`."""
        begin, end = jnp.asarray(self.flow.t0, t.dtype), self.ts[-1]
        length = end - begin
        if self.continued:  # it is likely to go on for as long as it has gone on so far
            length = jnp.maximum(length, 2 * (t + dt - begin))
        share = jnp.where(length > 0, (t + dt - begin) / jnp.where(length > 0, length, 1), 1)
        return Field(self.flow, self.frozen, t, share, self.extents, *self.beside(t))

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
    lost: Scalar  # rounding lost in `t`, added back at the next step (Kahan)
    dt: Scalar
    y: PyTree
    method_state: PyTree
    floor: PyTree
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


@eqx.filter_jit
@full_precision
def begin(setup: Setup) -> Carry:
    flow, control = setup.flow, setup.control
    flow.check(setup.start, setup.frozen)
    if setup.resumed is None:
        t = jnp.asarray(flow.t0, setup.ts.dtype)
        y = flow.init(setup.start, setup.frozen)
        watched = flow.controlled(y)
        floor = control.floor(flow.sizes(watched))
        if flow.own_sizes:
            floor = jax.tree_util.tree_map(jnp.zeros_like, floor)
        whole = jnp.stack([jnp.max(jnp.abs(leaf), initial=0.0) for leaf in jax.tree_util.tree_leaves(watched)])
        was_zero = jnp.all(whole == 0)
        loss = flow.loss(y, setup.frozen)
        launch = _launch(setup, t, y, floor)
    else:
        t, y = setup.resumed.t.astype(setup.ts.dtype), setup.resumed.state
        loss = flow.loss(y, setup.frozen)
        known = setup.resumed.checkpoint
        floor, was_zero = known.floor, known.was_zero
        now = fingerprint(flow, y, loss)
        anew = functools.partial(_launch, setup, t, y, floor)
        launch = relaunch(known, t, now, anew, setup.method.name, setup.jumps, setup.oversteps)
    observe = bind(setup.observe, flow, t, y, setup.frozen)
    record = blank_record(setup.ts.size, setup.params(y), observe, setup.save_params, flow.params(y))
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree_util.tree_leaves((y, loss))])
    finite = jnp.all(finite) & launch.finite
    carry = Carry(
        t=launch.t,
        lost=launch.lost,
        dt=launch.dt,
        y=launch.y,
        method_state=launch.method_state,
        floor=floor,
        was_zero=was_zero,
        failures=jnp.asarray(0),
        finite=jnp.asarray(True),
        index=jnp.asarray(0),
        record=record,
        steps=jnp.asarray(0),
        accepted=jnp.asarray(0),
        evaluations=launch.evaluations,
        products=jnp.asarray(0),
        code=jnp.where(finite, Status.RUNNING, Status.NONFINITE),
        first_loss=loss,
        errors=flow.errors(y, setup.frozen),
        step=launch.step,
    )
    index, record = _save(setup, carry, launch.t, lambda s: _inside(setup, launch.step, s, y))
    met = jnp.asarray(False) if setup.until is None else setup.until.excess(setup.params(y)) >= 0
    code = jnp.where(index == setup.ts.size, Status.OK, carry.code)
    code = jnp.where(met, Status.STOPPED, code)
    code = jnp.where(finite, code, Status.NONFINITE)
    valid = valid_times(setup.ts, t)
    code = jnp.where(valid, code, Status.INVALID_TIMES)
    record = jax.tree_util.tree_map(
        lambda new, blank: jnp.where(valid, new, blank) if eqx.is_array(new) else new, record, carry.record
    )
    index = jnp.where(valid, index, 0)
    return strong(eqx.tree_at(lambda c: (c.index, c.record, c.code), carry, (index, record, code)))


def valid_times(ts: Float[Array, " T"], t0: Scalar) -> Bool[Array, ""]:
    """Whether save times are finite, increase, and do not begin before `t0`: what cannot be refused under a trace."""
    return jnp.all(jnp.isfinite(ts)) & jnp.all(ts[1:] > ts[:-1]) & (ts[0] >= t0)


def _launch(setup: Setup, t: Scalar, y: PyTree, floor: PyTree) -> Launch:
    """The first step size, and the state of the method before the first step."""
    field = setup.field(t, jnp.zeros_like(t))
    f0 = field(jnp.zeros_like(t), y)

    def moved(s: Scalar, to: PyTree) -> PyTree:
        return field.watched(field(s.astype(t.dtype), field.replace(y, to)))

    order, length = setup.method.first_order, setup.ts[-1] - jnp.asarray(setup.flow.t0, t.dtype)
    dt, spent = setup.control.first_step(moved, field.watched(y), field.watched(f0), floor, order, length)
    dt = setup.limited(jax.lax.stop_gradient(jnp.asarray(dt, t.dtype)))
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree_util.tree_leaves(f0)])
    method_state, step, zero = setup.method.begin(field, y, f0, dt), None, jnp.zeros_like(t)
    if setup.oversteps:
        attempt = lambda: setup.method.attempt(field, y, dt, setup.control, floor, method_state).dense  # noqa: E731
        dense = jax.tree_util.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), eqx.filter_eval_shape(attempt))
        step = Step(t, zero, y, dense)
    return Launch(t, y, step, zero, dt, method_state, 1 + spent, jnp.all(finite))


def _inside(setup: Setup, step: Step | None, s: Scalar, y: PyTree) -> PyTree:
    """The state at a time within a step; `y` where there is none."""
    if step is None:
        return y
    inside = setup.method.interpolate(setup.field(step.t, step.dt), step.dense, s - step.t)
    return jax.tree_util.tree_map(lambda a, b: jnp.where(s - step.t >= step.dt, b, a), inside, step.y1)


@eqx.filter_jit
@full_precision
def advance(setup: Setup, carry: Carry, budget: Int[Array, ""]) -> Carry:
    """At most `budget` attempted steps."""
    last = carry.steps + budget
    dynamic, static = eqx.partition(carry, eqx.is_array)

    def running(state: PyTree) -> Bool[Array, ""]:
        now = eqx.combine(state, static)
        return (now.code == Status.RUNNING) & (now.steps < last)

    def body(state: PyTree) -> PyTree:
        return eqx.filter(attempt(setup, eqx.combine(state, static)), eqx.is_array)

    return strong(eqx.combine(jax.lax.while_loop(running, body, dynamic), static))


class Outcome(NamedTuple):
    """What has come of an attempted step of length `dt`."""

    dt: Scalar
    last: Bool[Array, ""]  # whether it leads to the end of the run, or to a jump
    keep: Bool[Array, ""]
    resting: Bool[Array, ""]  # whether it began at a state of zeros
    crossing: Bool[Array, ""]  # whether it is kept whatever its error, to cross a jump from there
    resolution: Scalar  # of time
    failures: Int[Array, ""]  # in a row


def attempt(setup: Setup, carry: Carry) -> Carry:
    """One attempted step, and whatever falls due within it."""
    control, method, y, t = setup.control, setup.method, carry.y, carry.t
    end, jump = _next_end(setup, t)
    remaining = (end - t) - carry.lost
    last = carry.dt * (1 + 1e-3) >= remaining
    dt = jnp.where(last, remaining, carry.dt)
    field = setup.field(t, dt)
    tried: Attempt = method.attempt(field, y, dt, control, carry.floor, carry.method_state)
    outcome = _judge(carry, field, tried, dt, last)
    keep = outcome.keep

    def at(s: Scalar) -> PyTree:
        inside = method.interpolate(field, tried.dense, s - t)
        return jax.tree_util.tree_map(lambda a, b: jnp.where(s - t >= dt, b, a), inside, tried.y1)

    moved = dt + carry.lost
    t1 = jnp.where(last, end, t + moved)
    lost = jnp.where(last, 0.0, moved - (t1 - t)).astype(t.dtype)
    stopped, t1, y1 = locate(setup.until, setup.params, keep, t, t1, at, tried.y1)
    reached = jnp.where(keep, t1, t)
    index, record = _save(setup, carry, reached, at)
    proposed = _propose(setup, carry, tried, outcome)
    whole = jnp.where(keep, carry.finite, tried.finite)
    code = _status_after(setup, carry, outcome, proposed, whole)
    code = jnp.where(keep & (index == setup.ts.size), Status.OK, code)
    code = jnp.where(stopped, Status.STOPPED, code)

    def choose(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree_util.tree_map(lambda a, b: jnp.where(keep, a, b) if eqx.is_array(b) else b, new, old)

    after = Carry(
        t=reached,
        lost=jnp.where(keep, lost, carry.lost),
        dt=proposed,
        y=choose(y1, y),
        method_state=choose(tried.accepted, tried.rejected),
        floor=choose(_raised_floor(setup, carry, field.sizes(tried.y1), outcome.crossing), carry.floor),
        was_zero=carry.was_zero,
        failures=outcome.failures,
        finite=whole,
        index=index,
        record=record,
        steps=carry.steps + 1,
        accepted=carry.accepted + keep.astype(carry.accepted.dtype),
        evaluations=carry.evaluations + tried.evaluations,
        products=carry.products + tried.products,
        code=code,
        first_loss=carry.first_loss,
        errors=choose(_largest(carry.errors, setup.flow.errors(y1, setup.frozen)), carry.errors),
        step=choose(Step(t, dt, tried.y1, tried.dense), carry.step) if setup.oversteps else None,
    )
    return after if jump is None else _restart(setup, after, keep & last & (t1 == jump))


def _next_end(setup: Setup, t: Scalar) -> tuple[Scalar, Scalar | None]:
    """The time at which a step has to end, and the next jump, where the field has any."""
    end, (_, jump) = setup.ts[-1], setup.beside(t)
    if setup.oversteps:
        end = jnp.full_like(end, jnp.inf)
    return end if jump is None else jnp.minimum(end, jump), jump


def _judge(carry: Carry, field: Field, tried: Attempt, dt: Scalar, last: Bool[Array, ""]) -> Outcome:
    """Whether a step is kept.

    From a state of zeros errors are as large as all that moves, however short the step, where the field jumps within
    it. Then the jump is looked for in time, and crossed by a step that time hardly resolves.
    """
    # Time carries its rounding along, so it resolves more than its type does.
    eps = float(jnp.finfo(carry.t.dtype).eps)
    resolution = 8 * max(eps**2, float(jnp.finfo(jnp.float64).eps)) * jnp.abs(carry.t)
    resting = _all_zero(carry.floor) & _all_zero(field.sizes(carry.y))
    crossing = resting & tried.finite & (dt <= CROSSING * resolution)
    keep = (tried.ratio <= 1) | crossing
    return Outcome(dt, last, keep, resting, crossing, resolution, jnp.where(keep, 0, carry.failures + 1))


def _propose(setup: Setup, carry: Carry, tried: Attempt, outcome: Outcome) -> Scalar:
    """The length of the step to try next."""
    factor = jax.lax.stop_gradient(tried.factor).astype(outcome.dt.dtype)
    factor = jnp.where(outcome.resting & ~outcome.keep, jnp.minimum(factor, BISECTION), factor)
    proposed = setup.limited(outcome.dt * factor)
    # A step cut short by the end of the run says nothing about the step size to go on with.
    short = (outcome.keep & outcome.last) | outcome.crossing
    return jnp.where(short, jnp.maximum(proposed, carry.dt), proposed)


def _status_after(
    setup: Setup, carry: Carry, outcome: Outcome, proposed: Scalar, finite: Bool[Array, ""]
) -> Int[Array, ""]:
    """The status of a run that has not reached its end: out of steps, or with steps that time does not resolve."""
    code = jnp.where(carry.steps + 1 >= setup.max_steps, Status.MAX_STEPS, carry.code)
    small = proposed < outcome.resolution
    tiny = proposed <= jnp.finfo(carry.t.dtype).tiny
    stuck = ~outcome.keep & (small | tiny | (outcome.failures >= MOST_FAILURES))
    stuck |= outcome.keep & small & ~outcome.last & (outcome.dt < outcome.resolution)
    return jnp.where(stuck, jnp.where(finite, Status.STEP_UNDERFLOW, Status.NONFINITE), code)


def _raised_floor(setup: Setup, carry: Carry, sizes: PyTree, crossing: Bool[Array, ""]) -> PyTree:
    """The absolute scale of errors after a step that is kept."""
    if setup.flow.own_sizes:
        return carry.floor
    control = setup.control
    floor = control.raise_floor(carry.floor, carry.was_zero, sizes, setup.method.dormant(carry.method_state))
    # A crossing leaves the time of the jump, and so all that has moved in it, uncertain: no more is asked of what
    # follows than an error of that size.
    uncertain = lambda size: jnp.where(crossing, size / control.rtol.astype(size.dtype), size)  # noqa: E731
    return jax.tree_util.tree_map(uncertain, floor)


def _restart(setup: Setup, carry: Carry, due: Bool[Array, ""]) -> Carry:
    """Where a jump has been met: the method begins anew, for what it knows of the field holds no longer.

    A loop of at most one round, so that under `vmap` members that meet no jump cost no evaluations.
    """

    def begin_again(state: tuple) -> tuple:
        _, _, _, evaluations = state
        new = _launch(setup, carry.t, carry.y, carry.floor)
        return jnp.asarray(False), new.dt, eqx.filter(new.method_state, eqx.is_array), evaluations + new.evaluations

    arrays, static = eqx.partition(carry.method_state, eqx.is_array)
    due &= carry.code == Status.RUNNING
    start = (due, carry.dt, arrays, carry.evaluations)
    _, dt, arrays, evaluations = jax.lax.while_loop(lambda state: state[0], begin_again, start)
    where = lambda c: (c.dt, c.method_state, c.evaluations)  # noqa: E731
    return eqx.tree_at(where, carry, (dt, eqx.combine(arrays, static), evaluations))


def _largest(errors: dict[str, Scalar], others: dict[str, Scalar]) -> dict[str, Scalar]:
    return jax.tree_util.tree_map(jnp.maximum, errors, others)


def _all_zero(tree: PyTree) -> Bool[Array, ""]:
    return jnp.stack([jnp.all(leaf == 0) for leaf in jax.tree_util.tree_leaves(tree)]).all()


def _save(setup: Setup, carry: Carry, reached: Scalar, at: Callable[[Scalar], PyTree]) -> tuple[Array, Record]:
    """Writes the rows of all save times up to `reached`."""

    arrays, static = eqx.partition(carry.record, eqx.is_array)

    def due(state: tuple[Array, PyTree]) -> Bool[Array, ""]:
        index, _ = state
        return (index < setup.ts.size) & (setup.ts[jnp.minimum(index, setup.ts.size - 1)] <= reached)

    def write(state: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        index, now = state
        y = at(setup.ts[index])
        observe = bind(setup.observe, setup.flow, setup.ts[index], y, setup.frozen)
        record = write_row(eqx.combine(now, static), index, setup.params(y), observe)
        return index + 1, eqx.filter(record, eqx.is_array)

    index, arrays = jax.lax.while_loop(due, write, (carry.index, arrays))
    return index, eqx.combine(arrays, static)


@eqx.filter_jit
@full_precision
def summarise(setup: Setup, carry: Carry) -> Solution:
    """The result, with zeros in the rows that were not reached."""
    flow, t, y = setup.flow, carry.t, carry.y
    if setup.oversteps:
        done, t = carry.code == Status.OK, jnp.minimum(carry.t, setup.ts[-1])
        y = jax.tree_util.tree_map(lambda a, b: jnp.where(done, a, b), _inside(setup, carry.step, t, y), y)
    first, final = carry.first_loss, flow.loss(y, setup.frozen)
    losses = None if first is None or final is None else (first, final)
    now = flow.conserved(y, setup.frozen)
    if setup.resumed is None:
        then = flow.conserved(flow.init(setup.start, setup.frozen), setup.frozen) if now else {}
        gradients, products = flow.start_cost
    else:
        then, (gradients, products) = setup.resumed.checkpoint.reference, (0, 0)
    counted = setup.method.counts
    products += carry.products + flow.products_per_evaluation * carry.evaluations
    stats = {
        "steps": carry.steps,
        "accepted": carry.accepted,
        "rejected": carry.steps - carry.accepted,
        "gradient_evaluations": gradients + carry.evaluations if counted else jnp.asarray(-1),
        "hessian_vector_products": products if counted else jnp.asarray(-1),
    }
    code = jnp.where(carry.code == Status.RUNNING, Status.INTERRUPTED, carry.code)
    return Solution(
        ts=setup.ts,
        params=carry.record.params,
        final=setup.params(y),
        t_final=t,
        observed=carry.record.observed,
        code=code,
        saved=carry.index,
        stats=stats,
        loss=losses,
        drift={name: _drift(value, then[name]) for name, value in now.items()},
        rtol=setup.control.rtol,
        title=type(flow).__name__,
        method=setup.method.name,
        errors=carry.errors or None,
        state=y,
        checkpoint=_checkpoint(setup, carry, code, fingerprint(flow, y, final), then),
        choice=setup.choice,
        held=held_paths(setup.frozen),
    )


def _drift(now: Conserved, then: Conserved) -> Scalar:
    """The relative change of what the exact flow conserves."""
    size = jnp.maximum(jnp.max(now.magnitude), jnp.max(then.magnitude))
    change = jnp.max(jnp.abs(now.value - then.value))
    return jnp.where(size > 0, change / jnp.where(size > 0, size, 1), change)


def _checkpoint(setup: Setup, carry: Carry, code: Int[Array, ""], mark: Any, reference: PyTree) -> Checkpoint:
    """What a run is continued from."""
    return Checkpoint(
        t=carry.t,
        y=carry.y,
        step=carry.step,
        lost=carry.lost,
        dt=carry.dt,
        method_state=eqx.filter(carry.method_state, eqx.is_array),
        usable=(code == Status.OK) | (code == Status.MAX_STEPS) | (code == Status.INTERRUPTED),
        floor=carry.floor,
        was_zero=carry.was_zero,
        fingerprint=mark,
        reference=reference,
        method=setup.method.name,
    )
