"""Spectral radius of the Jacobian of a vector field, by a power method on differences of the field.

With `J = df/dy` at `(t, y)` and a unit vector `v`,

    J v ~ (f(t, y + d v) - f(t, y)) / d,     d = sqrt(eps) |y|,

so each iteration costs one evaluation of the field, and no derivative of it. The size of the differences follows the
state: a state of size 1e-30 is displaced by less than its own size, in float32 as well.

Source: B. P. Sommeijer, L. F. Shampine and J. G. Verwer, RKC: an explicit solver for parabolic PDEs,
J. Comput. Appl. Math. 88 (1998) 315-326.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from gradflow._tree import Extents, tree_norm, within

MOST_ITERATIONS = 50
"""Iterations after which an estimate is taken as it stands."""

CONVERGED = 0.01
"""Relative change from one iteration to the next below which an estimate is taken."""

GOLDEN_ANGLE = 2.399963229728653

MIXED_FIELD, MIXED_NOISE = 0.1, 0.03
"""Shares of the field and of a fixed vector without structure in the first direction: neither the last direction nor
the field alone need have a part along the fastest mode, for instance where that mode is at rest. They differ, so that
the two do not cancel where there is one dimension only."""


class Estimate(eqx.Module):
    """What the power method found, and what it spent."""

    field: PyTree  # f(t, y), evaluated here unless it was known
    radius: Scalar  # NaN where nothing was estimated, or where the field is not finite near the state
    direction: PyTree  # unit vector, to start the next estimate from
    evaluations: Int[Array, ""]


def estimate_spectral_radius(
    field: Callable[[PyTree], PyTree],
    y: PyTree,
    f: PyTree,
    f_given: Bool[Array, ""],
    wanted: Bool[Array, ""],
    direction: PyTree,
    span: Scalar,
    extents: Extents | None = None,
) -> Estimate:
    """The modulus of the eigenvalue of largest modulus, if `wanted`; and `f(y)`, unless `f` is `known` to be that.

    A lower bound where the Jacobian is symmetric, as it is for a gradient flow: multiply it by a safety factor. `span`
    is the length of the coming step, whose displacement gives the size where the state is zero; `extents` are those of
    a padded state. Both tasks share one loop, so that the field is traced once.

    The field found keeps its derivatives in forward mode; radius and direction are constants to every derivative.
    """
    dtype = span.dtype
    root = jnp.sqrt(jnp.finfo(dtype).eps).astype(dtype)
    min_distance = 8 * jnp.finfo(dtype).tiny
    span, direction, size = jax.lax.stop_gradient((span, direction, tree_norm(y).astype(dtype)))
    blank = jnp.asarray(jnp.nan, dtype)

    def begin(f: PyTree) -> PyTree:
        waves = noise(f) if extents is None else within(noise(f), extents)
        return unit(add(direction, scale(MIXED_FIELD, unit(f)), scale(MIXED_NOISE, unit(waves))))

    def running(state: tuple) -> Bool[Array, ""]:
        k, _, _, _, converged = state
        return (k == 0) | (wanted & ~converged & (k <= MOST_ITERATIONS))

    def iterate(state: tuple) -> tuple:
        k, f, v, last, _ = state
        first = k == 0
        fixed_f = jax.lax.stop_gradient(f)
        drift = span * tree_norm(fixed_f).astype(dtype)
        reach = jnp.where(size > 0, size, jnp.where(drift > 0, drift, 1))
        distance = jnp.where(first, 0, jnp.maximum(root * reach, min_distance))
        image = field(add(y, scale(distance, v)))
        fixed_image = jax.lax.stop_gradient(image)
        change = jax.tree_util.tree_map(jnp.subtract, fixed_image, fixed_f)
        radius = jnp.where(first, blank, tree_norm(change).astype(dtype) / jnp.where(first, 1, distance))
        converged = ~first & (~jnp.isfinite(radius) | (jnp.abs(radius - last) <= CONVERGED * radius))
        return k + 1, select(first, image, f), select(first, begin(fixed_image), unit(change)), radius, converged

    start = jnp.where(f_given, 1, 0).astype(int)
    v0 = jax.lax.cond(f_given & wanted, begin, lambda _: direction, jax.lax.stop_gradient(f))
    done, f, v, radius, _ = jax.lax.while_loop(running, iterate, (start, f, v0, blank, jnp.asarray(False)))
    usable = wanted & jnp.isfinite(radius)
    return Estimate(f, jnp.where(usable, radius, blank), select(usable, v, direction), done - start)


def add(*trees: PyTree) -> PyTree:
    """The sum of pytrees of one structure."""
    return jax.tree_util.tree_map(lambda *leaves: sum(leaves[1:], start=leaves[0]), *trees)


def scale(factor: Scalar | float, tree: PyTree) -> PyTree:
    """A pytree times a number, each leaf in its own type."""
    return jax.tree_util.tree_map(lambda leaf: jnp.asarray(factor).astype(leaf.dtype) * leaf, tree)


def select(condition: Bool[Array, ""], yes: PyTree, no: PyTree) -> PyTree:
    """One of two pytrees of one structure."""
    return jax.tree_util.tree_map(lambda a, b: jnp.where(condition, a, b), yes, no)


def unit(tree: PyTree) -> PyTree:
    """A pytree over its Euclidean norm; zeros where that is zero or not finite."""
    norm = tree_norm(tree)
    usable = (norm > 0) & jnp.isfinite(norm)
    return jax.tree_util.tree_map(lambda x: jnp.where(usable, x / jnp.where(usable, norm, 1).astype(x.dtype), 0), tree)


def noise(tree: PyTree) -> PyTree:
    """A fixed vector without structure, of the shape of a pytree: cosines of incommensurable multiples of the indices.

    Padding a leaf changes nothing in the entries that were there before.
    """
    leaves, structure = jax.tree_util.tree_flatten(tree)
    waves = []
    for i, leaf in enumerate(leaves):
        phase = jnp.full(leaf.shape, float(i))
        for axis in range(leaf.ndim):
            phase += jax.lax.broadcasted_iota(phase.dtype, leaf.shape, axis) * 2 ** (axis / 3)
        waves.append(jnp.cos(GOLDEN_ANGLE * phase).astype(leaf.dtype))
    return jax.tree_util.tree_unflatten(structure, waves)
