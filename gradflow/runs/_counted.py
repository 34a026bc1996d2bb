"""Runs in counted steps, `state_{k+1} = step(k, state_k)`: what rules and stochastic flows have in common.

Rows are written at given numbers of steps. A state or a loss that is not finite, a loss that has grown too far, and a
condition that is met end a run at the step at which that happens.
"""

import abc
import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Scalar

from gradflow._conserved import Conserved
from gradflow._solution import Solution, Status
from gradflow._tree import Extents, PaddedRest, full_precision, held_paths, join, strong, within
from gradflow.runs._record import Observable, Record, blank_record, write_row
from gradflow.runs._run import AbstractRun, ErrorCounts, Position
from gradflow.runs._until import Until

GROWTH = 1e6
"""Factor by which the loss may grow over its first value (or over one) before a run counts as diverged."""


class RuleCheckpoint(eqx.Module):
    """What a run in counted steps needs, besides its state, to be continued as if it had never stopped."""

    k: Int[Array, ""]
    largest_loss: Scalar
    key: Key[Array, ""] | None = None  # of a stochastic flow; rules hold their own


class ResumedRule(eqx.Module):
    """Where a continued run starts."""

    state: PyTree
    checkpoint: RuleCheckpoint


class AbstractCountedRun(AbstractRun):
    """What stays fixed during a run in counted steps."""

    frozen: eqx.AbstractVar[PyTree]
    start: eqx.AbstractVar[PyTree]
    ks: eqx.AbstractVar[Int[Array, " rows"]]  # the numbers of steps at which rows are written
    observe: eqx.AbstractVar[dict[str, Observable]]
    until: eqx.AbstractVar[Until | None]
    save_params: eqx.AbstractVar[bool]
    extents: eqx.AbstractVar[Extents | None]  # of a padded state
    resumed: eqx.AbstractVar[ResumedRule | None]

    @abc.abstractmethod
    def check(self) -> None:
        """Raises `ValueError` for parameters of a shape or type that the run cannot start from."""

    @abc.abstractmethod
    def starts_well(self, state: PyTree) -> Int[Array, ""]:
        """The status with which the run begins: that it runs, or why it cannot."""

    @abc.abstractmethod
    def step(self, k: Int[Array, ""], state: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        """The next state, and the loss at the present one; zero where a step need not know it."""

    @abc.abstractmethod
    def flowing(self, state: PyTree) -> PyTree:
        """The parameters in a state that flow."""

    @abc.abstractmethod
    def size_of_loss(self, state: PyTree) -> Float[Array, ""]:
        """The loss at a state, by which a run is told to have diverged; zero where there is none."""

    @abc.abstractmethod
    def charged(self, state: PyTree, tried: PyTree) -> PyTree:
        """The state, where a step that led to `tried` is not taken, with what that step has cost."""

    @abc.abstractmethod
    def observables_at(self, k: Int[Array, ""], state: PyTree) -> dict[str, Observable]:
        """What is observed after `k` steps, as functions of the parameters alone."""

    @abc.abstractmethod
    def clock(self, k: Int[Array, ""]) -> Scalar:
        """Time after `k` steps."""

    @abc.abstractmethod
    def cost(self, carry: "CountedCarry") -> dict[str, Array]:
        """Gradients and Hessian-vector products that the run has taken, by the names of the result."""

    @property
    @abc.abstractmethod
    def method_name(self) -> str:
        """What the result calls the method."""

    @property
    @abc.abstractmethod
    def time_unit(self) -> str:
        """How its time counts steps."""

    @abc.abstractmethod
    def random_key(self) -> Key[Array, ""] | None:
        """The key that a run which continues this one goes on with."""

    @property
    def first(self) -> Int[Array, ""]:
        """Steps taken by the runs that this one continues."""
        return (
            jnp.asarray(0, self.ks.dtype) if self.resumed is None else self.resumed.checkpoint.k.astype(self.ks.dtype)
        )

    def params(self, state: PyTree) -> PyTree:
        return join(self.flowing(state), self.frozen)

    def begin(self) -> "CountedCarry":
        return begin(self)

    def advance(self, carry: "CountedCarry", budget: Int[Array, ""]) -> "CountedCarry":
        return advance(self, carry, budget)

    def attempt(self, carry: "CountedCarry", max_steps: Int[Array, ""]) -> "CountedCarry":
        return attempt(self, carry, max_steps)

    def running(self, carry: "CountedCarry") -> bool:
        return int(carry.code) == Status.RUNNING and int(carry.row) < self.ks.size

    def progress(self, carry: "CountedCarry") -> tuple[float, str]:
        first, last = int(self.first), int(self.ks[-1])
        return (int(carry.k) - first) / max(last - first, 1), f"step {int(carry.k)}"

    def state(self, carry: "CountedCarry") -> PyTree:
        return carry.state

    def position(self, carry: "CountedCarry") -> Position:
        return Position(
            t=jnp.asarray(self.clock(carry.k), float),
            rows=carry.row,
            steps=carry.attempted,
            gradient_evaluations=self.cost(carry)["gradient_evaluations"],
        )

    def summarise(self, carry: "CountedCarry") -> Solution:
        return summarise(self, carry)

    def conserved(self, state: PyTree) -> dict[str, Conserved]:
        return {}

    def errors(self, state: PyTree) -> dict[str, Scalar]:
        return {}

    def evaluation(self) -> PyTree:
        return self.step(jnp.asarray(0), self.initial())

    def error_counts(self) -> None:
        return None

    def padded(self, widths: Extents, extents: Extents, counts: ErrorCounts) -> "AbstractCountedRun":
        return dataclasses.replace(self, frozen=PaddedRest(self.frozen, widths), extents=extents)


class CountedCarry(eqx.Module):
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


@eqx.filter_jit
@full_precision
def begin(run: AbstractCountedRun) -> CountedCarry:
    run.check()
    resumed = run.resumed
    state = run.initial() if resumed is None else resumed.state
    loss = run.size_of_loss(state)
    # In half precision a factor of a million overflows.
    factor = min(GROWTH, float(jnp.finfo(loss.dtype).max))
    largest = jnp.asarray(factor, loss.dtype) * jnp.maximum(jnp.abs(loss), 1)
    if resumed is not None:
        largest = resumed.checkpoint.largest_loss.astype(largest.dtype)
    k = run.first
    flowing, observe = run.flowing(state), run.observables_at(k, state)
    record = blank_record(run.ks.size, run.params(state), observe, run.save_params, flowing)
    code = jnp.where(jnp.isfinite(loss), run.starts_well(state), Status.NONFINITE)
    zero = jnp.zeros_like(k)
    carry = CountedCarry(k, zero, state, loss, largest, record, jnp.asarray(0), code)
    if run.until is not None:
        code = _met(run.until, run, state, carry.code)
        carry = eqx.tree_at(lambda c: c.code, carry, code)
        carry = _saved_if((code == Status.STOPPED) & (run.ks[0] == k), run, carry, k)
    return strong(carry)


@eqx.filter_jit
@full_precision
def advance(run: AbstractCountedRun, carry: CountedCarry, budget: Int[Array, ""]) -> CountedCarry:
    """At most `budget` steps, and the rows that fall due."""
    last = carry.attempted + budget
    dynamic, static = eqx.partition(carry, eqx.is_array)

    def running(state: PyTree) -> Bool[Array, ""]:
        now = eqx.combine(state, static)
        return (now.code == Status.RUNNING) & (now.row < run.ks.size) & (now.attempted < last)

    def body(state: PyTree) -> PyTree:
        now = eqx.combine(state, static)
        return eqx.filter(_towards(run, now, last - now.attempted), eqx.is_array)

    return strong(eqx.combine(jax.lax.while_loop(running, body, dynamic), static))


def attempt(run: AbstractCountedRun, carry: CountedCarry, max_steps: Int[Array, ""]) -> CountedCarry:
    """At most one step towards the next row, and that row once it falls due."""
    after = _towards(run, carry, jnp.asarray(1))
    going = after.code == Status.RUNNING
    code = jnp.where(going & (after.attempted >= max_steps), Status.MAX_STEPS, after.code)
    code = jnp.where(going & (after.row == run.ks.size), Status.OK, code)
    return eqx.tree_at(lambda c: c.code, after, code)


def _towards(run: AbstractCountedRun, carry: CountedCarry, max_steps: Int[Array, ""]) -> CountedCarry:
    """At most `most` steps towards the next row, and that row once it falls due."""
    k = run.ks[jnp.minimum(carry.row, run.ks.size - 1)]
    target = jnp.minimum(k, carry.k + max_steps.astype(k.dtype))
    after = _steps_to(run, carry, target)
    return _saved_if((after.k == k) | (after.code != Status.RUNNING), run, after, k)


def _steps_to(run: AbstractCountedRun, carry: CountedCarry, k: Int[Array, ""]) -> CountedCarry:
    """Steps until there are `k`, or until the run ends; a state that is not finite is never taken over."""

    def running(state: tuple[Array, Array, PyTree, Array]) -> Bool[Array, ""]:
        now, _, _, code = state
        return (now < k) & (code == Status.RUNNING)

    def one(state: tuple[Array, Array, PyTree, Array]) -> tuple[Array, Array, PyTree, Array]:
        now, attempted, old, code = state
        new, loss = run.step(now, old)
        new = new if run.extents is None else within(new, run.extents)
        finite = _all_finite(run.flowing(new)) & jnp.isfinite(loss)
        grown = loss.astype(carry.largest_loss.dtype) > carry.largest_loss
        code = jnp.where(grown, Status.DIVERGED, code)
        code = jnp.where(finite, code, Status.NONFINITE)
        keep = finite & ~grown
        chosen = jax.tree_util.tree_map(lambda a, b: jnp.where(keep, a, b), new, old)
        if run.until is not None:
            code = _met(run.until, run, chosen, code)
        return now + keep.astype(now.dtype), attempted + 1, run.charged(chosen, new), code

    start = (carry.k, carry.attempted, carry.state, carry.code)
    reached = jax.lax.while_loop(running, one, start)
    return eqx.tree_at(lambda c: (c.k, c.attempted, c.state, c.code), carry, reached)


def _met(until: Until, run: AbstractCountedRun, state: PyTree, code: Int[Array, ""]) -> Int[Array, ""]:
    """The status at a state, where a run in good order ends if its condition is met."""
    met = until.event_value(run.params(state)) >= 0
    return jnp.where((code == Status.RUNNING) & met, Status.STOPPED, code)


def _saved_if(due: Bool[Array, ""], run: AbstractCountedRun, carry: CountedCarry, k: Int[Array, ""]) -> CountedCarry:
    """With the row of step `k`, where it is due."""
    dynamic, static = eqx.partition(carry, eqx.is_array)
    write = lambda now: eqx.filter(_save(run, eqx.combine(now, static), k), eqx.is_array)  # noqa: E731
    return eqx.combine(jax.lax.cond(due, write, lambda now: now, dynamic), static)


def _save(run: AbstractCountedRun, carry: CountedCarry, k: Int[Array, ""]) -> CountedCarry:
    """Writes a row if step `k` has been reached by a run in good order."""
    loss = run.size_of_loss(carry.state)
    bad = jnp.where(jnp.isfinite(loss), carry.code, Status.NONFINITE)
    grown = loss > carry.largest_loss
    bad = jnp.where(grown & (bad == carry.code), Status.DIVERGED, bad)
    # A run whose condition is met has not been told to have diverged: a step knows the loss before it alone.
    code = jnp.where((carry.code == Status.RUNNING) | (carry.code == Status.STOPPED), bad, carry.code)
    good = ((code == Status.RUNNING) | (code == Status.STOPPED)) & (carry.k == k)
    params, observe = run.params(carry.state), run.observables_at(k, carry.state)
    record = jax.lax.cond(
        good,
        lambda: eqx.filter(write_row(carry.record, carry.row, params, observe), eqx.is_array),
        lambda: eqx.filter(carry.record, eqx.is_array),
    )
    record = eqx.combine(record, carry.record)
    row = carry.row + good.astype(carry.row.dtype)
    return eqx.tree_at(lambda c: (c.record, c.row, c.code), carry, (record, row, code))


@eqx.filter_jit
@full_precision
def summarise(run: AbstractCountedRun, carry: CountedCarry) -> Solution:
    """The result, with zeros in the rows that were not reached."""
    done = (carry.code == Status.RUNNING) & (carry.row == run.ks.size)
    interrupted = jnp.where(carry.code == Status.RUNNING, Status.INTERRUPTED, carry.code)
    stats = {
        "steps": carry.attempted,
        "accepted": carry.k - run.first,
        "rejected": carry.attempted - (carry.k - run.first),
        **run.cost(carry),
    }
    final_loss = run.loss(carry.state)
    return Solution(
        ts=run.save_times(),
        params=carry.record.params,
        final=run.params(carry.state),
        t_final=jnp.asarray(run.clock(carry.k), float),
        observed=carry.record.observed,
        code=jnp.where(done, Status.OK, interrupted),
        saved=carry.row,
        stats=stats,
        loss=None if final_loss is None else (carry.first_loss, final_loss),
        drift={},
        rtol=None,
        title=run.title,
        method=run.method_name,
        state=carry.state,
        checkpoint=RuleCheckpoint(carry.k, carry.largest_loss, run.random_key()),
        held=held_paths(run.frozen),
        time_unit=run.time_unit,
    )


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree_util.tree_leaves(tree)]))
