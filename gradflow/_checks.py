"""One grammar for every complaint: "Argument `x` must ..., but is .... Do ...".

Checks run on concrete values before anything is traced. A value that is a tracer (the caller is inside `jit`, `vmap`
or `grad`) cannot be looked at, so value checks pass it by and only shapes are checked.
"""

import difflib
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


class PrecisionWarning(UserWarning):
    """The floating-point type in use cannot meet what was asked for."""


class TheoryWarning(UserWarning):
    """What is asked for can be computed, but lies outside of the theory that gives it its meaning."""


class DerivativeWarning(UserWarning):
    """A derivative misses what it should hold: its trajectory meets a kink in a way that is not followed."""


def fail(argument: str, must: str, actual: object, advice: str = "") -> ValueError:
    """The error "Argument `argument` must `must`, but is `actual`. `advice`", to be raised by the caller."""
    message = f"Argument `{argument}` must {must}, but is {actual}."
    return ValueError(f"{message} {advice}".rstrip())


def is_concrete(value: PyTree) -> bool:
    """Whether no array in the pytree `value` is a tracer."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(value))


def check_positive(argument: str, value: object, advice: str = "") -> None:
    """Refuses numbers that are not finite and positive."""
    if is_concrete(value):
        array = np.asarray(value)
        if array.dtype.kind not in "fiu" or not bool(np.all(np.isfinite(array) & (array > 0))):
            raise fail(argument, "be positive", _short(value), advice)


def check_not_negative(argument: str, value: object, advice: str = "") -> None:
    """Refuses numbers that are not finite, or negative."""
    if is_concrete(value):
        array = np.asarray(value)
        if array.dtype.kind not in "fiu" or not bool(np.all(np.isfinite(array) & (array >= 0))):
            raise fail(argument, "not be negative", _short(value), advice)


def check_count(argument: str, value: object, least: int = 1, advice: str = "") -> None:
    """Refuses anything but an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        actual = f"the float {value!r}" if isinstance(value, float) else _short(value)
        raise fail(argument, f"be an integer of at least {least}", actual, advice)


def check_finite(argument: str, tree: PyTree, advice: str = "") -> None:
    """Refuses pytrees with a NaN or an infinity in a floating-point leaf.

    Large data are neither copied nor converted nor gathered: arrays are counted where they are, on their devices.
    """
    for leaf in jax.tree_util.tree_leaves(tree):
        if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array | np.ndarray | float):
            continue
        if isinstance(leaf, float):
            size, bad = 1, int(not math.isfinite(leaf))
        elif not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        else:
            size, bad = leaf.size, _count_not_finite(leaf)
        if bad:
            raise fail(argument, "be finite", f"not finite in {bad} of {size} entries", advice)


BLOCK = 2**20
"""Entries of a NumPy array that are looked at together, so that their mask takes a megabyte."""


def _in_host_memory(array: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """An array as NumPy sees it, where that is no copy, which spares the compilation of a program; itself elsewhere."""
    if not isinstance(array, jax.Array) or not array.is_fully_addressable or len(array.devices()) > 1:
        return array
    return np.asarray(array) if next(iter(array.devices())).platform == "cpu" else array


def _count_not_finite(array: jax.Array | np.ndarray) -> int:
    array = _in_host_memory(array)
    if isinstance(array, jax.Array):
        # A trace around this call is none of the business of values that are known.
        with jax.ensure_compile_time_eval():
            return 0 if bool(_all_finite(array)) else int(_not_finite_on_device(array))
    blocks: Any = np.nditer(array, ["external_loop", "buffered", "zerosize_ok"], buffersize=BLOCK)
    return sum(block.size - int(np.count_nonzero(np.isfinite(block))) for block in blocks)


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    parts = (array.real, array.imag) if jnp.iscomplexobj(array) else (array,)
    # The largest entry, which NaN is if there is one: unlike a mask it takes no memory.
    return jnp.all(jnp.stack([jnp.isfinite(jnp.max(jnp.abs(part), initial=0)) for part in parts]))


@jax.jit
def _not_finite_on_device(array: jax.Array) -> jax.Array:
    return jnp.count_nonzero(~jnp.isfinite(array))


def largest_entry(array: jax.Array | np.ndarray) -> float:
    """The largest absolute value of an array that is known, taken where the array is; zero without entries."""
    array = _in_host_memory(array)
    if not isinstance(array, jax.Array):
        array = np.abs(array) if np.iscomplexobj(array) else array
        return float(max(np.max(array, initial=0.0), -np.min(array, initial=0.0)))
    with jax.ensure_compile_time_eval():
        return float(_largest(array))


@jax.jit
def _largest(array: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(array), initial=0)


def check_choice(argument: str, value: object, choices: Iterable[str], advice: str = "") -> None:
    """Refuses a name that is not among `choices`."""
    names = list(choices)
    if value not in names:
        listed = ", ".join(repr(name) for name in names)
        near = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
        advice = f"Did you mean {near[0]!r}? {advice}" if near else advice
        raise fail(argument, f"be one of {listed}", repr(value), advice)


def check_callable(argument: str, value: object, takes: str, advice: str = "") -> Callable[..., Any]:
    """Refuses what cannot be called; returns it otherwise."""
    if not callable(value):
        raise fail(argument, f"be callable as {takes}", f"of type {type(value).__name__}", advice)
    return value


def check_key(key: object) -> jax.Array:
    """A key as `jax.random.key` gives it; the raw ones of `jax.random.PRNGKey` are wrapped, all else is refused."""
    is_array = isinstance(key, jax.Array | np.ndarray)
    if is_array and key.dtype == np.uint32 and key.shape == jax.eval_shape(jax.random.PRNGKey, 0).shape:
        return jax.random.wrap_key_data(jnp.asarray(key))
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise fail("key", "be a random key", f"of type {type(key).__name__}", "For instance jax.random.key(0).")
    if key.shape != ():
        advice = "Pass one of them, or use jax.vmap over keys."
        raise fail("key", "be one random key", f"of shape {key.shape}", advice)
    return key


def check_no_filter(trainable: PyTree) -> None:
    """Refuses a choice of what flows where a run is continued, for which it has been made."""
    if trainable is not None:
        advice = "What flows was chosen when the run began; pass its `final` parameters, to start anew."
        raise fail("trainable", "be None where a Solution is continued", f"of type {type(trainable).__name__}", advice)


def warn_precision(message: str) -> None:
    """Says that a tolerance is out of reach of the floating-point type."""
    warnings.warn(message, PrecisionWarning, stacklevel=3)


def _short(value: object) -> str:
    if isinstance(value, float | int | np.number) and math.isfinite(value):
        return f"{value:g}" if isinstance(value, float | np.floating) else str(value)
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 80 else text[:77] + "..."
