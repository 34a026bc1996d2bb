"""The host's side of a sweep: gives out members, collects results, and keeps unfinished members on disk.

Members fly in lanes. A lane is one compiled loop at a time, on one device or on several; on a CPU with a single device,
which leaves most cores idle, there may be a lane for every core, each in a thread that does nothing but wait for its
loop. All else happens in the thread of the caller.
"""

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from gradflow.runs._member import Options
from gradflow.sweeps._checkpoint import Checkpoint
from gradflow.sweeps._memory import Plan
from gradflow.sweeps._program import Own, at
from gradflow.sweeps._slots import VACANT, Flight, Inbox, divided, fly, vacant

SEGMENT = 0.5
"""Seconds between two looks at the results of a lane, where there are no more lanes than `PROMPT`."""
PROMPT = 8
"""Lanes beyond which their segments get longer, for there is one host."""


def run_queue(
    members: Callable[[list[int]], Own],
    missing: list[int],
    shared: PyTree,
    options: Options,
    planned: Plan,
    *,
    mesh: Mesh | None,
    checkpoint: Checkpoint | None,
    tally: dict[str, Any],
) -> Iterator[tuple[np.ndarray, PyTree]]:
    """Runs members, by number; yields those that landed and their results, stacked, segment by segment.

    They set off in the order of `missing`, after the unfinished ones of the checkpoint. `members(numbers)` gives
    what these have of their own. `tally["evaluations"]` gets, by device, what was spent, slots that only waited for
    another included.
    """
    devices = 1 if mesh is None else mesh.size
    blank = vacant(at(members(missing[:1]), 0), planned.shapes, planned.slots, planned.room)
    flight = divided(jax.tree_util.tree_map(lambda leaf: jnp.stack([leaf] * devices), blank), mesh)
    flights = [flight] * planned.lanes
    if checkpoint is not None:
        flights = checkpoint.load(flights, set(missing))
    aboard = {number for flight in flights for number in np.ravel(flight.who).tolist()}
    waiting = [number for number in missing if number not in aboard]
    fill = lambda handed, more: _inbox(members, missing, handed, planned.room, more, mesh)  # noqa: E731
    lanes = [Lane(flight, mesh, planned.lanes) for flight in flights]
    start = lambda lane: lane.fly((shared, options))  # noqa: E731
    arrived: list[tuple[np.ndarray, PyTree]] = []
    with _threads(len(lanes)) as threads:
        busy: dict[Any, Lane] = {}
        warm = False
        while True:
            # The first lane compiles, for all.
            for lane in lanes:
                if (warm or not busy) and lane not in busy.values() and lane.load(waiting, fill):
                    busy[threads.submit(start, lane)] = lane
            yield from (landed for landed in arrived if landed[0].size)
            if not busy and warm:
                break
            # After the results are out, for who has landed is not kept; lanes that fly are kept as they set off.
            if checkpoint is not None and warm and checkpoint.due():
                checkpoint.save([lane.flight for lane in lanes])
            try:
                done, _ = threads.wait(busy)
                arrived = [busy[future].land(future.result()) for future in done]
            except KeyboardInterrupt:
                if checkpoint is not None:
                    checkpoint.save([lane.flight for lane in lanes])
                raise
            for future in done:
                tally["evaluations"] = tally.get("evaluations", 0) + busy.pop(future).news()
            warm = True
    if checkpoint is not None:
        checkpoint.clear()


