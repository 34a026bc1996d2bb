"""What flows at the edge of stability share: a sequence split into a centre and an amplitude of alternating sign.

Any sequence can be written as `w_k = c_k + (-1)^k a_k`. At the edge of stability both vary slowly, so that a flow can
follow them where none can follow the iterates. In a state the amplitude is `a = exp(log_size) direction`: below the
edge it falls by orders of magnitude, and how small it has become decides when the next burst begins.
"""

import abc
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_callable, check_positive, fail, is_concrete
from gradflow._tree import flatten, join, scaled_norm
from gradflow.flows._base import AbstractFlow
from gradflow.flows._gradient_flow import check_scalar, field_kinks
from gradflow.flows._traits import ErrorWeights

LARGEST_PROBE = 3e-4
"""An amplitude below this share of the centre, or below the cube root of the rounding, is probed at that size: the
difference of two gradients keeps its digits, and what is left out is of the square of this share."""

LARGEST_ROUNDING = 1e-4
"""Uncertainty of the growth of an amplitude, per step of descent, from which on a run complains: over a thousand steps
it is that of a tenth of a unit of the logarithm."""

ROUNDING = 0.2
"""Root mean square of rounding errors over the unit of rounding times the number that is rounded: `1/sqrt(12)` of the
spacing of numbers, which is 0.72 units times the number in the mean."""

Vector = Float[Array, " size"]
Gradient = Callable[[Vector], Vector]


class SplitState(NamedTuple):
    """A centre `c` and an amplitude `a = exp(log_size) direction`; the size of `direction` stays as it is."""

    centre: PyTree
    direction: PyTree
    log_size: Float[Array, ""]


class Probe(NamedTuple):
    """Two gradients at `centre +- scale direction`: their mean, and half of their difference over `scale`."""

    mean: Vector
    slope: Vector
    scale: Scalar


