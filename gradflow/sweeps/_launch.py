"""Sweeps in several processes: which part of a grid is whose, and jobs that each run one."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray as xr

from gradflow._checks import check_count, fail
from gradflow.runs._progress import Bar
from gradflow.stores._store import CHUNK
from gradflow.stores._zarr_group import discard, open_store

POLL = 1.0
"""Seconds between two looks at jobs."""


class Share(NamedTuple):
    """Part `k` of `n` of a grid. Parts are made of whole chunks of the store, so that no two write the same file."""

    k: int
    n: int

    @property
    def whole(self) -> bool:
        return self.n == 1

    def holds(self, index: Sequence[int], shape: Sequence[int]) -> bool:
        """Whether the member at this index of the grid belongs to it."""
        row = int(np.ravel_multi_index(tuple(index[:-1]), tuple(shape[:-1]))) if len(shape) > 1 else 0
        return (row * -(-shape[-1] // CHUNK) + index[-1] // CHUNK) % self.n == self.k

    def __str__(self) -> str:
        return f"{self.k}-of-{self.n}"


def check_share(chunk: Any, store: Any, resume: bool) -> Share:
    """The part of a sweep that this process is to run."""
    if chunk is None:
        share = Share(jax.process_index(), jax.process_count())
    else:
        pair = isinstance(chunk, tuple | list) and len(chunk) == 2
        if not pair or not all(isinstance(i, int | np.integer) for i in chunk) or not 0 <= chunk[0] < chunk[1]:
            raise fail("chunk", "be a pair (k, n) with 0 <= k < n", repr(chunk))
        share = Share(int(chunk[0]), int(chunk[1]))
    if not share.whole and store is None:
        raise fail("store", "be a path when several processes share a sweep", "None")
    if not share.whole and not resume:
        advice = "Delete the store, or start one chunk over by itself, before the others begin."
        raise fail("resume", "be True when several processes share a store", "False", advice)
    return share


def launch_jobs(
    executor: Any,
    jobs: int,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
    share: Share,
    progress: bool,
) -> xr.Dataset:
    """Submits a job for each chunk of a sweep, waits for all, and opens the store."""
    check_count("jobs", jobs)
    if not callable(getattr(executor, "submit", None)):
        actual = f"of type {type(executor).__name__}"
        raise fail("launch", "be an executor with `submit`", actual, "For instance submitit.AutoExecutor(folder).")
    store = options["store"]
    if store is None:
        raise fail("store", "be a path when jobs share a sweep", "None")
    if not share.whole:
        raise fail("chunk", "be None when jobs are launched, which get theirs", f"({share.k}, {share.n})")
    if not options["resume"]:
        discard(store)
    settings = options | {"resume": True, "progress": False}
    x64 = bool(jax.config.read("jax_enable_x64"))
    # Executors of clusters submit what belongs together as one array.
    with getattr(executor, "batch", contextlib.nullcontext)():
        submitted = [executor.submit(_run_chunk, run, args, settings, (k, jobs), x64) for k in range(jobs)]
    _wait(submitted, store, progress)
    failed = [(k, job.exception()) for k, job in enumerate(submitted) if job.exception() is not None]
    if failed:
        k, error = failed[0]
        raise RuntimeError(
            f"{len(failed)} of {jobs} jobs failed, the first of them with chunk ({k}, {jobs}): {error}. What is"
            f" finished is kept in {str(store)!r}, and the same call goes on with the rest."
        ) from error
    return open_store(store)


def _run_chunk(
    run: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], chunk: tuple[int, int], x64: bool
) -> None:
    """In the process of the job: one chunk, at the precision of the process that launched it."""
    jax.config.update("jax_enable_x64", x64)
    run(*args, **options, chunk=chunk)


def _wait(submitted: list[Any], store: Any, progress: bool) -> None:
    with Bar("jobs", None, unit="members", show=progress) as bar:
        while not all(job.done() for job in submitted):
            time.sleep(POLL)
            with contextlib.suppress(ValueError, OSError, KeyError):
                status = open_store(store)["status"].values
                bar.reach(int(np.sum(status != -1)), total=status.size)
