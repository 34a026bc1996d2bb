"""Nystrom: Runge-Kutta-Nystrom pairs for damped oscillations, with the damping taken exactly.

For `X'' = -a X' + F(X)` the displacement `Y = exp(a s / 2) (X - X_n)`, `s` counted from the start of a step, obeys

    Y'' = K(s, Y) = exp(a s / 2) F(X_n + exp(-a s / 2) Y) + (a^2 / 4) Y,      Y(0) = 0,     Y'(0) = X'_n,

which no velocity enters. A step of length `h` evaluates `K_i` at `c_i h` from `Y_i = c_i h Y'(0) + h^2 sum_j A_ij K_j`;
then `Y(h) = h Y'(0) + h^2 sum_i b_i K_i` and `Y'(h) = Y'(0) + h sum_i b'_i K_i`.
"""

import functools
import importlib.resources
import json
from fractions import Fraction
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Scalar

from gradflow._checks import fail
from gradflow._tree import flatten, scaled_norm
from gradflow.protocols import SecondOrderForm, SecondOrderState, lacking_for_second_order
from gradflow.solvers._control import SCALE_FRACTION, StepControl
from gradflow.solvers._method import AbstractMethod, Attempt, Field

TIGHTEST = (3e-4, 1e-6)
"""Tolerances below which the first pair gives way to the second, and that to the third."""
LENIENT = 20.0
"""Times the tolerance that the result of order six is held to; that of order eight, which is kept, errs by about it."""
STABILITY_LIMIT = 3.4
"""`h w` up to which a step of order eight does not amplify an oscillation."""
MIN_ERROR_RATIO = 0.1
"""Error ratio below which a step tells the next but one nothing but that it was short."""
OVERDAMPED = 6.0
"""Damping times the longest step: what decays without turning is no oscillation to which coefficients were fitted."""
FREQUENCY_MEMORY = 0.98
"""What is left after a step of the highest squared frequency seen before it."""


class NystromState(eqx.Module):
    """What is known at the start of a step."""

    force: Float[Array, " size"]  # F(X)
    ratio: Scalar  # of the last accepted step
    failed: Bool[Array, ""]
    highest: Scalar  # squared frequency, as seen so far


