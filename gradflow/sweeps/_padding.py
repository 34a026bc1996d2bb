"""Padding of members to a common shape, and whether it changes anything.

A network with neurons whose weights are all zero is a wider one that computes the same, unless something in it looks
at shapes, or at zeros. Whether it does is not guessed but tried: for every shape, the field, the loss and what is
observed are compared with and without padding, at the start and at a point drawn at random.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from gradflow._tree import Extents
from gradflow.programs._digest import arrays_of, numbers, with_arrays
from gradflow.runs._member import AbstractMember, Options
from gradflow.runs._run import CONSERVED, point
from gradflow.sweeps._probe import START, elsewhere, probe
from gradflow.sweeps._program import Padding


def padding_of(member: AbstractMember, options: Options) -> Padding:
    """The sizes of a member, as padding of others has to know them."""

    def parts(member: AbstractMember) -> tuple[PyTree, PyTree, tuple[int, ...] | None]:
        run = member.run(options)
        return run.start, run.initial(), run.error_counts()

    start, state, counts = eqx.filter_eval_shape(parts, member)
    return Padding(_extents(start), _extents(state), counts and tuple(jnp.asarray(count) for count in counts))


def stacked(leaves: Sequence[Array | np.ndarray], shape: tuple[int, ...]) -> Array:
    """Arrays one behind the other, each with zeros up to a shape."""
    if jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key):
        return jnp.stack(leaves)
    array = np.zeros((len(leaves), *shape), leaves[0].dtype)
    for i, leaf in enumerate(leaves):
        array[(i, *corner(leaf.shape))] = np.asarray(leaf)
    return jnp.asarray(array)


def corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of a padded array that an array of this shape takes."""
    return tuple(slice(size) for size in shape)


def what_changes(member: AbstractMember, shapes: list[tuple[int, ...]], options: Options) -> str | None:
    """What padding the arrays of a member to these shapes changes, in words; `None` if nothing."""
    if all(leaf.shape == shape for leaf, shape in zip(arrays_of(member), shapes, strict=True)):
        return None
    try:
        padding = padding_of(member, options)
        for relative, absolute, tolerance in PROBES:
            narrow, where = elsewhere(member, relative, absolute=absolute), point(tolerance)
            reference = probe(narrow, options, None, where)
            wide = probe(_padded(narrow, shapes), options, padding, where)
            for name, value in reference.items():
                if not _agree(value, wide[name], strict=name in (START, CONSERVED)):
                    return name
    except (AttributeError, IndexError, TypeError, ValueError):
        return "shapes that have to fit each other"
    return None


PROBES = ((0.0, 0.0, 0.0), (0.5, 0.0, 0.5), (3.0, 0.0, 0.3), (0.0, 1.0, 0.9))
"""Where padding is tried: how far from the start, in sizes of each leaf and in absolute terms, and how far into the
run. What looks at shapes may vanish at the start, at one time, or within bounds that training leaves: from a small
start weights grow to order one."""


def _extents(tree: PyTree) -> Extents:
    return tuple(_extent(leaf) for leaf in jax.tree_util.tree_leaves(tree))


def _extent(leaf: Array) -> Int[Array, " axes"] | None:
    return None if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.asarray(leaf.shape, int)


def _padded(member: AbstractMember, shapes: list[tuple[int, ...]]) -> AbstractMember:
    leaves = zip(arrays_of(member), shapes, strict=True)
    return with_arrays(member, [leaf if leaf.shape == shape else stacked([leaf], shape)[0] for leaf, shape in leaves])


def _agree(narrow: PyTree, wide: PyTree, strict: bool) -> bool:
    """Whether the own part of a padded result is what it was; with `strict`, whether the rest is zero, too."""
    pairs = zip(jax.tree_util.tree_leaves(narrow), jax.tree_util.tree_leaves(wide), strict=True)
    return all(_equal_inside(numbers(a), numbers(b), strict) for a, b in pairs)


def _equal_inside(a: np.ndarray, wide: np.ndarray, strict: bool) -> bool:
    if a.ndim != wide.ndim or any(n > m for n, m in zip(a.shape, wide.shape, strict=True)):
        return False
    b = wide[corner(a.shape)]
    if strict and np.count_nonzero(wide) != np.count_nonzero(b):
        return False
    if a.dtype.kind != "f":
        return np.array_equal(a, b)
    small = 1e3 * float(np.finfo(a.dtype).eps)
    size = np.max(np.abs(a), initial=0.0, where=np.isfinite(a))
    return np.allclose(a, b, rtol=small, atol=small * size, equal_nan=True)
