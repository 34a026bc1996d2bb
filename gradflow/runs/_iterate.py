"""`iterate`: runs a discrete rule and returns the same `Solution` as `solve`, on the rule's own clock."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, PyTree, Scalar

from gradflow import _checks
from gradflow._solution import Solution, Status, ended
from gradflow._tree import (
    Extents,
    PaddedRest,
    check_start,
    full_precision,
    held_paths,
    join,
    method_of,
    strong,
    within,
)
from gradflow.rules import AbstractRule
from gradflow.runs._arguments import halves
from gradflow.runs._drive import AbstractRun, drive
from gradflow.runs._record import Record, bind, blank_record, check_observe, with_unreached_rows, write_row
from gradflow.runs._until import Until

GROWTH = 1e6
"""Factor by which the loss may grow over its first value (or over one) before a run counts as diverged."""


class RuleCheckpoint(eqx.Module):
    """What a run of a rule needs, besides its state, to be continued as if it had never stopped."""

    k: Int[Array, ""]
    largest_loss: Scalar
    key: Key[Array, ""] | None = None  # of a stochastic flow; rules hold their own


class ResumedRule(eqx.Module):
    """Where a continued run starts."""

    state: PyTree
    checkpoint: RuleCheckpoint


class RuleSetup(AbstractRun):
    """What stays fixed during a run."""

    rule: AbstractRule
    frozen: PyTree
    start: PyTree
    ks: Int[Array, " rows"]  # the iterates that are saved
    observe: dict[str, Callable[[Any], Any]]
    until: Until | None
    save_params: bool = eqx.field(static=True)
    extents: Extents | None = None  # of a padded state
    resumed: ResumedRule | None = None

    @property
    def title(self) -> str:
        return type(self.rule).__name__

    def params(self, state: PyTree) -> PyTree:
        return join(self.rule.params(state), self.frozen)

    def observed_at(self, k: Int[Array, ""], state: PyTree) -> dict[str, Callable[[Any], Any]]:
        return bind(self.observe, self.rule, self.rule.time(k), state, self.frozen)

    def begin(self) -> "RuleCarry":
        return begin_rule(self)

    def advance(self, carry: "RuleCarry", budget: Int[Array, ""]) -> "RuleCarry":
        return advance_rule(self, carry, budget)

    def attempt(self, carry: "RuleCarry", max_steps: Int[Array, ""]) -> "RuleCarry":
        return attempt_rule(self, carry, max_steps)

    def summarise(self, carry: "RuleCarry") -> Solution:
        return summarise_rule(self, carry)

    def evaluation(self) -> PyTree:
        return self.rule.step(jnp.asarray(0), self.rule.init(self.start, self.frozen), self.frozen)

    def padded(self, widths: Extents, extents: Extents, counts: tuple[Int[Array, "..."], ...] | None) -> "RuleSetup":
        return dataclasses.replace(self, frozen=PaddedRest(self.frozen, widths), extents=extents)

    def running(self, carry: "RuleCarry") -> bool:
        return int(carry.code) == Status.RUNNING and int(carry.row) < self.ks.size

    def progress(self, carry: "RuleCarry") -> tuple[float, str]:
        first, last = int(self.ks[0]), int(self.ks[-1])
        return (int(carry.k) - first) / max(last - first, 1), f"step {int(carry.k)}"

    def finish(self, carry: "RuleCarry") -> Solution:
        return finish_rule(self, carry)


class RuleCarry(eqx.Module):
    """What changes from step to step."""

    k: Int[Array, ""]
    attempted: Int[Array, ""]
    state: PyTree
    first_loss: Scalar
    largest_loss: Scalar  # beyond which the run counts as diverged
    record: Record
    row: Int[Array, ""]
    code: Int[Array, ""]

    @property
    def evaluations(self) -> Int[Array, "*batch"]:
        """What the run has cost so far, in steps."""
        return self.attempted


def iterate(
    rule: AbstractRule,
    params: PyTree,
    steps: int,
    *,
    observe: Mapping[str, Callable[[Any], Any]] | None = None,
    save_every: int | None = None,
    save_params: bool = True,
    until: Until | None = None,
    progress: bool = False,
    throw: bool = True,
    trainable: Any = None,
) -> Solution:
    """Runs `steps` steps of a discrete rule.

    **Arguments**

    - `rule`: such as `gradflow.GradientDescent(problem, learning_rate=0.1)`.
    - `params`, `observe`, `save_params`, `until`, `progress`, `throw`, `trainable`: as for `solve`; `until` is looked
      at at the saved iterates. A `Solution` of the same rule in place of `params` is continued from its iterate, with
      the memory of the optimiser, the count of steps and so the random numbers that a run without a break would draw.
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
    )


