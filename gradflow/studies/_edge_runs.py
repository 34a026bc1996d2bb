"""The runs of the study of the edge of stability: learning rates, a rule for all seeds, a flow for all seeds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._tree import flatten, join, split
from gradflow.flows import GradientFlow
from gradflow.observables import HessianEigenpairs, Loss, Sharpness
from gradflow.rules import AbstractRule
from gradflow.runs._iterate import iterate_to
from gradflow.runs._solve import solve
from gradflow.studies._edge_flows import ADAPTIVE, KINKED, WARM_UP, Case
from gradflow.sweeps import sweep
from gradflow.theory import stability_threshold

SHARPNESS_TIMES = 31
"""Times at which the sharpness of gradient flow is looked at to choose a learning rate."""
ACCURACY: dict[str, Any] = {"rtol": 1e-3, "iterations": 40}
"""Of eigenvalues, whose errors are far below the bound on residuals."""
SMALLEST_RATE = 1e-5
"""The learning rate of an adaptive rule from which on it is doubled, and then bisected, until the share is met."""

BISECTIONS = 6
"""To one per cent."""


class Setting(NamedTuple):
    """What all runs have in common; `ks` are the steps at which flows are compared."""

    problem: Any
    models: list[Any]
    ks: np.ndarray
    rtol: float
    about: dict[str, Any]


class RuleRuns(NamedTuple):
    """A rule from every start: its midpoints, and what is known of them, at the steps `ks`."""

    rule: Any
    models: list[Any]
    ks: np.ndarray
    midpoints: Float[np.ndarray, "seeds rows size"]
    losses: Float[np.ndarray, "seeds steps"]  # averaged as midpoints are, at steps 1, 2, ...
    roots: Float[np.ndarray, "seeds rows size"]  # D^(-1/2); one where the rule has no memory
    travelled: Float[np.ndarray, " seeds"]
    warm: list[tuple[Any, Any]]  # parameters and memory after the warm-up; no memory where the rule has none

    @property
    def threshold(self) -> float:
        return float(stability_threshold(self.rule))


def run_rule(rule: Any, models: list[Any], ks: np.ndarray) -> RuleRuns:
    """A rule from all starts in one program, one step beyond the last of `ks`."""
    see: dict[str, Any] = {"loss": Loss(rule.problem)}
    if isinstance(rule, ADAPTIVE):
        see["memory"] = Memory()
    run = _iterated(rule, *_stacked(models), np.arange(int(ks[-1]) + 2), see)
    iterates = rows_of(run.params)
    middle = midpoints(iterates)
    roots = np.ones((len(models), ks.size, iterates.shape[2]))
    warm: list[tuple[Any, Any]] = [(model, None) for model in models]
    if isinstance(rule, ADAPTIVE):
        # The memory by which a step is divided has seen its gradient: it is that of the next iterate.
        roots = roots / np.sqrt(rows_of(rule.memory.scale(run.observed["memory"], jnp.zeros(())))[:, ks + 1])
        trainable, frozen = split(models[0])
        structure = jax.tree_util.tree_structure(rule.memory.start(trainable))
        late = [_at((run.params, run.observed["memory"]), i, WARM_UP) for i in range(len(models))]
        warm = [
            (join(split(params)[0], frozen), jax.tree_util.tree_unflatten(structure, memory)) for params, memory in late
        ]
    losses = midpoints(np.asarray(run.observed["loss"])[:, :, None])[:, :, 0]
    travelled = np.linalg.norm(middle[:, -1] - iterates[:, 0], axis=1)
    return RuleRuns(rule, models, ks, middle[:, ks - 1], losses, roots, travelled, warm)


def learning_rate(make: Callable[[Any], Any], models: list[Any], share: float, steps: int) -> float:
    """The learning rate whose threshold is a share of the largest sharpness that gradient flow reaches in all steps.

    The median over starts. For an adaptive rule, at which the sharpness after the warm-up is a share of the threshold,
    at the most.
    """
    one = make(1.0)
    if isinstance(one, ADAPTIVE):
        return _adaptive_rate(make, models, share)
    threshold, horizon = float(stability_threshold(one)), steps * unit_of_time(one)
    return float(np.median([_rate(one.problem, model, share, threshold, horizon) for model in models]))


def _rate(problem: Any, model: Any, share: float, threshold: float, horizon: float) -> float:
    """For one start; threshold and time of all steps are those of learning rate one."""
    see = Sharpness(problem)
    largest = threshold / (share * float(see(model)))
    rates = np.linspace(0, largest, SHARPNESS_TIMES)
    times, seen = rates * horizon, {"sharpness": see}
    along = solve(GradientFlow(problem), model, times, rtol=1e-3, observe=seen, save_params=False)
    reached = np.maximum.accumulate(np.asarray(along.observed["sharpness"]))
    return float(np.interp(1.0, share * reached * rates / threshold, rates))


def _adaptive_rate(make: Callable[[Any], Any], models: list[Any], share: float) -> float:
    """The smallest one at which the sharpness reaches that share, by doubling and bisection of its logarithm."""
    starts, ks = _stacked(models), np.array([WARM_UP, WARM_UP + 1])

    def reached(rate: float) -> float:
        rule = make(rate)
        run = _iterated(rule, *starts, ks, {"memory": Memory()})
        roots = 1 / np.sqrt(rows_of(rule.memory.scale(run.observed["memory"], jnp.zeros(())))[:, 1:])
        points = rows_of(run.params)[:, :1]
        eigenvalues = [
            leading_eigenvalues(rule.problem, models[0], point, np.array(np.broadcast_to(root, point.shape)))
            for point, root in zip(points, roots, strict=True)
        ]
        return max(float(values[0, 0]) for values in eigenvalues) / float(stability_threshold(rule))

    low = SMALLEST_RATE
    while reached(2 * low) < share and low < 1:
        low *= 2
    high = 2 * low
    for _ in range(BISECTIONS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if reached(middle) < share else (low, middle)
    return low


def follow(case: Case, runs: RuleRuns, chosen: list[int], rtol: float, store: Any, resume: bool) -> xr.Dataset:
    """A flow from the starts with the numbers `chosen`, at those of the steps `ks` that lie after its start."""
    rule = runs.rule

    def build(start: int) -> tuple[Any, Any]:
        return started(case, runs, start)

    def observe(flow: Any) -> dict[str, Any]:
        see = {"predicted_loss": case.loss(rule.problem)}
        return see | ({"root": Root()} if case.remembers else {})

    flow, params = build(chosen[0])
    patience = case.patience * (KINKED if flow.kinks(*split(params)) else 1)
    first = WARM_UP if case.remembers else 0
    ts = (runs.ks - first) * unit_of_time(rule)
    ts = ts[(runs.ks > first) & (ts > float(flow.t0))]
    axes = {"start": chosen}
    options: dict[str, Any] = {"rtol": rtol, "save_params": True, "store": store, "resume": resume, "progress": False}
    return sweep(build, axes, ts, observe=observe, max_steps=patience * int(runs.ks[-1]), **options)


def started(case: Case, runs: RuleRuns, start: int) -> tuple[Any, Any]:
    """A flow and its start, by number: that of the rule, or what the rule has become after its warm-up."""
    params, memory = runs.warm[start] if case.remembers else (runs.models[start], None)
    return case.build(runs.rule, memory), params


def refusal(case: Case, runs: RuleRuns, start: int) -> str:
    """Why a flow refuses to start, as a reason of the study; empty where it does not."""
    flow, params = started(case, runs, start)
    try:
        flow.check_values(*split(params))
    except ValueError:
        return "refused_kinks" if flow.kinks(*split(params)) else "refused_start"
    return ""


class Memory(eqx.Module):
    """The leaves of the memory of a rule."""

    def __call__(self, params: PyTree) -> Any:
        raise TypeError("The memory belongs to the state of a rule.")

    def of_state(self, rule: Any, t: Scalar, state: Any, frozen: PyTree) -> tuple[Array, ...]:
        return tuple(jax.tree_util.tree_leaves(state[1]))


class Root(eqx.Module):
    """`D^(-1/2)` along the central flow of a rule with a memory, flat."""

    def __call__(self, params: PyTree) -> Array:
        raise TypeError("The memory belongs to the state of a flow.")

    def of_state(self, flow: Any, t: Scalar, state: Any, frozen: PyTree) -> Float[Array, " size"]:
        scale = flow.form.memory.scale(state.memory, t / flow.form.learning_rate)
        like, _ = flatten(state.params)
        return jnp.broadcast_to(1 / jnp.sqrt(flatten(scale)[0]), like.shape)


class Displaced(eqx.Module):
    """A problem as a function of `v`, at `w + D^(-1/2) v`: its Hessian at zero is `D^(-1/2) H D^(-1/2)`."""

    problem: Any
    model: Any
    point: Float[Array, " size"]
    root: Float[Array, " size"]

    def __call__(self, v: Float[Array, " size"]) -> Scalar:
        trainable, frozen = split(self.model)
        return self.problem(join(flatten(trainable)[1](self.point + self.root * v), frozen))


@eqx.filter_jit
def leading_eigenvalues(
    problem: Any, model: Any, points: Float[ArrayLike, "rows size"], roots: Float[ArrayLike, "rows size"]
) -> Float[Array, "rows 2"]:
    """The two largest eigenvalues of `D^(-1/2) H D^(-1/2)` along a path, followed from row to row."""
    points, roots = jnp.asarray(points), jnp.asarray(roots)
    zero = jnp.zeros_like(points[0])

    def at(memory: Any, row: tuple[Array, Array]) -> tuple[Any, Array]:
        memory, pairs = HessianEigenpairs(Displaced(problem, model, *row), 2, **ACCURACY).follow(memory, zero)
        return memory, pairs.values

    first = HessianEigenpairs(Displaced(problem, model, points[0], roots[0]), 2, **ACCURACY).first_memory(zero)
    return jax.lax.scan(at, first, (points, roots))[1]


def unit_of_time(rule: AbstractRule) -> float:
    """Flow time of one step."""
    return float(rule.time(1) - rule.time(0))


def midpoints(values: Float[np.ndarray, "seeds rows size"]) -> Float[np.ndarray, "seeds rows-2 size"]:
    """`(w_{k-1} + 2 w_k + w_{k+1}) / 4`."""
    return (values[:, :-2] + 2 * values[:, 1:-1] + values[:, 2:]) / 4


def rows_of(tree: PyTree) -> Float[np.ndarray, "seeds rows size"]:
    """Arrays with leading axes for seeds and rows, flat behind these, in the order of `flatten`."""
    leaves = [np.asarray(leaf) for leaf in jax.tree_util.tree_leaves(eqx.filter(tree, eqx.is_inexact_array))]
    return np.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=2)


def _stacked(models: list[Any]) -> tuple[PyTree, PyTree]:
    """Parameters that flow, stacked, and the rest, which models share."""
    parts = [split(model)[0] for model in models]
    return jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *parts), split(models[0])[1]


@eqx.filter_jit
def _iterated(rule: AbstractRule, starts: PyTree, frozen: PyTree, ks: Any, see: dict[str, Any]) -> Any:
    """A rule from several starts in one program."""
    run = lambda start: iterate_to(rule, join(start, frozen), ks, observe=see, throw=False)  # noqa: E731
    return eqx.filter_vmap(run)(starts)


def _at(tree: PyTree, start: int, row: int) -> PyTree:
    return jax.tree_util.tree_map(lambda leaf: leaf[start, row] if eqx.is_inexact_array(leaf) else leaf, tree)
