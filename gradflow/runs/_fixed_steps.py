"""Paths of stochastic flows, in steps of fixed size between the save times."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Scalar

from gradflow import _checks
from gradflow._solution import Solution, Status, ended
from gradflow._tree import check_start
from gradflow.flows import AbstractStochasticFlow
from gradflow.rules import AbstractRule
from gradflow.runs._adaptive import valid_times
from gradflow.runs._iterate import RuleCheckpoint, iterate_to
from gradflow.runs._record import nan_where
from gradflow.runs._until import Until
from gradflow.solvers import AbstractStochasticMethod, EulerMaruyama, SmallNoise


class Path(AbstractRule):
    """One path as a rule: step `k` of an interval that `counts` steps divide."""

    sde: AbstractStochasticFlow
    method: AbstractStochasticMethod
    key: Key[Array, ""]
    edges: Float[Array, " intervals_1"]
    counts: Int[Array, " intervals"]
    earlier: Int[Array, ""]  # steps of the runs that this one continues

    @property
    def title(self) -> str:
        return type(self.sde).__name__

    @property
    def before(self) -> Int[Array, " intervals"]:
        """Steps taken before each interval."""
        return self.earlier + jnp.cumsum(self.counts) - self.counts

    def locate(self, k: Any) -> tuple[Any, Any]:
        """Time at step `k`, and the size of that step."""
        index = jnp.clip(jnp.searchsorted(self.before, k, side="right") - 1, 0, self.counts.size - 1)
        sizes = (self.edges[1:] - self.edges[:-1]) / jnp.maximum(self.counts, 1).astype(self.edges.dtype)
        within = jnp.asarray(k - self.before[index], sizes.dtype)
        return self.edges[index] + within * sizes[index], sizes[index]

    def time(self, k: Any) -> Any:
        return self.locate(k)[0]

    def init(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        return self.sde.init(trainable, frozen)

    def step(self, k: Int[Array, ""], state: PyTree, frozen: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        t, dt = self.locate(k)
        dtype = jnp.result_type(*jax.tree_util.tree_leaves(state))
        drawn = jax.random.normal(jax.random.fold_in(self.key, k), (self.sde.noise_size,), dtype)
        new = self.method.step(self.sde, frozen, t, dt, state, jnp.sqrt(dt).astype(dtype) * drawn)
        # The loss is looked at where it is saved; a step need not know it.
        return new, jnp.zeros(())

    def params(self, state: PyTree) -> PyTree:
        return self.sde.params(state)

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        found = self.sde.loss(state, frozen)
        return jnp.zeros(()) if found is None else found

    def flow(self, order: int = 1) -> AbstractStochasticFlow:
        return self.sde

    def with_learning_rate(self, learning_rate: float | Scalar) -> "AbstractRule":
        raise NotImplementedError("the steps of a path are those of its solver")

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        self.sde.check(trainable, frozen)


def solve_stochastic(
    flow: AbstractStochasticFlow,
    params: PyTree,
    ts: Float[Array, " T"],
    solver: Any,
    key: Any,
    max_steps: Any,
    *,
    observe: Mapping[str, Callable[[Any], Any]] | None,
    until: Until | None,
    save_params: bool,
    progress: bool,
    throw: bool,
    trainable: Any = None,
) -> Solution:
    """`solve` for stochastic flows; see there."""
    start, earlier = jnp.asarray(flow.t0, ts.dtype), jnp.asarray(0)
    if isinstance(params, Solution):
        if not isinstance(params.checkpoint, RuleCheckpoint) or params.checkpoint.key is None:
            actual = f"one of {params.title}"
            raise _checks.fail("params", f"be parameters, or a Solution of a {type(flow).__name__}", actual)
        start, earlier = params.t_final.astype(ts.dtype), params.checkpoint.k
        key = params.checkpoint.key if key is None else key
    elif _checks.is_concrete((flow, params)):
        check_start(flow, params)
    if key is None:
        raise _checks.fail("key", "be a random key for a stochastic flow", "None", "For instance jax.random.key(0).")
    key = _checks.check_key(key)
    if solver is None:
        solver = SmallNoise() if flow.weak_order > 1 else EulerMaruyama()
    if not isinstance(solver, AbstractStochasticMethod):
        advice = "For instance gradflow.solvers.EulerMaruyama(dt); see FixedSteps for those of diffrax."
        actual = f"of type {type(solver).__name__}"
        raise _checks.fail("solver", "be a method for stochastic flows", actual, advice)
    largest = flow.time_step if solver.dt is None else solver.dt
    edges = jnp.concatenate([start[None], ts])
    # A step that fits a whole number of times, up to rounding, is taken that often.
    counts = jnp.ceil((edges[1:] - edges[:-1]) / largest * (1 - 1e-9)).astype(int)
    if _checks.is_concrete((counts, max_steps)) and int(jnp.sum(counts)) > int(max_steps):
        actual = f"{int(max_steps)} for a run of {int(jnp.sum(counts))} steps"
        raise _checks.fail("max_steps", "be at least the number of steps", actual, "Raise it, or take larger steps.")
    # Save times that are none, known only during the run: no steps then, and no rows.
    valid = valid_times(ts, start)
    counts = jnp.where(valid, counts, 0)
    rule = Path(flow, solver, key, edges, counts, earlier)
    options: dict[str, Any] = {"observe": observe, "until": until, "save_params": save_params, "progress": progress}
    sol = iterate_to(rule, params, earlier + jnp.cumsum(counts), **options, throw=False, trainable=trainable)
    gradients, products = solver.evaluations(flow)
    cost = {"gradient_evaluations": gradients, "hessian_vector_products": products}
    stats = sol.stats | {name: sol.stats["steps"] * n if n >= 0 else jnp.asarray(-1) for name, n in cost.items()}
    checkpoint = dataclasses.replace(sol.checkpoint, key=key)
    solution = dataclasses.replace(sol, ts=ts, stats=stats, method=solver.name, checkpoint=checkpoint)
    return ended(_without_rows(solution, ~valid), throw)


def _without_rows(sol: Solution, invalid: Bool[Array, ""]) -> Solution:
    """The solution as that of a run whose save times were none, where they were."""

    def blank(leaf: Any) -> Any:
        if eqx.is_inexact_array(leaf):
            return nan_where(invalid, leaf)
        return jnp.where(invalid, jnp.zeros((), leaf.dtype), leaf) if eqx.is_array(leaf) else leaf

    rows = (None if sol.params is None else eqx.filter(sol.params, eqx.is_inexact_array), sol.observed)
    params, observed = jax.tree_util.tree_map(blank, rows)
    if sol.params is not None:
        params = eqx.combine(params, sol.params)
    code, saved = jnp.where(invalid, Status.INVALID_TIMES, sol.code), jnp.where(invalid, 0, sol.saved)
    return dataclasses.replace(sol, params=params, observed=observed, code=code, saved=saved)
