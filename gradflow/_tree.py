"""Pytrees of parameters: which leaves flow, which are carried along, and their flat form."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from gradflow._checks import fail

P = ParamSpec("P")
R = TypeVar("R")


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """Splits parameters into the leaves that flow and the frozen rest; `join` undoes it.

    NumPy arrays become JAX arrays. Complex leaves are refused: a gradient flow of complex parameters is a flow of
    their real and imaginary parts, and which inner product is meant is the user's to say.
    """
    params = jax.tree_util.tree_map(_as_jax, params)
    trainable, frozen = eqx.partition(params, eqx.is_inexact_array)
    leaves = jax.tree_util.tree_leaves(trainable)
    if any(jnp.iscomplexobj(leaf) for leaf in leaves):
        advice = "Pass real and imaginary parts as two arrays."
        raise fail("params", "hold real numbers", "complex in at least one leaf", advice)
    if not leaves:
        kinds = sorted({str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in jax.tree_util.tree_leaves(params)})
        actual = f"without one (leaf types: {', '.join(kinds) or 'none'})"
        advice = "Convert the parameters, for instance with `jax.numpy.asarray(x, dtype=float)`."
        raise fail("params", "have at least one floating-point array leaf", actual, advice)
    return trainable, frozen


def _as_jax(leaf: Any) -> Any:
    """NumPy arrays as JAX arrays; types as they are, never weak ones, so that equal shapes share one program."""
    if isinstance(leaf, np.ndarray | np.generic):
        return jnp.asarray(leaf) if leaf.dtype.kind in "biufc" else leaf
    if isinstance(leaf, jax.Array) and leaf.weak_type:
        return jax.lax.convert_element_type(leaf, leaf.dtype)
    return leaf


Extents = tuple[Int[Array, "..."] | None, ...]
"""For every leaf of a padded pytree, how many entries along each axis are its own; `None` for all of them."""


class PaddedRest(eqx.Module):
    """The frozen half of parameters that have been padded to a larger shape; `extents` are those of the other half."""

    rest: PyTree
    extents: Extents


def join(trainable: PyTree, frozen: PyTree) -> PyTree:
    """The full parameters, from the two halves of `split`.

    What has been added to padded parameters is seen as zero whatever it is, so that gradients vanish along it.
    """
    if isinstance(frozen, PaddedRest):
        return eqx.combine(within(trainable, frozen.extents), frozen.rest)
    return eqx.combine(trainable, frozen)


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
    own = jnp.asarray(True)
    for axis in range(leaf.ndim):
        own &= jax.lax.broadcasted_iota(extent.dtype, leaf.shape, axis) < extent[axis]
    return jnp.where(own, leaf, 0)


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


def method_of(value: Any, name: str) -> Callable[..., Any] | None:
    """The method of that name, if there is one: how models offer what not every model has."""
    found: Any = getattr(value, name, None)
    return found if callable(found) else None


def at_least_single(tree: PyTree) -> PyTree:
    """The pytree with its arrays of half precision in float32, in which factorisations exist and gaps are resolved."""

    def lift(leaf: Any) -> Any:
        half = eqx.is_inexact_array(leaf) and not jnp.iscomplexobj(leaf) and jnp.finfo(leaf.dtype).bits < 32
        return leaf.astype(jnp.float32) if half else leaf

    return jax.tree_util.tree_map(lift, tree)


def check_start(owner: Any, params: PyTree) -> None:
    """Lets the problem of a flow or a rule, if it has one that looks, refuse what it cannot start from."""
    check = method_of(getattr(owner, "problem", None), "check_start")
    if check is not None:
        check(params)


def full_precision(fn: Callable[P, R]) -> Callable[P, R]:
    """Runs (and traces) `fn` with matrix products at full precision, whatever the device's default is.

    Some accelerators multiply float32 matrices in fewer bits by default; an error-controlled integrator then takes
    the rounding for stiffness.
    """

    @functools.wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("highest"):
            return fn(*args, **kwargs)

    return wrapped
