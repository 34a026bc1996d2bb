"""NDF: implicit multistep method of orders one to five, matrix-free."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from gradflow._checks import check_count, fail
from gradflow._tree import flatten
from gradflow.solvers._control import StepControl
from gradflow.solvers._differences import append, weights
from gradflow.solvers._method import AbstractMethod, Attempt, Field
from gradflow.solvers._ndf_step import (
    ERROR,
    HIGHEST,
    ROWS,
    History,
    Step,
    assemble,
    carry_quadratures,
    prepare,
    split_state,
)
from gradflow.solvers._newton import Equation, ErrorMeasure, LinearSolver, Newton, Vector, newton

RESUMED_ORDER = 4
"""Order of the history that is read off a step of another method: that of its dense output."""
START_UP_STEPS = 10
"""Number of steps within which the step may grow tenfold at once; later it at most doubles."""


MAX_TREND = 5.0
"""Growth of the error from one step to the next, at the most, that is taken to go on."""
GROWTH_LIMIT = 0.7
"""Length of a step over the time in which the fastest instability seen grows by a factor e: at one `I + c H` is
singular, and the solution of the implicit equation is another one."""
CURVATURE_MEMORY, STIFFNESS_MEMORY = 0.7, 0.9
"""What is left after a step of the extreme curvatures seen before."""
CONTRACTION_AGEING = 1.1
"""By how much a contraction of Newton's method that was not seen anew is trusted less at every step."""
FAILED_FACTOR = 0.3
"""What a step is shortened by where Newton's method failed, with no sign of an instability to tell by how much."""


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
    def exact_counts(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return "NDF" if self.order is None else f"NDF{self.order}"

    @property
    def first_order(self) -> int:
        return 2

    def begin(self, field: Field, y: PyTree, slope: PyTree, dt: Scalar) -> History:
        value, change = split_state(field, y), split_state(field, slope)
        tables = []
        for now, moving in zip(value, change, strict=True):
            rows = jnp.zeros((ROWS, now.size), now.dtype)
            tables.append(rows.at[0].set(now).at[1].set(dt.astype(now.dtype) * moving))
        one = jnp.ones((), value[0].dtype)
        table, quadratures = tables
        zero, count = jnp.zeros_like(one), jnp.asarray(0)
        return History(table, quadratures, dt.astype(one.dtype), jnp.asarray(1), count, one, zero, count, zero, zero)

    def resume(
        self, field: Field, points: Callable[[Scalar], PyTree], newest: PyTree, spacing: Scalar, age: Int[Array, ""]
    ) -> History:
        """State of the method after a step of another one, of order four.

        From the state `newest` and `points`, which gives the states `j` spacings before it, `j = 0 ... 4`.
        """
        behind = jax.vmap(lambda j: jnp.concatenate(split_state(field, points(j))))(jnp.arange(RESUMED_ORDER + 1))
        rows = behind.at[0].set(jnp.concatenate(split_state(field, newest)))
        table = [rows[0]]
        while rows.shape[0] > 1:
            rows = rows[:-1] - rows[1:]
            table.append(rows[0])
        padding = jnp.zeros((ROWS - len(table), rows.shape[1]), rows.dtype)
        whole = jnp.concatenate([jnp.stack(table), padding])
        fresh = self.begin(field, newest, newest, spacing)
        size = fresh.table.shape[1]
        order = jnp.asarray(min(RESUMED_ORDER, self.max_order))
        return dataclasses.replace(fresh, table=whole[:, :size], quadratures=whole[:, size:], order=order, age=age)

    def attempt(
        self,
        field: Field,
        y: PyTree,
        dt: Scalar,
        control: StepControl,
        scale: PyTree,
        state: History,
    ) -> Attempt:
        return self.step(field, y, dt, control, scale, state, jnp.asarray(True))

    def step(
        self,
        field: Field,
        y: PyTree,
        dt: Scalar,
        control: StepControl,
        scale: PyTree,
        history: History,
        active: Bool[Array, ""],
    ) -> Attempt:
        """An attempt; one that is not `active` evaluates nothing and means nothing.

        All that is squared within is in units of the state, for squares of small states underflow.
        """
        step = prepare(field, y, dt, control, scale, history)

        def derivative(w: Vector) -> Vector:
            inside = field.replace(y, step.unflatten(step.unit * w))
            return flatten(field.controlled(field(dt, inside)))[0] / step.unit

        solved = newton(
            Equation(derivative, step.extrapolated, step.known, step.c),
            ErrorMeasure(step.norm, step.constant, step.accuracy),
            LinearSolver(field.flow.symmetric_jacobian, self.linearise, self.max_products),
            contraction=history.contraction,
            curvature=history.curvature,
            active=active,
        )
        error = step.constant * step.norm(solved.correction)
        finite = solved.finite & jnp.all(jnp.isfinite(solved.correction))
        ratio = jnp.where(solved.converged & finite, error, jnp.inf)
        accepted, growth, extra = self._accept(field, y, dt, step, history, solved, error)
        rejected, shrinkage = _reject(step, history, solved, error, finite)
        y1 = assemble(field, y, step.unflatten(accepted.table[0]), accepted.quadratures[0])
        return Attempt(
            y1=y1,
            ratio=jax.lax.stop_gradient(ratio),
            factor=jax.lax.stop_gradient(jnp.where(ratio <= 1, growth, shrinkage)),
            accepted=accepted,
            rejected=rejected,
            dense=(accepted.table, accepted.quadratures, step.h, step.order, y),
            finite=finite,
            evaluations=solved.evaluations + extra,
            products=solved.products,
        )

    def _accept(
        self, field: Field, y: PyTree, dt: Scalar, step: Step, history: History, solved: Newton, error: Scalar
    ) -> tuple[History, Scalar, Int[Array, ""]]:
        """The history after the step, the factor of the next one, and the evaluations that the quadratures took."""
        h = step.h
        scaled = append(step.table, solved.correction, step.order)
        table, slopes = step.unit * scaled, step.unit * ((step.known + solved.correction) / step.c)
        quadratures, extra = carry_quadratures(field, y, dt, step, table[0], slopes)
        comparable = (h == history.spacing) & (history.error > 0)
        trend = jnp.where(comparable, error / jnp.where(comparable, history.error, 1), 1)
        expected = error * jnp.clip(trend, 1, MAX_TREND)
        order, factor, changed = self._next(scaled, step.order, history.equal + 1, error, expected, step.norm)
        curvature, stiffest = _curvatures(history, solved)
        longest = GROWTH_LIMIT * step.alpha / jnp.where(curvature > 0, curvature, 1) / h
        factor = jnp.where(curvature > 0, jnp.minimum(factor, jnp.maximum(longest, 0.5)), factor)
        factor = jnp.minimum(factor, jnp.where(history.age < START_UP_STEPS, 10.0, 2.0))
        equal = jnp.where(changed, 0, jnp.where(h == history.spacing, history.equal + 1, 1))
        aged = CONTRACTION_AGEING * history.contraction
        contraction = jnp.minimum(1, jnp.where(solved.observed, solved.contraction, aged))
        age = history.age + 1
        after = History(table, quadratures, h, order, equal, contraction, curvature, age, error, stiffest)
        return after, factor, extra

    def renewed(self, field: Field, dt: Scalar, y: PyTree, state: History) -> History:
        # Past states take part in a jump as if they had been on this side all along: their differences stay.
        controlled, quadratures = split_state(field, y)
        rows = state.table.at[0].set(controlled), state.quadratures.at[0].set(quadratures)
        return eqx.tree_at(lambda h: (h.table, h.quadratures), state, rows)

    def interpolate(self, field: Field, dense: PyTree, s: Scalar) -> PyTree:
        table, quadratures, h, order, y = dense
        row = weights((s.astype(h.dtype) - h) / h, order, ROWS)
        unflatten = flatten(field.controlled(y))[1]
        return assemble(field, y, unflatten(row @ table), row.astype(quadratures.dtype) @ quadratures)

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


def _reject(
    step: Step, history: History, solved: Newton, error: Scalar, finite: Bool[Array, ""]
) -> tuple[History, Scalar]:
    """The history to try again from, and the factor of the next attempt."""
    curvature, stiffest = _curvatures(history, solved)
    unstable = jnp.clip(0.5 * step.alpha / jnp.where(curvature > 0, curvature, 1) / step.h, 0.1, 0.5)
    failed = jnp.where(solved.negative & (curvature > 0), unstable, FAILED_FACTOR)
    shorter = jnp.clip(0.8 * error ** (-1 / (step.order + 1)).astype(error.dtype), 0.2, 0.8)
    after = dataclasses.replace(
        history,
        equal=jnp.zeros_like(step.order),
        contraction=jnp.where(solved.converged, history.contraction, 1),
        curvature=curvature,
        error=jnp.zeros_like(error),
        stiffest=stiffest,
    )
    return after, jnp.where(solved.converged & finite, shorter, failed)


def _curvatures(history: History, solved: Newton) -> tuple[Scalar, Scalar]:
    """The most negative and the largest curvature met lately, as positive numbers."""
    curvature = jnp.maximum(solved.curvature, CURVATURE_MEMORY * history.curvature)
    return curvature, jnp.maximum(solved.stiffest, STIFFNESS_MEMORY * history.stiffest)
