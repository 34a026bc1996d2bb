"""Nystrom: a Runge-Kutta-Nystrom pair of orders 8 and 6 for damped oscillations, with the damping taken exactly.

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
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from gradflow._checks import fail
from gradflow._tree import flatten
from gradflow.solvers._control import DORMANT, StepControl
from gradflow.solvers._method import AbstractMethod, Attempt, Field

LENIENT = 20.0
"""Times the tolerance that the result of order six is held to; that of order eight, which is kept, errs by about it."""
LOOSEST = 0.03
"""Tolerance up to which that goes: beyond, steps come near the limit of stability."""


class NystromState(eqx.Module):
    """What is known at the start of a step."""

    force: Float[Array, " size"]  # F(X)
    ratio: Scalar  # of the last accepted step
    failed: Bool[Array, ""]


class Nystrom(AbstractMethod):
    """Runge-Kutta-Nystrom pair of orders 8 and 6, with the damping exact.

    For second-order flows `X'' = -a X' + F(X)`, `a` constant. Where accelerations depend on no velocity but by constant
    damping, as in heavy-ball flows, eight gradients a step follow an oscillation of frequency `w` as well over
    `h w = 3.9` as the twelve of `Dopri8` over `3.5`. Not for Hessian damping (Nesterov's flow at high resolution), nor
    for ReLU, where a method of order eight is wasted.

    Dense output integrates the polynomial through the accelerations of the stages. Forward-mode differentiation works;
    reverse mode does not.

    In `solve` it **raises** `ValueError` for a flow that is not of this form (`flow.velocity_free` is false).

    Source: J. R. Dormand, M. E. A. El-Mikkawy and P. J. Prince (1987), IMA J. Numer. Anal. 7, 423-430, for the
    coefficients.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.HeavyBallFlow(lambda w: 0.5 * jnp.sum(w**2), mu=1e-4, s=1.0)
    >>> sol = gf.solve(flow, jnp.ones(2), [100.0], rtol=1e-6, solver=gf.solvers.Nystrom())
    >>> dear = gf.solve(flow, jnp.ones(2), [100.0], rtol=1e-6, solver=gf.solvers.Dopri8())
    >>> bool(sol.stats["gradient_evaluations"] < 0.7 * dear.stats["gradient_evaluations"])
    True
    """

    @property
    def counts(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return "Nystrom"

    @property
    def first_order(self) -> int:
        return 7

    def begin(self, field: Field, y: PyTree, rate: PyTree, dt: Scalar) -> NystromState:
        if not getattr(field.flow, "velocity_free", False):
            advice = "Use one such as gradflow.solvers.Dopri8(), which takes any flow."
            raise fail("solver", f"be one for a {type(field.flow).__name__}", self.name, advice)
        force = flatten(rate.momentum)[0]
        velocity = flatten(y.momentum)[0]
        one = jnp.ones((), force.dtype)
        return NystromState(force + self._damping(field, velocity) * velocity, one, jnp.asarray(False))

    def attempt(
        self,
        field: Field,
        y: PyTree,
        dt: Scalar,
        control: StepControl,
        floor: PyTree,
        state: Any,
    ) -> Attempt:
        step = _Step(field, y, dt, self._damping(field, state.force))
        table, h = coefficients(), step.h
        accelerations, forces = step.stages(state.force)
        losses = step.dissipation(accelerations, forces)

        def weighted(weights: np.ndarray) -> Array:
            return jnp.asarray(weights, h.dtype) @ accelerations

        shift, speed = h * step.velocity + h**2 * weighted(table.position), step.velocity + h * weighted(table.velocity)
        y1 = step.state(h, shift, speed, y.lost + (h * (jnp.asarray(table.velocity, h.dtype) @ losses)))
        position, velocity = step.back(h, h**2 * weighted(table.position_error), h * weighted(table.velocity_error))
        error = y._replace(
            position=step.unflatten(position), momentum=step.unflatten(velocity), lost=jnp.zeros_like(y.lost)
        )
        ratio = control.ratio(field.watched(error), field.sizes(y), field.sizes(y1), floor)
        ratio = ratio / jnp.clip(LOOSEST / control.rtol, 1.0, LENIENT).astype(ratio.dtype)
        finite = jnp.all(jnp.isfinite(accelerations))
        ratio = jax.lax.stop_gradient(jnp.where(finite, ratio, jnp.inf)).astype(state.ratio.dtype)
        return Attempt(
            y1=y1,
            ratio=ratio,
            factor=control.factor(ratio, state.ratio, state.failed, self.first_order),
            accepted=NystromState(forces[-1], ratio, jnp.asarray(False)),
            rejected=NystromState(state.force, state.ratio, jnp.asarray(True)),
            dense=(y, dt, accelerations, losses),
            finite=finite,
            evaluations=jnp.asarray(len(table.nodes) - 1),
            products=jnp.asarray(0),
        )

    def dormant(self, state: Any) -> float:
        return DORMANT

    def interpolate(self, field: Field, dense: PyTree, s: Scalar) -> PyTree:
        y, dt, accelerations, losses = dense
        step = _Step(field, y, dt, self._damping(field, accelerations))
        now = s.astype(step.h.dtype)
        shift, speed, weights = step.inside(now / step.h, accelerations)
        return step.state(now, shift, speed, y.lost + step.h * (weights @ losses))

    def _damping(self, field: Field, like: Array) -> Scalar:
        return field.flow.damping(field.t).astype(like.dtype)


class _Step:
    """One step in the coordinates `Y`, `Y'`."""

    def __init__(self, field: Field, y: PyTree, dt: Scalar, damping: Scalar):
        self.field, self.y, self.dt, self.damping = field, y, dt, damping
        self.position, self.unflatten = flatten(y.position)
        self.velocity = flatten(y.momentum)[0]
        self.h = dt.astype(self.position.dtype)

    def back(self, s: Scalar, shift: Array, speed: Array) -> tuple[Array, Array]:
        """`X - X_n` and `X'` at time `s`, from `Y` and `Y'`."""
        shrunk = jnp.exp(-0.5 * self.damping * s)
        return shrunk * shift, shrunk * (speed - 0.5 * self.damping * shift)

    def state(self, s: Scalar, shift: Array, speed: Array, lost: Scalar) -> PyTree:
        moved, velocity = self.back(s, shift, speed)
        position, velocity = self.unflatten(self.position + moved), self.unflatten(velocity)
        return self.y._replace(position=position, momentum=velocity, lost=lost.astype(self.y.lost.dtype))

    def inside(self, share: Scalar, accelerations: Float[Array, "stages size"]) -> tuple[Array, Array, Array]:
        """`Y` and `Y'` after a share of the step, and the weights of the stages in the integral up to there."""
        once, twice = (jnp.asarray(part, self.h.dtype) for part in coefficients().dense)
        powers = share ** jnp.arange(1, once.shape[1] + 2, dtype=self.h.dtype)
        speed, shift = once @ powers[:-1], twice @ powers[1:]
        moved = share * self.h * self.velocity + self.h**2 * (shift @ accelerations)
        return moved, self.velocity + self.h * (speed @ accelerations), speed

    def stages(self, force: Float[Array, " size"]) -> tuple[Float[Array, "stages size"], Float[Array, "stages size"]]:
        """`K` and `F` at all stages, from `F` at the first; the last stage is where the step ends."""
        table, h = coefficients(), self.h
        rows, nodes, count = jnp.asarray(table.rows, h.dtype), jnp.asarray(table.nodes, h.dtype), len(table.nodes)
        rest = jnp.zeros_like(self.velocity)

        def stage(i: Int[Array, ""], found: tuple[Array, Array]) -> tuple[Array, Array]:
            accelerations, forces = found
            s = nodes[i] * h
            shift = s * self.velocity + h**2 * (rows[i] @ accelerations)
            position = self.unflatten(self.position + jnp.exp(-0.5 * self.damping * s) * shift)
            # The velocity has no say but in the damping.
            at_rest = self.y._replace(position=position, momentum=self.unflatten(rest))
            force = flatten(self.field(s.astype(self.dt.dtype), at_rest).momentum)[0]
            acceleration = jnp.exp(0.5 * self.damping * s) * force + 0.25 * self.damping**2 * shift
            return accelerations.at[i].set(acceleration), forces.at[i].set(force)

        start = jnp.zeros((count, self.position.size), h.dtype).at[0].set(force)
        return jax.lax.fori_loop(1, count, stage, (start, start))

    def dissipation(
        self, accelerations: Float[Array, "stages size"], forces: Float[Array, "stages size"]
    ) -> Float[Array, " stages"]:
        """The derivative of the quadrature that rides along, at all stages."""

        def one(node: Scalar, force: Array) -> Scalar:
            shift, speed, _ = self.inside(node, accelerations)
            velocity = self.back(node * self.h, shift, speed)[1]
            return self.field.flow.dissipation(self.field.t, jnp.sum(velocity**2), jnp.sum(velocity * force))

        return jax.vmap(one)(jnp.asarray(coefficients().nodes, self.h.dtype), forces).astype(self.h.dtype)


class Coefficients(NamedTuple):
    """The pair, and what follows from its nodes."""

    nodes: np.ndarray
    rows: np.ndarray  # (9, 9): positions of the stages
    position: np.ndarray
    velocity: np.ndarray
    position_error: np.ndarray  # less the weights of order six
    velocity_error: np.ndarray
    dense: tuple[np.ndarray, np.ndarray]  # (9, 7) each: powers of s/h in the integrals, once and twice, of the stages


@functools.cache
def coefficients() -> Coefficients:
    """The published coefficients."""
    text = importlib.resources.files("gradflow.solvers").joinpath("rkn86.json").read_text()
    data = json.loads(text)
    vectors = {
        name: np.array([float(Fraction(x)) for x in data[name]]) for name in data if name not in ("source", "rows")
    }
    nodes = vectors["nodes"]
    rows = np.zeros((9, 9))
    for i, row in enumerate(data["rows"]):
        rows[i, :i] = [float(Fraction(x)) for x in row]
    # The second stage is of low order, and no weight uses it; the one before the last foretells the last.
    inner = np.delete(np.arange(9), (1, 7))
    lagrange, k = np.zeros((9, 7)), np.arange(7)
    # Row `j`: the polynomial that is one at node `j` and zero at the others, lowest power first.
    lagrange[inner] = np.linalg.inv(np.vander(nodes[inner], increasing=True)).T
    position, velocity = vectors["position"], vectors["velocity"]
    return Coefficients(
        nodes,
        rows,
        position,
        velocity,
        position - vectors["position_embedded"],
        velocity - vectors["velocity_embedded"],
        (lagrange / (k + 1), lagrange / ((k + 1) * (k + 2))),
    )