class Nystrom(AbstractMethod):
    """Runge-Kutta-Nystrom pairs of eight gradients a step, with the damping exact.

    For second-order flows `X'' = -a X' + F(X)`, `a` constant: where accelerations depend on no velocity but by constant
    damping, as in heavy-ball flows. Not for Hessian damping (Nesterov's flow at high resolution), nor for ReLU, where
    high orders are wasted.

    Three pairs, by the tolerance. Below 1e-6 that of orders 8 and 6 by Dormand, El-Mikkawy and Prince, which errs by
    2e-5 in a step of `h w = 2` of an oscillation of frequency `w`. From there to 3e-4 a pair of order 6 whose free
    coefficients are fitted to oscillations: it errs by less than 4e-5 for all `h w` up to 6, almost a whole turn in a
    step. Above, one of order 4, by less than 1.6e-3 up to `h w = 8.75`. Steps are held to these lengths by the highest
    frequency seen: beyond, oscillations would be amplified.

    Dense output integrates a polynomial through the accelerations of the stages. Forward-mode differentiation works;
    reverse mode does not.

    In `solve` it **raises** `ValueError` for a flow that is not of this form: see `gradflow.protocols.SecondOrderForm`.

    Sources: J. R. Dormand, M. E. A. El-Mikkawy and P. J. Prince (1987), IMA J. Numer. Anal. 7, 423-430, for the pair of
    orders 8 and 6. The idea of spending free coefficients on the phase is that of P. J. van der Houwen and B. P.
    Sommeijer (1987), SIAM J. Numer. Anal. 24, 595-617; over an interval rather than at zero, as here, it leads much
    farther.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.HeavyBallFlow(lambda w: 0.5 * jnp.sum(w**2), mu=1e-4, s=1.0)
    >>> sol = gf.solve(flow, jnp.ones(2), [100.0], rtol=1e-6, solver=gf.solvers.Nystrom())
    >>> explicit = gf.solve(flow, jnp.ones(2), [100.0], rtol=1e-6, solver=gf.solvers.Dopri8())
    >>> bool(sol.stats["gradient_evaluations"] < 0.7 * explicit.stats["gradient_evaluations"])
    True
    """

    @property
    def exact_counts(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return "Nystrom"

    @property
    def first_order(self) -> int:
        return 7

    def begin(self, field: Field, y: PyTree, slope: PyTree, dt: Scalar) -> NystromState:
        lacking = lacking_for_second_order(field.flow)
        if lacking:
            advice = "Use one such as gradflow.solvers.Dopri8(), which takes any flow."
            actual = f"{self.name}: the flow {lacking}"
            raise fail("solver", f"be one for a {type(field.flow).__name__}", actual, advice)
        force = flatten(slope.momentum)[0]
        velocity = flatten(y.momentum)[0]
        one = jnp.ones((), force.dtype)
        force = force + self._damping(field, velocity) * velocity
        return NystromState(force, one, jnp.asarray(False), jnp.zeros_like(one))

    def attempt(
        self,
        field: Field,
        y: PyTree,
        dt: Scalar,
        control: StepControl,
        scale: PyTree,
        state: NystromState,
    ) -> Attempt:
        which = jnp.searchsorted(-jnp.asarray(TIGHTEST), -control.rtol)
        step = _Step(field, y, dt, self._damping(field, state.force), which)
        table, h = step.table, step.h
        accelerations, forces = step.stages(state.force)
        losses = step.dissipation(accelerations, forces)
        shift = h * step.velocity + h**2 * (table.position @ accelerations)
        speed = step.velocity + h * (table.velocity @ accelerations)
        y1 = step.state(h, shift, speed, y.dissipated + h * (table.velocity @ losses))
        errors = h**2 * (table.position_error @ accelerations), h * (table.velocity_error @ accelerations)
        position, velocity = step.back(h, *errors)
        error = y._replace(
            position=step.unflatten(position),
            momentum=step.unflatten(velocity),
            dissipated=jnp.zeros_like(y.dissipated),
        )
        ratio = control.ratio(field.controlled(error), field.error_weights(y), field.error_weights(y1), scale)
        finite = jnp.all(jnp.isfinite(accelerations))
        ratio = jax.lax.stop_gradient(jnp.where(finite, ratio, jnp.inf)).astype(state.ratio.dtype)
        seen = jax.lax.stop_gradient(step.squared_frequency(accelerations, forces)).astype(state.highest.dtype)
        highest = jnp.maximum(jnp.where(finite, seen, 0), FREQUENCY_MEMORY * state.highest)
        factor = control.factor(ratio, jnp.maximum(state.ratio, MIN_ERROR_RATIO), state.failed, step.table.order)
        tiny = jnp.finfo(h.dtype).tiny
        longest = jnp.minimum(
            table.stability_limit / jnp.sqrt(jnp.maximum(highest, tiny)), OVERDAMPED / jnp.maximum(step.damping, tiny)
        )
        return Attempt(
            y1=y1,
            ratio=ratio,
            factor=jnp.minimum(factor, (longest / h).astype(factor.dtype)),
            accepted=NystromState(forces[-1], ratio, jnp.asarray(False), highest),
            rejected=NystromState(state.force, state.ratio, jnp.asarray(True), highest),
            dense=(y, dt, which, accelerations, losses),
            finite=finite,
            evaluations=jnp.asarray(len(table.nodes) - 1),
            products=jnp.asarray(0),
        )

    def scale_fraction(self, state: NystromState) -> float:
        return SCALE_FRACTION

    def renewed(self, field: Field, dt: Scalar, y: PyTree, state: NystromState) -> NystromState:
        velocity = flatten(y.momentum)[0]
        force = flatten(field(dt, y).momentum)[0] + self._damping(field, velocity) * velocity
        return eqx.tree_at(lambda s: s.force, state, force)

    def interpolate(self, field: Field, dense: PyTree, s: Scalar) -> PyTree:
        y, dt, which, accelerations, losses = dense
        step = _Step(field, y, dt, self._damping(field, accelerations), which)
        now = s.astype(step.h.dtype)
        shift, speed, weights = step.inside(now / step.h, accelerations)
        return step.state(now, shift, speed, y.dissipated + step.h * (weights @ losses))

    def _damping(self, field: Field, like: Array) -> Scalar:
        return _form(field).damping(field.t).astype(like.dtype)


def _form(field: Field) -> SecondOrderForm:
    return field.flow


class _Step:
    """One step in the coordinates `Y`, `Y'`."""

    def __init__(self, field: Field, y: SecondOrderState, dt: Scalar, damping: Scalar, which: Int[Array, ""]):
        self.field, self.y, self.dt, self.damping = field, y, dt, damping
        self.position, self.unflatten = flatten(y.position)
        self.velocity = flatten(y.momentum)[0]
        self.h = dt.astype(self.position.dtype)
        self.table = jax.tree_util.tree_map(lambda part: jnp.asarray(part, self.h.dtype)[which], coefficients())

    def back(self, s: Scalar, shift: Array, speed: Array) -> tuple[Array, Array]:
        """`X - X_n` and `X'` at time `s`, from `Y` and `Y'`."""
        shrunk = jnp.exp(-0.5 * self.damping * s)
        return shrunk * shift, shrunk * (speed - 0.5 * self.damping * shift)

    def state(self, s: Scalar, shift: Array, speed: Array, dissipated: Scalar) -> PyTree:
        displacement, velocity = self.back(s, shift, speed)
        position, velocity = self.unflatten(self.position + displacement), self.unflatten(velocity)
        return self.y._replace(
            position=position, momentum=velocity, dissipated=dissipated.astype(self.y.dissipated.dtype)
        )

    def inside(self, fraction: Scalar, accelerations: Float[Array, "stages size"]) -> tuple[Array, Array, Array]:
        """`Y` and `Y'` after a fraction of the step, and the weights of the stages in the integral up to there."""
        once, twice = self.table.dense
        powers = fraction ** jnp.arange(1, once.shape[1] + 2, dtype=self.h.dtype)
        speed, shift = once @ powers[:-1], twice @ powers[1:]
        displacement = fraction * self.h * self.velocity + self.h**2 * (shift @ accelerations)
        return displacement, self.velocity + self.h * (speed @ accelerations), speed

    def stages(self, force: Float[Array, " size"]) -> tuple[Float[Array, "stages size"], Float[Array, "stages size"]]:
        """`K` and `F` at all stages, from `F` at the first; the last stage is where the step ends."""
        h, nodes, rows = self.h, self.table.nodes, self.table.rows
        count = len(nodes)
        still = jnp.zeros_like(self.velocity)

        def stage(i: Int[ArrayLike, ""], stages: tuple[Array, Array]) -> tuple[Array, Array]:
            accelerations, forces = stages
            s = nodes[i] * h
            shift = s * self.velocity + h**2 * (rows[i] @ accelerations)
            position = self.unflatten(self.position + jnp.exp(-0.5 * self.damping * s) * shift)
            # The velocity has no say but in the damping.
            at_rest = self.y._replace(position=position, momentum=self.unflatten(still))
            force = flatten(self.field(s.astype(self.dt.dtype), at_rest).momentum)[0]
            acceleration = jnp.exp(0.5 * self.damping * s) * force + 0.25 * self.damping**2 * shift
            return accelerations.at[i].set(acceleration), forces.at[i].set(force)

        start = jnp.zeros((count, self.position.size), h.dtype).at[0].set(force)
        return jax.lax.fori_loop(1, count, stage, (start, start))

    def squared_frequency(
        self, accelerations: Float[Array, "stages size"], forces: Float[Array, "stages size"]
    ) -> Scalar:
        """Of the fastest oscillations, for slow motion drops out of these combinations; zero where rounding is left.

        The same combination of forces and of positions: for `F = -H X` they differ by the factor `-H`.
        """
        weights, s = self.table.fast, self.table.nodes * self.h
        shrunk = weights * jnp.exp(-0.5 * self.damping * s)
        shift = (shrunk @ s) * self.velocity + self.h**2 * ((shrunk @ self.table.rows) @ accelerations)
        displacement, changed = scaled_norm(shift), scaled_norm(weights @ forces)
        noise = 100 * jnp.finfo(self.h.dtype).eps
        resolved = (displacement > noise * scaled_norm(self.position)) & (changed > noise * scaled_norm(forces[0]))
        return jnp.where(resolved, changed / jnp.where(resolved, displacement, 1), 0)

    def dissipation(
        self, accelerations: Float[Array, "stages size"], forces: Float[Array, "stages size"]
    ) -> Float[Array, " stages"]:
        """The derivative of the quadrature that rides along, at all stages."""

        def one(node: Scalar, force: Array) -> Scalar:
            shift, speed, _ = self.inside(node, accelerations)
            velocity = self.back(node * self.h, shift, speed)[1]
            return _form(self.field).dissipation(self.field.t, jnp.sum(velocity**2), jnp.sum(velocity * force))

        return jax.vmap(one)(self.table.nodes, forces).astype(self.h.dtype)


class Coefficients(NamedTuple):
    """The three pairs, loosest first, stacked along the first axis."""

    nodes: np.ndarray
    rows: np.ndarray  # (3, 9, 9): positions of the stages
    position: np.ndarray
    velocity: np.ndarray
    position_error: np.ndarray
    velocity_error: np.ndarray
    order: np.ndarray  # (3,): of the estimate
    fast: np.ndarray  # weights to which slow motion contributes nothing
    dense: tuple[np.ndarray, np.ndarray]  # (3, 9, 10) each: powers of s/h in the integrals, once and twice, of stages
    stability_limit: np.ndarray  # (3,): `h w` up to which oscillations are followed


@functools.cache
def coefficients() -> Coefficients:
    """The published coefficients, and those fitted to oscillations."""
    data = json.loads(_read("rkn_fitted.json"))
    pairs = [_fitted(data["loose"]), _fitted(data["middle"]), _published(json.loads(_read("rkn86.json")))]
    return jax.tree_util.tree_map(lambda *parts: np.stack(parts), *pairs)


def _read(name: str) -> str:
    return importlib.resources.files("gradflow.solvers").joinpath(name).read_text()


def _lower(rows: list[list[str | int | float]]) -> np.ndarray:
    full = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        full[i, :i] = [float(Fraction(x)) for x in row]
    return full


def _fitted(data: dict[str, Any]) -> Coefficients:
    nodes, position, velocity, error, fast, once, twice = (
        np.array(data[name])
        for name in ("nodes", "position", "velocity", "error", "fast", "dense_velocity", "dense_position")
    )
    reach, order = np.array(data["reach"]), np.array(data["order_estimate"])
    return Coefficients(
        nodes, _lower(data["rows"]), position, velocity, error, reach * error, order, fast, (once, twice), reach
    )


def _published(data: dict[str, Any]) -> Coefficients:
    vectors = {
        name: np.array([float(Fraction(x)) for x in data[name]]) for name in data if name not in ("source", "rows")
    }
    nodes = vectors["nodes"]
    # The second stage is of low order, and no weight uses it; the one before the last predicts the last.
    inner = np.delete(np.arange(9), (1, 7))
    lagrange, k = np.zeros((9, 10)), np.arange(10)
    # Row `j`: the polynomial that is one at node `j` and zero at the others, lowest power first.
    lagrange[inner, :7] = np.linalg.inv(np.vander(nodes[inner], increasing=True)).T
    position, velocity = vectors["position"], vectors["velocity"]
    return Coefficients(
        nodes,
        _lower(data["rows"]),
        position,
        velocity,
        (position - vectors["position_embedded"]) / LENIENT,
        (velocity - vectors["velocity_embedded"]) / LENIENT,
        np.array(7),
        velocity - vectors["velocity_embedded"],
        (lagrange / (k + 1), lagrange / ((k + 1) * (k + 2))),
        np.array(STABILITY_LIMIT),
    )
