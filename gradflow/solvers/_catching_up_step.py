"""A step of the method of catching up: what is known at its middle, and what holds it at the edge of stability."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from gradflow._linalg import Basis, Product, expanded, ritz
from gradflow.solvers._complementarity import complementary, pairs
from gradflow.solvers._edge import (
    Curvature,
    Gradient,
    Preconditioner,
    chosen_block,
    curvature,
    gram,
    inverse,
    rowwise,
    unpacked,
)

CRITICAL = 1.9
"""Relative sharpness (the threshold is at 2) from which on a direction may oscillate within the next step."""
TRACKED = 1.75
"""Relative sharpness down to which directions are tracked, and one more."""
CRITICAL_RESIDUAL, TRACKED_RESIDUAL = 3e-3, 0.03
"""Residuals of eigenvectors, relative to the threshold over two, that are left as they are. A Ritz value is off by the
square of its residual over the gap."""


class Middle(NamedTuple):
    """What is known at the middle of a step, in units of steps of the rule."""

    w: Float[Array, " size"]
    g: Float[Array, " size"]
    memory: Array
    p: Array
    slope: Array  # of p in the memory
    u: Float[Array, "k size"]
    curvature: Curvature
    inside: Bool[Array, " k"]  # which directions are critical
    edge: Float[Array, "k k"]  # 2 U'PU - U'HU
    improved: Basis  # there, by one product with each residual that is too large
    products: Int[Array, ""]
    outside: Scalar  # largest residual of a critical direction


class End(NamedTuple):
    """The end of a step, as far as it is known before it is taken."""

    h: Scalar
    k: Scalar
    memory: Array  # without the part of the oscillation
    guess: Float[Array, "k k"]  # of the covariance


class Step(NamedTuple):
    """A step that has caught up with the stable region."""

    w: Float[Array, " size"]
    x: Float[Array, "k k"]
    force: Float[Array, " size"]
    edge: Float[Array, "k k"]  # 2 U'PU - U'HU at the end, by the linearisation
    rate: Scalar  # of the sharpest direction's relative sharpness per step, without the oscillation
    brake: Scalar  # by how much its variance lowers that


def relative_hessian(gradient: Gradient, w: Float[Array, " size"], p: Array) -> Product:
    """Products with `P^-1/2 H P^-1/2` at `w`."""
    root = inverse(jnp.sqrt(p))
    return lambda v: root * jax.jvp(gradient, (w,), (root * v,))[1]


def middle_of(
    gradient: Gradient, preconditioner: Preconditioner, w: Float[Array, " size"], memory: Array, k: Scalar, basis: Basis
) -> Middle:
    p = preconditioner.at(memory, k)
    u = rowwise(inverse(jnp.sqrt(p))) * jnp.where(basis.used[:, None], basis.vectors, 0)
    g = gradient(w)
    inside = basis.used & (basis.values > CRITICAL)
    at_start = curvature(gradient, w, g, u, jnp.sum(inside), basis.count)
    mapped = rowwise(inverse(jnp.sqrt(p))) * at_start.mapped

    def tolerance(values: Float[Array, " k"]) -> Float[Array, " k"]:
        return jnp.where(values > CRITICAL, CRITICAL_RESIDUAL, TRACKED_RESIDUAL).astype(values.dtype)

    improved, _, num_products = expanded(relative_hessian(gradient, w, p), basis, mapped, tolerance)
    wanted = jnp.sum(improved.used & (improved.values > TRACKED)) + 1
    improved = eqx.tree_at(lambda b: b.count, improved, jnp.minimum(improved.count, wanted))
    small = basis.vectors @ mapped.T
    values, turn = ritz(0.5 * (small + small.T), inside)
    # The basis is off by its residuals, and the sharpness by their squares: it is that of the better one.
    lift = jnp.where(jnp.arange(values.size) < jnp.sum(inside), jnp.maximum(improved.values - values, 0), 0)
    small = 0.5 * (small + small.T) + (turn * lift[None]) @ turn.T
    tracked = jnp.where(inside[:, None], basis.vectors, 0)
    outside = jnp.max(jnp.where(inside, jnp.linalg.norm(mapped - (mapped @ tracked.T) @ tracked, axis=1), 0))
    edge = weighted(u, 2 * p) - small
    return Middle(
        w, g, memory, p, preconditioner.slope(memory, k), u, at_start, inside, edge, improved, num_products, outside
    )


def caught_up(preconditioner: Preconditioner, middle: Middle, drift: Float[Array, " size"], end: End) -> Step:
    """The step to `drift`, where it would lead without oscillation, with the covariance that the end asks for."""
    k, u, inside, thirds = middle.u.shape[0], middle.u, middle.inside, middle.curvature.thirds
    # Linear in the memory, as in the covariance: where the two parts of its change cancel, nothing is left.
    p1 = preconditioner.at(middle.memory, end.k) + middle.slope * (end.memory - middle.memory)
    change = weighted(u, 2 * (p1 - middle.p)) - unpacked(thirds @ (drift - middle.w), k)
    stiff = 0.5 * end.h * weighted(thirds, inverse(middle.p))
    if preconditioner.form.memory is not None:
        rows, columns = pairs(k)
        both = (inside[rows] & inside[columns])[:, None]
        mixed = jnp.where(both, u[rows] * u[columns], 0)
        weight = 8 * preconditioner.weight(end.h, u.dtype) * middle.slope * middle.p**2
        if preconditioner.form.memory.scalar:
            total = jnp.sum(mixed, axis=1)
            stiff += weight * total[:, None] * total[None]
        else:
            stiff += weighted(mixed, weight)
    a = chosen_block(middle.edge + change, inside, 1.0)
    b = gram(stiff, k)
    guess = chosen_block(end.guess, inside, 0.0)
    x, _ = complementary(a, b, guess)
    rows, columns = pairs(k)
    force = 0.5 * (jnp.where(rows == columns, 1, 2) * x[rows, columns]) @ thirds
    edge = a + jnp.einsum("ijkl,kl->ij", b, x)
    w = drift - end.h * inverse(middle.p) * force
    return Step(w, x, force, edge, -change[0, 0] / end.h, stiff[0, 0] / end.h)


def weighted(u: Float[Array, "k size"], weight: Array) -> Float[Array, "k k"]:
    """`U' diag(weight) U`."""
    return (u * rowwise(weight)) @ u.T