class Lane:
    """A flight, the members handed to it, and how long its segments are."""

    def __init__(self, flight: Flight, mesh: Mesh | None, lanes: int):
        self.flight, self._mesh, self._lanes = flight, mesh, lanes
        self._devices = 1 if mesh is None else mesh.size
        self._handed: list[list[int]] = [[] for _ in range(self._devices)]
        self._inbox: Inbox | None = None
        self._budget, self._warm, self._spent = 1, False, np.ravel(flight.spent)
        self._segment = SEGMENT * max(1.0, lanes / PROMPT)

    def load(self, waiting: list[int], fill: Callable[[list[list[int]], bool], Inbox]) -> bool:
        """Hands out members where they run short, from `waiting`; whether there is anything to do."""
        if self._inbox is None or waiting:
            taken = np.ravel(self.flight.next).tolist()
            if self._inbox is None or any(n > len(who) // 2 for n, who in zip(taken, self._handed, strict=True)):
                self._handed = [who[count:] for who, count in zip(self._handed, taken, strict=True)]
                who = np.ravel(self.flight.who).reshape(self._devices, -1)
                _hand_out(waiting, self._handed, who, self.flight.sender.shape[-1], self._lanes)
                self._inbox = fill(self._handed, bool(waiting))
                self.flight = eqx.tree_at(lambda f: f.next, self.flight, self._zero())
        left = sum(len(who) for who in self._handed) - int(np.sum(np.asarray(self.flight.next)))
        return bool(waiting) or left > 0 or bool(np.any(np.asarray(self.flight.who) != VACANT))

    def fly(self, fixed: tuple[PyTree, Options]) -> tuple[Flight, float]:
        """The flight after one segment, and the seconds that this took."""
        assert self._inbox is not None
        began = time.perf_counter()
        flight = jax.block_until_ready(fly(fixed, self._inbox, self.flight, jnp.asarray(self._budget), self._mesh))
        return flight, time.perf_counter() - began

    def land(self, segment: tuple[Flight, float]) -> tuple[np.ndarray, PyTree]:
        """Goes on with the flight after a segment; the members that landed, and their results."""
        flight, took = segment
        found = _collect(flight, np.ravel(flight.landed), self._devices)
        self.flight = eqx.tree_at(lambda f: f.landed, flight, self._zero())
        # The first segment compiles.
        pace = np.clip(self._segment / max(took, 1e-9), 0.5, 4.0)
        self._budget = int(np.clip(self._budget * pace, 1, 10**9)) if self._warm else 64
        self._warm = True
        return found

    def news(self) -> np.ndarray:
        """Evaluations by device since the last call."""
        before, self._spent = self._spent, np.ravel(self.flight.spent)
        return self._spent - before

    def _zero(self) -> Any:
        return divided(jnp.zeros(self._devices, int), self._mesh)


class _Inline:
    """Runs what has been submitted when it is waited for: a pool without threads."""

    def submit(self, fn: Callable[..., Any], *args: Any) -> "concurrent.futures.Future[Any]":
        self._todo, self._future = (fn, args), concurrent.futures.Future()
        return self._future

    def wait(self, futures: Any) -> tuple[list[Any], list[Any]]:
        fn, args = self._todo
        self._future.set_result(fn(*args))
        return [self._future], []


class _Pool:
    """Threads that run with the precision of the thread that made them."""

    def __init__(self, pool: concurrent.futures.ThreadPoolExecutor):
        self._pool, self._x64 = pool, jnp.result_type(float) == jnp.float64

    def submit(self, fn: Callable[..., Any], *args: Any) -> "concurrent.futures.Future[Any]":
        return self._pool.submit(self._run, fn, *args)

    def wait(self, futures: Any) -> Any:
        return concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)

    def _run(self, fn: Callable[..., Any], *args: Any) -> Any:
        with jax.enable_x64(self._x64):
            return fn(*args)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[_Inline | _Pool]:
    if count == 1:
        yield _Inline()
    else:
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            yield _Pool(pool)


def _hand_out(waiting: list[int], handed: list[list[int]], who: np.ndarray, room: int, lanes: int) -> None:
    """Moves members from the queue to the inboxes in turn; the fewer are left the fewer, so that all end together."""
    loops = len(handed) * lanes
    share = max(1, -(-len(waiting) // (2 * loops))) if loops > 1 else room
    wanted = [max(int(np.sum(row == VACANT)), min(room, share)) for row in who]
    while waiting and any(len(mine) < min(most, room) for mine, most in zip(handed, wanted, strict=True)):
        for mine, most in zip(handed, wanted, strict=True):
            if waiting and len(mine) < min(most, room):
                mine.append(waiting.pop(0))


def _inbox(
    members: Callable[[list[int]], Own],
    missing: list[int],
    handed: list[list[int]],
    room: int,
    more: bool,
    mesh: Mesh | None,
) -> Inbox:
    filled = [mine + (mine or missing)[:1] * (room - len(mine)) for mine in handed]
    own = members([number for mine in filled for number in mine])
    split = lambda leaf: leaf.reshape((len(handed), room, *leaf.shape[1:]))  # noqa: E731
    own = jax.tree_util.tree_map(split, own)
    sizes, others = jnp.asarray([len(mine) for mine in handed]), jnp.full(len(handed), more)
    return divided(Inbox(own, jnp.asarray(filled), sizes, others), mesh)


def _collect(flight: Flight, counts: np.ndarray, devices: int) -> tuple[np.ndarray, PyTree]:
    """The members that landed, with their results."""
    if not counts.any():
        return np.empty(0, int), None
    outbox, sender = jax.device_get((flight.outbox, flight.sender))
    if devices == 1:
        count = int(counts[0])
        return sender[:count], jax.tree_util.tree_map(lambda leaf: leaf[:count], outbox)
    mine = np.arange(sender.shape[1]) < counts[:, None]
    return sender[mine], jax.tree_util.tree_map(lambda leaf: leaf[mine], outbox)
