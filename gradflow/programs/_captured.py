"""What a compiled program takes for constant: the code of functions, and the arrays that these hold themselves."""

import functools
import hashlib
import weakref
import zlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from gradflow.programs._code import ArrayObject, code_of

P = ParamSpec("P")
R = TypeVar("R")

_SUMS: dict[int, tuple[weakref.ref[jax.Array], int]] = {}
"""Checksums of arrays of JAX, which do not change, by their addresses, as long as they live."""


def captured(tree: PyTree) -> str:
    """A hash of the code of all functions in a pytree, and of the arrays among what they refer to.

    The leaves of the pytree, which a program takes as arguments, do not count. Empty where objects are nested too
    deeply to be read.

    >>> from gradflow.programs import captured
    >>> rate = [0.1]
    >>> loss = lambda w: rate[0] * w**2
    >>> before = captured(loss)
    >>> rate[0] = 0.2
    >>> before == captured(loss)
    False
    """
    try:
        code = code_of(tree)
    except RecursionError:
        return ""
    leaves = {id(leaf) for leaf in jax.tree_util.tree_leaves(tree)}
    sums = [(array.shape, str(array.dtype), _sum_of(array)) for array in code.arrays if id(array) not in leaves]
    return hashlib.sha256(repr((code.digest, sums)).encode()).hexdigest()[:16]


def fresh_jit(fn: Callable[P, R]) -> Callable[P, R]:
    """`equinox.filter_jit` that compiles anew once functions among the arguments compute something else than before.

    A loss that reads a global, or an array that is changed in place, stays the same object; JAX would run the program
    of the old numbers.
    """

    call: Callable[..., R] = fn

    def program(code: str, args: tuple[object, ...], kwargs: dict[str, object]) -> R:
        return call(*args, **kwargs)

    # The name is what a profile shows. `functools.wraps` would hand on the signature as well, which `filter_jit` reads.
    program.__name__, program.__qualname__ = fn.__name__, fn.__qualname__
    compiled = eqx.filter_jit(program)

    @functools.wraps(fn)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        return compiled(captured((args, kwargs)), args, kwargs)

    return called


def numbers(array: ArrayObject) -> np.ndarray:
    """An array as NumPy sees it; the data of random keys."""
    if isinstance(array, jax.Array) and jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array)


def _sum_of(array: ArrayObject) -> int:
    if not isinstance(array, jax.Array):
        return _checksum(array)
    cached = _SUMS.get(id(array))
    if cached is None or cached[0]() is not array:
        forget = functools.partial(_SUMS.pop, id(array), None)
        cached = _SUMS[id(array)] = (weakref.ref(array, lambda _: forget()), _checksum(array))
    return cached[1]


def _checksum(array: ArrayObject) -> int:
    return zlib.crc32(np.ascontiguousarray(numbers(array)).reshape(-1).view(np.uint8).data)
