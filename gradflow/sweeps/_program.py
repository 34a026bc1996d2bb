"""One member of a sweep as the driver sees it: a start, one attempt after another, a result. Flows and rules alike."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from gradflow._solution import Solution, moving
from gradflow._tree import Extents
from gradflow.rules import AbstractRule
from gradflow.runs._drive import AbstractRun
from gradflow.runs._iterate import prepare_rule
from gradflow.runs._solve import prepare
from gradflow.runs._until import Until
from gradflow.solvers import AbstractMethod, StepControl


class Options(eqx.Module):
    """What all members have in common; numbers are leaves."""

    ts: Array
    solver: diffrax.AbstractSolver | AbstractMethod
    control: StepControl
    until: Until | None
    max_steps: Array
    save_params: bool = eqx.field(static=True)
    jumps: Array | None = None
    longest_step: Array | None = None
    # Of all functions and what they refer to: a program is not used again after a global has changed.
    code: str = eqx.field(static=True, default="")


class Padding(eqx.Module):
    """The sizes of a padded member."""

    widths: Extents  # of its parameters
    extents: Extents  # of its state
    counts: tuple[Int[Array, "..."], ...] | None  # entries of each leaf that the error control sees


class Own(eqx.Module):
    """What a member has of its own; a batch of them has one more leading axis."""

    run: PyTree  # arrays of its flow or rule, its parameters and its observables, where they differ between members
    iterates: Int[Array, " rows"] | None = None  # those of a rule that are saved
    padding: Padding | None = None


class Program(eqx.Module):
    """A member made ready to run. Exists while the driver is traced."""

    run: AbstractRun
    own: Own
    max_steps: Array

    def begin(self) -> PyTree:
        return self.run.begin()

    def attempt(self, carry: Any) -> PyTree:
        """One attempted step."""
        return self.run.attempt(carry, self.max_steps)

    def result(self, carry: Any) -> Solution:
        """The solution with the saved parameters that flow, zeros in rows not reached, and without the last ones."""
        solution = self.run.summarise(carry)
        parts = lambda s: (s.params, s.final, s.state, s.checkpoint)  # noqa: E731
        flowing = moving(solution.params, solution.held)
        return eqx.tree_at(parts, solution, (flowing, None, None, None), is_leaf=lambda x: x is None)

    def evaluation(self) -> Any:
        return self.run.evaluation()


def make_program(own: Own, shared: PyTree, options: Options) -> Program:
    """The program of a member, from its own part and that which it shares with the others of its group."""
    what, params, observe = eqx.combine(own.run, shared)
    run: AbstractRun
    if isinstance(what, AbstractRule):
        assert own.iterates is not None
        saved = {"save_params": options.save_params, "until": options.until}
        run = prepare_rule(what, params, own.iterates, observe=observe, **saved)
    else:
        run = prepare(
            what,
            params,
            options.ts,
            observe=observe,
            solver=options.solver,
            rtol=options.control.rtol,
            atol=options.control.atol,
            save_params=options.save_params,
            until=options.until,
            max_steps=options.max_steps,
            jumps=options.jumps,
            longest_step=options.longest_step,
        )
    if own.padding is not None:
        run = run.padded(own.padding.widths, own.padding.extents, own.padding.counts)
    return Program(run, own, options.max_steps)


def nearest_iterates(rule: AbstractRule, ts: Array, most: int) -> np.ndarray:
    """The iterates of a rule nearest to given times, by its own clock; at most `most`.

    Found by bisection, for clocks need not tick evenly.
    """
    times = np.asarray(ts, float)

    def clock(k: np.ndarray) -> np.ndarray:
        return np.asarray(rule.time(jnp.asarray(k)), float)

    start = float(clock(np.zeros(1, int))[0])
    pace = float(clock(np.ones(1, int))[0]) - start
    guess = np.clip(np.rint((times - start) / pace), 0, most).astype(int)
    if np.all(np.abs(clock(guess) - times) <= 0.5 * pace * (1 + 1e-9)):
        return guess
    low, high = np.zeros_like(guess), np.full_like(guess, most)
    while np.any(high > low):
        middle = (low + high) // 2
        later = 0.5 * (clock(middle) + clock(middle + 1)) >= times
        low, high = np.where(later, low, middle + 1), np.where(later, middle, high)
    return low


def at(tree: PyTree, index: Any) -> PyTree:
    """The entry of every leaf at an index of its leading axis."""
    return jax.tree_util.tree_map(lambda leaf: leaf[index], tree)
