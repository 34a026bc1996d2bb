"""The host's side of a sweep: gives out members, collects results, and keeps unfinished members on disk.

Members are run by workers. A worker is one compiled loop at a time, on one device or on several; on a CPU with a single
device, which leaves most cores idle, there may be a worker for every core, each in a thread that does nothing but wait
for its loop. All else happens in the thread of the caller.
"""

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from gradflow.runs._member import Options
from gradflow.sweeps._checkpoint import Checkpoint
from gradflow.sweeps._memory import Plan
from gradflow.sweeps._program import PerMember, at
from gradflow.sweeps._slots import EMPTY, Pending, SlotState, divided, empty_slots, run_segment

SEGMENT = 0.5
"""Seconds between two looks at the results of a worker, where there are no more workers than `PROMPT`."""
PROMPT = 8
"""Workers beyond which their segments get longer, for there is one host."""


class Finished(NamedTuple):
    """Members that have finished, by number, and their results, stacked."""

    member_ids: np.ndarray
    results: PyTree


class Segment(NamedTuple):
    """Slots after a segment, and how long it took."""

    state: SlotState
    seconds: float


Fixed = tuple[PyTree, Options]
"""What the members of one program share, and the options."""

Running = concurrent.futures.Future[Segment]
"""A segment on its way."""


class Costs:
    """What the members of a sweep have taken so far.

    `evaluations`: by device, those of slots that only waited for another included.
    """

    def __init__(self) -> None:
        self.evaluations: int | np.ndarray = 0


def run_queue(
    per_member_of: Callable[[list[int]], PerMember],
    missing: list[int],
    shared: PyTree,
    options: Options,
    planned: Plan,
    *,
    mesh: Mesh | None,
    checkpoint: Checkpoint | None,
    costs: Costs,
) -> Generator[Finished]:
    """Runs members, by number; yields what has finished, segment by segment, be it nothing.

    They are admitted in the order of `missing`, after the unfinished ones of the checkpoint. `per_member_of(numbers)`
    gives what these have of their own. What they take is added to `costs`.
    """
    devices = 1 if mesh is None else mesh.size
    blank = empty_slots(at(per_member_of(missing[:1]), 0), planned.shapes, planned.slots, planned.room)
    state = divided(jax.tree_util.tree_map(lambda leaf: jnp.stack([leaf] * devices), blank), mesh)
    states = [state] * planned.workers
    if checkpoint is not None:
        states = checkpoint.load(states, set(missing))
    running = {number for state in states for number in np.ravel(state.member_ids).tolist()}
    waiting = [number for number in missing if number not in running]
    fill = lambda assigned, more: _pending_of(per_member_of, missing, assigned, planned.room, more, mesh)  # noqa: E731
    workers = [Worker(state, mesh, planned.workers) for state in states]
    results: list[Finished] = []
    with _threads(len(workers)) as threads:
        busy: dict[Running, Worker] = {}
        warm = False
        while True:
            # The first worker compiles, for all.
            for worker in workers:
                if (warm or not busy) and worker not in busy.values() and worker.load(waiting, fill):
                    busy[threads.submit(worker, (shared, options))] = worker
            try:
                yield from results
            except GeneratorExit:  # the sweep is stopped by its caller
                if checkpoint is not None:
                    checkpoint.save([worker.state for worker in workers])
                raise
            if not busy and warm:
                break
            # After the results are out, for finished members are not kept; busy workers are, as their segment began.
            if checkpoint is not None and warm and checkpoint.due():
                checkpoint.save([worker.state for worker in workers])
            try:
                done = threads.wait(busy)
                results = [busy[future].collect(future.result()) for future in done]
            except KeyboardInterrupt:
                if checkpoint is not None:
                    checkpoint.save([worker.state for worker in workers])
                raise
            for future in done:
                costs.evaluations = costs.evaluations + busy.pop(future).evaluations_since()
            warm = True
    if checkpoint is not None:
        checkpoint.clear()


