"""What members are made of: their arrays, whether two are equal, and a hash of every number."""

import hashlib
import re
from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

HELD = 64
"""Arrays that are remembered by identity, and so kept alive."""


class Digest:
    """A hash of all that pytrees are made of: structure, names of functions, every number in every array."""

    def __init__(self) -> None:
        self._hash, self._seen = hashlib.sha256(), {}

    def add(self, tree: PyTree) -> None:
        self.add_parts(text_of(tree), arrays_of(tree))

    def add_parts(self, text: bytes, leaves: Iterable[Any]) -> None:
        """The same, from the `text_of` a pytree and its arrays."""
        self._hash.update(text)
        for leaf in leaves:
            self._hash.update(self._of(leaf))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()[:16]

    def _of(self, leaf: Any) -> bytes:
        if leaf.nbytes < 4096:
            return _hashed(leaf)
        # Large arrays that come again are hashed once; they are held, so that their numbers stay theirs.
        if id(leaf) not in self._seen:
            if len(self._seen) >= HELD:
                self._seen.clear()
            self._seen[id(leaf)] = leaf, _hashed(leaf)
        return self._seen[id(leaf)][1]


def fingerprint(trees: Iterable[PyTree]) -> str:
    """The digest of several pytrees."""
    digest = Digest()
    for tree in trees:
        digest.add(tree)
    return digest.hexdigest()


def text_of(tree: PyTree) -> bytes:
    """All of a pytree but its numbers."""
    arrays, static = eqx.partition(tree, eqx.is_array)
    text = repr(jax.tree_util.tree_structure(arrays)) + repr(jax.tree_util.tree_leaves(static))
    # Addresses of function objects differ from one process to the next.
    return re.sub(r"0x[0-9a-f]+", "", text).encode()


def numbers(leaf: Any) -> np.ndarray:
    """An array as NumPy sees it; the data of random keys."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def equal(a: Any, b: Any) -> bool:
    """Whether two arrays hold the same numbers; NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    left, right = numbers(a), numbers(b)
    return bool(np.array_equal(left, right, equal_nan=left.dtype.kind == "f"))


def arrays_of(run: PyTree) -> list[Any]:
    """The arrays of a pytree."""
    return jax.tree_util.tree_leaves(eqx.filter(run, eqx.is_array))


def with_arrays(run: PyTree, leaves: list[Any]) -> PyTree:
    """The pytree with other arrays."""
    arrays, static = eqx.partition(run, eqx.is_array)
    return eqx.combine(jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(arrays), leaves), static)


def _hashed(leaf: Any) -> bytes:
    array = numbers(leaf)
    return hashlib.sha256(str((array.shape, array.dtype)).encode() + array.tobytes()).digest()
