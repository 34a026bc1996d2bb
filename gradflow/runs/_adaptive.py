"""The compiled loop behind `solve`: one attempted step of a method after another.

It is written here rather than left to `diffrax.diffeqsolve` for four reasons: every evaluation of the field is counted;
a run can be cut into segments, for a progress bar and so that an interruption keeps what was computed; failures end a
run at once with its partial results; and no host callback enters the program, so that compiled programs can be cached.
"""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from gradflow._conserved import Conserved
from gradflow._solution import Solution, Status
from gradflow._tree import full_precision, held_paths, strong
from gradflow.runs._arguments import valid_times
from gradflow.runs._attempt import attempt, inside, save_rows, start_method
from gradflow.runs._continue import Checkpoint, fingerprint, relaunch
from gradflow.runs._record import bind, blank_record
from gradflow.runs._saltation import reported
from gradflow.runs._setup import Carry, Setup


class AdaptiveRun(Setup):
    """A run of a flow in steps whose size follows their error."""

    def begin(self) -> Carry:
        return begin(self)

    def advance(self, carry: Carry, budget: Int[Array, ""]) -> Carry:
        return advance(dataclasses.replace(self, resumed=None), carry, budget)

    def attempt(self, carry: Carry, max_steps: Int[Array, ""]) -> Carry:
        return attempt(self, carry, None)

    def summarise(self, carry: Carry) -> Solution:
        return summarise(self, carry)


@eqx.filter_jit
@full_precision
def begin(setup: Setup) -> Carry:
    flow = setup.flow
    flow.check(setup.start, setup.frozen)
    if setup.resumed is None:
        t = jnp.asarray(flow.t0, setup.ts.dtype)
        y = flow.init(setup.start, setup.frozen)
        scale, was_zero = _scale_at_start(setup, y)
        loss = flow.loss(y, setup.frozen)
        launch = start_method(setup, t, y, scale)
    else:
        t, y = setup.resumed.t.astype(setup.ts.dtype), setup.resumed.state
        loss = flow.loss(y, setup.frozen)
        checkpoint = setup.resumed.checkpoint
        scale, was_zero = checkpoint.scale, checkpoint.was_zero
        now = fingerprint(flow, y, loss)
        anew = functools.partial(start_method, setup, t, y, scale)
        launch = relaunch(checkpoint, t, now, anew, setup.method.name, setup.jumps, setup.oversteps)
    observe = bind(setup.observe, flow, t, y, setup.frozen)
    record = blank_record(setup.ts.size, setup.params(y), observe, setup.save_params, flow.params(y))
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree_util.tree_leaves((y, loss))])
    finite = jnp.all(finite) & launch.finite
    carry = Carry(
        t=launch.t,
        rounding_error=launch.rounding_error,
        dt=launch.dt,
        y=launch.y,
        method_state=launch.method_state,
        scale=scale,
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
        missed=jnp.asarray(0) if setup.traced else None,
    )
    index, record = save_rows(setup, carry, launch.t, lambda s: inside(setup, launch.step, s, y))
    met = jnp.asarray(False) if setup.until is None else setup.until.event_value(setup.params(y)) >= 0
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


def _scale_at_start(setup: Setup, y: PyTree) -> tuple[PyTree, Bool[Array, ""]]:
    """The absolute scale of errors at the start, and whether the run starts at zero."""
    controlled = setup.flow.controlled(y)
    weights, plus_scale = setup.flow.error_weights(controlled)
    scale = setup.control.absolute_scale(weights)
    if not plus_scale:
        scale = jax.tree_util.tree_map(jnp.zeros_like, scale)
    whole = jnp.stack([jnp.max(jnp.abs(leaf), initial=0.0) for leaf in jax.tree_util.tree_leaves(controlled)])
    return scale, jnp.all(whole == 0)


@eqx.filter_jit
@full_precision
def advance(setup: Setup, carry: Carry, budget: Int[Array, ""]) -> Carry:
    """At most `budget` attempted steps."""
    last = carry.steps + budget
    switches = setup.switches(carry.t, carry.y)
    if setup.traced and carry.missed is None:
        carry = dataclasses.replace(carry, missed=jnp.asarray(0))
    dynamic, static = eqx.partition(carry, eqx.is_array)

    def running(state: PyTree) -> Bool[Array, ""]:
        now = eqx.combine(state, static)
        return (now.code == Status.RUNNING) & (now.steps < last)

    def body(state: PyTree) -> PyTree:
        return eqx.filter(attempt(setup, eqx.combine(state, static), switches), eqx.is_array)

    return strong(eqx.combine(jax.lax.while_loop(running, body, dynamic), static))


@eqx.filter_jit
@full_precision
def summarise(setup: Setup, carry: Carry) -> Solution:
    """The result, with zeros in the rows that were not reached."""
    flow, t, y = setup.flow, carry.t, carry.y
    if setup.oversteps:
        done, t = carry.code == Status.OK, jnp.minimum(carry.t, setup.ts[-1])
        y = jax.tree_util.tree_map(lambda a, b: jnp.where(done, a, b), inside(setup, carry.step, t, y), y)
    kinked = setup.kinked_field(t, y)
    if kinked is not None and carry.missed is not None:
        y = reported(y, carry.missed, lost=kinked.plan.lost)
    first, final = carry.first_loss, flow.loss(y, setup.frozen)
    losses = None if first is None or final is None else (first, final)
    now = flow.conserved(y, setup.frozen)
    if setup.resumed is None:
        then = flow.conserved(flow.init(setup.start, setup.frozen), setup.frozen) if now else {}
        gradients, products = flow.start_cost
    else:
        then, (gradients, products) = setup.resumed.checkpoint.reference, (0, 0)
    counted, each = setup.method.exact_counts, flow.gradients_per_evaluation
    products += each * carry.products + flow.products_per_evaluation * carry.evaluations
    stats = {
        "steps": carry.steps,
        "accepted": carry.accepted,
        "rejected": carry.steps - carry.accepted,
        "gradient_evaluations": gradients + each * carry.evaluations if counted else jnp.asarray(-1),
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
        time_unit=flow.time_unit,
    )


def _drift(now: Conserved, then: Conserved) -> Scalar:
    """The relative change of what the exact flow conserves."""
    size = jnp.maximum(jnp.max(now.magnitude), jnp.max(then.magnitude))
    change = jnp.max(jnp.abs(now.value - then.value))
    return jnp.where(size > 0, change / jnp.where(size > 0, size, 1), change)


def _checkpoint(
    setup: Setup, carry: Carry, code: Int[Array, ""], mark: Float[Array, " numbers"], reference: PyTree
) -> Checkpoint:
    """What a run is continued from."""
    return Checkpoint(
        t=carry.t,
        y=carry.y,
        step=carry.step,
        rounding_error=carry.rounding_error,
        dt=carry.dt,
        method_state=eqx.filter(carry.method_state, eqx.is_array),
        usable=(code == Status.OK) | (code == Status.MAX_STEPS) | (code == Status.INTERRUPTED),
        scale=carry.scale,
        was_zero=carry.was_zero,
        fingerprint=mark,
        reference=reference,
        method=setup.method.name,
    )
