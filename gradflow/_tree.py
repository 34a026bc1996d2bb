"""Pytrees of parameters: which leaves flow, which are carried along, and their flat form."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from gradflow._checks import fail

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
Leaf = TypeVar("Leaf")


COLLECTION = "batch_stats"
"""What Flax calls running statistics, beside "params" in a dictionary of variables."""


class Chosen(eqx.Module):
    """Parameters with the choice of what flows made: `held` names, by path, the floating-point arrays that do not."""

    params: PyTree
    held: tuple[str, ...] = eqx.field(static=True)


def split(params: PyTree, trainable: PyTree = None) -> tuple[PyTree, PyTree]:
    """Splits parameters into the leaves that flow and the frozen rest; `join` undoes it.

    `trainable` is a filter as Equinox knows it: a function of a leaf, or a pytree of Booleans or of such functions,
    which may end above the leaves of `params`. Only floating-point arrays flow. `None` takes all of them but known
    buffers (`not_buffers`).

    NumPy arrays become JAX arrays. Complex leaves are refused: a gradient flow of complex parameters is a flow of
    their real and imaginary parts, and which inner product is meant is the user's to say.
    """
    if isinstance(params, Chosen):
        params, trainable = params.params, _none_of(params.params, params.held)
    params = jax.tree_util.tree_map(_as_jax, params)
    wanted = not_buffers(params) if trainable is None else _wanted(params, trainable)
    flowing, frozen = eqx.partition(params, wanted)
    leaves = jax.tree_util.tree_leaves(flowing)
    if any(jnp.iscomplexobj(leaf) for leaf in leaves):
        advice = "Pass real and imaginary parts as two arrays."
        raise fail("params", "hold real numbers", "complex in at least one leaf", advice)
    if not leaves:
        raise _nothing_flows(params, trainable)
    return flowing, frozen


def not_buffers(params: PyTree) -> PyTree:
    """For every leaf, whether it is a floating-point array and not known to be a buffer.

    Known are all variables of Flax's `nnx` but its `Param`, the state of Equinox layers, and Flax's "batch_stats".
    """

    def flowing(path: jax.tree_util.KeyPath, node: PyTree) -> PyTree:
        held = _is_buffer(node) or _in_collection(params, path)
        return jax.tree_util.tree_map(lambda leaf: not held and eqx.is_inexact_array(leaf), node)

    return jax.tree_util.tree_map_with_path(flowing, params, is_leaf=_is_whole)


def _is_whole(node: object) -> bool:
    """Whether a part of the parameters is looked at as one."""
    return isinstance(node, (eqx.nn.State, eqx.nn.StateIndex, *_variables()))


def _is_buffer(node: object) -> bool:
    if isinstance(node, eqx.nn.State | eqx.nn.StateIndex):
        return True
    return isinstance(node, _variables()) and not isinstance(node, sys.modules["flax.nnx"].Param)


def _variables() -> tuple[type, ...]:
    """The class of Flax's variables, if somebody has loaded it."""
    nnx = sys.modules.get("flax.nnx")
    return () if nnx is None or not hasattr(nnx, "Variable") else (nnx.Variable,)


def _in_collection(params: PyTree, path: jax.tree_util.KeyPath) -> bool:
    is_collection = isinstance(params, Mapping) and "params" in params and COLLECTION in params
    return is_collection and getattr(path[0], "key", None) == COLLECTION


def choose(params: PyTree, trainable: PyTree = None) -> PyTree:
    """Parameters that carry the choice of what flows along, where it is not simply all floating-point arrays."""
    held = held_paths(split(params, trainable)[1])
    return Chosen(params, held) if held else params


def held_paths(frozen: PyTree) -> tuple[str, ...]:
    """The floating-point arrays in the frozen half of parameters, by path."""
    static = frozen.rest if isinstance(frozen, PaddedRest) else frozen
    leaves = jax.tree_util.tree_flatten_with_path(static)[0]
    return tuple(jax.tree_util.keystr(path) for path, leaf in leaves if eqx.is_inexact_array(leaf))


def _none_of(params: PyTree, held: tuple[str, ...]) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path) not in held, params)


def _wanted(params: PyTree, trainable: PyTree) -> PyTree:
    """A Boolean for every leaf, from a filter."""

    def below(choice: object, part: PyTree) -> PyTree:
        if not callable(choice) and not isinstance(choice, bool | np.bool_):
            must = "be a function of a leaf or a pytree of Booleans"
            raise fail("trainable", must, f"one with a leaf of type {type(choice).__name__}")
        chosen = choice if callable(choice) else lambda _: choice
        return jax.tree_util.tree_map(lambda leaf: eqx.is_inexact_array(leaf) and bool(chosen(leaf)), part)

    try:
        return jax.tree_util.tree_map(below, trainable, params)
    except ValueError as error:
        if "Argument `trainable`" in str(error):
            raise
        actual = f"of another ({str(error).splitlines()[0]})"
        advice = "For instance equinox.tree_at on jax.tree_util.tree_map(lambda _: False, params)."
        raise fail("trainable", "have the structure of `params`, or of a part from the top", actual, advice) from error


def _nothing_flows(params: PyTree, trainable: PyTree) -> ValueError:
    types = sorted({str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in jax.tree_util.tree_leaves(params)})
    held = held_paths(params)
    if trainable is not None and held:
        listed = ", ".join(held[:5])
        return fail("trainable", "choose at least one floating-point array leaf", f"choosing none of {listed}")
    actual = f"without one (leaf types: {', '.join(types) or 'none'})"
    advice = "Convert the parameters, for instance with `jax.numpy.asarray(x, dtype=float)`."
    if held:
        actual = "without one but known buffers"
        advice = "Choose what flows by `trainable=equinox.is_inexact_array`, or another filter."
    return fail("params", "have at least one floating-point array leaf", actual, advice)


