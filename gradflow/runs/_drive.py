"""`drive`: takes a run to its end in segments, with one progress bar and one place where an interruption is caught."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from gradflow._checks import is_concrete
from gradflow._solution import Solution, SolveInterrupted
from gradflow.programs import captured
from gradflow.runs._run import AbstractRun

SEGMENT = 0.3
"""Seconds that a segment is meant to take: an interruption from the keyboard is noticed between two segments."""
COST_OF_STEP = 8.0
"""Time of a step at first, over that of the beginning of the run, which evaluates the field twice."""
GROWTH = 64.0
"""By how much a segment may have more steps than the one before."""
ENDLESS = 2**30
"""A budget of steps that no run exhausts; twice that still fits into 32 bits."""


def drive(run: AbstractRun, show: bool) -> Solution:
    """Runs from the beginning to the end. `show`: with a progress bar.

    Where values are concrete this is done in segments, so that a keyboard interruption is noticed within about a
    second, leaves nothing running on the device, and keeps what was computed. Under a trace there is one segment.

    **Raises** `SolveInterrupted`, with the partial solution.
    """
    run = dataclasses.replace(run, code=captured(run)) if is_concrete(run) else run.under_trace()
    before = time.perf_counter()
    carry = run.begin()
    if not is_concrete((run, carry)):
        run = run.under_trace()  # functions may have captured what is not concrete
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
