"""The state of a computation in progress in one file, replaced as a whole: its arrays, by their order, and a tag."""

import os
import pathlib
import time
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

COST = 0.05
"""Share of the time that keeping a state on disk may take; small ones are kept after every segment."""


class StateFile:
    """Arrays in a file. `tag`: of the computation. A file with another one is left from another computation."""

    def __init__(self, path: pathlib.Path, tag: str = ""):
        self.path, self._tag, self._next = path, tag, time.monotonic()

    def due(self) -> bool:
        """Whether it is time to keep the state again."""
        return time.monotonic() >= self._next

    def spent(self, seconds: float) -> None:
        """Notes what keeping the state, and all that goes with it, has taken just now."""
        self._next = time.monotonic() + seconds / COST

    def save(self, leaves: Sequence[jax.Array]) -> None:
        """Replaces the file. What it was before stays if this fails."""
        began = time.monotonic()
        self.path.parent.mkdir(exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        arrays: dict[str, Any] = {f"leaf{i}": _plain(_bits(leaf)) for i, leaf in enumerate(leaves)}
        try:
            with unfinished.open("wb") as file:
                np.savez(file, tag=np.array(self._tag), **arrays)
            os.replace(unfinished, self.path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        self.spent(time.monotonic() - began)

    def load(self, like: Sequence[jax.Array]) -> list[jax.Array] | None:
        """Arrays of the shapes and types, and on the devices, of others; `None` if there are none that fit."""
        try:
            with np.load(self.path) as file:
                if str(file["tag"]) != self._tag:
                    return None
                arrays = [file[f"leaf{i}"] for i in range(len(file.files) - 1)]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            return None
        wanted = [_bits(leaf) for leaf in like]
        if [(a.shape, a.dtype) for a in arrays] != [(_plain(b).shape, _plain(b).dtype) for b in wanted]:
            return None
        pairs = zip(arrays, wanted, like, strict=True)
        return [placed(array.view(bits.dtype), leaf) for array, bits, leaf in pairs]

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def placed(array: np.ndarray, like: jax.Array) -> jax.Array:
    """An array as a JAX array of the type, and on the devices, of another one."""
    value = jnp.asarray(array)
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
    return jax.device_put(value, like.sharding)


def _bits(leaf: jax.Array) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _plain(array: np.ndarray) -> np.ndarray:
    """Without types that the file format does not know, such as bfloat16."""
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array
