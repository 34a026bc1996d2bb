"""`iterate`: runs a discrete rule and returns the same `Solution` as `solve`, on the rule's own clock."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from gradflow import _checks, _solution
from gradflow._record import Record, blank_record, check_observe, unreached_as_nan, write_row
from gradflow._solution import Solution, SolveInterrupted
from gradflow._tree import Extents, full_precision, join, split, within
from gradflow._until import Until
from gradflow.rules import AbstractRule

GROWTH = 1e6
"""Factor by which the loss may grow over its first value (or over one) before a run counts as diverged."""


class RuleSetup(eqx.Module):
    """What stays fixed during a run."""

    rule: AbstractRule
    frozen: PyTree
    start: PyTree
    observe: dict[str, Callable[[Any], Any]]
    until: Until | None
    save_params: bool = eqx.field(static=True)
    extents: Extents | None = None  # of a padded state

    def params(self, state: PyTree) -> PyTree:
        return join(self.rule.params(state), self.frozen)


class RuleCarry(eqx.Module):
    """What changes from step to step."""

    k: Int[Array, ""]
    attempted: Int[Array, ""]
    state: PyTree
    first_loss: Scalar
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
) -> Solution:
    """Runs `steps` steps of a discrete rule.

    **Arguments**

    - `rule`: such as `gradflow.GradientDescent(problem, learning_rate=0.1)`.
    - `params`, `observe`, `save_params`, `until`, `progress`, `throw`: as for `solve`; `until` is looked at at the
      saved iterates.
    - `steps`: number of steps, at least one.
    - `save_every`: save iterates `0, save_every, 2 save_every, ...` and the last; by default about a hundred of them.

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
    return iterate_to(
        rule,
        params,
        ks,
        observe=observe,
        save_params=save_params,
        until=until,
        progress=progress,
        throw=throw,
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
) -> Solution:
    """As `iterate`, saving the iterates `ks`, which increase from zero on. One compilation per number of them."""
    ks = jnp.asarray(ks)
    setup = prepare_rule(rule, params, observe=observe, save_params=save_params, until=until)
    carry = begin_rule(setup, ks)
    if progress and _checks.is_concrete((setup, carry)):
        carry = _with_progress(setup, carry, ks)
    else:
        carry = _advance(setup, carry, ks)
    solution = finish_rule(setup, carry, ks)
    if throw:
        solution.check()
    return solution


def prepare_rule(
    rule: AbstractRule,
    params: PyTree,
    *,
    observe: Mapping[str, Callable[[Any], Any]] | None,
    save_params: bool,
    until: Until | None,
) -> RuleSetup:
    """Checks the arguments of `iterate`; returns what the loop runs on."""
    trainable, frozen = split(params)
    _checks.check_finite("params", trainable, "A rule cannot start from there.")
    if until is not None and not isinstance(until, Until):
        raise _checks.fail("until", "be a gradflow.Until", f"of type {type(until).__name__}")
    return RuleSetup(rule, frozen, trainable, check_observe(observe), until, bool(save_params))


@eqx.filter_jit
@full_precision
def begin_rule(setup: RuleSetup, ks: Int[Array, " rows"]) -> RuleCarry:
    setup.rule.check(setup.start, setup.frozen)
    state = setup.rule.init(setup.start, setup.frozen)
    loss = setup.rule.loss(state, setup.frozen)
    record = blank_record(ks.size, setup.params(state), setup.observe, setup.save_params)
    code = jnp.where(jnp.isfinite(loss), _solution.RUNNING, _solution.NONFINITE)
    zero = jnp.asarray(0, ks.dtype)
    return RuleCarry(zero, zero, state, loss, record, jnp.asarray(0), code)


@eqx.filter_jit
@full_precision
def _advance(setup: RuleSetup, carry: RuleCarry, ks: Int[Array, " rows"]) -> RuleCarry:
    """Goes on to each of the iterates `ks` in turn."""
    dynamic, static = eqx.partition(carry, eqx.is_array)

    def body(state: PyTree, k: Int[Array, ""]) -> tuple[PyTree, None]:
        now = _save(setup, _steps_to(setup, eqx.combine(state, static), k), k)
        return eqx.filter(now, eqx.is_array), None

    dynamic, _ = jax.lax.scan(body, dynamic, ks)
    return eqx.combine(dynamic, static)


def attempt_rule(setup: RuleSetup, carry: RuleCarry, ks: Int[Array, " rows"], max_steps: Int[Array, ""]) -> RuleCarry:
    """At most one step towards the next of the iterates `ks`, and its row once it is reached."""
    k = ks[jnp.minimum(carry.row, ks.size - 1)]
    dynamic, static = eqx.partition(_steps_to(setup, carry, jnp.minimum(k, carry.k + 1)), eqx.is_array)
    due = (dynamic.k == k) | (dynamic.code != _solution.RUNNING)
    write = lambda now: eqx.filter(_save(setup, eqx.combine(now, static), k), eqx.is_array)  # noqa: E731
    after = eqx.combine(jax.lax.cond(due, write, lambda now: now, dynamic), static)
    going = after.code == _solution.RUNNING
    code = jnp.where(going & (after.attempted >= max_steps), _solution.MAX_STEPS, after.code)
    code = jnp.where(going & (after.row == ks.size), _solution.OK, code)
    return eqx.tree_at(lambda c: c.code, after, code)


