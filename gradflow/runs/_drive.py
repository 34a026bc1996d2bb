"""`drive`: takes a run to its end in segments, with one progress bar and one place where an interruption is caught."""

import abc
import dataclasses
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gradflow._captured import captured
from gradflow._checks import is_concrete
from gradflow._solution import Solution, SolveInterrupted
from gradflow._tree import Extents

SEGMENT = 0.3
"""Seconds that a segment is meant to take: an interruption from the keyboard is noticed between two segments."""
COST_OF_STEP = 8.0
"""Time of a step at first, over that of the beginning of the run, which evaluates the field twice."""
GROWTH = 64.0
"""By how much a segment may have more steps than the one before."""
ENDLESS = 2**30
"""A budget of steps that no run exhausts; twice that still fits into 32 bits."""


class AbstractRun(eqx.Module):
    """A run that can be taken further by a number of steps; `carry` is all that changes on the way.

    `code` tells functions apart that are one object and no longer compute the same, since a variable they take from
    elsewhere has changed: a program compiled before then would return stale numbers.
    """

    code: str = eqx.field(static=True, kw_only=True, default="")

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """What the progress bar is labelled with."""

    @abc.abstractmethod
    def begin(self) -> Any:
        """What there is before the first step. Compiled."""

    @abc.abstractmethod
    def advance(self, carry: Any, budget: Int[Array, ""]) -> Any:
        """At most `budget` attempted steps. Compiled."""

    @abc.abstractmethod
    def attempt(self, carry: Any, max_steps: Int[Array, ""]) -> Any:
        """One attempted step, for loops that drive many runs at once; `max_steps` of them at the most."""

    @abc.abstractmethod
    def summarise(self, carry: Any) -> Solution:
        """The result, with zeros in the rows that were not reached."""

    @abc.abstractmethod
    def evaluation(self) -> Any:
        """What is evaluated again and again, at the start: the derivative of the state, or a step of the rule."""

    @abc.abstractmethod
    def padded(self, widths: Extents, extents: Extents, counts: tuple[Int[Array, "..."], ...] | None) -> "AbstractRun":
        """The run of parameters and of a state that have been padded; error control sees `counts` of each leaf."""

    @abc.abstractmethod
    def running(self, carry: Any) -> bool:
        """Whether there is anything left to do."""

    @abc.abstractmethod
    def progress(self, carry: Any) -> tuple[float, str]:
        """The part of the run that is done, between 0 and 1, and a remark for the bar."""

    @abc.abstractmethod
    def finish(self, carry: Any) -> Solution:
        """The result, or the part of it that there is."""


def drive(run: AbstractRun, show: bool) -> Solution:
    """Runs from the beginning to the end. `show`: with a progress bar.

    Where values are concrete this is done in segments, so that a keyboard interruption is noticed within about a
    second, leaves nothing running on the device, and keeps what was computed. Under a trace there is one segment.

    **Raises** `SolveInterrupted`, with the partial solution.
    """
    if is_concrete(run):
        run = dataclasses.replace(run, code=captured(run))
    before = time.perf_counter()
    carry = run.begin()
    if not is_concrete((run, carry)):
        return run.finish(run.advance(carry, jnp.asarray(ENDLESS)))
    bar = _Bar(run.title) if show else None
    try:
        carry = jax.block_until_ready(carry)
        budget = int(np.clip(SEGMENT / (COST_OF_STEP * (time.perf_counter() - before)), 1, ENDLESS))
        while run.running(carry):
            before = time.perf_counter()
            carry = jax.block_until_ready(run.advance(carry, jnp.asarray(budget)))
            spent = time.perf_counter() - before
            budget = int(np.clip(budget * np.clip(SEGMENT / max(spent, 1e-9), 0.25, GROWTH), 1, ENDLESS))
            if bar is not None:
                bar.show(*run.progress(carry))
    except KeyboardInterrupt as error:
        raise SolveInterrupted(run.finish(carry)) from error
    finally:
        if bar is not None:
            bar.close()
    return run.finish(carry)


class _Bar:
    """A progress bar in per cent."""

    def __init__(self, title: str):
        from tqdm import tqdm

        form = "{desc} {percentage:3.0f} % |{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=100.0, unit="%", bar_format=form)
        self.bar.set_description(title)

    def show(self, done: float, remark: str) -> None:
        self.bar.update(min(100.0, 100.0 * done) - self.bar.n)
        self.bar.set_postfix_str(remark, refresh=False)

    def close(self) -> None:
        self.bar.close()