class AbstractAlternatingFlow(AbstractFlow):
    """A flow of a centre and of an amplitude about it; a state has at least the three parts of `SplitState`."""

    problem: Callable[[PyTree], Scalar]
    learning_rate: Float[Array, ""]

    @property
    def rounding(self) -> Scalar | None:
        """Unit of rounding of the iterates; `None` for that of the parameters' type."""
        return None

    @property
    def gradients_per_evaluation(self) -> int:
        return 2

    def noise(self, centre: Vector, size: Scalar) -> Scalar:
        """What rounding adds to the growth of an amplitude of this size: its square grows by that of the error."""
        error = rounding_error(centre, self.rounding)
        # Runs start above the error; the limit is for states that do not come from one.
        return jnp.where(size > 0, jnp.minimum(error / jnp.where(size > 0, size, 1), 3) ** 2 / 2, 0)

    def gradient(self, frozen: PyTree) -> Callable[[PyTree], PyTree]:
        return jax.grad(lambda p: self.problem(join(p, frozen)))

    def params(self, state: PyTree) -> PyTree:
        return state.centre

    def amplitude(self, state: PyTree) -> PyTree:
        """The amplitude `a`, in the structure of the parameters that flow."""
        return jax.tree_util.tree_map(lambda b: jnp.exp(state.log_size).astype(b.dtype) * b, state.direction)

    def predicted_variance(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        """The variance of the iterates about their centre, `|a|^2`."""
        return jnp.sum(flatten(self.amplitude(state))[0] ** 2)

    def predicted_loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        """The mean of the loss over two iterates, `[L(c + a) + L(c - a)] / 2`."""
        a = self.amplitude(state)
        both = [jax.tree_util.tree_map(lambda c, x, s=s: c + s * x, self.params(state), a) for s in (1, -1)]
        return (self.problem(join(both[0], frozen)) + self.problem(join(both[1], frozen))) / 2

    def errors(self, state: PyTree, frozen: PyTree) -> dict[str, Scalar]:
        """`amplitude_growth`: what rounding leaves uncertain of the logarithm of the amplitude, per step of descent."""
        centre, direction = flatten(state.centre)[0], flatten(state.direction)[0]
        probed = probe_scale(centre, direction, state.log_size) * scaled_norm(direction)
        size = scaled_norm(centre) * jnp.finfo(centre.dtype).eps
        some = (probed > 0) & (scaled_norm(direction) > 0)
        return {"amplitude_growth": jnp.where(some, size / jnp.where(some, probed, 1), 0)}

    def complaint(self, errors: Mapping[str, ArrayLike]) -> str:
        worst = float(jnp.max(errors["amplitude_growth"]))
        if not worst > LARGEST_ROUNDING:
            return ""
        return (
            f"The amplitude has been so small beside the centre that its growth is known to {worst:.0e} a step of"
            " descent only, and so are the times of bursts: use float64, with jax.config.update('jax_enable_x64', True)"
            " and float64 parameters."
        )

    def kinks(self, trainable: PyTree, frozen: PyTree) -> tuple[str, ...] | None:
        return field_kinks(self.problem, trainable, frozen)

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(join(self.params(state), frozen))

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        check_scalar(self.problem, join(trainable, frozen))


class AbstractSplitFlow(AbstractAlternatingFlow):
    """A flow of centre and amplitude of gradient descent, on the clock of gradient descent, `t = k * learning_rate`."""

    @property
    def time_unit(self) -> str:
        return "t = k * learning_rate"

    @abc.abstractmethod
    def rates(self, gradient: Gradient, centre: Vector, direction: Vector, log_size: Scalar) -> tuple[Vector, Vector]:
        """The derivative of the centre, and that of the amplitude over `exp(log_size)`, per step of descent."""

    @abc.abstractmethod
    def start(self, trainable: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
        """Centre and amplitude at `t0`."""

    def init(self, trainable: PyTree, frozen: PyTree) -> SplitState:
        centre, amplitude = self.start(trainable, frozen)
        vector, unflatten = flatten(amplitude)
        size = scaled_norm(vector)
        some = (size > 0) & jnp.isfinite(size)
        safe = jnp.where(some, size, 1)
        # A size that is not finite stays in the direction, where it ends the run.
        min_size = jnp.where(some, rounding_error(flatten(centre)[0], self.rounding), 0)
        return SplitState(centre, unflatten(vector / safe), jnp.log(jnp.maximum(safe, min_size)))

    def vector_field(self, t: Scalar, state: SplitState, frozen: PyTree) -> SplitState:
        centre, unflatten = flatten(state.centre)
        direction = flatten(state.direction)[0]
        gradient = self.gradient(frozen)

        def flat(vector: Vector) -> Vector:
            return flatten(gradient(unflatten(vector)))[0]

        motion, growth = self.rates(flat, centre, direction, state.log_size)
        eta, squares = self.learning_rate.astype(centre.dtype), jnp.sum(direction**2)
        # What lengthens the direction goes into the logarithm of the size.
        radial = jnp.sum(direction * growth) / jnp.where(squares > 0, squares, 1)
        turn = growth - radial * direction
        radial += self.noise(centre, jnp.exp(state.log_size).astype(centre.dtype) * jnp.sqrt(squares))
        return SplitState(unflatten(motion / eta), unflatten(turn / eta), (radial / eta).astype(state.log_size.dtype))

    def error_weights(self, controlled: SplitState) -> ErrorWeights:
        # Errors of the amplitude are relative to the leaf, and those of its size weigh as much as all entries together.
        weight = flatten(controlled.direction)[0].size ** -0.5
        direction = jax.tree_util.tree_map(lambda b: jnp.full_like(b, jnp.sqrt(jnp.mean(b**2))), controlled.direction)
        return ErrorWeights(SplitState(controlled.centre, direction, jnp.full_like(controlled.log_size, weight / 2)))


def check_descent(
    problem: Callable[[PyTree], Scalar], learning_rate: ArrayLike
) -> tuple[Callable[[PyTree], Scalar], Float[Array, ""]]:
    """The problem and the learning rate of gradient descent, as they are kept."""
    check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
    if getattr(problem, "vector_field", None) is not None:
        raise fail("problem", "be a problem", f"a flow, {type(problem).__name__}")
    check_positive("learning_rate", learning_rate)
    if is_concrete(learning_rate) and jnp.ndim(learning_rate):
        raise fail("learning_rate", "be a scalar", f"of shape {jnp.shape(learning_rate)}", "Use jax.vmap over several.")
    return problem, jnp.asarray(learning_rate, float)


def probe_scale(centre: Vector, direction: Vector, log_size: Scalar) -> Scalar:
    """The factor of the direction at which gradients are taken: `exp(log_size)`, unless their difference would round.

    A constant to every derivative, for it only tells where the same function is evaluated.
    """
    share = min(float(jnp.finfo(centre.dtype).eps) ** (1 / 3), LARGEST_PROBE)
    size = scaled_norm(direction)
    min_scale = share * scaled_norm(centre) / jnp.where(size > 0, size, 1)
    min_scale = jnp.maximum(min_scale, jnp.finfo(centre.dtype).tiny ** 0.5)  # squares of it are no subnormal numbers
    return jax.lax.stop_gradient(jnp.maximum(jnp.exp(log_size).astype(centre.dtype), min_scale))


def probe(gradient: Gradient, centre: Vector, direction: Vector, scale: Scalar) -> Probe:
    """Two gradients about a centre."""
    ahead, behind = gradient(centre + scale * direction), gradient(centre - scale * direction)
    return Probe((ahead + behind) / 2, (ahead - behind) / (2 * scale), scale)


def rounding_error(centre: Vector, unit: Scalar | None) -> Scalar:
    """The root mean square of what rounding adds to iterates at each step, along any one direction."""
    each = jnp.asarray(jnp.finfo(centre.dtype).eps if unit is None else unit, centre.dtype)
    return jax.lax.stop_gradient(ROUNDING * each * scaled_norm(centre) / centre.size**0.5)


def iterates_from(
    gradient: Callable[[PyTree], PyTree], start: PyTree, learning_rate: Scalar, steps: int
) -> list[PyTree]:
    """The start and that many steps of gradient descent."""
    iterates = [start]
    for _ in range(steps):
        step = lambda w, g: w - learning_rate.astype(w.dtype) * g  # noqa: E731
        iterates.append(jax.tree_util.tree_map(step, iterates[-1], gradient(iterates[-1])))
    return iterates
