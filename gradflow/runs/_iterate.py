"""`iterate`: runs a discrete rule and returns the same `Solution` as `solve`, on the rule's own clock."""

import os
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from gradflow import _checks
from gradflow._solution import Solution, ended
from gradflow._tree import join
from gradflow.protocols import ExplainsFailure, offered
from gradflow.rules import AbstractRule
from gradflow.runs._arguments import Recorded, check_start, halves
from gradflow.runs._callback import Callback
from gradflow.runs._counted import ResumedRule, RuleCheckpoint
from gradflow.runs._discrete import DiscreteRun
from gradflow.runs._drive import drive
from gradflow.runs._record import Observable, check_observe
from gradflow.runs._until import Until, check_until


def iterate(
    rule: AbstractRule,
    params: PyTree,
    steps: int,
    *,
    observe: Mapping[str, Observable] | None = None,
    save_every: int | None = None,
    save_params: bool = True,
    until: Until | None = None,
    progress: bool = False,
    throw: bool = True,
    trainable: PyTree = None,
    store: str | os.PathLike[str] | None = None,
    resume: bool = True,
    callback: Callback | None = None,
) -> Solution:
    """Runs `steps` steps of a discrete rule.

    **Arguments**

    - `rule`: such as `gradflow.GradientDescent(problem, learning_rate=0.1)`.
    - `params`, `observe`, `save_params`, `until`, `progress`, `throw`, `trainable`, `store`, `resume`, `callback`: as
      for `solve`; `until` is looked at at every iterate. A `Solution` of the same rule in place of `params` is
      continued from its iterate, with the memory of the optimiser, the count of steps and so the random numbers that a
      run without a break would draw.
    - `steps`: number of steps, at least one.
    - `save_every`: save iterates `0, save_every, 2 save_every, ...` and the last, counted from where the run starts; by
      default about a hundred of them.

    **Returns** a `gradflow.Solution` with `ts = rule.time(k)` at the saved iterates `k`. A run whose loss is no longer
    finite, or has grown a million times over its first value (over one, if that is smaller), ends with the status
    `"nonfinite"` or `"diverged"`; the rows that follow hold NaN.

    **Raises** `ValueError` for bad input; `SolveError` for a run that diverged, unless `throw=False`;
    `SolveInterrupted` as `solve` does.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.GradientDescent(lambda w: 0.5 * w**2, learning_rate=2.5)
    >>> gf.iterate(rule, jnp.array(1.0), 200, throw=False).status
    'diverged'
    """
    if not isinstance(rule, AbstractRule):
        actual = f"of type {type(rule).__name__}"
        advice = "For instance gradflow.GradientDescent(problem, learning_rate=0.1)."
        raise _checks.fail("rule", "be a gradflow rule", actual, advice)
    _checks.check_count("steps", steps)
    save_every = max(1, steps // 100) if save_every is None else save_every
    _checks.check_count("save_every", save_every)
    ks = np.append(np.arange(0, steps, save_every), steps)
    if isinstance(params, Solution):
        halves(rule, params, trainable, rule.title, RuleCheckpoint)
        ks = jnp.asarray(ks) + params.checkpoint.k
    return iterate_to(
        rule,
        params,
        ks,
        observe=observe,
        save_params=save_params,
        until=until,
        progress=progress,
        throw=throw,
        trainable=trainable,
        store=store,
        resume=resume,
        callback=callback,
    )


def iterate_to(
    rule: AbstractRule,
    params: PyTree,
    ks: Int[Array, " rows"] | Int[np.ndarray, " rows"],
    *,
    observe: Mapping[str, Observable] | None = None,
    save_params: bool = True,
    until: Until | None = None,
    progress: bool = False,
    throw: bool = True,
    trainable: PyTree = None,
    store: str | os.PathLike[str] | None = None,
    resume: bool = True,
    callback: Callback | None = None,
) -> Solution:
    """As `iterate`, saving the iterates `ks`, which increase from the first on. One compilation per number of them."""
    run = prepare_rule(rule, params, jnp.asarray(ks), Recorded(observe, save_params, until), trainable)
    sol = drive(run, progress, store=store, resume=resume, callback=callback)
    return ended(sol, throw, lambda: _advice(run))


def _advice(run: DiscreteRun) -> str:
    """What helps a run that failed, beyond what its status says."""
    problem = offered(getattr(run.rule, "problem", None), ExplainsFailure)
    if problem is None or not _checks.is_concrete(run):
        return ""
    return problem.why_not_finite(join(run.start, run.frozen))


def prepare_rule(
    rule: AbstractRule,
    params: PyTree,
    ks: Int[Array, " rows"],
    recorded: Recorded,
    trainable: PyTree = None,
) -> DiscreteRun:
    """Checks the arguments of `iterate`; returns what the loop runs on."""
    flowing, frozen = halves(rule, params, trainable, rule.title, RuleCheckpoint)
    resumed = ResumedRule(params.state, params.checkpoint) if isinstance(params, Solution) else None
    _checks.check_finite("params", flowing, "A rule cannot start from there.")
    if resumed is None and _checks.is_concrete((rule, flowing, frozen)):
        check_start(rule, join(flowing, frozen))
    check_until(recorded.until)
    return DiscreteRun(
        rule=rule,
        frozen=frozen,
        start=flowing,
        ks=ks,
        observe=check_observe(recorded.observe),
        until=recorded.until,
        save_params=bool(recorded.save_params),
        resumed=resumed,
    )
