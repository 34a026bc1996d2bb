"""Sweeps in several processes: which part of a grid is whose, and jobs that each run one."""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
import xarray as xr

from gradflow._checks import check_count, fail
from gradflow.protocols import offered
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


@runtime_checkable
class Job(Protocol):
    """What has been submitted, as a `concurrent.futures.Future` is."""

    def done(self) -> bool:
        """Whether it has ended."""
        ...

    def exception(self) -> BaseException | None:
        """What it has failed with, once it has ended."""
        ...


@runtime_checkable
class Executor(Protocol):
    """What runs a function somewhere else, as those of `concurrent.futures` and of submitit do."""

    def submit(self, fn: Callable[..., object], /, *args: object) -> Job:
        """Has `fn(*args)` run."""
        ...


def check_share(chunk: tuple[int, int] | None, store: str | os.PathLike[str] | None, resume: bool) -> Share:
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
    executor: object,
    jobs: int,
    run: Callable[..., xr.Dataset],
    store: str | os.PathLike[str] | None,
    resume: bool,
    share: Share,
    progress: bool,
) -> xr.Dataset:
    """Submits a job for each chunk of a sweep, `run(chunk=(k, n))`, waits for all, and opens the store."""
    check_count("jobs", jobs)
    submitting = offered(executor, Executor)
    if submitting is None:
        actual = f"of type {type(executor).__name__}"
        raise fail("launch", "be an executor with `submit`", actual, "For instance submitit.AutoExecutor(folder).")
    if store is None:
        raise fail("store", "be a path when jobs share a sweep", "None")
    if not share.whole:
        raise fail("chunk", "be None when jobs are launched, which get theirs", f"({share.k}, {share.n})")
    if not resume:
        discard(store)
    x64 = bool(jax.config.read("jax_enable_x64"))
    # Executors of clusters submit what belongs together as one array.
    with getattr(submitting, "batch", contextlib.nullcontext)():
        submitted = [submitting.submit(_run_chunk, run, (k, jobs), x64) for k in range(jobs)]
    _wait(submitted, store, progress)
    failed = [(k, error) for k, job in enumerate(submitted) if (error := job.exception()) is not None]
    if failed:
        k, error = failed[0]
        raise RuntimeError(
            f"{len(failed)} of {jobs} jobs failed, the first of them with chunk ({k}, {jobs}): {error}. What is"
            f" finished is kept in {str(store)!r}, and the same call goes on with the rest."
        ) from error
    return open_store(store)


def _run_chunk(run: Callable[..., xr.Dataset], chunk: tuple[int, int], x64: bool) -> None:
    """In the process of the job: one chunk, at the precision of the process that launched it."""
    jax.config.update("jax_enable_x64", x64)
    run(chunk=chunk)


def _wait(submitted: Sequence[Job], store: str | os.PathLike[str], progress: bool) -> None:
    with Bar("jobs", None, unit="members", show=progress) as bar:
        while not all(job.done() for job in submitted):
            time.sleep(POLL)
            with contextlib.suppress(ValueError, OSError, KeyError):
                status = open_store(store)["status"].values
                bar.reach(int(np.sum(status != -1)), total=status.size)
