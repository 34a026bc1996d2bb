"""`solve`: integrates a flow with adaptive steps; checks what it is given, then runs the compiled loop."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optimistix
from jaxtyping import ArrayLike, Float, Int, PyTree

from gradflow import _checks
from gradflow._drive import drive
from gradflow._leaves import warn_of_leaves
from gradflow._loop import Checkpoint, Resumed, Setup
from gradflow._record import check_observe
from gradflow._solution import Solution, ended
from gradflow._stochastic import solve_stochastic
from gradflow._tree import check_start, join, method_of, rest_of, split, tree_norm
from gradflow._until import Until
from gradflow.flows import AbstractFlow, AbstractStochasticFlow
from gradflow.solvers import AbstractMethod, AbstractStochasticMethod, OneStep, StepControl, default_solver
from gradflow.solvers._default import describe_choice


def solve(
    flow: AbstractFlow,
    params: PyTree,
    ts: ArrayLike | Sequence[float],
    *,
    observe: Mapping[str, Callable[[Any], Any]] | None = None,
    solver: diffrax.AbstractSolver | AbstractMethod | AbstractStochasticMethod | None = None,
    rtol: float | ArrayLike = 1e-5,
    atol: float | ArrayLike | None = None,
    save_params: bool = True,
    until: Until | None = None,
    max_steps: int | Int[jax.Array, ""] = 100_000,
    progress: bool = False,
    throw: bool = True,
    key: Any = None,
    trainable: Any = None,
    jumps: ArrayLike | Sequence[float] | None = None,
    longest_step: float | ArrayLike | None = None,
) -> Solution:
    """Integrates a flow, and returns what was asked for at the save times.

    **Arguments**

    - `flow`: what to integrate, such as `gradflow.GradientFlow(problem)`; its docstring tells the time unit.
    - `params`: any pytree. Floating-point arrays flow; all other leaves are carried along unchanged, and so are known
      buffers: variables of Flax's `nnx` other than `Param`, the state of Equinox layers, Flax's "batch_stats".
      `print(sol)` names the arrays that were held fixed. Observables see all of them. Or a `Solution` of the same flow,
      which is continued from its whole state and its time, whether it had reached its end or not.
    - `ts`: increasing save times `(T,)`. Integration starts at `flow.t0`, or where a continued run ended; the last one
      ends it.
    - `observe`: name -> function of the parameters, evaluated at the save times during the run; it gives an array or a
      pytree of arrays.
    - `solver`: one of `gradflow.solvers`, or any diffrax solver with an error estimate. `None` chooses: `Automatic`,
      which takes an explicit method on short runs and the implicit multistep method `NDF` on all others; where the
      flow says that it oscillates or limits its steps, an explicit method alone; for problems with kinks, such as
      ReLU, not smoothed, a maximum or an absolute value of what depends on the parameters, `Hybrid` down to
      `rtol=1e-6`. See `gradflow.solvers.default_solver`; `print(sol)` says what was chosen and why.
    - `rtol`, `atol`: tolerances on the error of each step. `atol=None` scales with the initial state, leaf by leaf. An
      `rtol` below 64 units of rounding of the parameters' type is raised to that, with a `PrecisionWarning`.
    - `save_params`: keep the parameters at every save time, not only at the end.
    - `until`: a `gradflow.Until`, which ends the run early. Derivatives treat the time at which it does as constant.
    - `max_steps`: budget of attempted steps.
    - `progress`: show a bar. With or without one, a keyboard interrupt raises `SolveInterrupted` with the part computed
      so far.
    - `throw`: raise `SolveError`, which holds the partial result, when a run fails; otherwise return that result.
      Inside `jit` and `vmap` nothing can be raised: there the final parameters, state and loss of a run that failed
      are NaN, unless `throw` is false.
    - `key`: random key, for stochastic flows only. These take steps of fixed size, so `rtol` and `atol` play no part;
      `solver` is `gradflow.solvers.EulerMaruyama`, `SmallNoise` (the default where the flow is of second order),
      `SKROCK` (for stiff ones) or `FixedSteps`; `until` is looked at at the save times.
    - `trainable`: which floating-point arrays flow, instead, as an Equinox filter: a function of a leaf, or a pytree of
      Booleans such as `{"base": False, "adapter": True}`, which may end above the leaves of `params`.
    - `jumps`: increasing times at which the field jumps, besides those that `flow.jumps` declares. A step ends at each
      of them, the field is taken on its right side, and the method begins anew. Without them a short burst between two
      steps is missed.
    - `longest_step`: no step is longer. For fields that change at times which are not known. `None`: no limit.

    **Returns** a `gradflow.Solution`. Works inside `jax.jit` and `jax.vmap` and under forward-mode differentiation;
    where a trajectory crosses a kink, as of ReLU, the derivative of the exact flow jumps, and this one misses the jump.
    The second call with arrays of the same shapes compiles nothing. For reverse mode, hand `flow.terms()` to
    `diffrax.diffeqsolve` with a diffrax solver or with `gradflow.solvers.RKC2(bounded=True)`.

    **Raises** `ValueError` for bad input, before anything runs; `SolveError` and `SolveInterrupted` as above.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2))
    >>> sol = gf.solve(flow, jnp.ones(3), jnp.linspace(0, 2, 5), observe={"norm": gf.observables.ParameterNorm()})
    >>> sol.status, sol.observed["norm"].shape
    ('ok', (5,))
    """
    if isinstance(flow, AbstractStochasticFlow):
        for name, value in (("jumps", jumps), ("longest_step", longest_step)):
            if value is not None:
                raise _checks.fail(name, "be None for a stochastic flow", "given", "Its steps are of fixed size.")
        times = check_times(ts, flow.t0)
        options = {"observe": observe, "until": until, "save_params": save_params, "progress": progress}
        options["trainable"] = trainable
        return solve_stochastic(flow, params, times, solver, key, max_steps, throw=throw, **options)
    if isinstance(solver, AbstractStochasticMethod):
        advice = "See gradflow.solvers."
        raise _checks.fail("solver", "be one for a flow without noise", f"of type {type(solver).__name__}", advice)
    setup = prepare(
        flow,
        params,
        ts,
        observe=observe,
        solver=solver,
        rtol=rtol,
        atol=atol,
        save_params=save_params,
        until=until,
        max_steps=max_steps,
        key=key,
        trainable=trainable,
        jumps=jumps,
        longest_step=longest_step,
    )
    return ended(drive(setup, progress), throw, lambda: _advice(setup))


def _advice(setup: Setup) -> str:
    """What helps a run that failed, beyond what its status says."""
    if setup.flow.kinked(setup.start, setup.frozen):
        return SLIDING
    why = method_of(getattr(setup.flow, "problem", None), "why_not_finite")
    return "" if why is None or not _checks.is_concrete(setup) else why(join(setup.start, setup.frozen))


SLIDING = (
    "The model has kinks, along which trajectories may slide: smooth its ReLU with gradflow.models.Smoothed, or let"
    " gradflow.filippov take the limit of no smoothing."
)


def prepare(
    flow: AbstractFlow,
    params: PyTree,
    ts: ArrayLike | Sequence[float],
    *,
    observe: Mapping[str, Callable[[Any], Any]] | None,
    solver: diffrax.AbstractSolver | AbstractMethod | None,
    rtol: float | ArrayLike,
    atol: float | ArrayLike | None,
    save_params: bool,
    until: Until | None,
    max_steps: int | Int[jax.Array, ""],
    key: Any = None,
    trainable: Any = None,
    jumps: ArrayLike | Sequence[float] | None = None,
    longest_step: float | ArrayLike | None = None,
) -> Setup:
    """Checks the arguments of `solve`; returns what the loop runs on."""
    if not isinstance(flow, AbstractFlow):
        advice = "Wrap a loss as gradflow.GradientFlow(loss)."
        raise _checks.fail("flow", "be a gradflow flow", f"of type {type(flow).__name__}", advice)
    if flow.stochastic:
        advice = "Use gradflow.solve with a key, under jax.vmap for many; or sweep over its rule, such as gradflow.SGD."
        raise _checks.fail("flow", "be deterministic", f"a {type(flow).__name__}, which is not", advice)
    if key is not None:
        raise _checks.fail("key", "be None for a deterministic flow", "a key", "Only stochastic flows draw numbers.")
    resumed = None
    if isinstance(params, Solution):
        _checks.check_no_filter(trainable)
        flowing, frozen, resumed = resume(flow, params)
    else:
        if trainable is None:
            warn_of_leaves(params)
        flowing, frozen = split(params, trainable)
    _checks.check_finite("params", flowing, "A flow cannot start from there.")
    kinds = sorted({str(leaf.dtype) for leaf in jax.tree_util.tree_leaves(flowing)})
    if len(kinds) > 1:
        raise _checks.fail("params", "be of one floating-point type", " and ".join(kinds), "Cast them to one of these.")
    if jnp.finfo(kinds[0]).bits < 32:
        advice = "Its steps would be smaller than the rounding. Convert them; the data may stay as they are."
        raise _checks.fail("params", "be of type float32 or float64 to follow a flow", kinds[0], advice)
    if resumed is None and _checks.is_concrete((flow, flowing, frozen)):
        with jax.ensure_compile_time_eval():
            flow.check_values(flowing, frozen)
        check_start(flow, join(flowing, frozen))
    times = check_times(ts, flow.t0 if resumed is None else resumed.t)
    if save_params:
        check_memory(times.size, flowing)
    observe = check_observe(observe)
    if _checks.is_concrete(max_steps):
        _checks.check_count("max_steps", max_steps)
    if until is not None and not isinstance(until, Until):
        advice = "For instance gradflow.Until(problem, below=0.1)."
        raise _checks.fail("until", "be a gradflow.Until", f"of type {type(until).__name__}", advice)
    control = check_tolerances(rtol, atol, kinds[0])
    if resumed is None:
        check_size(flowing, kinds[0])
    choice = ""
    if solver is None:
        tolerance = float(control.rtol) if _checks.is_concrete(control.rtol) else 1e-5
        solver = default_solver(tolerance, flow, flow.kinked(flowing, frozen))
        choice = describe_choice(tolerance, flow, flow.kinks(flowing, frozen))
    method = _prepare_solver(solver, control, flowing)
    if flow.limited and not isinstance(method, OneStep):
        advice = "Use one such as gradflow.solvers.Tsit5() or, where it is stiff, Hybrid()."
        raise _checks.fail("solver", f"be an explicit method for a {type(flow).__name__}", method.name, advice)

    return Setup(
        flow=flow,
        frozen=frozen,
        start=flowing,
        ts=times,
        observe=observe,
        method=method,
        control=control,
        until=until,
        max_steps=jnp.asarray(max_steps),
        save_params=bool(save_params),
        choice=choice,
        jumps=join_jumps(check_jumps(jumps), flow.jumps),
        longest_step=check_longest_step(longest_step),
        resumed=resumed,
        continued=resumed is not None,
    )


def resume(flow: AbstractFlow, solution: Solution) -> tuple[PyTree, PyTree, Resumed]:
    """The parameters, in two halves, and the rest of what a run of this flow goes on from."""
    if solution.title != type(flow).__name__ or not isinstance(solution.checkpoint, Checkpoint):
        actual = f"one of {solution.title}"
        advice = "Pass its `final` parameters, to start anew from there."
        raise _checks.fail("params", f"be parameters, or a Solution of a {type(flow).__name__}", actual, advice)
    trainable = flow.params(solution.state)
    frozen = rest_of(solution.final, trainable)
    wanted = jax.tree_util.tree_structure(eqx.filter_eval_shape(flow.init, trainable, frozen))
    if wanted != jax.tree_util.tree_structure(solution.state):
        actual = "one whose state is of another structure"
        raise _checks.fail("params", "be a Solution of the same flow", actual, "Pass its `final` parameters instead.")
    return trainable, frozen, Resumed(solution.t_final, solution.state, solution.checkpoint)


def check_times(ts: ArrayLike | Sequence[float], t0: Any) -> Float[jax.Array, " T"]:
    advice = "For instance jax.numpy.linspace(0, 10, 101)."
    try:
        times: Any = np.asarray(ts) if _checks.is_concrete(ts) else jnp.asarray(ts)
        if times.dtype == object:
            times = times.astype(float)
    except (TypeError, ValueError) as error:
        raise _checks.fail("ts", "be an array of times", f"not convertible to one ({error})", advice) from error
    if not (jnp.issubdtype(times.dtype, jnp.floating) or jnp.issubdtype(times.dtype, jnp.integer)):
        raise _checks.fail("ts", "be an array of real numbers", f"of type {times.dtype}", advice)
    times = times.astype(float) if isinstance(times, np.ndarray) else times
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
        # In NumPy, for what JAX makes of a concrete array under a trace cannot be looked at.
        with np.errstate(over="ignore"):
            given, times = times, times.astype(jnp.result_type(float))
        if not np.all(times[1:] > times[:-1]):
            advice = "Enable float64: jax.config.update('jax_enable_x64', True)."
            actual = f"not distinct in float32 between {given[0]:g} and {given[-1]:g}"
            raise _checks.fail("ts", "increase strictly", actual, advice)
    return jnp.asarray(times, jnp.result_type(float))


def check_jumps(jumps: Any) -> Float[jax.Array, " J"] | None:
    """Times at which a field jumps, as an array."""
    if jumps is None:
        return None
    times: Any = jumps
    if not isinstance(jumps, jax.core.Tracer):
        try:
            times = np.asarray(jumps, dtype=float)
        except (TypeError, ValueError) as error:
            raise _checks.fail("jumps", "be an array of times", f"not convertible to one ({error})") from error
    if times.ndim != 1:
        raise _checks.fail("jumps", "be one-dimensional", f"of shape {times.shape}", "For instance [50.0, 51.0].")
    if isinstance(times, np.ndarray):
        if not np.all(np.isfinite(times)):
            raise _checks.fail("jumps", "be finite", "not", "Leave out what never happens.")
        if not np.all(times[1:] > times[:-1]):
            raise _checks.fail("jumps", "increase strictly", f"{times.tolist()}", "Sort them and remove repeated ones.")
    return jnp.asarray(times, jnp.result_type(float))


def join_jumps(given: Any, declared: Any) -> Float[jax.Array, " J"] | None:
    """All jumps in order, those that the user gives and those that the flow declares; `None` where there are none."""
    known = [jnp.asarray(times, jnp.result_type(float)) for times in (given, declared) if times is not None]
    known = [times for times in known if times.size]
    return jnp.sort(jnp.concatenate(known)) if known else None


def check_longest_step(longest_step: Any) -> Float[jax.Array, ""] | None:
    """The limit on steps in time as an array."""
    if longest_step is None:
        return None
    _checks.check_positive("longest_step", longest_step, "None sets no limit.")
    value = jnp.asarray(longest_step, jnp.result_type(float))
    if value.ndim:
        raise _checks.fail("longest_step", "be a scalar", f"of shape {value.shape}")
    return value


def check_memory(rows: int, trainable: PyTree) -> None:
    """Warns of parameters at all save times that take more memory than is free."""
    wanted = rows * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(trainable))
    free = free_memory() if wanted > WORTH_A_LOOK else None
    if free is not None and wanted > free:
        message = (
            f"The parameters at {rows} save times take {wanted:,} bytes, and {free:,} are free. Save fewer times, or"
            " pass save_params=False and observe what is needed of them."
        )
        warnings.warn(message, stacklevel=4)


WORTH_A_LOOK = 2**26
"""Bytes of saved parameters below which nobody asks the machine for its free memory."""


def free_memory() -> int | None:
    """Free bytes where arrays are put by default; `None` where this is not known."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)
    try:
        # What the system can give, its caches included; only Linux tells.
        with open("/proc/meminfo") as lines:
            known = dict(line.split(":", 1) for line in lines)
        return 1024 * int(known["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def check_size(trainable: PyTree, dtype: Any) -> None:
    """Warns of a start so small that differences of a millionth of it underflow."""
    if not _checks.is_concrete(trainable):
        return
    largest = max(float(np.max(np.abs(leaf), initial=0.0)) for leaf in jax.tree_util.tree_leaves(trainable))
    least = 1e6 * float(jnp.finfo(dtype).tiny)
    if 0 < largest < least:
        _checks.warn_precision(
            f"The largest entry of `params` is {largest:.1g}, and {jnp.dtype(dtype).name} resolves differences of"
            f" parameters only from about {least:.0e} on. Start from a larger scale"
            + (", or use float64 parameters." if jnp.dtype(dtype) == jnp.float32 else ".")
        )


def check_tolerances(rtol: Any, atol: Any, dtype: Any) -> StepControl:
    """The step control; a relative tolerance below what the precision can meet is raised to that, with a warning."""
    advice = "Typical values are 1e-3 ... 1e-8."
    _checks.check_positive("rtol", rtol, advice)
    least = 64 * float(jnp.finfo(dtype).eps)
    value = jnp.asarray(rtol, jnp.result_type(float))
    if value.ndim != 0:
        raise _checks.fail("rtol", "be a scalar", f"of shape {value.shape}", "Use jax.vmap over tolerances.")
    enable = " Enable float64 with jax.config.update('jax_enable_x64', True) and float64 parameters."
    if _checks.is_concrete(rtol):
        if float(rtol) >= 1:
            raise _checks.fail("rtol", "be below 1", f"{float(rtol):g}", advice)
        if float(rtol) < least:
            _checks.warn_precision(
                f"rtol = {float(rtol):g} is below what {jnp.dtype(dtype).name} can meet; using {least:.2g}."
                + (enable if jnp.dtype(dtype).itemsize < 8 else "")
            )
    value = jnp.maximum(value, least)
    if atol is None:
        return StepControl(value, None)
    if _checks.is_concrete(atol) and not np.all(np.asarray(atol) >= 0):
        raise _checks.fail("atol", "not be negative", f"{atol}", "None scales it to the state.")
    return StepControl(value, jnp.asarray(atol, jnp.result_type(float)))


def _prepare_solver(solver: Any, control: StepControl, trainable: PyTree) -> AbstractMethod:
    """The method; a diffrax solver with a loop that both modes of the run can use and its root finder's tolerances."""
    if isinstance(solver, AbstractMethod):
        return solver
    if not isinstance(solver, diffrax.AbstractSolver):
        if isinstance(solver, type):
            raise _checks.fail("solver", "be a solver", f"the class {solver.__name__}", f"Write {solver.__name__}().")
        raise _checks.fail("solver", "be a diffrax solver", f"of type {type(solver).__name__}", "See gradflow.solvers.")
    if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        advice = "Use gradflow.solvers.Tsit5() or Heun(); for fixed steps of Euler, iterate gradflow.GradientDescent."
        raise _checks.fail("solver", "have an error estimate", f"{type(solver).__name__}, which has none", advice)
    if isinstance(solver, diffrax.AbstractRungeKutta) and solver.scan_kind is None:
        # The plain loop over stages: diffrax's default one is made for reverse mode and knows no forward mode.
        solver = eqx.tree_at(lambda s: s.scan_kind, solver, "lax", is_leaf=lambda x: x is None)
    if not isinstance(solver, diffrax.AbstractImplicitSolver):
        return OneStep(solver)
    rough = control.rtol * tree_norm(trainable) if control.atol is None else control.atol
    own: dict[str, Any] = {"rtol": control.rtol, "atol": rough, "norm": optimistix.rms_norm}
    # A root finder of diffrax leaves a marker where it wants the tolerances of the run.
    finder = solver.root_finder
    open_ones = [n for n in own if hasattr(finder, n) and "UseStepSizeTol" in type(getattr(finder, n)).__name__]
    where = lambda s: [getattr(s.root_finder, name) for name in open_ones]  # noqa: E731
    return OneStep(eqx.tree_at(where, solver, [own[name] for name in open_ones]) if open_ones else solver)
