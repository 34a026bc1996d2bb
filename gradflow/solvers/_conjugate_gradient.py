"""Conjugate gradients for `(I + c H) x = r`, with a bound on the error and an eye on negative curvature."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

LEAST = 0.05
"""Rayleigh quotient of `I + c H` below which it counts as indefinite."""


class Solved(eqx.Module):
    """`x`, its residual, products with `H` spent, whether the bound was met, and the extremes of curvature seen."""

    x: Float[Array, " size"]
    residual: Float[Array, " size"]
    products: Int[Array, ""]
    converged: Bool[Array, ""]
    negative: Bool[Array, ""]
    finite: Bool[Array, ""]  # all products were
    curvature: Scalar
    stiffest: Scalar


def conjugate_gradient(
    product: Callable[[Float[Array, " size"]], Float[Array, " size"]],
    c: Scalar,
    r: Float[Array, " size"],
    norm: Callable[[Float[Array, " size"]], Scalar],
    tolerance: float | Scalar,
    smallest: Scalar,
    min_products: Int[Array, ""],
    max_products: Int[Array, ""],
) -> Solved:
    """Solves `(I + c H) x = r` until the error of `x`, measured with `norm`, is at most `tolerance`.

    The residual would be the wrong thing to stop by: it is dominated by the stiff directions, where the error is a
    thousandth of it. The error itself is bounded through the Gauss-Radau quadrature hidden in the coefficients of the
    iteration (Meurant & Tichy 2013, Numer. Algorithms 62), which takes a lower bound `smallest` on the eigenvalues of
    the matrix: they bound the energy norm of the error, and so, divided by the root of `smallest`, the Euclidean norm.
    From there it is carried over to `norm` by their ratio for `x`.

    `negative` tells that a direction of (nearly) negative curvature of `I + c H` was met; `x` is then not a solution.
    Neither is it where `converged` is false: that would have taken more than `max_products` products. At least
    `min_products` are made in any case.
    """
    scale = jnp.max(jnp.abs(r), initial=0.0)
    scale = jax.lax.stop_gradient(jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1))
    residual = r / scale
    squares = residual @ residual
    length = jnp.sqrt(squares)
    relative = norm(r) / (scale * jnp.where(length > 0, length, 1))
    start = (
        jnp.zeros_like(r), residual, residual, squares, 1 / smallest, relative, jnp.asarray(0),
        jnp.asarray(False), jnp.asarray(True), jnp.zeros((), r.dtype), jnp.zeros((), r.dtype),
    )  # fmt: skip

    def error(squares: Scalar, gamma: Scalar, relative: Scalar) -> Scalar:
        return jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(gamma * squares, 0) / smallest) * relative * scale)

    def wanted(state: tuple) -> Bool[Array, ""]:
        _, _, _, squares, gamma, relative, count, negative, *_ = state
        unfinished = (error(squares, gamma, relative) > tolerance) | ((count < min_products) & (squares > 0))
        return unfinished & (count < max_products) & ~negative

    def iterate(state: tuple) -> tuple:
        x, residual, p, squares, gamma, _, count, _, _, curvature, stiffest = state
        hp = product(p)
        pp = p @ p
        along = p @ hp
        quotient = 1 + c * along / pp
        negative, finite = ~(quotient > LEAST), jnp.isfinite(quotient)
        alpha = squares / jnp.where(negative, 1, pp * quotient)
        x = jnp.where(negative, x, x + alpha * p)
        residual = jnp.where(negative, residual, residual - alpha * (p + c * hp))
        new = residual @ residual
        beta = new / squares
        ahead = gamma - alpha
        gamma = jnp.where(ahead > 0, ahead / jnp.where(ahead > 0, smallest * ahead + beta, 1), alpha)
        length = jnp.sqrt(x @ x)
        relative = norm(x * scale) / (scale * jnp.where(length > 0, length, 1))
        along = jnp.where(jnp.isfinite(along), along / pp, 0)
        curvature, stiffest = jnp.minimum(curvature, along), jnp.maximum(stiffest, along)
        return x, residual, residual + beta * p, new, gamma, relative, count + 1, negative, finite, curvature, stiffest

    final = jax.lax.while_loop(wanted, iterate, start)
    x, residual, _, squares, gamma, relative, count, negative, finite, curvature, stiffest = final
    converged = error(squares, gamma, relative) <= tolerance
    extremes = -jax.lax.stop_gradient(curvature), jax.lax.stop_gradient(stiffest)
    return Solved(scale * x, scale * residual, count, converged & ~negative, negative, finite, *extremes)
