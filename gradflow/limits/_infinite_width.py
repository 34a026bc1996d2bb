"""`infinite_width`: the mean-field limit of a network to a requested accuracy, with an estimate of the error."""

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from gradflow import _checks
from gradflow._solution import Solution, Status
from gradflow.flows import MeanFieldFlow
from gradflow.models import MeanFieldNodes, MeanFieldStart
from gradflow.models.nodes import AbstractNodeRule, Sobol
from gradflow.problems import EmpiricalRisk, PopulationRisk
from gradflow.runs._solve import solve
from gradflow.solvers import AbstractMethod

Errors = dict[str, float]
Observe = Callable[[MeanFieldFlow], Mapping[str, Callable[[PyTree], PyTree]]]

MOST_ENTRIES = 1_000_000
"""Weights of a network of nodes beyond which there is no refinement, by default."""
TIGHT = 1e-6
"""Accuracy below which the explicit method is one of order eight."""
TENFOLD = 10.0
"""Factor from one tolerance to the next."""
LOOSEST = 1e-2
"""About the first tolerance, at most: the error of a run at a looser one says nothing of those at tighter ones."""
APART = 2
"""Tolerances between the two runs whose difference is the error of the solver. Runs of two or three steps at tolerances
that are next to each other may take the same steps, and differ by a third of their error."""
SOLVER_SHARE = 0.25
"""Part of the accuracy that the error of the solver may take; nodes have the rest."""
FIRST_FACTOR = 2.0
"""Error of the finer of two grids over their difference, for a quadrature of order one: `1 / (1.5 - 1)`."""
SLOWEST_RATIO = 0.9
"""Ratio of successive differences beyond which their sum is no longer extrapolated: a factor of nine."""
BEYOND_GRIDS = 1024
"""Sobol points in each replicate to begin with, where a grid would be too large."""


