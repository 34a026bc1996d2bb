"""`solve`: integrates a flow with adaptive steps; checks what it is given, then runs the compiled loop."""

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import diffrax
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import ArrayLike, Int, PyTree

from gradflow import _checks
from gradflow._solution import Solution, ended
from gradflow._tree import join
from gradflow.flows import AbstractFlow, AbstractStochasticFlow
from gradflow.protocols import ExplainsFailure, offered
from gradflow.runs._adaptive import AdaptiveRun
from gradflow.runs._arguments import (
    Recorded,
    check_jumps,
    check_longest_step,
    check_memory,
    check_size,
    check_start,
    check_times,
    check_tolerances,
    halves,
    join_jumps,
)
from gradflow.runs._callback import Callback
from gradflow.runs._continue import Checkpoint, Resumed
from gradflow.runs._drive import drive
from gradflow.runs._fixed_steps import check_budget, check_no_limits, prepare_path
from gradflow.runs._method import check_method_without_noise, method_for
from gradflow.runs._record import Observable, check_observe, seen
from gradflow.runs._until import Until, check_until
from gradflow.solvers import AbstractMethod, AbstractStochasticMethod


def solve(
    flow: AbstractFlow,
    params: PyTree,
    ts: ArrayLike | Sequence[float],
    *,
    observe: Mapping[str, Observable] | None = None,
    solver: diffrax.AbstractSolver | AbstractMethod | AbstractStochasticMethod | None = None,
    rtol: float | ArrayLike = 1e-5,
    atol: float | ArrayLike | None = None,
    save_params: bool = True,
    until: Until | None = None,
    max_steps: int | Int[jax.Array, ""] = 100_000,
    progress: bool = False,
    throw: bool = True,
    key: object = None,
    trainable: PyTree = None,
    jumps: ArrayLike | Sequence[float] | None = None,
    longest_step: float | ArrayLike | None = None,
    store: str | os.PathLike[str] | None = None,
    resume: bool = True,
    callback: Callback | None = None,
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
    - `progress`: show a bar with the loss; a line every 30 seconds where standard error is no terminal. With or without
      one, a keyboard interrupt raises `SolveInterrupted` with the part computed so far.
    - `throw`: raise `SolveError`, which holds the partial result, when a run fails; otherwise return that result.
      Inside `jit` and `vmap` nothing can be raised: there the final parameters, state and loss of a run that failed
      are NaN, unless `throw` is false.
    - `key`: random key, for stochastic flows only. These take steps of fixed size, so `rtol` and `atol` play no part;
      `solver` is `gradflow.solvers.EulerMaruyama`, `SmallNoise` (the default where the flow is of second order),
      `SKROCK` (for stiff ones) or `FixedSteps`; `until` is looked at after every step.
    - `trainable`: which floating-point arrays flow, instead, as an Equinox filter: a function of a leaf, or a pytree of
      Booleans such as `{"base": False, "adapter": True}`, which may end above the leaves of `params`.
    - `jumps`: increasing times at which the field jumps, besides those that `flow.jumps` declares. A step ends at each
      of them, the field is taken on its right side, and the method begins anew. Without them a short burst between two
      steps is missed.
    - `longest_step`: no step is longer. For fields that change at times which are not known. `None`: no limit.
    - `store`: path of a zarr store, to which rows are appended as they are reached, with the whole state of the run
      after each segment of about 0.3 seconds, or as often as this takes a twentieth of the time. A run that was killed
      loses no more than that: the same call goes on from there and ends in the same bits, on the same machine and with
      the same versions, or returns what was finished. With `resume=False` it is started over. The store of another run
      (of other numbers, settings or code; `max_steps` may be raised) and one that another process writes to are
      refused. `gradflow.sweeps.open_store` reads it at any moment.
    - `callback`: called with a `gradflow.Snapshot` after each segment. An exception that it raises stops the run and
      reaches the caller, with the part computed so far as its attribute `solution`.

    Functions may take variables from elsewhere, such as globals of a notebook. Where one has changed since a call
    before, the run is compiled anew.

    **Returns** a `gradflow.Solution`. Works inside `jax.jit` and `jax.vmap` and under forward-mode differentiation.
    Where a trajectory crosses a kink, as of ReLU, the derivative of the exact flow jumps, and this one with it; a
    trajectory that slides along kinks, grazes them or begins on them is told of at run time, by a `DerivativeWarning`.
    The second call with arrays of the same shapes compiles nothing. For reverse mode, hand `flow.terms()` to
    `diffrax.diffeqsolve` with a diffrax solver or with `gradflow.solvers.RKC2(bounded=True)`; it misses the jumps at
    kinks.

    **Raises** `ValueError` for bad input, before anything runs; `SolveError` and `SolveInterrupted` as above, and
    `SolveError` with the partial result where the store can no longer be written.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2))
    >>> sol = gf.solve(flow, jnp.ones(3), jnp.linspace(0, 2, 5), observe={"norm": gf.observables.ParameterNorm()})
    >>> sol.status, sol.observed["norm"].shape
    ('ok', (5,))
    """
    recorded = Recorded(observe, save_params, until)
    driven = functools.partial(drive, show=progress, store=store, resume=resume, callback=callback)
    if isinstance(flow, AbstractStochasticFlow):
        check_no_limits(jumps, longest_step)
        times = check_times(ts, flow.t0)
        path = prepare_path(flow, params, times, recorded, solver=solver, key=key, trainable=trainable)
        check_budget(path, max_steps)
        return ended(driven(path), throw)
    method = check_method_without_noise(solver)
    integration = Integration(method, rtol, atol, max_steps, jumps, longest_step)
    setup = prepare(flow, params, ts, recorded, integration, key=key, trainable=trainable)
    sol = driven(setup)
    if sol.errors and _checks.is_concrete(sol.errors):
        complaint = flow.complaint(sol.errors)
        if complaint:
            warnings.warn(complaint, flow.complaint_category, stacklevel=2)
    return ended(sol, throw, lambda: _advice(setup))


def _advice(setup: AdaptiveRun) -> str:
    """What helps a run that failed, beyond what its status says."""
    if setup.flow.kinked(setup.start, setup.frozen):
        return SLIDING
    if setup.flow.remedy:
        return setup.flow.remedy
    problem = offered(getattr(setup.flow, "problem", None), ExplainsFailure)
    if problem is None or not _checks.is_concrete(setup):
        return ""
    return problem.why_not_finite(seen(problem.why_not_finite, join(setup.start, setup.frozen)))


SLIDING = (
    "The model has kinks, along which trajectories may slide: smooth its ReLU with gradflow.models.Smoothed, or let"
    " gradflow.filippov take the limit of no smoothing."
)


class Integration(NamedTuple):
    """How a flow is integrated in adaptive steps, as `solve` is given it."""

    solver: diffrax.AbstractSolver | AbstractMethod | None
    rtol: float | ArrayLike
    atol: float | ArrayLike | None
    max_steps: int | Int[jax.Array, ""]
    jumps: ArrayLike | Sequence[float] | None = None
    longest_step: float | ArrayLike | None = None


def prepare(
    flow: AbstractFlow,
    params: PyTree,
    ts: ArrayLike | Sequence[float],
    recorded: Recorded,
    integration: Integration,
    *,
    key: object = None,
    trainable: PyTree = None,
) -> AdaptiveRun:
    """Checks the arguments of `solve`; returns what the loop runs on."""
    if not isinstance(flow, AbstractFlow):
        advice = "Wrap a loss as gradflow.GradientFlow(loss)."
        raise _checks.fail("flow", "be a gradflow flow", f"of type {type(flow).__name__}", advice)
    if key is not None:
        raise _checks.fail("key", "be None for a deterministic flow", "a key", "Only stochastic flows draw numbers.")
    flowing, frozen = halves(flow, params, trainable, type(flow).__name__, Checkpoint)
    resumed = Resumed(params.t_final, params.state, params.checkpoint) if isinstance(params, Solution) else None
    dtype = _check_parameters(flowing)
    if resumed is None and _checks.is_concrete((flow, flowing, frozen)):
        with jax.ensure_compile_time_eval():
            flow.check_values(flowing, frozen)
        check_start(flow, join(flowing, frozen))
    times = check_times(ts, flow.t0 if resumed is None else resumed.t)
    if recorded.save_params:
        check_memory(times.size, flowing)
    observe = check_observe(recorded.observe)
    max_steps = integration.max_steps
    if _checks.is_concrete(max_steps):
        _checks.check_count("max_steps", max_steps.item() if isinstance(max_steps, jax.Array) else max_steps)
    check_until(recorded.until)
    control = check_tolerances(integration.rtol, integration.atol, dtype)
    if resumed is None:
        check_size(flowing, dtype)
    method, choice = method_for(flow, integration.solver, control, flowing, frozen)
    return AdaptiveRun(
        flow=flow,
        frozen=frozen,
        start=flowing,
        ts=times,
        observe=observe,
        method=method,
        control=control,
        until=recorded.until,
        max_steps=jnp.asarray(max_steps),
        save_params=bool(recorded.save_params),
        choice=choice,
        jumps=join_jumps(check_jumps(integration.jumps), flow.jumps),
        longest_step=check_longest_step(integration.longest_step),
        resumed=resumed,
        continued=resumed is not None,
    )


def _check_parameters(flowing: PyTree) -> str:
    """Refuses parameters from which no flow can start; returns the name of their type."""
    _checks.check_finite("params", flowing, "A flow cannot start from there.")
    kinds = sorted({str(leaf.dtype) for leaf in jax.tree_util.tree_leaves(flowing)})
    if len(kinds) > 1:
        raise _checks.fail("params", "be of one floating-point type", " and ".join(kinds), "Cast them to one of these.")
    if jnp.finfo(kinds[0]).bits < 32:
        advice = "Its steps would be smaller than the rounding. Convert them; the data may stay as they are."
        raise _checks.fail("params", "be of type float32 or float64 to follow a flow", kinds[0], advice)
    return kinds[0]
