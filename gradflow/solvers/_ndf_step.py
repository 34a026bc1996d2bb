"""A step of the implicit multistep method: its formulas, what it starts from, and the quadratures it carries along."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Scalar

from gradflow._tree import flatten
from gradflow.solvers._control import FIRST_TOLERANCE_SHARE, StepControl
from gradflow.solvers._differences import append, change_of_spacing
from gradflow.solvers._method import Field
from gradflow.solvers._newton import Vector

HIGHEST = 5
ROWS = HIGHEST + 3
KAPPA = (0.0, -0.1850, -1 / 9, -0.0823, -0.0415, 0.0)  # Shampine & Reichelt 1997, table 1
SUMS = tuple(sum(1 / m for m in range(1, k + 1)) for k in range(HIGHEST + 1))
ALPHA = tuple((1 - kappa) * total for kappa, total in zip(KAPPA, SUMS, strict=True))
ERROR = tuple(abs(kappa * total + 1 / (k + 1)) for k, (kappa, total) in enumerate(zip(KAPPA, SUMS, strict=True)))

SHARE = 0.3
"""Share of the tolerance that a step is held to, so that the error at the end comes out near the tolerance."""
SHARPER, POWER = 1e-4, 0.1
"""Tolerance below which that share falls, and how: a run of more steps adds up more errors."""
LOOSEST = 2.5e-3
"""Tolerance beyond which steps cost more again: Newton's method takes more iterations, and fails more often."""


class History(eqx.Module):
    """What the method keeps from step to step."""

    table: Float[Array, "rows size"]  # backward differences of the controlled part of the state
    quadratures: Float[Array, "rows rest"]  # and of the quadratures that ride along
    spacing: Scalar
    order: Int[Array, ""]
    equal: Int[Array, ""]  # steps since the spacing or the order changed
    contraction: Scalar  # by how much a Newton iteration shrank the error when last observed; grows with its age
    curvature: Scalar  # most negative curvature met lately, as a positive number
    age: Int[Array, ""]  # accepted steps
    error: Scalar  # of the last accepted step, over its tolerance; zero after a rejection
    stiffest: Scalar  # largest curvature met lately


class Step(NamedTuple):
    """One step in the units in which it is solved: those of the state, a power of two."""

    h: Scalar
    order: Int[Array, ""]
    alpha: Scalar  # (1 - kappa_k) g_k
    c: Scalar  # h / alpha
    unit: Scalar
    table: Float[Array, "rows size"]  # at this spacing
    quadratures: Float[Array, "rows rest"]  # in their own units
    sums: Float[Array, " rows"]  # weights of the rows in what is known of the equation
    extrapolated: Vector
    known: Vector
    constant: Scalar  # of the error
    accuracy: Scalar
    norm: Callable[[Vector], Scalar]  # of an error, over its tolerance
    unflatten: Callable[[Array], PyTree]  # of the controlled part


def prepare(field: Field, y: PyTree, dt: Scalar, control: StepControl, scale: PyTree, history: History) -> Step:
    k, dtype = history.order, history.table.dtype
    h = dt.astype(dtype)
    ready = change_of_spacing(h / history.spacing, k, ROWS)
    quadratures = ready.astype(history.quadratures.dtype) @ history.quadratures
    unflatten = flatten(field.controlled(y))[1]
    allowed = flatten(control.error_weights(field.controlled(y), scale))[0]
    unit = _power_of_two(jnp.max(allowed, initial=0.0))
    table, allowed = ready @ (history.table / unit), allowed / unit
    index = jnp.arange(ROWS)
    extrapolate = (index <= k).astype(dtype)
    alpha = jnp.asarray(ALPHA, dtype)[k]
    sums = jnp.where((index >= 1) & (index <= k), jnp.asarray(SUMS + (0.0,) * 2, dtype)[index], 0) / alpha
    grade = jnp.clip(field.progress.astype(dtype), FIRST_TOLERANCE_SHARE, 1.0)
    entries = jnp.asarray(control.entries(field.controlled(y)), dtype)
    rtol = jnp.minimum(control.rtol, LOOSEST).astype(dtype)
    accuracy = SHARE * rtol * jnp.minimum(rtol / SHARPER, 1) ** POWER * grade

    def norm(v: Vector) -> Scalar:
        return jax.lax.stop_gradient(jnp.sqrt(jnp.sum((v / allowed) ** 2) / entries) / accuracy)

    return Step(
        h=h,
        order=k,
        alpha=alpha,
        c=h / alpha,
        unit=unit,
        table=table,
        quadratures=quadratures,
        sums=sums,
        extrapolated=extrapolate @ table,
        known=sums @ table,
        constant=jnp.asarray(ERROR, dtype)[k],
        accuracy=accuracy,
        norm=norm,
        unflatten=unflatten,
    )


def carry_quadratures(
    field: Field, y: PyTree, dt: Scalar, step: Step, w: Vector, slope: Vector
) -> tuple[Float[Array, "rows rest"], Int[Array, ""]]:
    """The table of the quadratures after the step to `w`, and the evaluations that took."""
    quadratures = step.quadratures
    if quadratures.shape[1] == 0:
        return quadratures, jnp.asarray(0)
    whole = field.flow.derivative(step.unflatten(slope))
    num_evaluations = jnp.asarray(0)
    if whole is None:
        whole, num_evaluations = field(dt, field.replace(y, step.unflatten(w))), jnp.asarray(1)
    slopes = split_state(field, whole)[1]
    history_part = step.sums.astype(quadratures.dtype) @ quadratures
    return append(quadratures, step.c.astype(quadratures.dtype) * slopes - history_part, step.order), num_evaluations


def _power_of_two(x: Scalar) -> Scalar:
    """The next one above `x`, by which numbers can be divided without rounding; one for zero and infinity."""
    usable = jnp.isfinite(x) & (x > 0)
    _, exponent = jnp.frexp(jax.lax.stop_gradient(jnp.where(usable, x, 1)))
    return jnp.where(usable, jnp.ldexp(jnp.ones_like(x), exponent), 1)


def split_state(field: Field, y: PyTree) -> tuple[Float[Array, " size"], Float[Array, " rest"]]:
    """The controlled part of a state and the rest, each as one vector."""
    controlled = flatten(field.controlled(y))[0]
    quadratures = flatten(field.replace(y, None))[0]
    return controlled, quadratures.astype(controlled.dtype)


def assemble(field: Field, y: PyTree, controlled: PyTree, quadratures: Float[Array, " rest"]) -> PyTree:
    """The state of the structure of `y` with these two parts."""
    unflatten = flatten(field.replace(y, None))[1]
    return field.replace(unflatten(quadratures), controlled)
