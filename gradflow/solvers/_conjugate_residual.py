"""Generalised conjugate residuals for `(I + c H) x = r`, where `H` need not be symmetric."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from gradflow.solvers._conjugate_gradient import LEAST, Solved

RECALLED = 30
"""Directions kept; beyond that many the oldest is forgotten."""


def conjugate_residual(
    product: Callable[[Float[Array, " size"]], Float[Array, " size"]],
    c: Scalar,
    r: Float[Array, " size"],
    norm: Callable[[Float[Array, " size"]], Scalar],
    tolerance: float | Scalar,
    smallest: Scalar,
    min_products: Int[Array, ""],
    max_products: Int[Array, ""],
) -> Solved:
    """Solves `(I + c H) x = r` until the residual, measured with `norm`, is at most `tolerance`.

    The iterates are those of GMRES as long as no more than `RECALLED` directions are needed (Eisenstat, Elman & Schultz
    1983, SIAM J. Numer. Anal. 20). Where the flow contracts, `|(I + c H)^{-1}| <= 1` and the residual bounds the error;
    unlike for a symmetric matrix there is no sharper bound at hand.

    `negative` tells that a direction was met in which `I + c H` is not positive, so that the iteration may stall; `x`
    is then not a solution. `smallest` is not used; the other arguments are those of `conjugate_gradient`.
    """
    del smallest
    scale = jnp.max(jnp.abs(r), initial=0.0)
    scale = jax.lax.stop_gradient(jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1))
    num_kept = min(RECALLED, r.size)
    nothing = jnp.zeros((num_kept, r.size), r.dtype)
    zero = jnp.zeros((), r.dtype)
    start = (
        jnp.zeros_like(r), r / scale, nothing, nothing, jnp.asarray(0),
        jnp.asarray(False), jnp.asarray(True), zero, zero,
    )  # fmt: skip

    def error(residual: Float[Array, " size"]) -> Scalar:
        return jax.lax.stop_gradient(norm(residual * scale))

    def wanted(state: tuple) -> Bool[Array, ""]:
        _, residual, _, _, count, negative, *_ = state
        unfinished = (error(residual) > tolerance) | ((count < min_products) & jnp.any(residual != 0))
        return unfinished & (count < max_products) & ~negative

    def iterate(state: tuple) -> tuple:
        x, residual, inputs, outputs, count, _, _, curvature, stiffest = state
        hp = product(residual)
        squares = residual @ residual
        along = residual @ hp / squares
        negative, finite = ~(1 + c * along > LEAST), jnp.isfinite(along)
        output = residual + c * hp
        before = outputs @ output
        output, p = output - before @ outputs, residual - before @ inputs
        length = jnp.sqrt(output @ output)
        usable = ~negative & (length > 0)
        output, p = output / jnp.where(usable, length, 1), p / jnp.where(usable, length, 1)
        alpha = jnp.where(usable, output @ residual, 0)
        x, residual = jnp.where(usable, x + alpha * p, x), jnp.where(usable, residual - alpha * output, residual)
        place = count % num_kept
        inputs, outputs = inputs.at[place].set(p), outputs.at[place].set(output)
        along = jnp.where(finite, along, 0)
        curvature, stiffest = jnp.minimum(curvature, along), jnp.maximum(stiffest, along)
        return x, residual, inputs, outputs, count + 1, ~usable, finite, curvature, stiffest

    final = jax.lax.while_loop(wanted, iterate, start)
    x, residual, _, _, count, negative, finite, curvature, stiffest = final
    converged = (error(residual) <= tolerance) & ~negative
    extremes = -jax.lax.stop_gradient(curvature), jax.lax.stop_gradient(stiffest)
    return Solved(scale * x, scale * residual, count, converged, negative, finite, *extremes)
