"""Critical points of functions on the unit sphere: projected ascent, Newton's method, least residuals."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from gradflow._tree import full_precision, join
from gradflow.problems import NeuralCorrelation
from gradflow.programs import fresh_jit

FARTHEST = 0.1
"""Length of the longest step of the ascent, in radians."""


class WholeCorrelation(eqx.Module):
    """`N` as a function of all parameters as one vector."""

    correlation: NeuralCorrelation
    trainable: PyTree
    frozen: PyTree

    def __call__(self, vector: Array, index: Int[ArrayLike, ""]) -> Float[Array, ""]:
        _, unflatten = jax.flatten_util.ravel_pytree(self.trainable)
        return self.correlation(join(unflatten(vector), self.frozen))


@fresh_jit
@full_precision
def ascend(
    target: Callable[[Array, Array], Array],
    starts: Float[Array, "starts size"],
    scale: Float[Array, ""],
    degree: int,
    iterations: int,
) -> tuple[Array, Array, Array, Array, Array]:
    """Ends of the ascent of `target(u, index)` on the unit sphere from start `index`.

    Unit vectors, values, residuals, last steps, and the tangential eigenvalues of the Hessian, rising. `scale`: a size
    of `target`.
    """

    def ends(value: Callable[[Array], Array], start: Array) -> tuple[Array, ...]:
        def step(_: Int[ArrayLike, ""], state: tuple[Array, ...]) -> tuple[Array, ...]:
            u, n, g, length = state
            move = length * g / scale
            v = u + move * jnp.minimum(1, FARTHEST / jnp.maximum(jnp.linalg.norm(move), 1e-30))
            v = v / jnp.linalg.norm(v)
            new, slope = tangent(value, v)
            better = new >= n
            pick = lambda a, b: jnp.where(better, a, b)  # noqa: E731
            return pick(v, u), pick(new, n), pick(slope, g), jnp.where(better, 2.0, 0.3).astype(u.dtype) * length

        u = start / jnp.linalg.norm(start)
        n, g = tangent(value, u)
        # Steps are short, so that the basin of the start is not left; one that starts at rest is to stay there.
        first = FARTHEST * scale / jnp.maximum(jnp.linalg.norm(g), 1e-3 * scale)
        u, n, g, length = jax.lax.fori_loop(0, iterations, step, (u, n, g, first.astype(u.dtype)))
        u = newton(value, degree, u)
        n, g = tangent(value, u)
        return u, n, jnp.linalg.norm(g), length, eigenvalues(value, u)

    def one(given: tuple[Array, Array]) -> tuple[Array, ...]:
        start, index = given
        return ends(lambda v: target(v, index), start)

    given = (starts, jnp.arange(starts.shape[0]))
    u, n, residual, length, values = jax.lax.map(one, given, batch_size=min(16, starts.shape[0]))
    return u, n, residual, length, values


def tangent(value: Callable[[Array], Array], u: Array) -> tuple[Array, Array]:
    """Value and tangential gradient."""
    n, g = jax.value_and_grad(value)(u)
    return n, g - (g @ u) * u


def newton(value: Callable[[Array], Array], degree: int, u: Array, steps: int = 4) -> Array:
    """Steps of Newton's method on `grad N(u) = degree N(u) u`, taken where they lower the residual."""
    rtol = 1e-8 if u.dtype == jnp.float64 else 1e-4

    def step(_: Int[ArrayLike, ""], u: Array) -> Array:
        stepped = u - jnp.linalg.pinv(_tangent_jacobian(value, degree, u), rtol=rtol) @ tangent(value, u)[1]
        stepped = stepped / jnp.linalg.norm(stepped)
        better = jnp.linalg.norm(tangent(value, stepped)[1]) < jnp.linalg.norm(tangent(value, u)[1])
        better &= jnp.linalg.norm(stepped - u) < 0.1
        return jnp.where(better, stepped, u)

    return jax.lax.fori_loop(0, steps, step, u)


def least_residual(value: Callable[[Array], Array], degree: int, u: Array, steps: int) -> Array:
    """Levenberg and Marquardt's method on `|grad N(u) - degree N(u) u|^2`: it comes to rest at saddles and minima too.

    Steps are at most about a third of a radian, so that a critical point nearby is not passed over.
    """
    u = u / jnp.linalg.norm(u)

    def step(_: Int[ArrayLike, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        u, damping = state
        force = tangent(value, u)[1]
        matrix = _tangent_jacobian(value, degree, u)
        shift = damping * jnp.sum(matrix**2) / u.size + jnp.finfo(u.dtype).tiny
        stepped = jnp.linalg.solve(matrix @ matrix + shift * jnp.eye(u.size, dtype=u.dtype), matrix @ force)
        stepped = stepped * jnp.minimum(1, 0.3 / jnp.maximum(jnp.linalg.norm(stepped), 1e-30))
        stepped = (u - stepped) / jnp.linalg.norm(u - stepped)
        better = jnp.linalg.norm(tangent(value, stepped)[1]) < jnp.linalg.norm(force)
        tolerance = 100 * jnp.finfo(u.dtype).eps
        return jnp.where(better, stepped, u), jnp.clip(jnp.where(better, 0.2, 5.0) * damping, tolerance, 1e3)

    return jax.lax.fori_loop(0, steps, step, (u, jnp.asarray(0.1, u.dtype)))[0]


def eigenvalues(value: Callable[[Array], Array], u: Array, allowed: Array | None = None) -> Float[Array, " tangential"]:
    """Eigenvalues of the Hessian on the tangent space, rising; `inf` in place of directions that are not allowed."""
    project = jnp.eye(u.size, dtype=u.dtype) - jnp.outer(u, u)
    inside = project if allowed is None else allowed @ project @ allowed
    hessian = inside @ jax.hessian(value)(u) @ inside
    # The direction u itself, and those not allowed, are moved out of the way.
    far = 4 * (1 + jnp.max(jnp.abs(hessian))) * u.size
    outside = jnp.zeros_like(inside) if allowed is None else jnp.eye(u.size, dtype=u.dtype) - allowed
    spectrum = jnp.linalg.eigvalsh(hessian - far * jnp.outer(u, u) + far * outside)[1:]
    return jnp.where(spectrum > far / 2, jnp.inf, spectrum)


def _tangent_jacobian(value: Callable[[Array], Array], degree: int, u: Array) -> Array:
    project = jnp.eye(u.size, dtype=u.dtype) - jnp.outer(u, u)
    return project @ jax.hessian(value)(u) @ project - degree * value(u) * project
