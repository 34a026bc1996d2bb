"""The compiled loop behind `solve`: one attempted step of a method after another.

It is written here rather than left to `diffrax.diffeqsolve` for four reasons: every evaluation of the field is counted;
a run can be cut into segments, for a progress bar and so that an interruption keeps what was computed; failures end a
run at once with its partial results; and no host callback enters the program, so that compiled programs can be cached.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from gradflow import _solution
from gradflow._conserved import Conserved
from gradflow._drive import AbstractRun
from gradflow._record import Record, bind, blank_record, write_row
from gradflow._solution import Solution
from gradflow._tree import Extents, full_precision, join
from gradflow._until import Until
from gradflow.flows import AbstractFlow
from gradflow.solvers import AbstractMethod, Attempt, Field, StepControl

MOST_FAILURES = 40
"""Rejections in a row after which a run is given up: each divides the step by ten at the most, by 1.1 at the least."""
SAME = 64
"""Units of rounding within which a loss and the constants of a flow count as those of the run that is continued."""


class Checkpoint(eqx.Module):
    """What a run needs, besides its state and time, to be continued as if it had never stopped."""

    lost: Scalar
    dt: Scalar
    method_state: PyTree  # its arrays
    usable: Bool[Array, ""]  # whether the method's state belongs to the state that the run ended with
    floor: PyTree
    was_zero: Bool[Array, ""]
    fingerprint: Float[Array, " numbers"]  # of the flow, at the end of the run
    reference: dict[str, Conserved]  # conserved quantities at the start of the first run
    method: str = eqx.field(static=True)


class Resumed(eqx.Module):
    """Where a continued run starts."""

    t: Scalar
    state: PyTree
    checkpoint: Checkpoint


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
    resumed: Resumed | None = None

    @property
    def title(self) -> str:
        return type(self.flow).__name__

    def params(self, state: PyTree) -> PyTree:
        return join(self.flow.params(state), self.frozen)

    def begin(self) -> "Carry":
        return begin(self)

    def advance(self, carry: "Carry", budget: Int[Array, ""]) -> "Carry":
        return advance(self, carry, budget)

    def running(self, carry: "Carry") -> bool:
        return int(carry.code) == _solution.RUNNING

    def progress(self, carry: "Carry") -> tuple[float, str]:
        start = float(self.flow.t0 if self.resumed is None else self.resumed.t)
        done = (float(carry.t) - start) / max(float(self.ts[-1]) - start, 1e-300)
        return done, f"t = {float(carry.t):.4g}, {int(carry.evaluations)} gradients"

    def finish(self, carry: "Carry") -> Solution:
        return finish(self, carry)

    def field(self, t: Scalar, dt: Scalar) -> Field:
        """The flow in time counted from `t`, for a step of size `dt`."""
        begin, end = jnp.asarray(self.flow.t0, t.dtype), self.ts[-1]
        length = end - begin
        share = jnp.where(length > 0, (t + dt - begin) / jnp.where(length > 0, length, 1), 1)
        return Field(self.flow, self.frozen, t, share, self.extents)


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


class Launch(eqx.Module):
    """What a method starts with."""

    dt: Scalar
    method_state: PyTree
    evaluations: Int[Array, ""]
    finite: Bool[Array, ""]


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
        lost, was_zero = jnp.zeros_like(t), jnp.all(whole == 0)
        loss = flow.loss(y, setup.frozen)
        launch = _launch(setup, t, y, floor)
    else:
        t, y = setup.resumed.t.astype(setup.ts.dtype), setup.resumed.state
        loss = flow.loss(y, setup.frozen)
        known = setup.resumed.checkpoint
        lost, floor, was_zero = known.lost, known.floor, known.was_zero
        launch = _relaunch(setup, known, t, y, loss)
    observe = bind(setup.observe, flow, t, y, setup.frozen)
    record = blank_record(setup.ts.size, setup.params(y), observe, setup.save_params)
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree_util.tree_leaves((y, loss))])
    finite = jnp.all(finite) & launch.finite
    carry = Carry(
        t=t,
        lost=lost,
        dt=launch.dt,
        y=y,
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
        code=jnp.where(finite, _solution.RUNNING, _solution.NONFINITE),
        first_loss=loss,
    )
    index, record = _save(setup, carry, t, lambda _: y)
    met = jnp.asarray(False) if setup.until is None else setup.until.excess(setup.params(y)) >= 0
    code = jnp.where(index == setup.ts.size, _solution.OK, carry.code)
    code = jnp.where(met, _solution.STOPPED, code)
    code = jnp.where(finite, code, _solution.NONFINITE)
    valid = valid_times(setup.ts, t)
    code = jnp.where(valid, code, _solution.INVALID_TIMES)
    record = jax.tree_util.tree_map(
        lambda new, blank: jnp.where(valid, new, blank) if eqx.is_array(new) else new, record, carry.record
    )
    return eqx.tree_at(lambda c: (c.index, c.record, c.code), carry, (jnp.where(valid, index, 0), record, code))


def valid_times(ts: Float[Array, " T"], t0: Scalar) -> Bool[Array, ""]:
    """Whether save times are finite, increase, and do not begin before `t0`: what cannot be refused under a trace."""
    return jnp.all(jnp.isfinite(ts)) & jnp.all(ts[1:] > ts[:-1]) & (ts[0] >= t0)


def _launch(setup: Setup, t: Scalar, y: PyTree, floor: PyTree) -> Launch:
    """The first step size, and the state of the method before the first step."""
    field = setup.field(t, jnp.zeros_like(t))
    f0 = field(jnp.zeros_like(t), y)

    def moved(s: Scalar, to: PyTree) -> PyTree:
        return field.watched(field(s.astype(t.dtype), field.replace(y, to)))

    order = setup.method.first_order
    dt, spent = setup.control.first_step(moved, field.watched(y), field.watched(f0), floor, order)
    dt = jax.lax.stop_gradient(jnp.asarray(dt, t.dtype))
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree_util.tree_leaves(f0)])
    return Launch(dt, setup.method.begin(field, y, f0, dt), 1 + spent, jnp.all(finite))


def _relaunch(setup: Setup, known: Checkpoint, t: Scalar, y: PyTree, loss: Scalar | None) -> Launch:
    """The method as the run before left it; started anew if it, the problem or a constant of the flow has changed."""

    def anew() -> Launch:
        return _launch(setup, t, y, known.floor)

    fresh = eqx.filter_eval_shape(anew)
    arrays, static = eqx.partition(fresh, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    kept = Launch(known.dt.astype(t.dtype), known.method_state, jnp.asarray(0), jnp.asarray(True))
    if known.method != setup.method.name or not _alike(kept, arrays):
        return anew()
    now = _fingerprint(setup, y, loss)
    if now.shape != known.fingerprint.shape:
        return anew()
    near = jnp.abs(now - known.fingerprint) <= SAME * jnp.finfo(now.dtype).eps * jnp.abs(now)
    same = jnp.all(near) & known.usable
    kept = jax.tree_util.tree_map(lambda a, b: a.astype(b.dtype), kept, arrays)
    found = jax.lax.cond(same, lambda: kept, lambda: eqx.filter(anew(), eqx.is_array))
    return eqx.combine(found, static)


def _alike(tree: PyTree, other: PyTree) -> bool:
    """Whether two pytrees of arrays have the same structure and shapes."""
    leaves, structure = jax.tree_util.tree_flatten(tree)
    others, wanted = jax.tree_util.tree_flatten(other)
    return structure == wanted and all(a.shape == b.shape for a, b in zip(leaves, others, strict=True))


def _fingerprint(setup: Setup, y: PyTree, loss: Scalar | None) -> Float[Array, " numbers"]:
    """The loss at a state and the numbers among the flow's leaves: what tells whether it is the same flow."""
    leaves = [leaf for leaf in jax.tree_util.tree_leaves(setup.flow) if eqx.is_inexact_array(leaf)]
    numbers: list[Any] = [leaf for leaf in leaves if leaf.ndim == 0]
    numbers += [] if loss is None else [loss]
    dtype = jnp.result_type(*jax.tree_util.tree_leaves(y))
    return jnp.stack([jnp.zeros((), dtype), *(jnp.asarray(number).astype(dtype) for number in numbers)])


