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
from jaxtyping import PyTree

from gradflow.sweeps._flight import VACANT, Flight, Options, at, evaluation, fly, vacant

SEGMENT = 0.5
"""Seconds between two looks at the results."""
PERIOD = 10.0
"""Seconds between two states of the flight on disk."""
CAPACITY = 8
"""Results that are collected, at least, before the host is given them."""
LIGHT = 1e5
"""Floating-point operations of an evaluation below which a CPU spends its time on everything else."""


def usual_slots(one: PyTree, shared: PyTree, options: Options) -> int:
    """Slots for members like this one.

    On a CPU the cost of a tick is that of its slots, and slots wait for one another: one slot wastes nothing. Only
    where an evaluation costs next to nothing do eight take hardly longer than one. An accelerator wants to be filled.
    """
    if jax.default_backend() != "cpu":
        return 256
    compilable: Any = eqx.filter_jit(evaluation)
    costs = compilable.lower(one, shared, options).lowered.cost_analysis()
    return 8 if costs and costs.get("flops", np.inf) < LIGHT else 1


class Checkpoint:
    """The flight of one group of members, in a file that is replaced as a whole."""

    def __init__(self, path: pathlib.Path):
        self.path, self.saved = path, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.saved > PERIOD

    def save(self, flight: Flight, order: list[int]) -> None:
        """Keeps who is in the air, and how far they are; `order` is the queue, by place in the group."""
        leaves = jax.tree_util.tree_leaves(flight)
        if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves):
            return
        who = np.asarray(flight.who)
        places = [order[number] if number != VACANT else VACANT for number in who.tolist()]
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        with unfinished.open("wb") as file:
            arrays: dict[str, Any] = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
            np.savez(file, places=places, **arrays)
        os.replace(unfinished, self.path)
        self.saved = time.monotonic()

    def load(self, blank: Flight, missing: list[int]) -> tuple[Flight, list[int]]:
        """The flight and the queue to go on with: those in the air first, as far as they are still missing."""
        leaves, structure = jax.tree_util.tree_flatten(blank)
        try:
            with np.load(self.path) as kept:
                places = kept["places"].tolist()
                found = [kept[f"leaf{i}"] for i in range(len(leaves))]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            return blank, missing
        if any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in zip(found, leaves, strict=True)):
            return blank, missing
        flying = [place for place in places if place in missing]
        order = flying + [place for place in missing if place not in flying]
        who = [order.index(place) if place in flying else VACANT for place in places]
        flight = jax.tree_util.tree_unflatten(structure, [jnp.asarray(leaf) for leaf in found])
        where = lambda f: (f.who, f.next, f.landed)  # noqa: E731
        numbers = (jnp.asarray(who), jnp.asarray(len(flying)), jnp.asarray(0))
        return eqx.tree_at(where, flight, numbers), order

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def run_queue(
    members: Callable[[list[int]], PyTree],
    missing: list[int],
    shared: PyTree,
    options: Options,
    slots: int,
    checkpoint: Checkpoint | None,
    tally: dict[str, int],
) -> Iterator[list[tuple[int, Any]]]:
    """Runs the members at these places of a group; yields those that landed, with their results, segment by segment.

    `members(places)` stacks what the members at these places have of their own. `tally["evaluations"]` counts the
    gradients spent, those of slots that only waited for another included.
    """
    capacity = max(slots, CAPACITY)
    room = 2 * capacity
    flight, order = vacant(members(missing[:1]), shared, options, slots, capacity), missing
    if checkpoint is not None:
        flight, order = checkpoint.load(flight, missing)
    size, first, budget, warm = len(order), int(flight.next), 1, False
    spent = int(flight.spent)

    def load(first: int) -> PyTree:
        return members([order[min(first + i, size - 1)] for i in range(room)])

    inbox = load(first)
    while True:
        began = time.perf_counter()
        end = min(first + room, size)
        numbers = jnp.asarray(first), jnp.asarray(end), jnp.asarray(budget)
        try:
            flight = jax.block_until_ready(fly((inbox, shared, options), flight, *numbers))
            results, senders = jax.device_get((flight.outbox, flight.sender[: int(flight.landed)]))
            flight = eqx.tree_at(lambda f: f.landed, flight, jnp.asarray(0))
        except KeyboardInterrupt:
            if checkpoint is not None:
                checkpoint.save(flight, order)
            raise
        took = time.perf_counter() - began
        # The first call compiles.
        budget = int(np.clip(budget * np.clip(SEGMENT / max(took, 1e-9), 0.5, 4.0), 1, 10**9)) if warm else 8
        warm = True
        tally["evaluations"] += int(flight.spent) - spent
        spent = int(flight.spent)
        yield [(order[sender], at(results, i)) for i, sender in enumerate(senders.tolist())]
        if checkpoint is not None and checkpoint.due():
            checkpoint.save(flight, order)
        if int(flight.next) == end:
            if end < size:
                first = end
                inbox = load(first)
            elif np.all(np.asarray(flight.who) == VACANT):
                break
    if checkpoint is not None:
        checkpoint.clear()
