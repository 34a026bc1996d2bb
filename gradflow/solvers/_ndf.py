"""NDF: implicit multistep method of orders one to five, matrix-free."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from gradflow._checks import check_count, fail
from gradflow._tree import flatten
from gradflow.solvers._control import FIRST_TOLERANCE_SHARE, StepControl
from gradflow.solvers._differences import append, change_of_spacing, weights
from gradflow.solvers._method import AbstractMethod, Attempt, Field
from gradflow.solvers._newton import newton

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
START_UP_STEPS = 10
"""Number of steps within which the step may grow tenfold at once; later it at most doubles."""


class History(eqx.Module):
    """What the method keeps from step to step."""

    table: Float[Array, "rows size"]  # backward differences of the watched part of the state
    quadratures: Float[Array, "rows rest"]  # and of the quadratures that ride along
    spacing: Scalar
    order: Int[Array, ""]
    equal: Int[Array, ""]  # steps since the spacing or the order changed
    rate: Scalar  # by how much a Newton iteration shrank the error when last observed; grows with its age
    curvature: Scalar  # most negative curvature met lately, as a positive number
    age: Int[Array, ""]  # accepted steps
    error: Scalar  # of the last accepted step, over its tolerance; zero after a rejection
    stiffest: Scalar  # largest curvature met lately


class NDF(AbstractMethod):
    """Implicit multistep formulas, orders 1 to 5, by Newton and Krylov methods.

    These are the numerical differentiation formulas, of variable order and step.

    One step of order `k` finds `y_{n+1}` such that

        (1 - kappa_k) g_k (y_{n+1} - y*) + sum_{m=1}^k g_m nabla^m y_n = h f(t_{n+1}, y_{n+1}),

    `g_m = 1 + 1/2 + ... + 1/m`, with `y*` the extrapolation of the last `k + 1` points. Stability does not limit
    `h`: all orders are stable, and damp, on the whole negative real axis. On a gradient flow the equation is the
    optimality condition of a proximal step, so that its matrix `I + c H` is symmetric, and conjugate gradients need
    nothing but products `H v`. Their number grows like the square root of `h sharpness`, where an explicit method
    pays for `h sharpness` itself. A flow whose Jacobian is not symmetric gets conjugate residuals instead, which keep
    a few vectors more and stop by the residual; stability holds in a wedge around the negative real axis only, narrow
    for the high orders: strongly oscillating flows are for explicit methods.

    - The linear solves stop by a bound on their error, not by the residual. A bound met at once means one product.
    - A direction of negative curvature of `I + c H` means that the step is longer than the instability it would have
      to follow: it is repeated with a shorter one.
    - The tolerance on a step is graded: `rtol` times the part of the run that lies behind, from a twentieth on.
      Errors made early are carried, and near saddles amplified, through all the run, and early steps cost least.
    - Products `H v` are differences of gradients, one gradient each, or, with `linearise=True`, products with a
      gradient linearised once per iteration: exact, and 1.4 times as expensive.

    **Arguments**: `order`: keep to this order once it is reached (default: whichever takes the longest step, up to
    `max_order`). `max_products`: most products in one linear solve.

    **Raises** `ValueError` for an `order` or `max_order` other than 1 to 5, and for `max_products` below one.

    Forward-mode differentiation works; reverse mode does not.

    **Source**: Shampine & Reichelt (1997), SIAM J. Sci. Comput. 18, 1-22, for the formulas and the constant-step form;
    Brown & Hindmarsh (1986), SIAM J. Numer. Anal. 23, for Krylov methods within multistep methods.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> stiff = gf.GradientFlow(lambda w: 0.5 * (w[0] ** 2 + 1e4 * w[1] ** 2))
    >>> sol = gf.solve(stiff, jnp.ones(2), [5.0], solver=gf.solvers.NDF())
    >>> bool(sol.stats["gradient_evaluations"] < 1000)  # Tsit5 takes 86,000
    True
    """

    order: int | None = eqx.field(static=True)
    max_order: int = eqx.field(static=True)
    linearise: bool = eqx.field(static=True)
    max_products: int = eqx.field(static=True)

    def __init__(
        self, order: int | None = None, *, max_order: int = HIGHEST, linearise: bool = False, max_products: int = 300
    ):
        for name, value in (("order", order), ("max_order", max_order)):
            if value is not None and value not in range(1, HIGHEST + 1):
                raise fail(name, f"be an order from 1 to {HIGHEST}", f"{value}")
        check_count("max_products", max_products, advice="The default of 300 is seldom reached.")
        self.order, self.max_order, self.linearise = order, order or max_order, linearise
        self.max_products = max_products

    @property
    def counts(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return "NDF" if self.order is None else f"NDF{self.order}"

    @property
    def first_order(self) -> int:
        return 2

    def begin(self, field: Field, y: PyTree, rate: PyTree, dt: Scalar) -> History:
        value, slope = split_state(field, y), split_state(field, rate)
        tables = []
        for now, change in zip(value, slope, strict=True):
            rows = jnp.zeros((ROWS, now.size), now.dtype)
            tables.append(rows.at[0].set(now).at[1].set(dt.astype(now.dtype) * change))
        one = jnp.ones((), value[0].dtype)
        table, quadratures = tables
        zero, count = jnp.zeros_like(one), jnp.asarray(0)
        return History(table, quadratures, dt.astype(one.dtype), jnp.asarray(1), count, one, zero, count, zero, zero)

    def attempt(
        self,
        field: Field,
        y: PyTree,
        dt: Scalar,
        control: StepControl,
        floor: PyTree,
        state: Any,
    ) -> Attempt:
        return self.step(field, y, dt, control, floor, state, jnp.asarray(True))

    def step(
        self,
        field: Field,
        y: PyTree,
        dt: Scalar,
        control: StepControl,
        floor: PyTree,
        history: History,
        active: Bool[Array, ""],
    ) -> Attempt:
        """An attempt; one that is not `active` evaluates nothing and means nothing.

        All that is squared within is in units of the state, for squares of small states underflow.
        """
        k, dtype = history.order, history.table.dtype
        h = dt.astype(dtype)
        ready = change_of_spacing(h / history.spacing, k, ROWS)
        quadratures = ready.astype(history.quadratures.dtype) @ history.quadratures
        sizes = flatten(control.sizes(field.watched(y), floor))[0]
        unit = _power_of_two(jnp.max(sizes, initial=0.0))
        table, sizes = ready @ (history.table / unit), sizes / unit
        index = jnp.arange(ROWS)
        extrapolate = (index <= k).astype(dtype)
        alpha = jnp.asarray(ALPHA, dtype)[k]
        sums = jnp.where((index >= 1) & (index <= k), jnp.asarray(SUMS + (0.0,) * 2, dtype)[index], 0) / alpha
        c = h / alpha

        grade = jnp.clip(field.share.astype(dtype), FIRST_TOLERANCE_SHARE, 1.0)
        entries = jnp.asarray(control.entries(field.watched(y)), dtype)
        rtol = jnp.minimum(control.rtol, LOOSEST).astype(dtype)
        accuracy = SHARE * rtol * jnp.minimum(rtol / SHARPER, 1) ** POWER * grade

        def norm(v: Float[Array, " size"]) -> Scalar:
            return jax.lax.stop_gradient(jnp.sqrt(jnp.sum((v / sizes) ** 2) / entries) / accuracy)

        unflatten = flatten(field.watched(y))[1]

        def derivative(w: Float[Array, " size"]) -> Float[Array, " size"]:
            return flatten(field.watched(field(dt, field.replace(y, unflatten(unit * w)))))[0] / unit

        constant = jnp.asarray(ERROR, dtype)[k]
        found = newton(
            derivative,
            extrapolate @ table,
            sums @ table,
            c,
            norm=norm,
            constant=constant,
            accuracy=accuracy,
            rate=history.rate,
            curvature=history.curvature,
            active=active,
            symmetric=field.flow.symmetric_jacobian,
            linearise=self.linearise,
            max_products=self.max_products,
        )
        error = constant * norm(found.correction)
        finite = found.finite & jnp.all(jnp.isfinite(found.correction))
        ratio = jnp.where(found.converged & finite, error, jnp.inf)

        scaled = append(table, found.correction, k)
        moved, rates = unit * scaled, unit * ((sums @ table + found.correction) / c)
        carried, extra = self._carry_quadratures(field, y, dt, unflatten, moved[0], rates, quadratures, sums, c, k)
        comparable = (h == history.spacing) & (history.error > 0)
        trend = jnp.where(comparable, error / jnp.where(comparable, history.error, 1), 1)
        expected = error * jnp.clip(trend, 1, 5)
        order, factor, changed = self._next(scaled, k, history.equal + 1, error, expected, norm)
        curvature = jnp.maximum(found.curvature, 0.7 * history.curvature)
        stiffest = jnp.maximum(found.stiffest, 0.9 * history.stiffest)
        longest = 0.7 * alpha / jnp.where(curvature > 0, curvature, 1) / h
        factor = jnp.where(curvature > 0, jnp.minimum(factor, jnp.maximum(longest, 0.5)), factor)
        factor = jnp.minimum(factor, jnp.where(history.age < START_UP_STEPS, 10.0, 2.0))
        equal = jnp.where(changed, 0, jnp.where(h == history.spacing, history.equal + 1, 1))
        rate = jnp.minimum(1, jnp.where(found.observed, found.rate, 1.1 * history.rate))
        accepted = History(moved, carried, h, order, equal, rate, curvature, history.age + 1, error, stiffest)

        unstable = jnp.clip(0.5 * alpha / jnp.where(curvature > 0, curvature, 1) / h, 0.1, 0.5)
        failed = jnp.where(found.negative & (curvature > 0), unstable, 0.3)
        shorter = jnp.clip(0.8 * error ** (-1 / (k + 1)).astype(error.dtype), 0.2, 0.8)
        shrink = jnp.where(found.converged & finite, shorter, failed)
        distrust = jnp.where(found.converged, history.rate, 1)
        rejected = History(
            history.table,
            history.quadratures,
            history.spacing,
            k,
            jnp.zeros_like(k),
            distrust,
            curvature,
            history.age,
            jnp.zeros_like(error),
            stiffest,
        )
        y1 = _assemble(field, y, unflatten(moved[0]), carried[0])
        return Attempt(
            y1=y1,
            ratio=jax.lax.stop_gradient(ratio),
            factor=jax.lax.stop_gradient(jnp.where(ratio <= 1, factor, shrink)),
            accepted=accepted,
            rejected=rejected,
            dense=(moved, carried, h, k, y),
            finite=finite,
            evaluations=found.evaluations + extra,
            products=found.products,
        )

    def interpolate(self, field: Field, dense: PyTree, s: Scalar) -> PyTree:
        table, quadratures, h, order, y = dense
        row = weights((s.astype(h.dtype) - h) / h, order, ROWS)
        unflatten = flatten(field.watched(y))[1]
        return _assemble(field, y, unflatten(row @ table), row.astype(quadratures.dtype) @ quadratures)

    def _next(
        self,
        table: Float[Array, "rows size"],
        k: Int[Array, ""],
        equal: Int[Array, ""],
        error: Scalar,
        expected: Scalar,
        norm: Callable[[Array], Scalar],
    ) -> tuple[Int[Array, ""], Scalar, Bool[Array, ""]]:
        """The order and the factor of the next step after an accepted one, and whether either changes."""
        constants = jnp.asarray((1.0, *ERROR[1:], 1.0, 1.0), table.dtype)

        def longest(order: Int[Array, ""], error: Scalar) -> Scalar:
            return jnp.maximum(error, 1e-10) ** (-1.0 / (order + 1).astype(error.dtype))

        lower = longest(k - 1, constants[k - 1] * norm(jnp.take(table, k, axis=0)))
        higher = longest(k + 1, constants[k + 1] * norm(jnp.take(table, k + 2, axis=0)))
        if self.order is not None:
            lower = jnp.where(k > self.order, lower, 0)
        candidates = jnp.stack([
            jnp.where(k > 1, lower, 0),
            longest(k, error),
            jnp.where((k < self.max_order) & (equal >= 2), higher, 0),
        ])  # fmt: skip
        best = jnp.argmax(candidates)
        factor = jnp.clip(0.9 * candidates[best], 0.2, 10.0)
        due = (equal >= jnp.maximum(k - 1, 2)) | (equal >= k) & (k == 1)
        worth = (best != 1) | (factor >= 1.2) | (factor < 1)
        change = due & worth
        hurry = ~due & (expected > 0.8)
        order = jnp.where(change, k + best - 1, k)
        if self.order is not None:
            order = jnp.minimum(jnp.where(change & (k < self.order), k + 1, k), self.order)
        factor = jnp.where(change, factor, jnp.where(hurry, jnp.minimum(0.9 * longest(k, expected), 1), 1))
        return order, factor, change | hurry

    def _carry_quadratures(
        self,
        field: Field,
        y: PyTree,
        dt: Scalar,
        unflatten: Callable[[Array], PyTree],
        w: Float[Array, " size"],
        rate: Float[Array, " size"],
        quadratures: Float[Array, "rows rest"],
        sums: Float[Array, " rows"],
        c: Scalar,
        k: Int[Array, ""],
    ) -> tuple[Float[Array, "rows rest"], Int[Array, ""]]:
        """The table of the quadratures after the step, and the evaluations that took."""
        if quadratures.shape[1] == 0:
            return quadratures, jnp.asarray(0)
        whole = field.flow.derivative(unflatten(rate))
        spent = jnp.asarray(0)
        if whole is None:
            whole, spent = field(dt, field.replace(y, unflatten(w))), jnp.asarray(1)
        slope = split_state(field, whole)[1]
        known = sums.astype(quadratures.dtype) @ quadratures
        return append(quadratures, c.astype(quadratures.dtype) * slope - known, k), spent


def _power_of_two(x: Scalar) -> Scalar:
    """The next one above `x`, by which numbers can be divided without rounding; one for zero and infinity."""
    usable = jnp.isfinite(x) & (x > 0)
    _, exponent = jnp.frexp(jax.lax.stop_gradient(jnp.where(usable, x, 1)))
    return jnp.where(usable, jnp.ldexp(jnp.ones_like(x), exponent), 1)


def split_state(field: Field, y: PyTree) -> tuple[Float[Array, " size"], Float[Array, " rest"]]:
    """The watched part of a state and the rest, each as one vector."""
    watched = flatten(field.watched(y))[0]
    rest = flatten(field.replace(y, None))[0]
    return watched, rest.astype(watched.dtype)


def _assemble(field: Field, y: PyTree, watched: PyTree, rest: Float[Array, " rest"]) -> PyTree:
    """The state of the structure of `y` with these two parts."""
    unflatten = flatten(field.replace(y, None))[1]
    return field.replace(unflatten(rest), watched)
