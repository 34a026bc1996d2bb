"""A plane in the space of parameters: its two directions, coordinates of a run in it, a loss on it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from gradflow._checks import fail
from gradflow._solution import Solution, moving

PARALLEL = 1e-8
"""Share of a direction, outside of the other one, below which the two do not span a plane."""


class Plane(NamedTuple):
    """Points `centre + a axes[0] + b axes[1]`, and what its axes are called.

    `far`: the largest distance of given paths from the plane, over the largest distance from the start of the first.
    """

    centre: Float[np.ndarray, " size"]
    axes: Float[np.ndarray, "2 size"]
    names: tuple[str, str]
    far: float

    def coordinates(self, path: Float[np.ndarray, "T size"]) -> Float[np.ndarray, "T 2"]:
        """Where points are seen in the plane."""
        return (path - self.centre) @ self.axes.T


def path_of(sol: Solution) -> Float[np.ndarray, "T size"]:
    """The parameters that flow, as vectors, at the save times that were reached."""
    leaves = jax.tree_util.tree_leaves(moving(sol.params, sol.held))
    rows = [np.asarray(leaf, float).reshape(len(leaf), -1) for leaf in leaves]
    return np.concatenate(rows, axis=1)[sol.reached]


def plane_of(
    paths: Sequence[Float[np.ndarray, "_ size"]], directions: tuple[PyTree, PyTree] | None, held: tuple[str, ...]
) -> Plane:
    """The plane of two directions through the end of the first path, or that of the two principal components of all.

    Two parameters are their own plane. `held`: paths of the parameters that do not flow.

    **Raises** `ValueError` for directions that span no plane, and for paths of fewer than two parameters or points.
    """
    points = np.concatenate(list(paths))
    size = points.shape[1]
    if size < 2:
        raise fail("sols", "have at least two parameters that flow", "of one", "Observe it, and use `sol.plot()`.")
    if directions is not None:
        centre, axes, names = paths[0][-1], _spanning(directions, held, size), ("direction 1", "direction 2")
    elif size == 2:
        centre, axes, names = np.zeros(2), np.eye(2), ("first parameter", "second parameter")
    else:
        centre, axes, names = _principal(points)
    off = (points - centre) - (points - centre) @ axes.T @ axes
    extent = float(np.max(np.linalg.norm(points - points[0], axis=1)))
    far = float(np.max(np.linalg.norm(off, axis=1)))
    return Plane(centre, axes, names, far / extent if extent > 0 else 0.0)


def _principal(points: Float[np.ndarray, "T size"]) -> tuple[np.ndarray, np.ndarray, tuple[str, str]]:
    centre = np.mean(points, axis=0)
    _, sizes, axes = np.linalg.svd(points - centre, full_matrices=False)
    if len(points) < 2 or not sizes[0] > 0:
        actual = "of one point" if len(points) < 2 else "at rest"
        raise fail("sols", "move, in order to have principal components", actual, "Pass directions=(first, second).")
    shares = sizes**2 / np.sum(sizes**2)
    first, second = (f"principal component {i + 1}, {100 * shares[i]:.1f} % of the variance" for i in range(2))
    # A sign is free: the path ends to the right of its middle and above it.
    signs = np.where((points[-1] - centre) @ axes[:2].T < 0, -1.0, 1.0)
    return centre, axes[:2] * signs[:, None], (first, second)


def _spanning(directions: object, held: tuple[str, ...], size: int) -> Float[np.ndarray, "2 size"]:
    """An orthonormal basis of two directions, the first of which keeps its own."""
    if not isinstance(directions, list | tuple) or len(directions) != 2:
        raise fail("directions", "be a pair", f"of type {type(directions).__name__}", "For instance (first, second).")
    first, second = (_vector(direction, held, size) for direction in directions)
    lengths = np.linalg.norm(first), np.linalg.norm(second)
    if not all(np.isfinite(lengths)) or min(lengths) == 0:
        raise fail("directions", "be finite and not zero", f"of norms {lengths[0]:.3g} and {lengths[1]:.3g}")
    first, second = first / lengths[0], second / lengths[1]
    remaining = second - (second @ first) * first
    if np.linalg.norm(remaining) < PARALLEL:
        raise fail("directions", "span a plane", "parallel")
    return np.stack([first, remaining / np.linalg.norm(remaining)])


def _vector(direction: PyTree, held: tuple[str, ...], size: int) -> Float[np.ndarray, " size"]:
    """A direction as a vector: given as one, or as parameters, of which those count that flow."""
    if isinstance(direction, jax.Array | np.ndarray) and direction.shape == (size,):
        return np.asarray(direction, float)
    arrays = jax.tree_util.tree_map(lambda leaf: jnp.asarray(leaf) if eqx.is_array_like(leaf) else leaf, direction)
    vector = np.asarray(jax.flatten_util.ravel_pytree(moving(arrays, held))[0], float)
    if vector.size != size:
        actual = f"one of {vector.size} entries"
        raise fail("directions", f"have the {size} entries of the parameters that flow", actual)
    return vector


def loss_on(
    plane: Plane,
    x: Float[np.ndarray, " nx"],
    y: Float[np.ndarray, " ny"],
    loss: Callable[[PyTree], Array],
    sol: Solution,
) -> Float[np.ndarray, "ny nx"]:
    """The loss over a grid of the plane; what does not flow is as at the end of the run."""
    flowing = moving(sol.final, sol.held)
    vector, unravel = jax.flatten_util.ravel_pytree(flowing)

    @eqx.filter_jit
    def along(centre: Array, axes: Array, remaining: PyTree) -> Array:
        def at(point: Array) -> Array:
            # Over one axis of the grid at a time: large data and models have room for no more at once.
            params = eqx.combine(unravel((centre + point @ axes).astype(vector.dtype)), remaining)
            return jnp.asarray(loss(params), float)

        row = lambda b: jax.lax.map(lambda a: at(jnp.stack([a, b])), jnp.asarray(x, float))  # noqa: E731
        return jax.lax.map(row, jnp.asarray(y, float))

    values = along(jnp.asarray(plane.centre, float), jnp.asarray(plane.axes, float), sol.final)
    if values.shape != (len(y), len(x)):
        raise fail("loss", "return a scalar", f"returning an array of shape {values.shape[2:]}")
    return np.asarray(values)