def _as_jax(leaf: Leaf) -> Leaf | Array:
    """NumPy arrays as JAX arrays; types as they are, never weak ones, so that equal shapes share one program."""
    if isinstance(leaf, np.ndarray | np.generic):
        return jnp.asarray(leaf) if leaf.dtype.kind in "biufc" else leaf
    if isinstance(leaf, jax.Array) and getattr(leaf, "weak_type", False):  # random keys have no such attribute
        return jax.lax.convert_element_type(leaf, leaf.dtype)
    return leaf


def common_dtype(*values: ArrayLike | DTypeLike) -> np.dtype:
    """The type that JAX gives to a combination of values, also where it is told to refuse combinations."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*values)


Extents = tuple[Int[Array, "..."] | None, ...]
"""For every leaf of a padded pytree, how many entries along each axis are its own; `None` for all of them."""


class PaddedRest(eqx.Module):
    """The frozen half of parameters that have been padded to a larger shape; `extents` are those of the other half."""

    rest: PyTree
    extents: Extents


def join(trainable: PyTree, frozen: PyTree) -> PyTree:
    """The full parameters, from the two halves of `split`.

    What has been added to padded parameters is seen as zero, so that gradients vanish along it.
    """
    if isinstance(frozen, PaddedRest):
        return eqx.combine(within(trainable, frozen.extents), frozen.rest)
    return eqx.combine(trainable, frozen)


def strong(tree: PyTree) -> PyTree:
    """The pytree without weak types, so that what a program gives can be handed to it again without a new trace."""

    def convert(leaf: Any) -> Any:
        return jax.lax.convert_element_type(leaf, leaf.dtype) if eqx.is_array(leaf) and leaf.weak_type else leaf

    return jax.tree_util.tree_map(convert, tree)


def rest_of(params: PyTree, trainable: PyTree) -> PyTree:
    """What `join` has to add to the half `trainable` to give `params`."""
    return jax.tree_util.tree_map(
        lambda half, leaf: leaf if half is None else None, trainable, params, is_leaf=lambda leaf: leaf is None
    )


split_params, join_params = split, join  # the names by which users know the two


def within(tree: PyTree, extents: Extents) -> PyTree:
    """A padded pytree with zeros beyond the extents of its leaves."""
    leaves, structure = jax.tree_util.tree_flatten(tree)
    pairs = zip(leaves, extents, strict=True)
    return jax.tree_util.tree_unflatten(structure, [leaf if e is None else _cut(leaf, e) for leaf, e in pairs])


def _cut(leaf: Array, extent: Int[Array, " axes"]) -> Array:
    inside = jnp.asarray(True)
    for axis in range(leaf.ndim):
        inside &= jax.lax.broadcasted_iota(extent.dtype, leaf.shape, axis) < extent[axis]
    return jnp.where(inside, leaf, 0)


def flatten(tree: PyTree) -> tuple[Float[Array, " size"], Callable[[Array], PyTree]]:
    """The leaves as one vector, and the function that gives the pytree back."""
    return jax.flatten_util.ravel_pytree(tree)


def scaled_norm(vector: Float[Array, " size"]) -> Float[Array, ""]:
    """Euclidean norm that neither under- nor overflows on the way: the square of 1e-30 is zero in float32."""
    largest = jnp.max(jnp.abs(vector), initial=0.0)
    safe = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
    return jnp.where(largest > 0, safe * jnp.sqrt(jnp.sum((vector / safe) ** 2)), largest)


def tree_norm(tree: PyTree) -> Float[Array, ""]:
    """Euclidean norm of all floating-point leaves together."""
    return scaled_norm(flatten(eqx.filter(tree, eqx.is_inexact_array))[0])


def at_least_single(tree: PyTree) -> PyTree:
    """The pytree with its arrays of half precision in float32, in which factorisations exist and gaps are resolved."""

    def lift(leaf: Any) -> Any:
        half = eqx.is_inexact_array(leaf) and not jnp.iscomplexobj(leaf) and jnp.finfo(leaf.dtype).bits < 32
        return leaf.astype(jnp.float32) if half else leaf

    return jax.tree_util.tree_map(lift, tree)


def in_double(tree: PyTree) -> PyTree:
    """The pytree with its real arrays in float64, where that is enabled."""
    real = lambda leaf: eqx.is_inexact_array(leaf) and not jnp.iscomplexobj(leaf)  # noqa: E731
    return jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.float64) if real(leaf) else leaf, tree)


def in_single(call: Callable[[S, PyTree], R]) -> Callable[[S, PyTree], R]:
    """The `__call__` of an observable, in float32 where it or the parameters are of half precision.

    In half precision sums of squares overflow, and differences are of a few per cent of what they are taken of.
    """

    @functools.wraps(call)
    def wrapped(self: S, params: PyTree) -> R:
        return call(at_least_single(self), at_least_single(params))

    return wrapped


def full_precision(fn: Callable[P, R]) -> Callable[P, R]:
    """Runs (and traces) `fn` with matrix products at full precision, on devices of any default.

    Some accelerators multiply float32 matrices in fewer bits by default; an error-controlled integrator then takes
    the rounding for stiffness.
    """

    @functools.wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("highest"):
            return fn(*args, **kwargs)

    return wrapped
