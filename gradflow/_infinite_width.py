"""`infinite_width`: the mean-field limit of a network to a requested accuracy, with an estimate of the error."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gradflow import _checks
from gradflow._solution import Solution
from gradflow._solve import solve
from gradflow.flows import MeanFieldFlow
from gradflow.models import MeanFieldNodes, MeanFieldStart
from gradflow.models.nodes import AbstractNodeRule

MOST_ENTRIES = 1_000_000
"""Weights of a network of nodes beyond which there is no refinement."""
TIGHT = 1e-6
"""Accuracy below which the explicit method is one of order eight."""


def infinite_width(
    problem: Any,
    start: Any,
    ts: Any,
    *,
    accuracy: float = 1e-5,
    rule: Any = None,
    decay: Any = 0.0,
    observe: Callable[[MeanFieldFlow], dict[str, Any]] | None = None,
    particles: dict[str, Any] | None = None,
    replicates: int = 8,
    solver: Any = None,
    save_params: bool = True,
) -> Solution:
    """The flow of a network of width infinity, to a stated accuracy.

    Its nodes are refined until the predictions are accurate enough.

    A tensor rule is refined by half as many nodes again in each dimension, at a third of the solver's tolerance, until
    two runs in a row agree; what they differ by is the estimate, and the finer run is returned, which is usually more
    accurate by a factor. A random rule runs in replicates, four times the nodes at a time; the mean of what they
    observe is returned, with the half-width of its 99 % interval (it has to hold for all predictions at once) and
    the solver's tolerance for an estimate, and the parameters of the first.

    **Time unit**: as for `gradflow.MeanFieldFlow`.

    **Arguments**

    - `problem`: as for `MeanFieldFlow`. `start`: the initial laws. `ts`: save times.
    - `accuracy`: absolute, of the predictions at the inputs of the problem, at all save times.
    - `rule`: where to begin, see `start.rules`. `decay`: weight decay, as for `MeanFieldFlow`.
    - `observe`: function `flow -> dictionary of observables`, such as `lambda flow: {"risk": flow.risk}`; besides
      `predictions (T, n)` and `risk (T,)`, which are always there.
    - `particles`: test particles, the arguments of `MeanFieldNodes.with_particles`; they are the last of their layers.
    - `replicates`: of random rules. `solver`: explicit by default, `Tsit5` or `Dopri8`; on long runs, where the flow
      is stiff, `gradflow.solvers.Automatic()`.

    **Returns** a `Solution` with `errors`: name -> estimate, the largest over the run, for every observable whose shape
    does not depend on the number of nodes.

    **Raises** `ValueError` for bad input, `SolveError` for a run that fails. **Warns** (`PrecisionWarning`) where the
    accuracy is out of reach of a million weights; the estimate is then what was reached.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> from gradflow.models.nodes import Uniform
    >>> start = gf.models.MeanFieldStart(1, first=Uniform(-1, 1), middle=[Uniform(0, 2)], output=Uniform(-1, 1))
    >>> problem = gf.EmpiricalRisk(jnp.array([[1.0], [-0.5]]), jnp.array([1.0, 0.5]), gf.losses.square)
    >>> sol = gf.infinite_width(problem, start, [0.0, 5.0], accuracy=1e-6)
    >>> sol.observed["predictions"].shape, bool(sol.errors["predictions"] < 1e-6)
    ((2, 2), True)
    """
    if not isinstance(start, MeanFieldStart):
        raise _checks.fail("start", "be a gradflow.models.MeanFieldStart", f"of type {type(start).__name__}")
    _checks.check_positive("accuracy", accuracy)
    _checks.check_count("replicates", replicates, 2, "Their scatter is the estimate of the error.")
    if solver is None:
        solver = diffrax.Tsit5() if accuracy >= TIGHT else diffrax.Dopri8()
    run = _Runs(problem, start, ts, decay, observe, particles or {}, solver, save_params)
    rules = start.rules(rule)
    if any(one.random for one in rules):
        return _by_replicates(run, rules, float(accuracy), replicates)
    return _by_refinement(run, rules, float(accuracy))


class _Runs:
    """Runs on nodes, and what they have in common."""

    def __init__(
        self,
        problem: Any,
        start: MeanFieldStart,
        ts: Any,
        decay: Any,
        observe: Any,
        particles: dict[str, Any],
        solver: Any,
        save_params: bool,
    ):
        self.problem, self.start, self.ts, self.decay = problem, start, ts, decay
        self.observe, self.particles, self.solver, self.save_params = observe, particles, solver, save_params
        self.least = 64 * float(np.finfo(np.dtype(start.dtype)).eps)

    def __call__(self, nodes: MeanFieldNodes, rtol: float, throw: bool = True) -> Solution:
        nodes = nodes.with_particles(**self.particles)
        flow = MeanFieldFlow(self.problem, nodes.weights, self.decay)
        observe = {"predictions": flow.predictions, "risk": flow.risk}
        observe |= {} if self.observe is None else self.observe(flow)
        options = {"observe": observe, "solver": self.solver, "save_params": self.save_params, "throw": throw}
        return solve(flow, nodes.net, self.ts, rtol=max(rtol, self.least), **options)


def _by_refinement(run: _Runs, rules: tuple[AbstractNodeRule, ...], accuracy: float) -> Solution:
    finer = tuple(rule.refined() for rule in rules)
    coarse, fine = run.start.nodes(rules), run.start.nodes(finer)
    rtol = accuracy
    # Nodes of weight zero change nothing, and with them both share a program.
    wide = coarse.padded([max(n, m) for n, m in zip(coarse.net.widths, fine.net.widths, strict=True)])
    before = run(wide, rtol)
    while True:
        rtol /= 3
        found = run(fine, rtol)
        errors = _differences(found.observed, before.observed)
        title = _titled(fine)
        if float(errors["predictions"]) <= accuracy:
            break
        finer = tuple(rule.refined() for rule in finer)
        next_nodes = run.start.nodes(finer)
        if _entries(next_nodes) > MOST_ENTRIES:
            _say_unmet(accuracy, float(errors["predictions"]))
            break
        before, fine = found, next_nodes
    return dataclasses.replace(found, errors=errors, title=title)


def _by_replicates(run: _Runs, rules: tuple[AbstractNodeRule, ...], accuracy: float, replicates: int) -> Solution:
    from scipy.stats import t

    quantile = float(t.ppf(0.995, replicates - 1))
    rtol = min(accuracy / 30, 1e-4)
    many = eqx.filter_vmap(lambda nodes: run(nodes, rtol, throw=False))
    while True:
        drawn = [run.start.nodes(tuple(rule.replicate(r) for rule in rules)) for r in range(replicates)]
        stacked: Any = jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *drawn)
        all_of_them = many(stacked)
        all_of_them.check()
        means = {name: jnp.mean(value, axis=0) for name, value in all_of_them.observed.items()}
        errors = {
            name: quantile * jnp.max(jnp.std(value, axis=0, ddof=1)) / replicates**0.5 + rtol * jnp.max(jnp.abs(value))
            for name, value in all_of_them.observed.items()
        }
        reached = float(errors["predictions"])
        finer = tuple(rule.refined() for rule in rules)
        enough = reached <= accuracy
        if enough or _entries(run.start.nodes(finer)) > MOST_ENTRIES:
            if not enough:
                _say_unmet(accuracy, reached)
            first = jax.tree_util.tree_map(lambda leaf: leaf[0], all_of_them)
            title = f"{_titled(drawn[0])}, mean of {replicates}"
            return dataclasses.replace(first, observed=means, errors=errors, title=title)
        rules = finer


def _differences(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
    return {name: jnp.max(jnp.abs(a[name] - b[name])) for name in a if a[name].shape == b[name].shape}


def _entries(nodes: MeanFieldNodes) -> int:
    widths = nodes.net.widths
    return widths[0] + sum(n * m for n, m in itertools.pairwise(widths)) + widths[-1]


def _titled(nodes: MeanFieldNodes) -> str:
    return f"MeanFieldFlow at width infinity, {' x '.join(map(str, nodes.net.widths))} nodes"


def _say_unmet(accuracy: float, reached: float) -> None:
    _checks.warn_precision(
        f"accuracy = {accuracy:g} is out of reach of {MOST_ENTRIES:,} weights; the estimated error is {reached:.1e}."
        " Take another rule, fewer dimensions, or a shorter time."
    )