class Worker:
    """Slots, the members assigned to them, and how long their segments are."""

    def __init__(self, state: SlotState, mesh: Mesh | None, workers: int):
        self.state, self._mesh, self._workers = state, mesh, workers
        self._devices = 1 if mesh is None else mesh.size
        self._assigned: list[list[int]] = [[] for _ in range(self._devices)]
        self._pending: Pending | None = None
        self._budget, self._warm, self._num_evaluations = 1, False, np.ravel(state.num_evaluations)
        self._segment = SEGMENT * max(1.0, workers / PROMPT)

    def load(self, waiting: list[int], fill: Callable[[list[list[int]], bool], Pending]) -> bool:
        """Assigns members where they run short, from `waiting`; whether there is anything to do."""
        if self._pending is None or waiting:
            assigned = np.ravel(self.state.next).tolist()
            if self._pending is None or any(n > len(row) // 2 for n, row in zip(assigned, self._assigned, strict=True)):
                self._assigned = [row[count:] for row, count in zip(self._assigned, assigned, strict=True)]
                member_ids = np.ravel(self.state.member_ids).reshape(self._devices, -1)
                _assign(waiting, self._assigned, member_ids, self.state.finished_ids.shape[-1], self._workers)
                self._pending = fill(self._assigned, bool(waiting))
                self.state = eqx.tree_at(lambda f: f.next, self.state, self._zero())
        left = sum(len(row) for row in self._assigned) - int(np.sum(np.asarray(self.state.next)))
        return bool(waiting) or left > 0 or bool(np.any(np.asarray(self.state.member_ids) != EMPTY))

    def run(self, fixed: Fixed) -> Segment:
        """The slots after one segment, and the seconds that this took."""
        assert self._pending is not None
        began = time.perf_counter()
        state = jax.block_until_ready(
            run_segment(fixed, self._pending, self.state, jnp.asarray(self._budget), self._mesh)
        )
        return Segment(state, time.perf_counter() - began)

    def collect(self, segment: Segment) -> Finished:
        """Goes on from the end of a segment; what finished within it."""
        state, took = segment.state, segment.seconds
        finished = _collect(state, np.ravel(state.num_finished), self._devices)
        self.state = eqx.tree_at(lambda f: f.num_finished, state, self._zero())
        # The first segment compiles.
        pace = np.clip(self._segment / max(took, 1e-9), 0.5, 4.0)
        self._budget = int(np.clip(self._budget * pace, 1, 10**9)) if self._warm else 64
        self._warm = True
        return finished

    def evaluations_since(self) -> np.ndarray:
        """Evaluations by device since the last call."""
        before, self._num_evaluations = self._num_evaluations, np.ravel(self.state.num_evaluations)
        return self._num_evaluations - before

    def _zero(self) -> Array:
        return divided(jnp.zeros(self._devices, int), self._mesh)


class _Inline:
    """Runs what has been submitted when it is waited for: a pool without threads."""

    def submit(self, worker: Worker, fixed: Fixed) -> Running:
        self._todo, self._future = (worker, fixed), concurrent.futures.Future()
        return self._future

    def wait(self, running: Iterable[Running]) -> Iterable[Running]:
        """Those that have ended."""
        worker, fixed = self._todo
        self._future.set_result(worker.run(fixed))
        return [self._future]


class _Pool:
    """Threads that run with the precision of the thread that made them."""

    def __init__(self, pool: concurrent.futures.ThreadPoolExecutor):
        self._pool, self._x64 = pool, jnp.result_type(float) == jnp.float64

    def submit(self, worker: Worker, fixed: Fixed) -> Running:
        return self._pool.submit(self._run, worker, fixed)

    def wait(self, running: Iterable[Running]) -> Iterable[Running]:
        """Those that have ended, once there is one."""
        return concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done

    def _run(self, worker: Worker, fixed: Fixed) -> Segment:
        with jax.enable_x64(self._x64):
            return worker.run(fixed)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[_Inline | _Pool]:
    if count == 1:
        yield _Inline()
    else:
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            yield _Pool(pool)


def _assign(waiting: list[int], assigned: list[list[int]], member_ids: np.ndarray, room: int, workers: int) -> None:
    """Moves members from the queue to those assigned, in turn; the fewer are left, the fewer, so that all end
    together."""
    loops = len(assigned) * workers
    per_loop = max(1, -(-len(waiting) // (2 * loops))) if loops > 1 else room
    wanted = [max(int(np.sum(row == EMPTY)), min(room, per_loop)) for row in member_ids]
    while waiting and any(len(mine) < min(limit, room) for mine, limit in zip(assigned, wanted, strict=True)):
        for mine, limit in zip(assigned, wanted, strict=True):
            if waiting and len(mine) < min(limit, room):
                mine.append(waiting.pop(0))


def _pending_of(
    per_member_of: Callable[[list[int]], PerMember],
    missing: list[int],
    assigned: list[list[int]],
    room: int,
    more: bool,
    mesh: Mesh | None,
) -> Pending:
    filled = [mine + (mine or missing)[:1] * (room - len(mine)) for mine in assigned]
    per_member = per_member_of([number for mine in filled for number in mine])
    split = lambda leaf: leaf.reshape((len(assigned), room, *leaf.shape[1:]))  # noqa: E731
    per_member = jax.tree_util.tree_map(split, per_member)
    sizes, others = jnp.asarray([len(mine) for mine in assigned]), jnp.full(len(assigned), more)
    return divided(Pending(per_member, jnp.asarray(filled), sizes, others), mesh)


def _collect(state: SlotState, counts: np.ndarray, devices: int) -> Finished:
    """What finished, on all devices."""
    if not counts.any():
        return Finished(np.empty(0, int), None)
    finished, finished_ids = jax.device_get((state.finished, state.finished_ids))
    if devices == 1:
        count = int(counts[0])
        return Finished(finished_ids[:count], jax.tree_util.tree_map(lambda leaf: leaf[:count], finished))
    mine = np.arange(finished_ids.shape[1]) < counts[:, None]
    return Finished(finished_ids[mine], jax.tree_util.tree_map(lambda leaf: leaf[mine], finished))
