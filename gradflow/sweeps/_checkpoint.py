"""Unfinished members, kept on disk so that an interrupted sweep goes on where it was."""

import os
import pathlib
import time
import zipfile
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gradflow.sweeps._slots import VACANT, Flight

COST = 0.05
"""Share of the time that keeping flights on disk may take; small ones are kept after every segment."""


class Checkpoint:
    """The flights of one group of members, in a file that is replaced as a whole.

    `tag`: of the sweep, its settings included. A file with another one is left from another computation.
    """

    def __init__(self, path: pathlib.Path, tag: str = ""):
        self.path, self._tag, self._next = path, tag, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def save(self, flights: list[Flight]) -> None:
        """Keeps the unfinished members, and how far they are."""
        began = time.monotonic()
        self.path.parent.mkdir(exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        with unfinished.open("wb") as file:
            leaves = jax.tree_util.tree_leaves(flights)
            arrays: dict[str, Any] = {f"leaf{i}": _bits(leaf) for i, leaf in enumerate(leaves)}
            np.savez(file, tag=np.array(self._tag), **arrays)
        os.replace(unfinished, self.path)
        now = time.monotonic()
        self._next = now + (now - began) / COST

    def load(self, blank: list[Flight], missing: set[int]) -> list[Flight]:
        """The flights to go on with, with those on board who are still missing; `blank` if there are none that fit."""
        leaves, structure = jax.tree_util.tree_flatten(blank)
        try:
            with np.load(self.path) as kept:
                if str(kept["tag"]) != self._tag:
                    return blank
                found = [kept[name] for name in kept.files if name != "tag"]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            return blank
        shapes = [(array.shape, array.dtype) for array in found]
        if shapes != [(_bits(leaf).shape, _bits(leaf).dtype) for leaf in leaves]:
            return blank
        arrays = [_placed(a, b) for a, b in zip(found, leaves, strict=True)]
        flights = jax.tree_util.tree_unflatten(structure, arrays)
        return [_without(flight, missing, empty) for flight, empty in zip(flights, blank, strict=True)]

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def _without(flight: Flight, missing: set[int], blank: Flight) -> Flight:
    """A flight with empty boxes, and without those on board who are not missing."""
    who = np.where(np.isin(np.asarray(flight.who), sorted(missing)), np.asarray(flight.who), VACANT)
    where = lambda f: (f.who, f.next, f.landed)  # noqa: E731
    return eqx.tree_at(where, flight, (_placed(who, blank.who), blank.next, blank.landed))


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