@eqx.filter_jit
@full_precision
def advance(setup: Setup, carry: Carry, budget: Int[Array, ""]) -> Carry:
    """At most `budget` attempted steps."""
    last = carry.steps + budget
    dynamic, static = eqx.partition(carry, eqx.is_array)

    def running(state: PyTree) -> Bool[Array, ""]:
        now = eqx.combine(state, static)
        return (now.code == _solution.RUNNING) & (now.steps < last)

    def body(state: PyTree) -> PyTree:
        return eqx.filter(attempt(setup, eqx.combine(state, static)), eqx.is_array)

    return eqx.combine(jax.lax.while_loop(running, body, dynamic), static)


def attempt(setup: Setup, carry: Carry) -> Carry:
    """One attempted step, and whatever falls due within it."""
    control, method, y, t, end = setup.control, setup.method, carry.y, carry.t, setup.ts[-1]
    remaining = (end - t) - carry.lost
    last = carry.dt * (1 + 1e-3) >= remaining
    dt = jnp.where(last, remaining, carry.dt)
    field = setup.field(t, dt)
    tried: Attempt = method.attempt(field, y, dt, control, carry.floor, carry.method_state)
    y1, size1 = tried.y1, field.sizes(tried.y1)
    keep = tried.ratio <= 1

    def at(s: Scalar) -> PyTree:
        inside = method.interpolate(field, tried.dense, s - t)
        return jax.tree_util.tree_map(lambda a, b: jnp.where(s - t >= dt, b, a), inside, tried.y1)

    moved = dt + carry.lost
    t1 = jnp.where(last, end, t + moved)
    lost = jnp.where(last, 0.0, moved - (t1 - t)).astype(t.dtype)
    stopped, t1, y1 = _locate(setup, keep, t, t1, at, y1)
    reached = jnp.where(keep, t1, t)
    index, record = _save(setup, carry, reached, at)
    failures = jnp.where(keep, 0, carry.failures + 1)
    proposed = dt * tried.factor.astype(dt.dtype)
    # A step cut short by the end of the run says nothing about the step size to go on with.
    proposed = jnp.where(keep & last, jnp.maximum(proposed, carry.dt), proposed)

    steps = carry.steps + 1
    code = jnp.where(steps >= setup.max_steps, _solution.MAX_STEPS, carry.code)
    # Time carries its rounding along, so it resolves more than its type does.
    resolution = 8 * max(float(jnp.finfo(t.dtype).eps) ** 2, float(jnp.finfo(jnp.float64).eps)) * jnp.abs(t)
    small = proposed < resolution
    stuck = ~keep & (small | (proposed <= jnp.finfo(t.dtype).tiny) | (failures >= MOST_FAILURES))
    stuck |= keep & small & ~last & (dt < resolution)
    whole = jnp.where(keep, carry.finite, tried.finite)
    broken = jnp.where(whole, _solution.STEP_UNDERFLOW, _solution.NONFINITE)
    code = jnp.where(stuck, broken, code)
    code = jnp.where(keep & (index == setup.ts.size), _solution.OK, code)
    code = jnp.where(stopped, _solution.STOPPED, code)

    floor = carry.floor
    if not setup.flow.own_sizes:
        floor = control.raise_floor(floor, carry.was_zero, size1, method.dormant(carry.method_state))

    def choose(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree_util.tree_map(lambda a, b: jnp.where(keep, a, b) if eqx.is_array(b) else b, new, old)

    return Carry(
        t=reached,
        lost=jnp.where(keep, lost, carry.lost),
        dt=proposed,
        y=choose(y1, y),
        method_state=choose(tried.accepted, tried.rejected),
        floor=choose(floor, carry.floor),
        was_zero=carry.was_zero,
        failures=failures,
        finite=whole,
        index=index,
        record=record,
        steps=steps,
        accepted=carry.accepted + keep,
        evaluations=carry.evaluations + tried.evaluations,
        products=carry.products + tried.products,
        code=code,
        first_loss=carry.first_loss,
    )


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


def _locate(
    setup: Setup, keep: Bool[Array, ""], t0: Scalar, t1: Scalar, at: Callable[[Scalar], PyTree], y1: PyTree
) -> tuple[Bool[Array, ""], Scalar, PyTree]:
    """Where in the step the condition `until` is met, if it is: bisection and secant steps in turn, to rounding."""
    if setup.until is None:
        return jnp.asarray(False), t1, y1
    until = setup.until
    beyond = until.excess(setup.params(y1))
    met = keep & (beyond >= 0)

    def excess(t: Scalar) -> Scalar:
        return until.excess(setup.params(at(t)))

    def wide(state: tuple[Scalar, ...]) -> Bool[Array, ""]:
        low, high, _, _, count = state
        return met & (high - low > 4 * jnp.finfo(t0.dtype).eps * jnp.abs(high)) & (count < 100)

    def narrow(state: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
        low, high, below, above, count = state
        gap = above - below
        secant = low - below * (high - low) / jnp.where(gap > 0, gap, 1)
        usable = (count % 3 != 2) & (gap > 0) & (secant > low) & (secant < high)
        middle = jnp.where(usable, secant, low + 0.5 * (high - low)).astype(low.dtype)
        value = excess(middle)
        up = value >= 0
        ends = (jnp.where(up, low, middle), jnp.where(up, middle, high))
        return (*ends, jnp.where(up, below, value), jnp.where(up, value, above), count + 1)

    def search() -> tuple[Scalar, PyTree]:
        _, found, *_ = jax.lax.while_loop(wide, narrow, (t0, t1, excess(t0), beyond, jnp.asarray(0)))
        found = jax.lax.stop_gradient(found)
        return found, at(found)

    found, located = jax.lax.cond(met, search, lambda: (t1, y1))
    return met, found, located


@eqx.filter_jit
@full_precision
def finish(setup: Setup, carry: Carry) -> Solution:
    flow = setup.flow
    first, final = carry.first_loss, flow.loss(carry.y, setup.frozen)
    losses = None if first is None or final is None else (first, final)
    drift = {}
    now = flow.conserved(carry.y, setup.frozen)
    if setup.resumed is None:
        then = flow.conserved(flow.init(setup.start, setup.frozen), setup.frozen) if now else {}
        gradients, products = flow.start_cost
    else:
        then, (gradients, products) = setup.resumed.checkpoint.reference, (0, 0)
    for name, value in now.items():
        size = jnp.maximum(jnp.max(value.magnitude), jnp.max(then[name].magnitude))
        change = jnp.max(jnp.abs(value.value - then[name].value))
        drift[name] = jnp.where(size > 0, change / jnp.where(size > 0, size, 1), change)
    counted = setup.method.counts
    products += carry.products + flow.products_per_evaluation * carry.evaluations
    stats = {
        "steps": carry.steps,
        "accepted": carry.accepted,
        "rejected": carry.steps - carry.accepted,
        "gradient_evaluations": gradients + carry.evaluations if counted else jnp.asarray(-1),
        "hessian_vector_products": products if counted else jnp.asarray(-1),
    }
    code = jnp.where(carry.code == _solution.RUNNING, _solution.INTERRUPTED, carry.code)
    usable = (code == _solution.OK) | (code == _solution.MAX_STEPS) | (code == _solution.INTERRUPTED)
    checkpoint = Checkpoint(
        lost=carry.lost,
        dt=carry.dt,
        method_state=eqx.filter(carry.method_state, eqx.is_array),
        usable=usable,
        floor=carry.floor,
        was_zero=carry.was_zero,
        fingerprint=_fingerprint(setup, carry.y, final),
        reference=then,
        method=setup.method.name,
    )
    return Solution(
        ts=setup.ts,
        params=carry.record.params,
        final=setup.params(carry.y),
        t_final=carry.t,
        observed=carry.record.observed,
        code=code,
        saved=carry.index,
        stats=stats,
        loss=losses,
        drift=drift,
        rtol=setup.control.rtol,
        title=type(flow).__name__,
        method=setup.method.name,
        state=carry.y,
        checkpoint=checkpoint,
    )
