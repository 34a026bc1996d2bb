"""Gradient descent at the edge of stability: descent of its centre, ascent of the amplitude about it."""

import itertools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_finite, check_not_negative, fail
from gradflow._tree import flatten, split
from gradflow.flows._split_flow import (
    AbstractSplitFlow,
    Gradient,
    Vector,
    check_descent,
    iterates_from,
    probe,
    probe_scale,
)

STAGES: dict[int, tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
    1: ((), (1.0,)),
    2: (((-1 / 3,),), (-1 / 2, 3 / 2)),
    3: (((-1 / 2,), (1 / 4, -1 / 2)), (-2 / 3, 1 / 3, 4 / 3)),
}
"""For each order, where the increment is taken after its first time, in units of the earlier ones, and the weights of
all. They solve the conditions of a Runge-Kutta method for the series of the flow; the second of order 2 is chosen so
that its error has no term `D^2 F(F, F)`."""

LEAST_STEPS = 2
"""Steps of descent that the amplitude at the start is read off, where the order needs no more: after a single one, the
motion of all modes is taken for a part of it."""


class DescentAscentFlow(AbstractSplitFlow):
    """Centre and amplitude of gradient descent, at the edge of stability.

    Written as `w_k = c_k + (-1)^k a_k`, gradient descent is exactly, with `g = grad L`,

        c_{k+1} - c_k = -(eta/2) (g(c + a) + g(c - a)),     a_{k+1} - a_k = (eta/2) (g(c + a) - g(c - a)) - 2 a

    both smooth in `k`: descent in `c` and ascent in `a` of `[L(c + a) + L(c - a)] / 2 - |a|^2 / eta`. With `F` the
    right sides, `z = (c, a)`, the flow of which this is the map of time `eta` is

        eta z' = F - (1/2) DF F + (1/12) D^2F(F, F) + (1/3) DF DF F - ...

    by order: `F` alone, to `DF F`, to all terms given. They are had without derivatives, from `F` at one, two and three
    points: `eta z' = F` for order 1, for order 2 and 3

        (-F1 + 3 F2) / 2,            F1 = F(z),  F2 = F(z - F1/3)
        (-2 F1 + F2 + 4 F3) / 3,     F1 = F(z),  F2 = F(z - F1/2),  F3 = F(z + F1/4 - F2/2)

    An amplitude along an eigenvector of the Hessian grows where the eigenvalue exceeds `2/eta`; its square then lowers
    the sharpness. `a` is one vector for any number of unstable directions; no Hessian, no eigenvectors.

    **Time unit**: iterate `k` sits at `t = k * learning_rate`. `Solution.params` is the centre, to be compared with the
    midpoints `(w_{k-1} + 2 w_k + w_{k+1}) / 4`; below the edge it is the iterate. `gradflow.observables.Amplitude`,
    `Variance` and `MeanLoss` see the rest. On a fixed time, below the edge, the gap is of order `eta^order`.

    **Arguments**

    - `problem`: a callable `params -> scalar`, as a rule smooth; with ReLU, kinks dominate. `learning_rate`: positive,
      may be traced.
    - `order`: 1, 2 or 3; an evaluation takes 2, 4 or 6 gradients.
    - `amplitude`: that at the start, a pytree like the parameters that flow; the parameters given to `solve` are then
      the centre, see `flows.split_iterates`. `None`: `a(0) = (-1/2)^m D^m w_0`, the `m`-th difference of the first
      iterates, and `c(0) = w_0 - a(0)`, with `m` the order, and 2 for order 1, which takes `m` gradients. A mode of
      eigenvalue `lambda` so has `(eta lambda / 2)^m` of its part in `w_0`: one at the edge all, a slow one little
      enough for the order. Beyond the threshold it is scaled down.
    - `t0`: time at which the flow starts.
    - `rounding`: unit of rounding of the iterates; by default that of the parameters' type, as `iterate` has it, and 0
      for exact arithmetic. Far below the edge an amplitude falls to what rounding adds at each step, 0.2 units of the
      root mean square of the weights along any direction, and it is from there that a burst grows: `|a|^2` grows by
      the square of that.

    Bursts begin when an amplitude has grown from whatever it had shrunk to: their times depend on logarithms of small
    numbers, averages do not.

    **Raises** `ValueError` for a problem that cannot be called, a learning rate that is not positive, another `order`,
    and an amplitude that is not finite; so does `solve` for an amplitude of other shapes than the parameters.

    Source: the expansion is backward error analysis (E. Hairer, C. Lubich and G. Wanner, *Geometric Numerical
    Integration*, IX); the stabilising force is that of A. Damian, E. Nichani and J. Lee (2022), arXiv 2209.15594; split
    and stages were worked out here, and are confirmed by the measured orders.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> loss = lambda w: 0.5 * (w[0] + w[1]) * w[0] ** 2 - 0.01 * (w[0] + w[1])  # a valley that gets steeper
    >>> flow = gf.DescentAscentFlow(loss, learning_rate=0.3)
    >>> sol = gf.solve(flow, jnp.array([0.1, 6.5]), [180.0], rtol=1e-3)
    >>> round(0.3 * float(sol.final[1]), 1)  # gradient flow goes on to 2.5
    2.0
    """

    problem: Callable[[PyTree], Scalar]
    learning_rate: Float[Array, ""]
    order: int = eqx.field(static=True)
    initial_amplitude: PyTree
    start_time: Float[Array, ""]
    unit: Float[Array, ""] | None

    def __init__(
        self,
        problem: Callable[[PyTree], Scalar],
        learning_rate: ArrayLike,
        order: int = 2,
        amplitude: PyTree = None,
        t0: ArrayLike = 0.0,
        rounding: ArrayLike | None = None,
    ):
        self.problem, self.learning_rate = check_descent(problem, learning_rate)
        if order not in STAGES:
            advice = "Beyond order 3 the series gains nothing at the edge, where its terms do not get small."
            raise fail("order", "be 1, 2 or 3", repr(order), advice)
        check_finite("amplitude", amplitude)
        check_finite("t0", t0)
        self.order = int(order)
        self.initial_amplitude = None if amplitude is None else split(amplitude)[0]
        self.start_time = jnp.asarray(t0, float)
        check_not_negative("rounding", 0.0 if rounding is None else rounding, "Zero is exact arithmetic.")
        self.unit = None if rounding is None else jnp.asarray(rounding, float)

    @property
    def t0(self) -> Scalar:
        return self.start_time

    @property
    def rounding(self) -> Scalar | None:
        return self.unit

    @property
    def start_cost(self) -> tuple[int, int]:
        return (max(self.order, LEAST_STEPS) if self.initial_amplitude is None else 0), 0

    @property
    def gradients_per_evaluation(self) -> int:
        return 2 * self.order

    def start(self, trainable: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
        if self.initial_amplitude is not None:
            amplitude = jax.tree_util.tree_map(lambda c, a: a.astype(c.dtype), trainable, self.initial_amplitude)
            return trainable, amplitude
        steps = max(self.order, LEAST_STEPS)
        halved = iterates_from(self.gradient(frozen), trainable, self.learning_rate, steps)
        before = halved[0]
        while len(halved) > 1:
            before = halved[0]
            pairs = itertools.pairwise(halved)
            halved = [jax.tree_util.tree_map(lambda a, b: (a - b) / 2, *pair) for pair in pairs]
        # A mode of eigenvalue `lambda` has `(eta lambda / 2)^steps` of its part in `w_0`: too much beyond the edge.
        share = _alternating_share(flatten(before)[0], flatten(halved[0])[0]) ** steps
        amplitude = jax.tree_util.tree_map(lambda a: share.astype(a.dtype) * a, halved[0])
        return jax.tree_util.tree_map(jnp.subtract, trainable, amplitude), amplitude

    def rates(self, gradient: Gradient, centre: Vector, direction: Vector, log_size: Scalar) -> tuple[Vector, Vector]:
        eta, scale = self.learning_rate.astype(centre.dtype), probe_scale(centre, direction, log_size)
        places, weights = STAGES[self.order]

        def increment(z: Float[Array, "2 size"]) -> Float[Array, "2 size"]:
            seen = probe(gradient, z[0], z[1], scale)
            return jnp.stack([-eta * seen.mean, eta * seen.slope - 2 * z[1]])

        z = jnp.stack([centre, direction])
        increments = [increment(z)]
        for place in places:
            increments.append(increment(z + sum(x * f for x, f in zip(place, increments, strict=True))))
        total = sum((x * f for x, f in zip(weights, increments, strict=True)), start=jnp.zeros_like(z))
        return total[0], total[1]

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        super().check(trainable, frozen)
        if self.initial_amplitude is None:
            return
        shapes = [
            [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
            for tree in (trainable, self.initial_amplitude)
        ]
        if shapes[0] != shapes[1]:
            raise fail("amplitude", f"have the shapes of the parameters that flow, {shapes[0]}", f"of {shapes[1]}")


def _alternating_share(before: Vector, after: Vector) -> Scalar:
    """One over the factor, if it exceeds one, by which halved differences grow from one to the next."""
    squares = jnp.sum(after**2)
    some = squares > 0
    return jnp.where(some, jnp.clip(jnp.sum(before * after) / jnp.where(some, squares, 1), 0, 1), 1)


def split_iterates(before: PyTree, now: PyTree, after: PyTree, k: int = 0) -> tuple[PyTree, PyTree]:
    """Centre and amplitude of three consecutive iterates `w_{k-1}, w_k, w_{k+1}`:

        c_k = (w_{k-1} + 2 w_k + w_{k+1}) / 4,     a_k = (-1)^k (2 w_k - w_{k-1} - w_{k+1}) / 4

    Leaves that are no floating-point arrays are those of `now`. The sign of an amplitude matters to no flow.

    **Returns** both, in the structure of the iterates; `a_k` holds `None` where nothing flows.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> centre, amplitude = gf.flows.split_iterates(jnp.array(0.9), jnp.array(3.1), jnp.array(0.9), k=2)
    >>> round(float(centre), 3), round(float(amplitude), 3)
    (2.0, 1.1)
    """
    parts = [split(w)[0] for w in (before, now, after)]
    centre = jax.tree_util.tree_map(lambda a, b, c: (a + 2 * b + c) / 4, *parts)
    amplitude = jax.tree_util.tree_map(lambda a, b, c: (-1) ** k * (2 * b - a - c) / 4, *parts)
    return eqx.combine(centre, now), amplitude
