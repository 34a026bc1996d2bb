"""One attempted step of a flow in adaptive steps: whether it is kept, what falls due within it, and what comes next."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from gradflow._solution import Status
from gradflow.problems._switching import Switching
from gradflow.runs._continue import Launch, Step
from gradflow.runs._passage import Passage, Passed
from gradflow.runs._record import Record, bind, write_row
from gradflow.runs._saltation import passed, renewed
from gradflow.runs._setup import Carry, Setup
from gradflow.runs._until import locate
from gradflow.solvers import Attempt, Field

CROSSING = 100
"""Times the resolution of time, a step from a state of zeros that is accepted whatever its error."""
BISECTION = 0.1
"""Factor on a step that is turned down from a state of zeros: fifteen of them go through all digits of time."""
MOST_FAILURES = 40
"""Rejections in a row after which a run is given up: each divides the step by ten at the most, by 1.1 at the least."""


class Outcome(NamedTuple):
    """What has come of an attempted step of length `dt`."""

    dt: Scalar
    last: Bool[Array, ""]  # whether it leads to the end of the run, or to a jump
    keep: Bool[Array, ""]
    resting: Bool[Array, ""]  # whether it began at a state of zeros
    crossing: Bool[Array, ""]  # whether it is kept whatever its error, to cross a jump from there
    resolution: Scalar  # of time
    failures: Int[Array, ""]  # in a row


def attempt(setup: Setup, carry: Carry, switches: Switching | None) -> Carry:
    """One attempted step, and whatever falls due within it. Derivatives jump at `switches`."""
    control, method, y, t = setup.control, setup.method, carry.y, carry.t
    end, jump = _next_end(setup, t)
    remaining = (end - t) - carry.rounding_error
    last = carry.dt * (1 + 1e-3) >= remaining
    dt = jnp.where(last, remaining, carry.dt)
    field = setup.field(t, dt)
    tried: Attempt = method.attempt(field, y, dt, control, carry.scale, carry.method_state)
    outcome = _judge(carry, field, tried, dt, last)
    keep = outcome.keep

    whole, accepted, missed = _across(setup, carry, field, tried, dt, keep, switches)

    def at(s: Scalar) -> PyTree:
        inside = method.interpolate(field, tried.dense, s - t)
        if switches is not None:
            passage = Passage(switches, method, field, carry.method_state, y, tried.y1, tried.dense, dt, s - t, keep)
            inside, _ = passed(inside, Passed.nothing(), passage)
        return jax.tree_util.tree_map(lambda a, b: jnp.where(s - t >= dt, b, a), inside, whole)

    advance = dt + carry.rounding_error
    t1 = jnp.where(last, end, t + advance)
    rounding_error = jnp.where(last, 0.0, advance - (t1 - t)).astype(t.dtype)
    stopped, t1, y1 = locate(setup.until, setup.params, keep, t, t1, at, whole)
    reached = jnp.where(keep, t1, t)
    index, record = save_rows(setup, carry, reached, at)
    proposed = _propose(setup, carry, tried, outcome)
    finite = jnp.where(keep, carry.finite, tried.finite)
    code = _status_after(setup, carry, outcome, proposed, finite)
    code = jnp.where(keep & (index == setup.ts.size), Status.OK, code)
    code = jnp.where(stopped, Status.STOPPED, code)

    def choose(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree_util.tree_map(lambda a, b: jnp.where(keep, a, b) if eqx.is_array(b) else b, new, old)

    after = Carry(
        t=reached,
        rounding_error=jnp.where(keep, rounding_error, carry.rounding_error),
        dt=proposed,
        y=choose(y1, y),
        method_state=choose(accepted, tried.rejected),
        scale=choose(_raised_scale(setup, carry, tried.y1, outcome.crossing), carry.scale),
        was_zero=carry.was_zero,
        failures=outcome.failures,
        finite=finite,
        index=index,
        record=record,
        steps=carry.steps + 1,
        accepted=carry.accepted + keep.astype(carry.accepted.dtype),
        evaluations=carry.evaluations + tried.evaluations,
        products=carry.products + tried.products,
        code=code,
        first_loss=carry.first_loss,
        errors=choose(_largest(carry.errors, setup.flow.errors(y1, setup.frozen)), carry.errors),
        step=choose(Step(t, dt, whole, tried.dense), carry.step) if setup.oversteps else None,
        missed=missed,
    )
    return after if jump is None else _restart(setup, after, keep & last & (t1 == jump))


def _across(
    setup: Setup,
    carry: Carry,
    field: Field,
    tried: Attempt,
    dt: Scalar,
    keep: Bool[Array, ""],
    switches: Switching | None,
) -> tuple[PyTree, PyTree, Int[Array, ""] | None]:
    """The state after a step and that of the method, with derivatives that jump at the switches crossed, and how many
    jumps have been missed so far."""
    if switches is None or carry.missed is None:
        return tried.y1, tried.accepted, carry.missed
    start = carry.method_state, carry.y
    passage = Passage(switches, setup.method, field, *start, tried.y1, tried.dense, dt, dt, keep)
    y1, met = passed(tried.y1, Passed.nothing(), passage)
    arrays, static = eqx.partition(tried.accepted, eqx.is_array)
    accepted = eqx.combine(renewed(arrays, y1, met.crossed, passage), static)
    return y1, accepted, carry.missed + met.missed


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
    resting = _all_zero(carry.scale) & _all_zero(field.error_weights(carry.y))
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


def _raised_scale(setup: Setup, carry: Carry, y: PyTree, crossing: Bool[Array, ""]) -> PyTree:
    """The absolute scale of errors after a step that is kept."""
    weights, plus_scale = setup.flow.error_weights(setup.flow.controlled(y))
    if not plus_scale:
        return carry.scale
    control = setup.control
    scale = control.raise_scale(carry.scale, carry.was_zero, weights, setup.method.scale_fraction(carry.method_state))
    # A crossing leaves the time of the jump, and so all that has moved in it, uncertain: no more is asked of what
    # follows than an error of that size.
    uncertain = lambda size: jnp.where(crossing, size / control.rtol.astype(size.dtype), size)  # noqa: E731
    return jax.tree_util.tree_map(uncertain, scale)


def _restart(setup: Setup, carry: Carry, due: Bool[Array, ""]) -> Carry:
    """Where a jump has been met: the method begins anew, for what it knows of the field holds no longer.

    A loop of at most one round, so that under `vmap` members that meet no jump cost no evaluations.
    """

    def begin_again(state: tuple) -> tuple:
        _, _, _, evaluations = state
        new = start_method(setup, carry.t, carry.y, carry.scale)
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


def start_method(setup: Setup, t: Scalar, y: PyTree, scale: PyTree) -> Launch:
    """The first step size, and the state of the method before the first step."""
    field = setup.field(t, jnp.zeros_like(t))
    f0 = field(jnp.zeros_like(t), y)

    def stepped(s: Scalar, to: PyTree) -> PyTree:
        return field.controlled(field(s.astype(t.dtype), field.replace(y, to)))

    order, length = setup.method.first_order, setup.ts[-1] - jnp.asarray(setup.flow.t0, t.dtype)
    dt, num_evaluations = setup.control.first_step(
        stepped, field.controlled(y), field.controlled(f0), scale, order, length
    )
    dt = setup.limited(jax.lax.stop_gradient(jnp.asarray(dt, t.dtype)))
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree_util.tree_leaves(f0)])
    method_state, step, zero = setup.method.begin(field, y, f0, dt), None, jnp.zeros_like(t)
    if setup.oversteps:
        attempt = lambda: setup.method.attempt(field, y, dt, setup.control, scale, method_state).dense  # noqa: E731
        dense = jax.tree_util.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), eqx.filter_eval_shape(attempt))
        step = Step(t, zero, y, dense)
    return Launch(t, y, step, zero, dt, method_state, 1 + num_evaluations, jnp.all(finite))


def inside(setup: Setup, step: Step | None, s: Scalar, y: PyTree) -> PyTree:
    """The state at a time within a step; `y` where there is none."""
    if step is None:
        return y
    field = setup.field(step.t, step.dt)
    inside = setup.method.interpolate(field, step.dense, s - step.t)
    switches = setup.switches(step.t, step.y1)
    if switches is not None:
        y0, yes = setup.method.interpolate(field, step.dense, jnp.zeros_like(step.dt)), jnp.asarray(True)
        passage = Passage(switches, setup.method, field, None, y0, step.y1, step.dense, step.dt, s - step.t, yes)
        inside, _ = passed(inside, Passed.nothing(), passage)
    return jax.tree_util.tree_map(lambda a, b: jnp.where(s - step.t >= step.dt, b, a), inside, step.y1)


def save_rows(setup: Setup, carry: Carry, reached: Scalar, at: Callable[[Scalar], PyTree]) -> tuple[Array, Record]:
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
