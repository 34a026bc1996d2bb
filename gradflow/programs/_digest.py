"""What runs are made of: their arrays, whether two are equal, a hash of every number, and sketches of them.

A hash tells whether numbers are the same to the bit, which they are where they are computed on the same machine. A
sketch tells whether they are the same within rounding.
"""

import functools
import hashlib
from collections.abc import Iterable, Sequence

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from gradflow.programs._captured import numbers
from gradflow.programs._code import ArrayObject

HELD = 64
"""Arrays that are remembered by identity, and so kept alive."""

BLOCK = 2**16
"""Entries of an array that get signs of their own in a sketch; blocks get one more sign each."""


class Digest:
    """A hash of every number in arrays, and sketches of these."""

    def __init__(self, sketches: bool = True) -> None:
        self._hash, self._seen, self._sketches = hashlib.sha256(), {}, sketches

    def add(self, leaves: Iterable[ArrayObject]) -> tuple[float, float]:
        """Adds arrays; returns the sketch of them all: weighted means of their directions and sizes."""
        direction, size, weights = 0.0, 0.0, 0.0
        for i, leaf in enumerate(leaves):
            hashed, (along, norm) = self._of(leaf)
            self._hash.update(hashed)
            # Irrational weights, so that what two arrays gain and lose does not cancel.
            weight = (i + 2.0) ** 0.5
            direction, weights = direction + weight * along, weights + weight
            size += weight * (np.log(norm) if norm > 0 else -1e3)
        return float(direction / (weights or 1.0)), float(size / (weights or 1.0))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()[:16]

    def _of(self, leaf: ArrayObject) -> tuple[bytes, tuple[float, float]]:
        if leaf.nbytes < 4096:
            return _hashed(leaf), self._sketch(leaf)
        # Large arrays that come again are hashed once; they are held, so that their numbers stay theirs.
        if id(leaf) not in self._seen:
            if len(self._seen) >= HELD:
                self._seen.clear()
            self._seen[id(leaf)] = leaf, (_hashed(leaf), self._sketch(leaf))
        return self._seen[id(leaf)][1]

    def _sketch(self, leaf: ArrayObject) -> tuple[float, float]:
        return _sketch(leaf) if self._sketches else (0.0, 0.0)


def _sketch(leaf: ArrayObject) -> tuple[float, float]:
    """A random sum of the entries over their norm, and the norm."""
    array, largest, _ = _scaled(leaf)
    norm = float(np.linalg.norm(array))
    return (_signed_sum(array, 0) / norm if norm > 0 else 0.0), largest * norm


def measure(leaf: ArrayObject) -> list[float]:
    """Norm of an array, two random sums of its entries, and a count of what is not finite."""
    array, largest, bad = _scaled(leaf)
    return [largest * float(np.linalg.norm(array)), *(largest * _signed_sum(array, seed) for seed in (0, 1)), bad]


def _scaled(leaf: ArrayObject) -> tuple[np.ndarray, float, float]:
    """The entries as one vector over the largest of them, that one, and a count of those that are not finite."""
    array = np.ravel(numbers(leaf))
    array = np.concatenate([np.real(array), np.imag(array)]) if array.dtype.kind == "c" else array
    array = array.astype(float)
    nonfinite = 0.0
    if not np.all(np.isfinite(array)):
        nonfinite = float(
            np.sum(np.isnan(array)) + 2**0.5 * np.sum(array == np.inf) + 3**0.5 * np.sum(array == -np.inf)
        )
        array = np.where(np.isfinite(array), array, 0.0)
    largest = float(np.max(np.abs(array), initial=0.0)) or 1.0
    return array / largest, largest, nonfinite


def _signed_sum(array: np.ndarray, seed: int) -> float:
    signs = _signs(seed)
    if array.size <= BLOCK:
        return float(np.dot(array, signs[: array.size]))
    blocks = [np.dot(array[i : i + BLOCK], signs[: array.size - i]) for i in range(0, array.size, BLOCK)]
    return float(np.dot(blocks, np.resize(_signs(seed + 2), len(blocks))))


@functools.cache
def _signs(seed: int) -> np.ndarray:
    return 1.0 - 2.0 * np.random.default_rng(seed).integers(0, 2, BLOCK)


def equal(a: ArrayObject, b: ArrayObject) -> bool:
    """Whether two arrays hold the same numbers; NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    left, right = numbers(a), numbers(b)
    return bool(np.array_equal(left, right, equal_nan=left.dtype.kind == "f"))


def arrays_of(run: PyTree) -> list[jax.Array | np.ndarray]:
    """The arrays of a pytree."""
    return jax.tree_util.tree_leaves(eqx.filter(run, eqx.is_array))


def with_arrays(run: PyTree, leaves: Sequence[ArrayObject | None]) -> PyTree:
    """The pytree with other arrays."""
    arrays, static = eqx.partition(run, eqx.is_array)
    return eqx.combine(jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(arrays), leaves), static)


def _hashed(leaf: ArrayObject) -> bytes:
    array = numbers(leaf)
    return hashlib.sha256(str((array.shape, array.dtype)).encode() + array.tobytes()).digest()