def iterate_to(
    rule: AbstractRule,
    params: PyTree,
    ks: Any,
    *,
    observe: Mapping[str, Callable[[Any], Any]] | None = None,
    save_params: bool = True,
    until: Until | None = None,
    progress: bool = False,
    throw: bool = True,
    trainable: Any = None,
) -> Solution:
    """As `iterate`, saving the iterates `ks`, which increase from the first on. One compilation per number of them."""
    saved: dict[str, Any] = {"observe": observe, "save_params": save_params, "until": until}
    setup = prepare_rule(rule, params, jnp.asarray(ks), **saved, trainable=trainable)
    return ended(drive(setup, progress), throw, lambda: _advice(setup))


def _advice(setup: RuleSetup) -> str:
    """What helps a run that failed, beyond what its status says."""
    why = method_of(getattr(setup.rule, "problem", None), "why_not_finite")
    return "" if why is None or not _checks.is_concrete(setup) else why(join(setup.start, setup.frozen))


def prepare_rule(
    rule: AbstractRule,
    params: PyTree,
    ks: Int[Array, " rows"],
    *,
    observe: Mapping[str, Callable[[Any], Any]] | None,
    save_params: bool,
    until: Until | None,
    trainable: Any = None,
) -> RuleSetup:
    """Checks the arguments of `iterate`; returns what the loop runs on."""
    flowing, frozen = halves(rule, params, trainable, rule.title, RuleCheckpoint)
    resumed = ResumedRule(params.state, params.checkpoint) if isinstance(params, Solution) else None
    _checks.check_finite("params", flowing, "A rule cannot start from there.")
    if resumed is None and _checks.is_concrete((rule, flowing, frozen)):
        check_start(rule, join(flowing, frozen))
    if until is not None and not isinstance(until, Until):
        raise _checks.fail("until", "be a gradflow.Until", f"of type {type(until).__name__}")
    observe = check_observe(observe)
    return RuleSetup(rule, frozen, flowing, ks, observe, until, bool(save_params), resumed=resumed)


@eqx.filter_jit
@full_precision
def begin_rule(setup: RuleSetup) -> RuleCarry:
    setup.rule.check(setup.start, setup.frozen)
    resumed = setup.resumed
    state = setup.rule.init(setup.start, setup.frozen) if resumed is None else resumed.state
    loss = setup.rule.loss(state, setup.frozen)
    # In half precision a factor of a million overflows.
    factor = min(GROWTH, float(jnp.finfo(loss.dtype).max))
    largest = jnp.asarray(factor, loss.dtype) * jnp.maximum(jnp.abs(loss), 1)
    k = jnp.asarray(0, setup.ks.dtype)
    if resumed is not None:
        k, largest = resumed.checkpoint.k.astype(k.dtype), resumed.checkpoint.largest_loss.astype(largest.dtype)
    flowing, observe = setup.rule.params(state), setup.observed_at(k, state)
    record = blank_record(setup.ks.size, setup.params(state), observe, setup.save_params, flowing)
    code = jnp.where(jnp.isfinite(loss), Status.RUNNING, Status.NONFINITE)
    zero = jnp.zeros_like(k)
    return strong(RuleCarry(k, zero, state, loss, largest, record, jnp.asarray(0), code))


@eqx.filter_jit
@full_precision
def advance_rule(setup: RuleSetup, carry: RuleCarry, budget: Int[Array, ""]) -> RuleCarry:
    """At most `budget` steps, and the rows of the iterates that are reached."""
    last = carry.attempted + budget
    dynamic, static = eqx.partition(carry, eqx.is_array)

    def running(state: PyTree) -> Bool[Array, ""]:
        now = eqx.combine(state, static)
        return (now.code == Status.RUNNING) & (now.row < setup.ks.size) & (now.attempted < last)

    def body(state: PyTree) -> PyTree:
        now = eqx.combine(state, static)
        return eqx.filter(_towards(setup, now, last - now.attempted), eqx.is_array)

    return strong(eqx.combine(jax.lax.while_loop(running, body, dynamic), static))


def attempt_rule(setup: RuleSetup, carry: RuleCarry, max_steps: Int[Array, ""]) -> RuleCarry:
    """At most one step towards the next of the iterates that are saved, and its row once it is reached."""
    after = _towards(setup, carry, jnp.asarray(1))
    going = after.code == Status.RUNNING
    code = jnp.where(going & (after.attempted >= max_steps), Status.MAX_STEPS, after.code)
    code = jnp.where(going & (after.row == setup.ks.size), Status.OK, code)
    return eqx.tree_at(lambda c: c.code, after, code)


def _towards(setup: RuleSetup, carry: RuleCarry, most: Int[Array, ""]) -> RuleCarry:
    """At most `most` steps towards the next of the iterates that are saved, and its row once it is reached."""
    k = setup.ks[jnp.minimum(carry.row, setup.ks.size - 1)]
    target = jnp.minimum(k, carry.k + most.astype(k.dtype))
    dynamic, static = eqx.partition(_steps_to(setup, carry, target), eqx.is_array)
    due = (dynamic.k == k) | (dynamic.code != Status.RUNNING)
    write = lambda now: eqx.filter(_save(setup, eqx.combine(now, static), k), eqx.is_array)  # noqa: E731
    return eqx.combine(jax.lax.cond(due, write, lambda now: now, dynamic), static)


