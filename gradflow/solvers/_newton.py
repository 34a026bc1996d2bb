"""Newton's method with a Krylov method for the linear systems, for one step of an implicit method."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from gradflow._tree import scaled_norm
from gradflow.solvers._conjugate_gradient import Solved, conjugate_gradient
from gradflow.solvers._conjugate_residual import conjugate_residual

SOLVE = 0.05
"""Error of a linear solve, as a share of the tolerance on the error of the step."""
NEWTON = 0.1
"""What the next Newton iteration may still change, as a share of that tolerance."""


class Newton(eqx.Module):
    """Progress of a Newton iteration."""

    correction: Float[Array, " size"]
    residual: Float[Array, " size"]  # of the last linear solve
    change: Scalar
    rate: Scalar
    observed: Bool[Array, ""]
    converged: Bool[Array, ""]
    failed: Bool[Array, ""]
    finite: Bool[Array, ""]  # the field was, wherever it was evaluated
    negative: Bool[Array, ""]
    curvature: Scalar
    stiffest: Scalar
    iterations: Int[Array, ""]
    evaluations: Int[Array, ""]
    products: Int[Array, ""]


def newton(
    derivative: Callable[[Float[Array, " size"]], Float[Array, " size"]],
    start: Float[Array, " size"],
    known: Float[Array, " size"],
    c: Scalar,
    *,
    norm: Callable[[Float[Array, " size"]], Scalar],
    constant: Scalar,
    accuracy: Scalar,
    rate: Scalar,
    curvature: Scalar,
    active: Bool[Array, ""],
    symmetric: bool,
    linearise: bool,
    max_products: int,
) -> Newton:
    """Solves `d + known = c f(start + d)` for the correction `d`, to a share of the tolerance.

    The change that the next iteration would make is predicted by the rate seen last, so that most steps take one
    iteration, with no evaluation to check it. Where one is checked, what counts is by how much the residual
    differs from what the linear model says.

    `constant norm(d)` is the error of the step over its tolerance, `accuracy` the relative tolerance itself; `rate` and
    `curvature` are those of the steps before. `symmetric` tells that the Jacobian is. Nothing is evaluated unless
    `active`.
    """
    dtype = start.dtype
    krylov = conjugate_gradient if symmetric else conjugate_residual
    smallest = jnp.clip(0.9 * (1 - c * curvature), 0.1, 0.9)
    root = 3 * jnp.sqrt(jnp.finfo(dtype).eps).astype(dtype)
    zero, nought, no = jnp.zeros((), dtype), jnp.asarray(0), jnp.asarray(False)

    def iterate(now: Newton) -> Newton:
        point = start + now.correction
        if linearise:
            slope, tangent = jax.linearize(derivative, point)
        else:
            slope, tangent = derivative(point), None
        length = scaled_norm(point)
        length = root * jnp.where(length > 0, length, 1)

        def product(p: Float[Array, " size"]) -> Float[Array, " size"]:
            if tangent is not None:
                return -tangent(p)
            step = length / jnp.sqrt(p @ p)
            return (slope - derivative(point + step * p)) / step

        residual = c * slope - known - now.correction
        bent = constant * norm(residual - now.residual)
        first = now.iterations == 0
        settled = ~first & (bent <= NEWTON)
        usable = jnp.all(jnp.isfinite(residual))
        most = jnp.where(settled | ~usable, 0, max_products)
        solved: Solved = krylov(product, c, residual, norm, SOLVE / constant, smallest, jnp.where(first, 1, 0), most)
        change = constant * norm(solved.x)
        divisor = jnp.where(now.change > 0, now.change, 1)
        ratio = bent / divisor
        observed = jnp.where(first, now.rate, jnp.maximum(0.3 * now.rate, jnp.where(settled, ratio, change / divisor)))
        diverged = ~first & ~settled & (change > 0.9 * now.change)
        broken = ~usable | (~solved.met & ~settled) | diverged
        spent = solved.products
        return Newton(
            correction=now.correction + jnp.where(broken | settled, 0, solved.x),
            residual=solved.residual,
            change=change,
            rate=observed,
            observed=~first,
            converged=~broken & (settled | (change * jnp.minimum(observed, 1) <= NEWTON)),
            failed=broken,
            finite=usable & solved.finite,
            negative=now.negative | solved.negative,
            curvature=jnp.maximum(now.curvature, solved.curvature),
            stiffest=jnp.maximum(now.stiffest, solved.stiffest),
            iterations=now.iterations + 1,
            evaluations=now.evaluations + 1 + (0 if linearise else spent),
            products=now.products + (spent if linearise else 0),
        )

    def running(now: Newton) -> Bool[Array, ""]:
        return active & ~now.converged & ~now.failed & (now.iterations < 4)

    nowhere = jnp.zeros_like(start)
    begin = Newton(
        correction=nowhere,
        residual=nowhere,
        change=zero,
        rate=rate,
        observed=no,
        converged=no,
        failed=no,
        finite=~no,
        negative=no,
        curvature=zero,
        stiffest=zero,
        iterations=nought,
        evaluations=nought,
        products=nought,
    )

    def equation(d: Float[Array, " size"]) -> Float[Array, " size"]:
        return c * derivative(start + d) - known - d

    def solve(_: Any, __: Any) -> "tuple[Array, Newton]":
        final = jax.lax.while_loop(running, iterate, begin)
        # As numbers: whatever comes along with the solution of `custom_root` must have a derivative.
        return final.correction, jax.tree_util.tree_map(lambda a: a.astype(dtype), final)

    def solve_tangent(slope: Callable[[Array], Array], b: Float[Array, " size"]) -> Float[Array, " size"]:
        size = scaled_norm(b)
        relative = lambda v: scaled_norm(v) / jnp.where(size > 0, size, 1)  # noqa: E731
        most = jnp.where(active, max_products, 0)
        product = lambda p: -(slope(p) + p) / c  # noqa: E731
        return krylov(product, c, -b, relative, SOLVE * accuracy, smallest, nought, most).x

    # Derivatives are those of the equation at its solution; those of the iterations would be noise.
    correction, found = jax.lax.custom_root(equation, jnp.zeros_like(start), solve, solve_tangent, has_aux=True)
    found = jax.tree_util.tree_map(lambda a, b: a.astype(b.dtype), found, begin)
    return eqx.tree_at(lambda n: n.correction, found, correction)