def infinite_width(
    problem: EmpiricalRisk | PopulationRisk,
    start: MeanFieldStart,
    ts: ArrayLike | Sequence[float],
    *,
    accuracy: float = 1e-5,
    rule: AbstractNodeRule | Sequence[AbstractNodeRule] | None = None,
    decay: ArrayLike = 0.0,
    observe: Observe | None = None,
    particles: dict[str, ArrayLike] | None = None,
    replicates: int = 8,
    solver: diffrax.AbstractSolver | AbstractMethod | None = None,
    save_params: bool = True,
    max_weights: int = MOST_ENTRIES,
) -> Solution:
    """The flow of a network of width infinity, to a stated accuracy.

    Its nodes are refined until the predictions are accurate enough.

    **The estimate** in `errors` is the sum of that of the nodes and that of the solver, each the largest over the run.

    - *Nodes, tensor rules* have half as many nodes again in each dimension, from run to run. Of the returned run,
      the finest, the error is taken to be `d max(1, r / (1 - r))`, with `d` its difference from the run before and `r`
      the ratio of `d` to the difference before that; `2 d` where there are only two runs. That is the limit of a
      geometric series, not a bound.
    - *Nodes, random rules* (`Sobol`, `MonteCarlo`) run in replicates, independent of each other by their seeds (for
      `Sobol`: independent scramblings, replicate `r` with seed `7919 r` more than the rule's), four times the nodes
      at a time. The mean of what they observe is returned, with the parameters of the first; the error is the
      half-width of the 99 % interval of each number by Student's law, the largest of them. Layers with a tensor
      rule beside them add the difference that refining these alone makes to the first replicate. A tensor grid of more
      than 100,000 nodes is replaced by replicates of Sobol points.
    - *Solver*: the difference of two runs on the coarsest nodes, one of them with a tolerance a hundred times as large,
      and rounding, `eps` times the square root of the number of steps. The tolerance is lowered until this is a quarter
      of the accuracy, or the tolerance is at its least, 64 `eps`.

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
    - `max_weights`: of a network of nodes; beyond it there is no refinement. One network is in memory at a time.

    **Returns** a `Solution` with `errors`: name -> estimate, the largest over the run, for every observable whose shape
    does not depend on the number of nodes.

    **Raises** `ValueError` for bad input, `SolveError` for a run that fails. **Warns** (`PrecisionWarning`) where the
    accuracy is out of reach of these weights or of the floating-point type; `status` is then `"inaccurate"`, and the
    estimate is of what was reached.

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
    _checks.check_count("max_weights", max_weights)
    if solver is None:
        solver = diffrax.Tsit5() if accuracy >= TIGHT else diffrax.Dopri8()
    run = _Runs(
        problem, start, ts, decay, observe, particles or {}, solver, save_params, float(accuracy), int(max_weights)
    )
    pairs = zip(start.rules(rule), start.labels, strict=True)
    rules = tuple(one if one.fits(laws) else Sobol(BEYOND_GRIDS) for one, laws in pairs)
    with _each_warning_once():
        if any(one.random for one in rules):
            estimate = _by_replicates(run, rules, replicates)
        else:
            estimate = _by_refinement(run, rules)
    reached = float(_of(estimate)["predictions"])
    if reached <= accuracy:
        return estimate
    _checks.warn_precision(
        f"accuracy = {accuracy:g} is out of reach of {max_weights:,} weights and grids of 100,000 nodes in"
        f" {np.dtype(start.dtype).name};"
        f" the estimated error is {reached:.1e}. Take another rule, fewer dimensions, or a shorter time."
    )
    return dataclasses.replace(estimate, code=jnp.full_like(estimate.code, Status.INACCURATE))


@dataclasses.dataclass(frozen=True)
class _Runs:
    """Runs on nodes, and what they have in common."""

    problem: EmpiricalRisk | PopulationRisk
    start: MeanFieldStart
    ts: ArrayLike | Sequence[float]
    decay: ArrayLike
    observe: Observe | None
    particles: dict[str, ArrayLike]
    solver: diffrax.AbstractSolver | AbstractMethod
    save_params: bool
    accuracy: float
    max_weights: int

    @property
    def eps(self) -> float:
        return float(np.finfo(np.dtype(self.start.dtype)).eps)

    @property
    def least(self) -> float:
        """The lowest tolerance."""
        return 64 * self.eps

    def __call__(self, nodes: MeanFieldNodes, rtol: float | Float[Array, ""], throw: bool = True) -> Solution:
        nodes = nodes.with_particles(**self.particles)
        flow = MeanFieldFlow(self.problem, nodes.weights, self.decay)
        observe = {"predictions": flow.predictions, "risk": flow.risk}
        observe |= {} if self.observe is None else self.observe(flow)
        saved = functools.partial(solve, observe=observe, save_params=self.save_params)
        return saved(flow, nodes.net, self.ts, rtol=rtol, solver=self.solver, throw=throw)

    def fits(self, rules: tuple[AbstractNodeRule, ...]) -> bool:
        """Whether these rules keep to their kind and to the number of weights."""
        pairs = list(zip(rules, self.start.labels, strict=True))
        if not all(rule.fits(laws) for rule, laws in pairs):
            return False
        # Counted without the matrices between layers, which may not fit into memory.
        return _entries([len(rule(laws)[1]) if laws else 1 for rule, laws in pairs]) <= self.max_weights

    def solver_error(self, nodes: MeanFieldNodes) -> tuple[Solution, float, Errors]:
        """The first run, its tolerance, low enough where it can be, and the error that this leaves."""
        first = min(TENFOLD * self.accuracy, LOOSEST)
        decades = max(APART, math.ceil(math.log10(max(first / self.least, 1.0))))
        runs: list[Solution] = []
        while True:
            rtol = self.least * TENFOLD**decades
            runs.append(self(nodes, rtol))
            if len(runs) > APART:
                errors = _sum(_differences(runs[-1], runs.pop(0)), self._rounding(runs[-1], nodes))
                if errors["predictions"] <= SOLVER_SHARE * self.accuracy or decades == 0:
                    return runs[-1], rtol, errors
            decades -= 1

    def _rounding(self, sol: Solution, nodes: MeanFieldNodes) -> Errors:
        """Of sums whose terms are as large as the outputs, and of the steps, as if they were independent."""
        unit = self.eps * (1 + float(sol.stats["steps"])) ** 0.5
        terms = float(jnp.max(jnp.tensordot(nodes.weights[-1], jnp.abs(nodes.net.output), axes=1)))
        errors = {name: unit * float(jnp.max(jnp.abs(value))) for name, value in sol.observed.items()}
        return errors | {"predictions": unit * max(terms, errors["predictions"] / unit)}


def _by_refinement(run: _Runs, rules: tuple[AbstractNodeRule, ...]) -> Solution:
    finer = tuple(rule.refined() for rule in rules)
    while not run.fits(finer):
        coarser = tuple(rule.coarsened() for rule in rules)
        if all(eqx.tree_equal(a, b) for a, b in zip(coarser, rules, strict=True)):
            break
        rules, finer = coarser, tuple(rule.refined() for rule in coarser)
    coarse, fine = run.start.nodes(rules), run.start.nodes(finer)
    # Nodes of weight zero change nothing, and with them both share a program.
    wide = coarse.padded([max(n, m) for n, m in zip(coarse.net.widths, fine.net.widths, strict=True)])
    before, rtol, of_solver = run.solver_error(wide)
    earlier: Errors | None = None
    while True:
        sol = run(fine, rtol)
        change = _differences(sol, before)
        errors = _sum(
            {name: _extrapolated(d, earlier[name] if earlier else None) for name, d in change.items()}, of_solver
        )
        finer = tuple(rule.refined() for rule in finer)
        # More nodes do not help against the error of the solver.
        enough = errors["predictions"] <= run.accuracy or change["predictions"] <= of_solver["predictions"] / 2
        if enough or not run.fits(finer):
            return dataclasses.replace(sol, errors=_arrays(errors), title=_titled(fine))
        before, fine, earlier = sol, run.start.nodes(finer), change


def _extrapolated(change: float, earlier: float | None) -> float:
    """Error of the last run by the last two differences, as those of a geometric sequence."""
    if earlier is None:
        return FIRST_FACTOR * change
    ratio = min(change / earlier, SLOWEST_RATIO) if earlier > 0 else 0.0
    return change * max(1.0, ratio / (1 - ratio))


def _by_replicates(run: _Runs, rules: tuple[AbstractNodeRule, ...], replicates: int) -> Solution:
    from scipy.stats import t

    quantile = float(t.ppf(0.995, replicates - 1))
    _, rtol, of_solver = run.solver_error(run.start.nodes(rules))
    one = eqx.filter_jit(lambda nodes, rtol: run(nodes, rtol, throw=False))
    while True:
        first, rows = None, []
        for number in range(replicates):
            sol = one(run.start.nodes(tuple(rule.replicate(number) for rule in rules)), jnp.asarray(rtol))
            sol.check()
            first = sol if first is None else first
            rows.append(sol.observed)
        assert first is not None
        values = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
        scatter = {name: float(jnp.max(jnp.std(value, axis=0, ddof=1))) for name, value in values.items()}
        errors = _sum({name: quantile * std / replicates**0.5 for name, std in scatter.items()}, of_solver)
        finer = tuple(rule.refined() for rule in rules)
        enough, last = errors["predictions"] <= run.accuracy, not run.fits(finer)
        if enough or last:
            errors = _sum(errors, _of_grids(run, rules, first, rtol))
            enough = errors["predictions"] <= run.accuracy
        if enough or last or errors["predictions"] <= 1.5 * of_solver["predictions"]:
            title = f"{_titled(run.start.nodes(rules))}, mean of {replicates}"
            means = {name: jnp.mean(value, axis=0) for name, value in values.items()}
            return dataclasses.replace(first, observed=means, errors=_arrays(errors), title=title)
        rules = finer


def _of_grids(run: _Runs, rules: tuple[AbstractNodeRule, ...], first: Solution, rtol: float) -> Errors:
    """What refining the layers that have a grid does to the first replicate; scatter does not show their error."""
    finer = tuple(rule if rule.random else rule.refined() for rule in rules)
    drawn = run.start.nodes(rules), run.start.nodes(finer)
    if drawn[0].net.widths == drawn[1].net.widths:
        return dict.fromkeys(first.observed, 0.0)
    return {name: FIRST_FACTOR * d for name, d in _differences(run(drawn[1], rtol), first).items()}


def _differences(a: Solution, b: Solution) -> Errors:
    pairs = {name: (value, b.observed[name]) for name, value in a.observed.items()}
    return {name: float(jnp.max(jnp.abs(u - v))) for name, (u, v) in pairs.items() if u.shape == v.shape}


def _sum(a: Errors, b: Errors) -> Errors:
    return {name: a[name] + b[name] for name in a if name in b}


def _arrays(errors: Errors) -> dict[str, Array]:
    return {name: jnp.asarray(value) for name, value in errors.items()}


def _of(sol: Solution) -> dict[str, Array]:
    assert sol.errors is not None
    return sol.errors


@contextmanager
def _each_warning_once() -> Iterator[None]:
    """Says once for a call what every run in it says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            unique = {(str(one.message), one.category): one for one in caught}
    for one in unique.values():
        warnings.warn(one.message, one.category, stacklevel=4)


def _entries(widths: Sequence[int]) -> int:
    return widths[0] + sum(n * m for n, m in itertools.pairwise(widths)) + widths[-1]


def _titled(nodes: MeanFieldNodes) -> str:
    return f"MeanFieldFlow at width infinity, {' x '.join(map(str, nodes.net.widths))} nodes"
