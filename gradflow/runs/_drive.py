"""`drive`: takes a run to its end in segments, and ends it well if it is interrupted."""

import dataclasses
import os
import time
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradflow._checks import fail, is_concrete
from gradflow._solution import Solution, SolveInterrupted
from gradflow.programs import captured
from gradflow.runs._callback import Callback, check_callback
from gradflow.runs._run import AbstractRun
from gradflow.runs._watch import Watch

if TYPE_CHECKING:
    from gradflow.runs._stored_run import StoredRun

SEGMENT = 0.3
"""Seconds that a segment is meant to take: an interruption from the keyboard is noticed between two segments."""
COST_OF_STEP = 8.0
"""Time of a step at first, over that of the beginning of the run, which evaluates the field twice."""
GROWTH = 64.0
"""By how much a segment may have more steps than the one before."""
ENDLESS = 2**30
"""A budget of steps that no run exhausts; twice that still fits into 32 bits."""


def drive(
    run: AbstractRun,
    show: bool,
    *,
    store: str | os.PathLike[str] | None = None,
    resume: bool = True,
    callback: Callback | None = None,
) -> Solution:
    """Runs from the beginning to the end. `show`: with a progress bar; `store`, `resume`, `callback`: as for `solve`.

    Where values are concrete this is done in segments, so that a keyboard interruption is noticed within about a
    second, leaves nothing running on the device, and keeps what was computed. Under a trace there is one segment.

    **Raises** `SolveInterrupted`, and `SolveError` where a store can no longer be written, with the partial solution;
    what `callback` raises, which gets an attribute `solution`.
    """
    check_callback(callback)
    if is_concrete(run):
        run = dataclasses.replace(run, code=captured(run))
    elif store is not None or callback is not None:
        advice = "Call it outside of jax.jit and jax.vmap; gradflow.sweep keeps many runs in one store."
        raise fail("callback" if store is None else "store", "be None under a trace", "given", advice)
    else:
        run = run.under_trace()
    stored = None if store is None else _stored(run, store, resume)
    try:
        before = time.perf_counter()
        carry = run.begin()
        if not is_concrete((run, carry)):
            run = run.under_trace()  # functions may have captured what is not concrete
            return run.finish(run.advance(carry, jnp.asarray(ENDLESS)))
        carry = jax.block_until_ready(carry)
        took = time.perf_counter() - before
        with Watch(run, show, stored, callback) as watch:
            return _in_segments(run, carry, watch, took)
    finally:
        if stored is not None:
            stored.close()


def _in_segments(run: AbstractRun, carry: PyTree, watch: Watch, took: float) -> Solution:
    """The rest of a run whose beginning `took` some seconds."""
    try:
        carry = watch.begin(carry)
        budget = int(np.clip(SEGMENT / (COST_OF_STEP * took), 1, ENDLESS))
        while run.running(carry):
            before = time.perf_counter()
            carry = jax.block_until_ready(run.advance(carry, jnp.asarray(budget)))
            seconds = time.perf_counter() - before
            budget = int(np.clip(budget * np.clip(SEGMENT / max(seconds, 1e-9), 0.25, GROWTH), 1, ENDLESS))
            watch.segment(carry)
    except KeyboardInterrupt as error:
        raise SolveInterrupted(watch.end(carry)) from error
    return watch.end(carry)


def _stored(run: AbstractRun, store: str | os.PathLike[str], resume: bool) -> "StoredRun":
    """The run in its store, which needs packages that a run without one does not wait for."""
    if jax.process_count() > 1:
        actual = f"given in a run of {jax.process_count()} processes"
        raise fail("store", "be None where several processes compute one run", actual)
    from gradflow.runs._stored_run import StoredRun

    return StoredRun(run, store, resume=resume)
