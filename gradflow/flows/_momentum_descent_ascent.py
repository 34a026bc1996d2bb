"""Momentum at its edge of stability: centre and alternating amplitude, both with inertia."""

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_count, check_not_negative, fail, is_concrete
from gradflow._tree import flatten
from gradflow.flows._momentum_flow import check_momentum
from gradflow.flows._split_flow import (
    AbstractAlternatingFlow,
    Vector,
    check_descent,
    probe,
    probe_scale,
    rounding_error,
)
from gradflow.flows._traits import ErrorWeights

HALF_WIDTH = 4
"""Iterates on either side of the one that the flow starts at, from which centre and amplitude are separated. The
binomial weights suppress a motion of frequency `w` in the amplitude like `(w/2)^8`."""
DECAYED = 10.0
"""The default warm-up over `1/(1 - momentum)`: the ringing of the method, `momentum^(k/2)`, has fallen below 1 %."""


class MomentumSplit(NamedTuple):
    """Centre `c`, amplitude `a = exp(log_size) direction`, and the velocities of both, `p2/p1 c'` and `q2/q1 a'`.

    `direction` and `direction_velocity` together have a constant norm, so that an amplitude that decays to 1e-100 and
    grows again keeps all its digits.
    """

    centre: PyTree
    velocity: PyTree
    direction: PyTree
    direction_velocity: PyTree
    log_size: Float[Array, ""]


