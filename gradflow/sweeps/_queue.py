"""The host's side of a sweep: gives out members, collects results, and keeps what is in the air on disk."""

import os
import pathlib
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from gradflow.sweeps._flight import VACANT, Flight, Inbox, divided, fly, vacant
from gradflow.sweeps._program import Options, Own, at

SEGMENT = 0.5
"""Seconds between two looks at the results."""
PERIOD = 10.0
"""Seconds between two states of the flight on disk."""
ROOM = 16
"""Members that wait in an inbox, and results in an outbox, unless there are more slots than that."""


class Checkpoint:
    """The flight of one group of members, in a file that is replaced as a whole."""

    def __init__(self, path: pathlib.Path):
        self.path, self.saved = path, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.saved > PERIOD

    def save(self, flight: Flight) -> None:
        """Keeps who is in the air, and how far they are."""
        self.path.parent.mkdir(exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        with unfinished.open("wb") as file:
            leaves = jax.tree_util.tree_leaves(flight)
            arrays: dict[str, Any] = {f"leaf{i}": _bits(leaf) for i, leaf in enumerate(leaves)}
            np.savez(file, who=np.asarray(flight.who), **arrays)
        os.replace(unfinished, self.path)
        self.saved = time.monotonic()

    def load(self, blank: Flight, missing: set[int]) -> Flight:
        """The flight to go on with, with those on board who are still missing; `blank` if there is none that fits."""
        leaves, structure = jax.tree_util.tree_flatten(blank)
        try:
            with np.load(self.path) as kept:
                who = kept["who"]
                found = [kept[f"leaf{i}"] for i in range(len(leaves))]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            return blank
        if any((a.shape, a.dtype) != (_bits(b).shape, _bits(b).dtype) for a, b in zip(found, leaves, strict=True)):
            return blank
        arrays = [_placed(a, b) for a, b in zip(found, leaves, strict=True)]
        flight = jax.tree_util.tree_unflatten(structure, arrays)
        who = np.where(np.isin(who, sorted(missing)), who, VACANT)
        where = lambda f: (f.who, f.next, f.landed)  # noqa: E731
        return eqx.tree_at(where, flight, (_placed(who, blank.who), blank.next, blank.landed))

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def run_queue(
    members: Callable[[list[int]], Own],
    missing: list[int],
    shared: PyTree,
    options: Options,
    shapes: tuple[PyTree, PyTree],
    *,
    slots: int,
    mesh: Mesh | None,
    checkpoint: Checkpoint | None,
    tally: dict[str, Any],
) -> Iterator[list[tuple[int, Any]]]:
    """Runs members, by number; yields those that landed, with their results, segment by segment.

    They set off in the order of `missing`, after those whom the checkpoint holds in the air. `members(numbers)` gives
    what these have of their own, `shapes` are those of `shapes_of`. `tally["evaluations"]` gets, by device, what was
    spent, slots that only waited for another included.
    """
    devices = 1 if mesh is None else mesh.size
    room = max(slots, ROOM)
    blank = vacant(at(members(missing[:1]), 0), shapes, slots, room)
    flight = divided(jax.tree_util.tree_map(lambda leaf: jnp.stack([leaf] * devices), blank), mesh)
    if checkpoint is not None:
        flight = checkpoint.load(flight, set(missing))
    waiting = [number for number in missing if number not in set(np.ravel(flight.who).tolist())]
    handed: list[list[int]] = [[] for _ in range(devices)]
    inbox, budget, warm, spent = None, 1, False, np.ravel(flight.spent)
    while True:
        began = time.perf_counter()
        if inbox is None or waiting:
            taken = np.ravel(flight.next).tolist()
            if inbox is None or any(count > len(who) // 2 for count, who in zip(taken, handed, strict=True)):
                handed = [who[count:] for who, count in zip(handed, taken, strict=True)]
                _hand_out(waiting, handed, np.ravel(flight.who).reshape(devices, slots), room)
                inbox = _inbox(members, missing, handed, room, bool(waiting), mesh)
                flight = eqx.tree_at(lambda f: f.next, flight, divided(jnp.zeros(devices, int), mesh))
        try:
            flight = jax.block_until_ready(fly((shared, options), inbox, flight, jnp.asarray(budget), mesh))
            counts = np.ravel(flight.landed).tolist()
            landed = _collect(flight, counts, devices)
            flight = eqx.tree_at(lambda f: f.landed, flight, divided(jnp.zeros(devices, int), mesh))
        except KeyboardInterrupt:
            if checkpoint is not None:
                checkpoint.save(flight)
            raise
        took = time.perf_counter() - began
        # The first call compiles.
        budget = int(np.clip(budget * np.clip(SEGMENT / max(took, 1e-9), 0.5, 4.0), 1, 10**9)) if warm else 64
        warm = True
        now = np.ravel(flight.spent)
        tally["evaluations"] = tally.get("evaluations", 0) + (now - spent)
        spent = now
        yield landed
        if checkpoint is not None and checkpoint.due():
            checkpoint.save(flight)
        left = sum(len(who) for who in handed) - int(np.sum(np.asarray(flight.next)))
        if not waiting and left == 0 and np.all(np.asarray(flight.who) == VACANT):
            break
    if checkpoint is not None:
        checkpoint.clear()


def _hand_out(waiting: list[int], handed: list[list[int]], who: np.ndarray, room: int) -> None:
    """Moves members from the queue to the inboxes in turn; the fewer are left the fewer, so that all end together."""
    devices = len(handed)
    share = max(1, -(-len(waiting) // (2 * devices))) if devices > 1 else room
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


def _collect(flight: Flight, counts: list[int], devices: int) -> list[tuple[int, Any]]:
    """The members that landed, with their results."""
    if not any(counts):
        return []
    outbox, sender = jax.device_get((flight.outbox, flight.sender))
    sender = sender.reshape(devices, -1)
    found = []
    for device, count in enumerate(counts):
        mine = outbox if devices == 1 else at(outbox, device)
        found += [(int(sender[device, i]), at(mine, i)) for i in range(count)]
    return found


def _bits(leaf: Any) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _placed(array: np.ndarray, like: Any) -> Any:
    """An array as a JAX array of the type, and on the devices, of another one."""
    value = jnp.asarray(array)
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
    return jax.device_put(value, like.sharding)