def _steps_to(setup: RuleSetup, carry: RuleCarry, k: Int[Array, ""]) -> RuleCarry:
    """Steps until iterate `k`, or until the run breaks down; a state that is not finite is never taken over."""

    def running(state: tuple[Array, Array, PyTree, Array]) -> Bool[Array, ""]:
        now, _, _, code = state
        return (now < k) & (code == Status.RUNNING)

    def one(state: tuple[Array, Array, PyTree, Array]) -> tuple[Array, Array, PyTree, Array]:
        now, attempted, old, code = state
        new, loss = setup.rule.step(now, old, setup.frozen)
        new = new if setup.extents is None else within(new, setup.extents)
        finite = _all_finite(setup.rule.params(new)) & jnp.isfinite(loss)
        grown = loss.astype(carry.largest_loss.dtype) > carry.largest_loss
        code = jnp.where(grown, Status.DIVERGED, code)
        code = jnp.where(finite, code, Status.NONFINITE)
        keep = finite & ~grown
        kept = jax.tree_util.tree_map(lambda a, b: jnp.where(keep, a, b), new, old)
        return now + keep.astype(now.dtype), attempted + 1, setup.rule.with_cost_of(kept, new), code

    start = (carry.k, carry.attempted, carry.state, carry.code)
    found = jax.lax.while_loop(running, one, start)
    return eqx.tree_at(lambda c: (c.k, c.attempted, c.state, c.code), carry, found)


def _save(setup: RuleSetup, carry: RuleCarry, k: Int[Array, ""]) -> RuleCarry:
    """Writes a row if iterate `k` has been reached by a run in good order."""
    loss = setup.rule.loss(carry.state, setup.frozen)
    bad = jnp.where(jnp.isfinite(loss), carry.code, Status.NONFINITE)
    grown = loss > carry.largest_loss
    bad = jnp.where(grown & (bad == Status.RUNNING), Status.DIVERGED, bad)
    code = jnp.where(carry.code == Status.RUNNING, bad, carry.code)
    good = (code == Status.RUNNING) & (carry.k == k)
    params, observe = setup.params(carry.state), setup.observed_at(k, carry.state)
    record = jax.lax.cond(
        good,
        lambda: eqx.filter(write_row(carry.record, carry.row, params, observe), eqx.is_array),
        lambda: eqx.filter(carry.record, eqx.is_array),
    )
    record = eqx.combine(record, carry.record)
    if setup.until is not None:
        code = jnp.where(good & (setup.until.excess(params) >= 0), Status.STOPPED, code)
    row = carry.row + good.astype(carry.row.dtype)
    return eqx.tree_at(lambda c: (c.record, c.row, c.code), carry, (record, row, code))


def finish_rule(setup: RuleSetup, carry: RuleCarry) -> Solution:
    """The result, with NaN in the rows that were not reached."""
    return with_unreached_rows(summarise_rule(setup, carry))


@eqx.filter_jit
@full_precision
def summarise_rule(setup: RuleSetup, carry: RuleCarry) -> Solution:
    """The result, with zeros in the rows that were not reached."""
    rule, ks = setup.rule, setup.ks
    first, spent = 0, rule.gradient_evaluations(carry.state, carry.attempted)
    if setup.resumed is not None:
        first = setup.resumed.checkpoint.k
        before = rule.gradient_evaluations(setup.resumed.state, jnp.zeros_like(carry.attempted))
        spent = jnp.where(spent < 0, spent, spent - before)
    done = (carry.code == Status.RUNNING) & (carry.row == ks.size)
    interrupted = jnp.where(carry.code == Status.RUNNING, Status.INTERRUPTED, carry.code)
    stats = {
        "steps": carry.attempted,
        "accepted": carry.k - first,
        "rejected": carry.attempted - (carry.k - first),
        "gradient_evaluations": spent,
        "hessian_vector_products": jnp.asarray(0),
    }
    return Solution(
        ts=jnp.asarray(rule.time(ks), float),
        params=carry.record.params,
        final=setup.params(carry.state),
        t_final=jnp.asarray(rule.time(carry.k), float),
        observed=carry.record.observed,
        code=jnp.where(done, Status.OK, interrupted),
        saved=carry.row,
        stats=stats,
        loss=(carry.first_loss, rule.loss(carry.state, setup.frozen)),
        drift={},
        rtol=None,
        title=rule.title,
        method="discrete steps",
        state=carry.state,
        checkpoint=RuleCheckpoint(carry.k, carry.largest_loss),
        held=held_paths(setup.frozen),
    )


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree_util.tree_leaves(tree)]))
