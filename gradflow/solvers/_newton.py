"""Newton's method with a Krylov method for the linear systems, for one step of an implicit method."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from gradflow._tree import scaled_norm
from gradflow.solvers._conjugate_gradient import Solved, conjugate_gradient
from gradflow.solvers._conjugate_residual import conjugate_residual

Vector = Float[Array, " size"]

SOLVE = 0.05
"""Error of a linear solve, as a share of the tolerance on the error of the step."""
NEWTON = 0.1
"""What the next Newton iteration may still change, as a share of that tolerance."""
MAX_ITERATIONS = 4
"""Newton iterations in a step: where these do not converge, a shorter step is cheaper than another one."""
DIVERGING = 0.9
"""Ratio of two changes in a row from which on the iteration is given up."""
CONTRACTION_MEMORY = 0.3
"""What is left of the contraction seen before, as a bound from below on that of the present iteration."""
DIFFERENCE = 3.0
"""Length of the step of a difference of gradients, over the root of the rounding unit times the size of the state."""
MIN_EIGENVALUE, MAX_EIGENVALUE = 0.1, 0.9
"""Between these lies the bound from below on the eigenvalues of `I + c H` by which linear solves stop."""


class Equation(NamedTuple):
    """`d + known = c f(start + d)`, for the correction `d`."""

    derivative: Callable[[Vector], Vector]
    start: Vector
    known: Vector
    c: Scalar

    def residual(self, slope: Vector, correction: Vector) -> Vector:
        """What is left of the equation, where `f` is `slope`."""
        return self.c * slope - self.known - correction


class ErrorMeasure(NamedTuple):
    """`constant norm(d)` is the error of the step over its tolerance, `accuracy` the relative tolerance itself."""

    norm: Callable[[Vector], Scalar]
    constant: Scalar
    accuracy: Scalar

    def of(self, vector: Vector) -> Scalar:
        return self.constant * self.norm(vector)


class LinearSolver(NamedTuple):
    """How linear systems are solved: with what is known of the Jacobian, by differences or exact products, how long."""

    symmetric: bool
    linearise: bool
    max_products: int

    @property
    def method(self) -> Callable[..., Solved]:
        return conjugate_gradient if self.symmetric else conjugate_residual


class Newton(eqx.Module):
    """Progress of a Newton iteration."""

    correction: Vector
    residual: Vector  # of the last linear solve
    change: Scalar
    contraction: Scalar
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
    equation: Equation,
    measure: ErrorMeasure,
    linear: LinearSolver,
    *,
    contraction: Scalar,
    curvature: Scalar,
    active: Bool[Array, ""],
) -> Newton:
    """Solves for the correction, to a share of the tolerance.

    The change that the next iteration would make is predicted by the contraction seen last, so that most steps take one
    iteration, with no evaluation to check it. Where one is checked, what counts is by how much the residual
    differs from what the linear model says.

    `contraction` and `curvature` are those of the steps before. Nothing is evaluated unless `active`.
    """
    dtype, c = equation.start.dtype, equation.c
    smallest = jnp.clip(0.9 * (1 - c * curvature), MIN_EIGENVALUE, MAX_EIGENVALUE)
    begin = _begin(equation.start, contraction)

    def running(now: Newton) -> Bool[Array, ""]:
        return active & ~now.converged & ~now.failed & (now.iterations < MAX_ITERATIONS)

    def iterate(now: Newton) -> Newton:
        return _iterate(equation, measure, linear, smallest, now)

    def residual(d: Vector) -> Vector:
        return equation.residual(equation.derivative(equation.start + d), d)

    def solve(_: Callable[[Vector], Vector], __: Vector) -> tuple[Array, Newton]:
        final = jax.lax.while_loop(running, iterate, begin)
        # As numbers: whatever comes along with the solution of `custom_root` must have a derivative.
        return final.correction, jax.tree_util.tree_map(lambda a: a.astype(dtype), final)

    def solve_tangent(slope: Callable[[Array], Array], b: Vector) -> Vector:
        size = scaled_norm(b)
        relative = lambda v: scaled_norm(v) / jnp.where(size > 0, size, 1)  # noqa: E731
        max_products = jnp.where(active, linear.max_products, 0)
        product = lambda p: -(slope(p) + p) / c  # noqa: E731
        tolerance = SOLVE * measure.accuracy
        return linear.method(product, c, -b, relative, tolerance, smallest, jnp.asarray(0), max_products).x

    # Derivatives are those of the equation at its solution; those of the iterations would be noise.
    nowhere = jnp.zeros_like(equation.start)
    correction, solved = jax.lax.custom_root(residual, nowhere, solve, solve_tangent, has_aux=True)
    solved = jax.tree_util.tree_map(lambda a, b: a.astype(b.dtype), solved, begin)
    return eqx.tree_at(lambda n: n.correction, solved, correction)


def _begin(start: Vector, contraction: Scalar) -> Newton:
    """Before the first iteration."""
    nowhere, zero, count, no = jnp.zeros_like(start), jnp.zeros((), start.dtype), jnp.asarray(0), jnp.asarray(False)
    return Newton(
        correction=nowhere,
        residual=nowhere,
        change=zero,
        contraction=contraction,
        observed=no,
        converged=no,
        failed=no,
        finite=~no,
        negative=no,
        curvature=zero,
        stiffest=zero,
        iterations=count,
        evaluations=count,
        products=count,
    )


def _iterate(equation: Equation, measure: ErrorMeasure, linear: LinearSolver, smallest: Scalar, now: Newton) -> Newton:
    slope, product = _linear_model(equation.derivative, equation.start + now.correction, linear.linearise)
    residual = equation.residual(slope, now.correction)
    nonlinearity = measure.of(residual - now.residual)
    first = now.iterations == 0
    settled = ~first & (nonlinearity <= NEWTON)
    usable = jnp.all(jnp.isfinite(residual))
    max_products = jnp.where(settled | ~usable, 0, linear.max_products)
    solved = linear.method(
        product, equation.c, residual, measure.norm, SOLVE / measure.constant, smallest,
        jnp.where(first, 1, 0), max_products,
    )  # fmt: skip
    change = measure.of(solved.x)
    divisor = jnp.where(now.change > 0, now.change, 1)
    seen = jnp.where(settled, nonlinearity / divisor, change / divisor)
    contraction = jnp.where(first, now.contraction, jnp.maximum(CONTRACTION_MEMORY * now.contraction, seen))
    diverged = ~first & ~settled & (change > DIVERGING * now.change)
    failed = ~usable | (~solved.converged & ~settled) | diverged
    return Newton(
        correction=now.correction + jnp.where(failed | settled, 0, solved.x),
        residual=solved.residual,
        change=change,
        contraction=contraction,
        observed=~first,
        converged=~failed & (settled | (change * jnp.minimum(contraction, 1) <= NEWTON)),
        failed=failed,
        finite=usable & solved.finite,
        negative=now.negative | solved.negative,
        curvature=jnp.maximum(now.curvature, solved.curvature),
        stiffest=jnp.maximum(now.stiffest, solved.stiffest),
        iterations=now.iterations + 1,
        evaluations=now.evaluations + 1 + (0 if linear.linearise else solved.products),
        products=now.products + (solved.products if linear.linearise else 0),
    )


def _linear_model(
    derivative: Callable[[Vector], Vector], point: Vector, linearise: bool
) -> tuple[Vector, Callable[[Vector], Vector]]:
    """The field at a point, and products with minus its Jacobian there: exact ones, or by differences."""
    if linearise:
        slope, tangent = jax.linearize(derivative, point)
        return slope, lambda p: -tangent(p)
    slope, length = derivative(point), scaled_norm(point)
    root = DIFFERENCE * jnp.sqrt(jnp.finfo(point.dtype).eps).astype(point.dtype)
    length = root * jnp.where(length > 0, length, 1)

    def product(p: Vector) -> Vector:
        step = length / jnp.sqrt(p @ p)
        return (slope - derivative(point + step * p)) / step

    return slope, product
