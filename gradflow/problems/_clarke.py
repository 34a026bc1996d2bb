"""KKT residuals at the kinks of ReLU, where the gradient of the neural correlation function jumps."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.core
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from gradflow._homogeneity import degree_one_slopes
from gradflow._tree import full_precision, join, split
from gradflow.problems._empirical_risk import EmpiricalRisk
from gradflow.protocols import PiecewiseLinearLayer, missing

ITERATIONS = 400
"""Of the accelerated projected gradient method."""


class Clarke(NamedTuple):
    """The element of the Clarke subdifferential of `N` that is nearest to `degree N(u) u`, at a direction `u`.

    - `distance`: to it. `on (n, width)`: whether neuron `j` counts as on the kink of sample `i`.
    - `shares (n, width)`: the weight in `[0, 1]` of the right slope there. `jumps (n, width)`: by how much the
      derivative of `N` with respect to the preactivation jumps; negative where neurons are held on the kink.
    """

    distance: Float[Array, ""]
    on: Bool[Array, "n width"]
    shares: Float[Array, "n width"]
    jumps: Float[Array, "n width"]


@runtime_checkable
class Correlation(Protocol):
    """What is asked of `N`, a `gradflow.NeuralCorrelation`."""

    @property
    def problem(self) -> EmpiricalRisk: ...

    @property
    def labels(self) -> Float[Array, "n ..."]: ...

    @property
    def degree(self) -> int: ...

    def __call__(self, params: PyTree) -> Float[Array, ""]: ...


def has_kinks(problem: EmpiricalRisk, params: PyTree) -> bool:
    """Whether the model is one layer of (leaky) ReLU neurons with a linear readout, as `TwoLayer` is."""
    if problem.predict is not None or missing(params, PiecewiseLinearLayer):
        return False
    slopes = degree_one_slopes(params.activation)
    return slopes is not None and slopes[0] != slopes[1]


@full_precision
def nearest_element(correlation: Correlation, params: PyTree, tolerance: ArrayLike) -> Clarke:
    """Projects `degree N(u) u` onto the subdifferentials of the samples, added up; `u` of length one.

        min over s in [0, 1]^kinks of | sum_i z_i (slope_i x_i a, relu(w . x_i)) - degree N(u) u |

    with slopes `left + s_i (right - left)` where `|w . x_i| <= reach |w| |x_i|`. The sum is the subdifferential of `N`
    itself where the inputs of these samples are linearly independent, and contains it otherwise (F. H. Clarke 1983,
    *Optimization and Nonsmooth Analysis*, 2.3.3).
    """
    trainable, frozen = split(params)
    flat, unflatten = jax.flatten_util.ravel_pytree(trainable)
    x, labels = correlation.problem.x.astype(flat.dtype), correlation.labels.astype(flat.dtype)
    activation = params.activation
    left, right = degree_one_slopes(activation) or (1.0, 1.0)
    before = jax.vmap(params.preactivations)(x)
    bounds = jax.vmap(params.preactivation_bounds)(x)
    on = jnp.abs(before) <= jnp.asarray(tolerance, flat.dtype) * bounds

    def value(vector: Array, weights: Array) -> Array:
        model = join(unflatten(vector), frozen)
        z = jax.vmap(model.preactivations)(x)
        hidden = jnp.where(on, (left + weights * (right - left)) * z, activation(z))
        return jnp.sum(labels * jax.vmap(model.readout)(hidden))

    def element(weights: Array) -> Array:
        return jax.grad(value)(flat, jnp.where(on, weights, 0))

    middle = jnp.full_like(before, 0.5)
    base, forward = jax.linearize(element, middle)
    backward = jax.linear_transpose(forward, middle)
    base = base - correlation.degree * correlation(params) * flat

    def off(weights: Array) -> Array:
        return base + forward(weights - middle)

    start = jnp.where(on, 1.0 + 0.1 * jnp.cos(jnp.arange(before.size, dtype=flat.dtype)).reshape(before.shape), 0.0)
    weights = _nearest_weights(off, forward, backward, middle, start)

    def readout(hidden: Array) -> Array:
        return jnp.sum(labels * jax.vmap(params.readout)(hidden))

    jumps = jnp.where(on, (right - left) * jax.grad(readout)(activation(before)), 0)
    return Clarke(jnp.linalg.norm(off(weights)), on, jnp.where(on, weights, (before > 0).astype(flat.dtype)), jumps)


def _nearest_weights(
    off: Callable[[Array], Array],
    forward: Callable[[Array], Array],
    backward: Callable[[Array], tuple[Array]],
    middle: Float[Array, "n width"],
    start: Float[Array, "n width"],
) -> Float[Array, "n width"]:
    """The weights in `[0, 1]` at which `|off(weights)|` is least, by a projected gradient method.

    It is accelerated, with restarts, begins at `middle`, and takes steps of the inverse of the largest eigenvalue of
    `backward(forward(.))`, from thirty power iterations that begin at `start`.
    """

    def largest(_: Int[ArrayLike, ""], v: Array) -> Array:
        w = backward(forward(v))[0]
        return w / jnp.maximum(jnp.linalg.norm(w), jnp.finfo(w.dtype).tiny)

    top = jax.lax.fori_loop(0, 30, largest, start)
    steepness = 1.05 * jnp.linalg.norm(backward(forward(top))[0])
    length = 1 / jnp.where(steepness > 0, steepness, 1)

    def step(_: Int[ArrayLike, ""], state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weights, ahead, momentum = state
        projected = jnp.clip(ahead - length * backward(off(ahead))[0], 0, 1)
        uphill = jnp.sum((ahead - projected) * (projected - weights)) > 0
        momentum = jnp.where(uphill, 1.0, momentum)
        following = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
        return projected, projected + (momentum - 1) / following * (projected - weights), following

    initial = middle, middle, jnp.ones((), middle.dtype)
    return jax.lax.fori_loop(0, ITERATIONS, step, initial)[0]