class MomentumDescentAscentFlow(AbstractAlternatingFlow):
    """Gradient descent with momentum beyond its stability threshold.

    An iterate is a centre and an amplitude that alternates, `w_k = c_k + (-1)^k a_k`. With `g+- = grad L(c +- a)`, the
    heavy ball `w_{k+1} = w_k + beta (w_k - w_{k-1}) - eta grad L(w_k)` keeps

        c_{k+1} - c_k - beta (c_k - c_{k-1}) = -eta (g+ + g-)/2
        a_{k+1} + (1 + beta) a_k + beta a_{k-1} = eta (g+ - g-)/2

    exactly. Both sides vary slowly near the threshold `eta lambda = 2 (1 + beta)`, where the multiplier of the
    amplitude is 1. Expanded to second order about `k`, in steps:

        p2 c'' + p1 c' = -eta (g+ + g-)/2                   p1 = 1 - beta, p2 = (1 + beta)/2
        q2 a'' + q1 a' + q0 a = eta (g+ - g-)/2             q0 = 2 (1 + beta), q1 = 1 - beta, q2 = (1 + beta)/2

    For Nesterov's method `c` and `a` are those of the points `u_k = w_k + beta (w_k - w_{k-1})` at which it takes its
    gradients. There the left-hand sides are quotients, `(r - 1)(r - beta)/((1 + beta) r - beta)` and
    `(r + 1)(r + beta)/((1 + beta) r + beta)` of the multiplier `r`, and the coefficients are those of their expansions
    at `r = 1`; so `q0 = 2 (1 + beta)/(1 + 2 beta)`, the threshold of this method. With momentum 0 both are gradient
    descent, and the error of the flow is of the order of that of `DescentAscentFlow` of order 2. Without amplitude the
    heavy ball's is `MomentumFlow` up to its initial velocity.

    **Time unit**: iterate `k` sits at `t = k eps`, `eps = eta/(1 - beta)`. `params` is the centre of the iterates; for
    Nesterov's method it is `c - beta c'`.

    **Start.** From rest, all directions with `eta lambda` above `(1 - sqrt(beta))^2` ring at first, at frequencies of
    up to one half per step, which no flow follows; the ringing decays like `beta^(k/2)`. The first `warm_up` steps are
    therefore those of the method itself, and the flow starts after them, at `t0 = warm_up * eps`, with what binomial
    filters over nine iterates find of centre, amplitude and velocities. Before the edge
    the amplitude decays down to the rounding of the iterates, which adds to its growth as in `DescentAscentFlow`.

    **Arguments**: `problem`, a callable `params -> scalar`; `learning_rate`, positive; `momentum`, in `[0, 1)`; both
    may be traced; `nesterov`: whether the method is Nesterov's; `warm_up`: steps of the method before the flow, at
    least five; by default `10/(1 - momentum)`; `rounding`: unit of rounding of the iterates, as for
    `DescentAscentFlow`.

    An evaluation of the vector field costs two gradients.

    **Raises** `ValueError` for a problem that cannot be called, a learning rate that is not positive, momentum outside
    `[0, 1)`, negative `rounding`, a `warm_up` below five, and none for momentum that is traced.

    Source: the split of gradient descent into centre and amplitude is that of `DescentAscentFlow`; the equations with
    inertia and their start are derived here.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> loss = lambda w: 0.25 * jnp.sum((w**2 - 1.0) ** 2)
    >>> flow = gf.MomentumDescentAscentFlow(loss, learning_rate=0.1, momentum=0.5)
    >>> rule = gf.HeavyBall(loss, 0.1, momentum=0.5)
    >>> sol = gf.solve(flow, jnp.array([0.1, 2.0]), [10.0])
    >>> float(jnp.max(jnp.abs(sol.final - gf.iterate(rule, jnp.array([0.1, 2.0]), 50).final))) < 1e-3
    True
    """

    problem: Callable[[PyTree], Scalar]
    learning_rate: Float[Array, ""]
    momentum: Float[Array, ""]
    nesterov: bool = eqx.field(static=True)
    warm_up: int = eqx.field(static=True)
    unit: Float[Array, ""] | None
    oscillatory: ClassVar[bool] = True

    def __init__(
        self,
        problem: Callable[[PyTree], Scalar],
        learning_rate: ArrayLike,
        momentum: ArrayLike,
        nesterov: bool = False,
        warm_up: int | None = None,
        rounding: ArrayLike | None = None,
    ):
        self.problem, self.learning_rate = check_descent(problem, learning_rate)
        check_momentum(momentum)
        if warm_up is None:
            if not is_concrete(momentum):
                raise fail("warm_up", "be given where `momentum` is traced", "None", "Take 10 / (1 - momentum).")
            warm_up = max(HALF_WIDTH + 1, math.ceil(DECAYED / (1 - float(np.asarray(momentum)))))
        check_count("warm_up", warm_up)
        if warm_up <= HALF_WIDTH:
            advice = f"The start is taken from {2 * HALF_WIDTH + 3} iterates about it."
            raise fail("warm_up", f"be at least {HALF_WIDTH + 1}", f"{warm_up}", advice)
        self.nesterov, self.warm_up = bool(nesterov), int(warm_up)
        self.momentum = jnp.asarray(momentum, float)
        check_not_negative("rounding", 0.0 if rounding is None else rounding, "Zero is exact arithmetic.")
        self.unit = None if rounding is None else jnp.asarray(rounding, float)

    @property
    def rounding(self) -> Scalar | None:
        return self.unit

    @property
    def time_unit(self) -> str:
        return "t = k * learning_rate / (1 - momentum)"

    @property
    def t0(self) -> Scalar:
        return self.warm_up * self._unit()

    @property
    def start_cost(self) -> tuple[int, int]:
        return self.warm_up + HALF_WIDTH + 1, 0

    def init(self, trainable: PyTree, frozen: PyTree) -> MomentumSplit:
        start, unflatten = flatten(trainable)
        window = self._iterates(start, unflatten, frozen)
        signs = (-1.0) ** jnp.arange(-HALF_WIDTH - 1, HALF_WIDTH + 2, dtype=start.dtype)
        centre, velocity = filtered(window)
        amplitude, amplitude_velocity = filtered(window * signs[:, None])
        p, q = self._coefficients()
        velocity = (p.inertia / p.slope).astype(start.dtype) * velocity
        amplitude_velocity = (q.inertia / q.slope).astype(start.dtype) * amplitude_velocity
        # An amplitude of exactly zero stays zero.
        size = jnp.sqrt(jnp.sum(amplitude**2) + jnp.sum(amplitude_velocity**2))
        scale = jnp.where(size > 0, size, 1)
        direction, direction_velocity = amplitude / scale, amplitude_velocity / scale
        c, u, b, v = (unflatten(part) for part in (centre, velocity, direction, direction_velocity))
        min_size = jnp.where(size > 0, rounding_error(centre, self.rounding), 0)
        return MomentumSplit(c, u, b, v, jnp.log(jnp.maximum(scale, min_size)))

    def vector_field(self, t: Scalar, state: MomentumSplit, frozen: PyTree) -> MomentumSplit:
        (c, unflatten), (u, _) = flatten(state.centre), flatten(state.velocity)
        (b, _), (v, _) = flatten(state.direction), flatten(state.direction_velocity)
        seen = probe(self._flat_gradient(unflatten, frozen), c, b, probe_scale(c, b, state.log_size))
        p, q = (jax.tree_util.tree_map(lambda n: n.astype(c.dtype), part) for part in self._coefficients())
        unit, eta = self._unit().astype(c.dtype), self.learning_rate.astype(c.dtype)
        slow, fast = p.slope / (p.inertia * unit), q.slope / (q.inertia * unit)
        dc, du = slow * u, -eta / (p.slope * unit) * seen.mean - slow * u
        db, dv = fast * v, (eta * seen.slope - q.value * b) / (q.slope * unit) - fast * v
        squares = b @ b + v @ v
        growth = (b @ db + v @ dv) / jnp.where(squares > 0, squares, 1)
        turned, turned_velocity = unflatten(db - growth * b), unflatten(dv - growth * v)
        noise = self.noise(c, jnp.exp(state.log_size).astype(c.dtype) * jnp.sqrt(squares))
        growth = (growth + noise / unit).astype(state.log_size.dtype)
        return MomentumSplit(unflatten(dc), unflatten(du), turned, turned_velocity, growth)

    def params(self, state: MomentumSplit) -> PyTree:
        if not self.nesterov:
            return state.centre
        p, _ = self._coefficients()
        factor = self.momentum * p.slope / p.inertia
        return jax.tree_util.tree_map(lambda c, u: c - factor.astype(c.dtype) * u, state.centre, state.velocity)

    def error_weights(self, controlled: MomentumSplit) -> ErrorWeights:
        # Rounding in the centre is that of the points at which gradients are taken, centre and amplitude together.
        def largest(c: Array, a: Array) -> Array:
            return jnp.maximum(jnp.abs(c), jnp.abs(a))

        size = jnp.exp(controlled.log_size)
        map_leaves = jax.tree_util.tree_map
        whole = map_leaves(lambda c, b: largest(c, size.astype(c.dtype) * b), controlled.centre, controlled.direction)
        direction = map_leaves(largest, controlled.direction, controlled.direction_velocity)
        return ErrorWeights(MomentumSplit(whole, whole, direction, direction, controlled.log_size))

    def amplitude(self, state: MomentumSplit) -> PyTree:
        """The amplitude of the iterates, in the structure of the parameters that flow."""
        size, factor = jnp.exp(state.log_size), jnp.zeros(())
        if self.nesterov:  # `u = (1 + 2 beta) a - beta a'` is that of the points at which gradients are taken
            q, beta = self._coefficients()[1], self.momentum
            size, factor = size / (1 + 2 * beta), beta / (1 + 2 * beta) * q.slope / q.inertia
        return jax.tree_util.tree_map(
            lambda b, v: size.astype(b.dtype) * (b + factor.astype(b.dtype) * v),
            state.direction,
            state.direction_velocity,
        )

    def _unit(self) -> Scalar:
        """`eps`, the time of a step."""
        return self.learning_rate / (1 - self.momentum)

    def _coefficients(self) -> tuple["Expansion", "Expansion"]:
        """What multiplies `c` and `a` on the left-hand sides."""
        beta = self.momentum
        if not self.nesterov:
            half = (1 + beta) / 2
            return Expansion(jnp.zeros_like(beta), 1 - beta, half), Expansion(2 * (1 + beta), 1 - beta, half)
        # Of the methods as rational functions of the multiplier `exp(s)`, per step.
        centre = quotient(
            (jnp.zeros_like(beta), 1 - beta, (3 - beta) / 2), (jnp.ones_like(beta), 1 + beta, (1 + beta) / 2)
        )
        alternating = quotient((2 * (1 + beta), 3 + beta, (5 + beta) / 2), (1 + 2 * beta, 1 + beta, (1 + beta) / 2))
        return centre, alternating

    def _flat_gradient(self, unflatten: Callable[[Array], PyTree], frozen: PyTree) -> Callable[[Array], Array]:
        gradient = self.gradient(frozen)
        return lambda point: flatten(gradient(unflatten(point)))[0]

    def _iterates(self, start: Array, unflatten: Callable[[Array], PyTree], frozen: PyTree) -> Array:
        """The iterates from `HALF_WIDTH + 1` before the end of the warm-up to as many after it."""
        gradient = self._flat_gradient(unflatten, frozen)
        eta, beta = self.learning_rate.astype(start.dtype), self.momentum.astype(start.dtype)

        def step(pair: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
            now, before = pair
            ahead = now + beta * (now - before)
            after = ahead - eta * gradient(ahead if self.nesterov else now)
            return (after, now), ahead if self.nesterov else now

        pair, first = (start, start), self.warm_up - HALF_WIDTH - 1
        if first:  # without jit, JAX refuses an empty loop
            pair, _ = jax.lax.scan(lambda pair, _: (step(pair, None)[0], None), pair, None, length=first)
        return jax.lax.scan(step, pair, None, length=2 * HALF_WIDTH + 3)[1]


class Expansion(NamedTuple):
    """`value + slope s + inertia s^2`, which acts on a function of time as `s = d/dk`."""

    value: Scalar
    slope: Scalar
    inertia: Scalar


def quotient(above: tuple[Scalar, Scalar, Scalar], below: tuple[Scalar, Scalar, Scalar]) -> Expansion:
    """The quotient of two power series, to second order."""
    value = above[0] / below[0]
    slope = (above[1] - value * below[1]) / below[0]
    return Expansion(value, slope, (above[2] - value * below[2] - slope * below[1]) / below[0])


def filtered(window: Float[Array, "iterates size"]) -> tuple[Vector, Vector]:
    """The slow part of iterates at the middle one, and its change per step, by binomial filters."""
    weights = jnp.array([math.comb(2 * HALF_WIDTH, i) / 4**HALF_WIDTH for i in range(2 * HALF_WIDTH + 1)], window.dtype)
    before, now, after = (weights @ window[i : i + len(weights)] for i in range(3))
    return now, (after - before) / 2
