"""`solve`: integrates a flow with adaptive steps, one compiled loop over the solver's own steps.

The loop lives here rather than in `diffrax.diffeqsolve` for four reasons: every evaluation of the field is counted;
a run can be cut into segments, for a progress bar and so that an interruption keeps what was computed; failures end a
run at once with its partial results; and no host callback enters the program, so that compiled programs can be cached.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Scalar

from gradflow import _checks, _solution
from gradflow._record import Record, blank_record, write_row
from gradflow._solution import Solution, SolveInterrupted
from gradflow._tree import full_precision, join, split
from gradflow._until import Until
from gradflow.flows import AbstractFlow
from gradflow.solvers import StepControl, default_solver, evaluations_per_step

MOST_FAILURES = 40
"""Rejections in a row after which a run is given up: each divides the step by ten at the most, by 1.1 at the least."""


class _Setup(eqx.Module):
    """What stays fixed during a run; all numbers are leaves."""

    flow: AbstractFlow
    frozen: PyTree
    start: PyTree
    ts: Float[Array, " T"]
    observe: dict[str, Callable[[Any], Any]]
    solver: diffrax.AbstractSolver
    control: StepControl
    until: Until | None
    max_steps: Int[Array, ""]
    save_params: bool = eqx.field(static=True)

    def params(self, state: PyTree) -> PyTree:
        return join(self.flow.params(state), self.frozen)

    def terms(self, t: Scalar) -> diffrax.ODETerm:
        """The flow in time counted from `t`: a step keeps its digits however far the run has come."""
        return diffrax.ODETerm(lambda s, y, frozen: self.flow.vector_field((t + s).astype(t.dtype), y, frozen))


class _Carry(eqx.Module):
    """What changes from step to step."""

    t: Scalar
    lost: Scalar  # rounding lost in `t`, added back at the next step (Kahan)
    dt: Scalar
    y: PyTree
    solver_state: PyTree
    ratio: Scalar
    floor: PyTree
    was_zero: Bool[Array, ""]
    failures: Int[Array, ""]
    index: Int[Array, ""]
    record: Record
    steps: Int[Array, ""]
    accepted: Int[Array, ""]
    evaluations: Int[Array, ""]
    code: Int[Array, ""]


def solve(
    flow: AbstractFlow,
    params: PyTree,
    ts: ArrayLike | Sequence[float],
    *,
    observe: Mapping[str, Callable[[Any], Any]] | None = None,
    solver: diffrax.AbstractSolver | None = None,
    rtol: float | ArrayLike = 1e-5,
    atol: float | ArrayLike | None = None,
    save_params: bool = True,
    until: Until | None = None,
    max_steps: int | Int[Array, ""] = 100_000,
    progress: bool = False,
    throw: bool = True,
    key: Any = None,
) -> Solution:
    """Integrates a flow from given parameters and returns what was asked for at the save times.

    **Arguments**

    - `flow`: what to integrate, such as `gradflow.GradientFlow(problem)`; its docstring tells the time unit.
    - `params`: any pytree. Floating-point arrays flow; all other leaves are carried along unchanged.
    - `ts`: increasing save times `(T,)`. Integration starts at `flow.t0`; the last one ends it.
    - `observe`: name -> function of the parameters, evaluated at the save times during the run.
    - `solver`: a diffrax solver with an error estimate, or `None` for a choice by tolerance. Default: `Tsit5`, or
      `Dopri8` below `rtol=1e-7`.
    - `rtol`, `atol`: tolerances on the error of each step. `atol=None` scales with the initial state, leaf by leaf.
    - `save_params`: keep the parameters at every save time, not only at the end.
    - `until`: a `gradflow.Until`, which ends the run early. Derivatives treat the time at which it does as constant.
    - `max_steps`: budget of attempted steps.
    - `progress`: show a bar; a keyboard interrupt then raises `SolveInterrupted` with the part computed so far.
    - `throw`: raise `SolveError`, which holds the partial result, when a run fails; otherwise return that result.
      Inside `jit`, `vmap` or `grad` nothing can be raised: look at the status.
    - `key`: random key, for stochastic flows only.

    **Returns** a `gradflow.Solution`. Works inside `jax.jit` and `jax.vmap` and under forward-mode differentiation.
    The second call with arrays of the same shapes compiles nothing.

    **Raises** `ValueError` for bad input, before anything runs; `SolveError` as above.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2))
    >>> sol = gf.solve(flow, jnp.ones(3), jnp.linspace(0, 2, 5), observe={"norm": gf.observables.ParameterNorm()})
    >>> sol.status, sol.observed["norm"].shape
    ('ok', (5,))
    """
    if not isinstance(flow, AbstractFlow):
        advice = "Wrap a loss as gradflow.GradientFlow(loss)."
        raise _checks.fail("flow", "be a gradflow flow", f"of type {type(flow).__name__}", advice)
    if not flow.stochastic and key is not None:
        raise _checks.fail("key", "be None for a deterministic flow", "a key", "Only stochastic flows draw numbers.")
    trainable, frozen = split(params)
    _checks.check_finite("params", trainable, "A flow cannot start from there.")
    flow.check(trainable, frozen)
    times = check_times(ts, flow.t0)
    observe = check_observe(observe)
    if _checks.is_concrete(max_steps):
        _checks.check_count("max_steps", max_steps)
    if until is not None and not isinstance(until, Until):
        advice = "For instance gradflow.Until(problem, below=0.1)."
        raise _checks.fail("until", "be a gradflow.Until", f"of type {type(until).__name__}", advice)
    dtype = jnp.result_type(*jax.tree_util.tree_leaves(trainable))
    control = check_tolerances(rtol, atol, dtype)
    if solver is None:
        solver = default_solver(float(control.rtol) if _checks.is_concrete(control.rtol) else 1e-5)
    solver = _check_solver(solver)

    setup = _Setup(
        flow, frozen, trainable, times, observe, solver, control, until, jnp.asarray(max_steps), bool(save_params)
    )
    carry = _begin(setup)
    if progress and _checks.is_concrete((carry, setup)):
        carry = _with_progress(setup, carry)
    else:
        carry = _advance(setup, carry, setup.max_steps)
    solution = _finish(setup, carry)
    if throw:
        solution.check()
    return solution


@eqx.filter_jit
@full_precision
def _begin(setup: _Setup) -> _Carry:
    flow, control, solver = setup.flow, setup.control, setup.solver
    t = jnp.asarray(flow.t0, setup.ts.dtype)
    y = flow.init(setup.start, setup.frozen)
    watched = flow.controlled(y)
    floor = control.floor(watched)
    whole = jnp.stack([jnp.max(jnp.abs(leaf), initial=0.0) for leaf in jax.tree_util.tree_leaves(watched)])
    f0 = flow.vector_field(t, y, setup.frozen)

    def field(s: Scalar, moved: PyTree) -> PyTree:
        return flow.controlled(flow.vector_field(t + s.astype(t.dtype), _replace(flow, y, moved), setup.frozen))

    order = _order(setup)
    dt, spent = control.first_step(field, watched, flow.controlled(f0), floor, order)
    dt = jax.lax.stop_gradient(jnp.asarray(dt, t.dtype))
    terms = setup.terms(t)
    zero = jnp.zeros((), _state_dtype(y))
    solver_state = solver.init(terms, zero, dt.astype(zero.dtype), y, setup.frozen)
    record = blank_record(setup.ts.size, setup.params(y), setup.observe, setup.save_params)
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree_util.tree_leaves((y, f0))])
    carry = _Carry(
        t=t,
        lost=jnp.zeros_like(t),
        dt=dt,
        y=y,
        solver_state=solver_state,
        ratio=jnp.ones((), zero.dtype),
        floor=floor,
        was_zero=jnp.all(whole == 0),
        failures=jnp.asarray(0),
        index=jnp.asarray(0),
        record=record,
        steps=jnp.asarray(0),
        accepted=jnp.asarray(0),
        evaluations=1 + spent,
        code=jnp.where(jnp.all(finite), _solution.RUNNING, _solution.NONFINITE),
    )
    index, record = _save(setup, carry, t, lambda _: y)
    met = jnp.asarray(False) if setup.until is None else setup.until.excess(setup.params(y)) >= 0
    code = jnp.where(index == setup.ts.size, _solution.OK, carry.code)
    code = jnp.where(met, _solution.STOPPED, code)
    code = jnp.where(jnp.all(finite), code, _solution.NONFINITE)
    return eqx.tree_at(lambda c: (c.index, c.record, c.code), carry, (index, record, code))


@eqx.filter_jit
@full_precision
def _advance(setup: _Setup, carry: _Carry, budget: Int[Array, ""]) -> _Carry:
    """At most `budget` attempted steps."""
    last = carry.steps + budget
    dynamic, static = eqx.partition(carry, eqx.is_array)

    def running(state: PyTree) -> Bool[Array, ""]:
        now = eqx.combine(state, static)
        return (now.code == _solution.RUNNING) & (now.steps < last)

    def body(state: PyTree) -> PyTree:
        return eqx.filter(_attempt(setup, eqx.combine(state, static)), eqx.is_array)

    return eqx.combine(jax.lax.while_loop(running, body, dynamic), static)


def _attempt(setup: _Setup, carry: _Carry) -> _Carry:
    """One attempted step, and whatever falls due within it."""
    flow, solver, control = setup.flow, setup.solver, setup.control
    y, t, end = carry.y, carry.t, setup.ts[-1]
    remaining = (end - t) - carry.lost
    last = carry.dt * (1 + 1e-3) >= remaining
    dt = jnp.where(last, remaining, carry.dt)
    local = _state_dtype(y)
    start, stop = jnp.zeros((), local), dt.astype(local)
    spent = evaluations_per_step(solver, carry.solver_state)
    y1, error, dense, solver_state, _ = solver.step(
        setup.terms(t), start, stop, y, setup.frozen, carry.solver_state, made_jump=jnp.asarray(False)
    )
    watched, watched1 = flow.controlled(y), flow.controlled(y1)
    ratio = control.ratio(flow.controlled(error), watched, watched1, carry.floor)
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree_util.tree_leaves(y1)])
    ratio = jax.lax.stop_gradient(jnp.where(jnp.all(finite), ratio, jnp.inf))
    keep = ratio <= 1
    interpolant = solver.interpolation_cls(t0=start, t1=stop, **dense)

    def at(s: Scalar) -> PyTree:
        inside = interpolant.evaluate((s - t).astype(local))
        return jax.tree_util.tree_map(lambda a, b: jnp.where(s - t >= dt, b, a), inside, y1)

    moved = dt + carry.lost
    t1 = jnp.where(last, end, t + moved)
    lost = jnp.where(last, 0.0, moved - (t1 - t)).astype(t.dtype)
    stopped, t1, y1 = _locate(setup, keep, t, t1, at, y1)
    reached = jnp.where(keep, t1, t)
    index, record = _save(setup, carry, reached, at)
    failures = jnp.where(keep, 0, carry.failures + 1)
    factor = control.factor(ratio, carry.ratio, carry.failures > 0, _order(setup))
    proposed = dt * factor.astype(dt.dtype)
    # A step cut short by the end of the run says nothing about the step size to go on with.
    proposed = jnp.where(keep & last, jnp.maximum(proposed, carry.dt), proposed)

    steps = carry.steps + 1
    code = jnp.where(steps >= setup.max_steps, _solution.MAX_STEPS, carry.code)
    small = proposed < 8 * jnp.finfo(t.dtype).eps * jnp.abs(t)
    stuck = ~keep & (small | (proposed <= jnp.finfo(t.dtype).tiny) | (failures >= MOST_FAILURES))
    broken = jnp.where(jnp.isfinite(ratio), _solution.STEP_UNDERFLOW, _solution.NONFINITE)
    code = jnp.where(stuck, broken, code)
    code = jnp.where(keep & (index == setup.ts.size), _solution.OK, code)
    code = jnp.where(stopped, _solution.STOPPED, code)

    def choose(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree_util.tree_map(lambda a, b: jnp.where(keep, a, b) if eqx.is_array(b) else b, new, old)

    return _Carry(
        t=reached,
        lost=jnp.where(keep, lost, carry.lost),
        dt=proposed,
        y=choose(y1, y),
        solver_state=choose(solver_state, carry.solver_state),
        ratio=jnp.where(keep, ratio, carry.ratio),
        floor=choose(control.raise_floor(carry.floor, carry.was_zero, watched1), carry.floor),
        was_zero=carry.was_zero,
        failures=failures,
        index=index,
        record=record,
        steps=steps,
        accepted=carry.accepted + keep,
        evaluations=carry.evaluations + (0 if spent is None else spent),
        code=code,
    )


def _save(setup: _Setup, carry: _Carry, reached: Scalar, at: Callable[[Scalar], PyTree]) -> tuple[Array, Record]:
    """Writes the rows of all save times up to `reached`."""

    def due(state: tuple[Array, Record]) -> Bool[Array, ""]:
        index, _ = state
        return (index < setup.ts.size) & (setup.ts[jnp.minimum(index, setup.ts.size - 1)] <= reached)

    def write(state: tuple[Array, Record]) -> tuple[Array, Record]:
        index, record = state
        return index + 1, write_row(record, index, setup.params(at(setup.ts[index])), setup.observe)

    return jax.lax.while_loop(due, write, (carry.index, carry.record))


def _locate(
    setup: _Setup, keep: Bool[Array, ""], t0: Scalar, t1: Scalar, at: Callable[[Scalar], PyTree], y1: PyTree
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
def _finish(setup: _Setup, carry: _Carry) -> Solution:
    flow = setup.flow
    begin = flow.init(setup.start, setup.frozen)
    first, final = flow.loss(begin, setup.frozen), flow.loss(carry.y, setup.frozen)
    losses = None if first is None or final is None else (first, final)
    drift = {}
    then, now = flow.conserved(begin, setup.frozen), flow.conserved(carry.y, setup.frozen)
    for name, value in now.items():
        size = jnp.maximum(jnp.max(value.magnitude), jnp.max(then[name].magnitude))
        change = jnp.max(jnp.abs(value.value - then[name].value))
        drift[name] = jnp.where(size > 0, change / jnp.where(size > 0, size, 1), change)
    counted = evaluations_per_step(setup.solver, carry.solver_state) is not None
    stats = {
        "steps": carry.steps,
        "accepted": carry.accepted,
        "rejected": carry.steps - carry.accepted,
        "gradient_evaluations": carry.evaluations if counted else jnp.asarray(-1),
        "hessian_vector_products": jnp.asarray(0 if counted else -1),
    }
    code = jnp.where(carry.code == _solution.RUNNING, _solution.MAX_STEPS, carry.code)
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
        method=type(setup.solver).__name__,
    )


def _with_progress(setup: _Setup, carry: _Carry) -> _Carry:
    """Segments of about a third of a second, with a bar over the time of the flow."""
    import time

    from tqdm.auto import tqdm

    begin, end = float(carry.t), float(setup.ts[-1])
    budget = 1
    with tqdm(
        total=100.0, unit="%", bar_format="{desc} {percentage:3.0f} % |{bar}| {elapsed}<{remaining}{postfix}"
    ) as bar:
        bar.set_description(type(setup.flow).__name__)
        while int(carry.code) == _solution.RUNNING:
            before = time.perf_counter()
            try:
                carry = jax.block_until_ready(_advance(setup, carry, jnp.asarray(budget)))
            except KeyboardInterrupt as error:
                raise SolveInterrupted(_finish(setup, carry)) from error
            spent = time.perf_counter() - before
            budget = int(np.clip(budget * np.clip(0.3 / max(spent, 1e-9), 0.5, 4.0), 1, 1_000_000))
            done = (float(carry.t) - begin) / max(end - begin, 1e-300)
            bar.update(min(100.0, 100.0 * done) - bar.n)
            bar.set_postfix_str(f"t = {float(carry.t):.4g}, {int(carry.evaluations)} gradients", refresh=False)
    return carry


def _replace(flow: AbstractFlow, state: PyTree, watched: PyTree) -> PyTree:
    """The state with its controlled part replaced."""
    return eqx.tree_at(flow.controlled, state, watched, is_leaf=lambda x: x is None)


def _state_dtype(y: PyTree) -> jnp.dtype:
    return jnp.result_type(*jax.tree_util.tree_leaves(y))


def _order(setup: _Setup) -> int:
    order = setup.solver.error_order(setup.terms(jnp.zeros(())))
    return 2 if order is None else int(order)


def check_times(ts: ArrayLike | Sequence[float], t0: Any) -> Float[Array, " T"]:
    times: Any = ts
    if not isinstance(ts, jax.core.Tracer):
        try:
            times = np.asarray(ts, dtype=float)
        except (TypeError, ValueError) as error:
            raise _checks.fail("ts", "be an array of times", f"not convertible to one ({error})") from error
    advice = "For instance jax.numpy.linspace(0, 10, 101)."
    if times.ndim != 1 or times.shape[0] == 0:
        raise _checks.fail("ts", "be one-dimensional and not empty", f"of shape {times.shape}", advice)
    if isinstance(times, np.ndarray):
        if not np.all(np.isfinite(times)):
            raise _checks.fail("ts", "be finite", "not", advice)
        rising = times[1:] > times[:-1]
        if not np.all(rising):
            where = int(np.argmin(rising))
            actual = f"{times[where]:g} followed by {times[where + 1]:g} at index {where}"
            raise _checks.fail("ts", "increase strictly", actual, "Sort the times and remove repeated ones.")
        if _checks.is_concrete(t0) and times[0] < float(t0):
            raise _checks.fail("ts", f"not start before the flow does, at t = {float(t0):g}", f"{times[0]:g} first")
        given = times
        times = jnp.asarray(times)
        if times.dtype == jnp.float32 and not np.all(np.diff(np.asarray(times)) > 0):
            advice = "Enable float64: jax.config.update('jax_enable_x64', True)."
            actual = f"not distinct in float32 between {given[0]:g} and {given[-1]:g}"
            raise _checks.fail("ts", "increase strictly", actual, advice)
    return jnp.asarray(times, jnp.result_type(float))


def check_tolerances(rtol: Any, atol: Any, dtype: Any) -> StepControl:
    """The step control; a relative tolerance below what the precision can meet is raised to that, with a warning."""
    advice = "Typical values are 1e-3 ... 1e-8."
    _checks.check_positive("rtol", rtol, advice)
    least = 64 * float(jnp.finfo(dtype).eps)
    value = jnp.asarray(rtol, jnp.result_type(float))
    if value.ndim != 0:
        raise _checks.fail("rtol", "be a scalar", f"of shape {value.shape}", "Use jax.vmap over tolerances.")
    if _checks.is_concrete(rtol):
        if float(rtol) >= 1:
            raise _checks.fail("rtol", "be below 1", f"{float(rtol):g}", advice)
        if float(rtol) < least:
            _checks.warn_precision(
                f"rtol = {float(rtol):g} is below what {jnp.dtype(dtype).name} can meet; using {least:.2g}."
                " Enable float64 with jax.config.update('jax_enable_x64', True) and float64 parameters."
            )
    value = jnp.maximum(value, least)
    if atol is None:
        return StepControl(value, None)
    if _checks.is_concrete(atol) and not np.all(np.asarray(atol) >= 0):
        raise _checks.fail("atol", "not be negative", f"{atol}", "None scales it to the state.")
    return StepControl(value, jnp.asarray(atol, jnp.result_type(float)))


def _check_solver(solver: Any) -> diffrax.AbstractSolver:
    if not isinstance(solver, diffrax.AbstractSolver):
        raise _checks.fail("solver", "be a diffrax solver", f"of type {type(solver).__name__}", "See gradflow.solvers.")
    if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        advice = "Use gradflow.solvers.Tsit5() or Heun(); for fixed steps of Euler, iterate gradflow.GradientDescent."
        raise _checks.fail("solver", "have an error estimate", f"{type(solver).__name__}, which has none", advice)
    if isinstance(solver, diffrax.AbstractRungeKutta) and solver.scan_kind is None:
        # The plain loop over stages: diffrax's default one is made for reverse mode and knows no forward mode.
        return eqx.tree_at(lambda s: s.scan_kind, solver, "lax", is_leaf=lambda x: x is None)
    return solver


def check_observe(observe: Any) -> dict[str, Callable[[Any], Any]]:
    """A dictionary of named functions, or a complaint."""
    if observe is None:
        return {}
    if not isinstance(observe, Mapping):
        actual = f"of type {type(observe).__name__}"
        raise _checks.fail("observe", "be a dictionary name -> function of the parameters", actual)
    for name, fn in observe.items():
        _checks.check_callable(f"observe[{name!r}]", fn, "fn(params) -> array")
    return dict(observe)
