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

from gradflow.sweeps._slots import EMPTY, SlotState

COST = 0.05
"""Share of the time that keeping slots on disk may take; small ones are kept after every segment."""


def unfinished_file(share: Any, group: int) -> str:
    """The name of the file of a group, which stores that were begun long ago have, too."""
    return f"in-flight-{share}-{group}.npz"


class Checkpoint:
    """The slots of one group of members, worker by worker, in a file that is replaced as a whole.

    `tag`: of the sweep, its settings included. A file with another one is left from another computation.
    """

    def __init__(self, path: pathlib.Path, tag: str = ""):
        self.path, self._tag, self._next = path, tag, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def save(self, states: list[SlotState]) -> None:
        """Keeps the unfinished members, and how far they are."""
        began = time.monotonic()
        self.path.parent.mkdir(exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        with unfinished.open("wb") as file:
            leaves = jax.tree_util.tree_leaves(states)
            arrays: dict[str, Any] = {f"leaf{i}": _bits(leaf) for i, leaf in enumerate(leaves)}
            np.savez(file, tag=np.array(self._tag), **arrays)
        os.replace(unfinished, self.path)
        now = time.monotonic()
        self._next = now + (now - began) / COST

    def load(self, blank: list[SlotState], missing: set[int]) -> list[SlotState]:
        """The slots to go on with, of members that are still missing; `blank` if there are none that fit."""
        leaves, structure = jax.tree_util.tree_flatten(blank)
        try:
            with np.load(self.path) as file:
                if str(file["tag"]) != self._tag:
                    return blank
                saved = [file[name] for name in file.files if name != "tag"]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            return blank
        shapes = [(array.shape, array.dtype) for array in saved]
        if shapes != [(_bits(leaf).shape, _bits(leaf).dtype) for leaf in leaves]:
            return blank
        arrays = [_placed(a, b) for a, b in zip(saved, leaves, strict=True)]
        states = jax.tree_util.tree_unflatten(structure, arrays)
        return [_without(state, missing, empty) for state, empty in zip(states, blank, strict=True)]

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def _without(state: SlotState, missing: set[int], blank: SlotState) -> SlotState:
    """Slots without pending members and results, and without members that are not missing."""
    member_ids = np.where(np.isin(np.asarray(state.member_ids), sorted(missing)), np.asarray(state.member_ids), EMPTY)
    where = lambda f: (f.member_ids, f.next, f.num_finished)  # noqa: E731
    return eqx.tree_at(where, state, (_placed(member_ids, blank.member_ids), blank.next, blank.num_finished))


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