def _steps_to(setup: RuleSetup, carry: RuleCarry, k: Int[Array, ""]) -> RuleCarry:
    """Steps until iterate `k`, or until the run breaks down; a state that is not finite is never taken over."""
    bound = GROWTH * jnp.maximum(jnp.abs(carry.first_loss), 1)

    def running(state: tuple[Array, Array, PyTree, Array]) -> Bool[Array, ""]:
        now, _, _, code = state
        return (now < k) & (code == _solution.RUNNING)

    def one(state: tuple[Array, Array, PyTree, Array]) -> tuple[Array, Array, PyTree, Array]:
        now, attempted, old, code = state
        new, loss = setup.rule.step(now, old, setup.frozen)
        new = new if setup.extents is None else within(new, setup.extents)
        finite = _all_finite(setup.rule.params(new)) & jnp.isfinite(loss)
        grown = loss > bound
        code = jnp.where(grown, _solution.DIVERGED, code)
        code = jnp.where(finite, code, _solution.NONFINITE)
        keep = finite & ~grown
        kept = jax.tree_util.tree_map(lambda a, b: jnp.where(keep, a, b), new, old)
        return now + keep.astype(now.dtype), attempted + 1, kept, code

    start = (carry.k, carry.attempted, carry.state, carry.code)
    found = jax.lax.while_loop(running, one, start)
    return eqx.tree_at(lambda c: (c.k, c.attempted, c.state, c.code), carry, found)


def _save(setup: RuleSetup, carry: RuleCarry, k: Int[Array, ""]) -> RuleCarry:
    """Writes a row if iterate `k` has been reached by a run in good order."""
    loss = setup.rule.loss(carry.state, setup.frozen)
    bad = jnp.where(jnp.isfinite(loss), carry.code, _solution.NONFINITE)
    grown = loss > GROWTH * jnp.maximum(jnp.abs(carry.first_loss), 1)
    bad = jnp.where(grown & (bad == _solution.RUNNING), _solution.DIVERGED, bad)
    code = jnp.where(carry.code == _solution.RUNNING, bad, carry.code)
    good = (code == _solution.RUNNING) & (carry.k == k)
    params = setup.params(carry.state)
    record = jax.lax.cond(
        good,
        lambda: eqx.filter(write_row(carry.record, carry.row, params, setup.observe), eqx.is_array),
        lambda: eqx.filter(carry.record, eqx.is_array),
    )
    record = eqx.combine(record, carry.record)
    if setup.until is not None:
        code = jnp.where(good & (setup.until.excess(params) >= 0), _solution.STOPPED, code)
    row = carry.row + good.astype(carry.row.dtype)
    return RuleCarry(carry.k, carry.attempted, carry.state, carry.first_loss, record, row, code)


def finish_rule(setup: RuleSetup, carry: RuleCarry, ks: Int[Array, " rows"]) -> Solution:
    """The result, with NaN in the rows that were not reached."""
    solution = summarise_rule(setup, carry, ks)
    rows = unreached_as_nan((solution.params, solution.observed), solution.saved)
    return dataclasses.replace(solution, params=rows[0], observed=rows[1])


@eqx.filter_jit
@full_precision
def summarise_rule(setup: RuleSetup, carry: RuleCarry, ks: Int[Array, " rows"]) -> Solution:
    """The result, with zeros in the rows that were not reached."""
    rule = setup.rule
    done = (carry.code == _solution.RUNNING) & (carry.row == ks.size)
    interrupted = jnp.where(carry.code == _solution.RUNNING, _solution.INTERRUPTED, carry.code)
    stats = {
        "steps": carry.attempted,
        "accepted": carry.k,
        "rejected": carry.attempted - carry.k,
        "gradient_evaluations": rule.gradients_per_step * carry.attempted,
        "hessian_vector_products": jnp.asarray(0),
    }
    return Solution(
        ts=jnp.asarray(rule.time(ks), float),
        params=carry.record.params,
        final=setup.params(carry.state),
        t_final=jnp.asarray(rule.time(carry.k), float),
        observed=carry.record.observed,
        code=jnp.where(done, _solution.OK, interrupted),
        saved=carry.row,
        stats=stats,
        loss=(carry.first_loss, rule.loss(carry.state, setup.frozen)),
        drift={},
        rtol=None,
        title=type(rule).__name__,
        method="discrete steps",
    )


def _with_progress(setup: RuleSetup, carry: RuleCarry, ks: Int[Array, " rows"]) -> RuleCarry:
    """Segments of a few saved iterates each, with a bar over the steps."""
    from tqdm import tqdm

    parts = min(ks.size, 50)
    # Equal parts, so that at most two programs are compiled.
    length = -(-ks.size // parts)
    with tqdm(total=int(ks[-1]), desc=type(setup.rule).__name__, unit="step") as bar:
        for first in range(0, ks.size, length):
            try:
                carry = jax.block_until_ready(_advance(setup, carry, ks[first : first + length]))
            except KeyboardInterrupt as error:
                raise SolveInterrupted(finish_rule(setup, carry, ks)) from error
            bar.update(int(carry.k) - bar.n)
            if int(carry.code) != _solution.RUNNING:
                break
    return carry


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree_util.tree_leaves(tree)]))
