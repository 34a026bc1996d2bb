"""Alternating gradient flow: training from a vanishing start, one neuron after the other."""

from collections.abc import Sequence

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from gradflow import _checks
from gradflow.limits._neurons import NeuronPursuitResult, check_numbers, residuals_at_origin, settle
from gradflow.models._polar import neuron_rows, with_rows
from gradflow.problems import EmpiricalRisk, NeuralCorrelation
from gradflow.programs import fresh_jit
from gradflow.solvers import AbstractMethod
from gradflow.theory._ascent import ascend


def alternating_flow(
    problem: EmpiricalRisk,
    model: PyTree,
    log_norms: ArrayLike | Sequence[float],
    *,
    degree: int = 2,
    rounds: int = 20,
    seed_norm: float = 1e-3,
    tolerance: float = 1e-5,
    horizon: float = 1e5,
    rtol: float = 1e-6,
    solver: diffrax.AbstractSolver | AbstractMethod | None = None,
) -> NeuronPursuitResult:
    """Saddles of a sum of neurons in the limit of a vanishing start.

    Alternating gradient flow is what gradient flow becomes there.

    Neurons are dormant at first. Dormant ones turn to the nearest maximum of their correlation `U_j` with what the
    active ones leave unexplained, and meanwhile accumulate `S_j = degree * int U_j dt`. The first whose `S_j` reaches
    `c_j` becomes active, and the active neurons then follow gradient flow to convergence, which takes no time here;
    those that shrink to nothing are dormant again. A neuron that has turned keeps an exponentially small part of the
    direction it left, so the clock is signed: when the output of a dormant neuron turns to the opposite side, `S_j`
    changes sign and first counts back to zero; one that was active comes back with the other sign after twice `c_j`.
    For diagonal networks this is `gradflow.theory.diagonal_saddles`. A turn to a direction that is not opposite keeps
    `S_j` whole, which is an approximation for neurons that can learn several features. In degree 2,
    `c_j = -log_norm_j`; in degree `k > 2`, `c_j = (|w_j|^(2 - k) - 1) / (k - 2)`, and since there turning takes as long
    as growing, times are right up to a factor unless neurons start where they turn to. Saddles of the active
    neurons among themselves, such as those of modular addition, where one frequency replaces another, are passed at
    once. It is `NeuronPolarFlow` with the residuals frozen between two jumps, and directions that turn at once.

    **Arguments**

    - `problem`, `model`: a sum of homogeneous neurons, as for `NeuronPolarFlow`; the weights give the first directions.
    - `log_norms`: `ln |w_j(0)|` of every neuron, or one for all. Times are in the unit of gradient flow.
    - `degree`; `rounds`: the most. `seed_norm`: of a neuron that becomes active. `tolerance`: gradient norm over its
      largest value in a round, at which the active ones have converged; `horizon`: flow time after which they count as
      converged in any case. `rtol`, `solver`: of the integration.

    Where ReLU neurons slide along kinks, give the problem `predict=gradflow.models.Smoothed(...)`.

    **Returns** a `NeuronPursuitResult`. **Raises** `ValueError` for parameters without neurons, log-norms of another
    number or not finite, a degree below two, and other numbers that are not positive.

    Source: D. Kunin et al. (2025), *Alternating gradient flows: a theory of feature learning in two-layer neural
    networks*, arXiv 2506.06489.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([1.0, -2.0]), gf.losses.square, reduction="sum")
    >>> result = gf.alternating_flow(problem, gf.models.DiagonalLinear(2), log_norms=-100.0)
    >>> result.times.round(6).tolist(), result.activated  # 100 / |y|
    ([0.0, 50.0, 100.0], (1, 0))
    """
    rows = np.asarray(neuron_rows(model), float)
    width = rows.shape[0]
    _checks.check_count("rounds", rounds)
    _checks.check_count("degree", degree, least=2)
    check_numbers(seed_norm, tolerance, horizon)
    if np.shape(log_norms) not in ((), (width,)):
        raise _checks.fail("log_norms", f"be one number or {width}", f"of shape {np.shape(log_norms)}")
    _checks.check_finite("log_norms", np.asarray(log_norms, float))
    neurons = _Neurons(model, rows, np.broadcast_to(np.asarray(log_norms, float), (width,)), degree)
    times, losses = [0.0], [float(problem(neurons.params()))]
    saddles, activated, correlations, ended = [], [], [], "rounds"
    fitted = 10 * tolerance * float(jnp.linalg.norm(residuals_at_origin(problem, model)))
    for _ in range(rounds):
        labels = problem.residuals(problem.predictions(neurons.params()))
        size = float(jnp.linalg.norm(labels))
        if size <= fitted:
            ended = "fitted"
            break
        if np.all(neurons.active):
            ended = "nothing grows"
            break
        values = neurons.turn(problem, NeuralCorrelation(problem, degree, labels=labels), 1e-6 * size)
        waits = neurons.waits(degree * values, 1e-6 * size)
        first = int(np.argmin(waits))
        if not np.isfinite(waits[first]):
            ended = "nothing grows"
            break
        wait = max(float(waits[first]), 0.0)
        neurons.pass_time(wait, degree * values)
        # Neurons of equal norms in one basin become active together.
        neurons.activate(waits <= wait * (1 + 1e-6), seed_norm)
        neurons.weights = settle(problem, model, neurons.weights, tolerance, horizon, rtol, solver)
        neurons.deactivate(seed_norm)
        saddles.append(neurons.params())
        activated.append(first)
        correlations.append(float(values[first]))
        times.append(times[-1] + wait)
        losses.append(float(problem(saddles[-1])))
        if not neurons.active[first] and losses[-1] >= losses[-2] * (1 - 1e-9):
            ended = "nothing grows"
            break
    visited = np.array(times), np.array(losses), neurons.params(), tuple(saddles), tuple(activated)
    return NeuronPursuitResult(*visited, np.array(correlations), ended)


class _Neurons:
    """What alternating gradient flow knows of the neurons: directions and clocks, and the weights of the active ones.

    `grown` is the clock on the side of the direction `sides`, the last one in which the neuron grew; it counts to the
    threshold.
    """

    def __init__(
        self, model: PyTree, rows: Float[np.ndarray, "width size"], logs: Float[np.ndarray, " width"], degree: int
    ):
        exponent = degree - 2
        self.model, self.degree, self.dtype = model, degree, neuron_rows(model).dtype
        self.thresholds = -logs if degree == 2 else (np.exp(-exponent * logs) - 1) / exponent
        self.units = unit_rows(rows)
        # What a flow keeps of the first directions, and rounding may have lost: without it a direction that has turned
        # all the way to one label would stay there when another label is what is left.
        self.trace = float(np.sqrt(np.finfo(self.dtype).eps)) * self.units
        self.grown, self.active = np.zeros(len(rows)), np.zeros(len(rows), bool)
        self.sides, self.weights = self.units.copy(), np.zeros_like(rows)

    def params(self) -> PyTree:
        """The network of the active neurons."""
        return with_rows(self.model, jnp.asarray(self.weights, self.dtype))

    def turn(
        self, problem: EmpiricalRisk, correlation: NeuralCorrelation, threshold: float
    ) -> Float[np.ndarray, " width"]:
        """Turns the dormant ones to the maxima of their basins, and the clocks of those whose output changes sides.

        Returns the correlations there. `threshold`: of the speed above which a neuron grows.
        """
        traced = jnp.asarray(unit_rows(self.units + self.trace), self.dtype)
        turned, values = nearest_points(correlation, self.model, traced)
        dormant = ~self.active
        self.units[dormant] = turned[dormant]
        grows = dormant & (self.degree * values > threshold)
        sides, units = jnp.asarray(self.sides, self.dtype), jnp.asarray(self.units, self.dtype)
        overlaps = output_overlaps(problem, self.model, sides, units)
        self.grown = np.where(grows & (np.asarray(overlaps) < 0), -self.grown, self.grown)
        self.sides[grows] = self.units[grows]
        return values

    def waits(self, speed: Float[np.ndarray, " width"], threshold: float) -> Float[np.ndarray, " width"]:
        """How long each takes to become active; infinity for those that do not grow."""
        grows = ~self.active & (speed > threshold)
        return np.where(grows, (self.thresholds - self.grown) / np.maximum(speed, threshold), np.inf)

    def pass_time(self, wait: float, speed: Float[np.ndarray, " width"]) -> None:
        """The clocks of the dormant ones go on."""
        grown = np.minimum(self.grown + np.where(np.isfinite(speed), speed, 0) * wait, self.thresholds)
        self.grown[~self.active] = grown[~self.active]

    def activate(self, ripe: Bool[np.ndarray, " width"], seed_norm: float) -> None:
        """The dormant ones among these become active, with weights of this norm."""
        together = ~self.active & ripe
        self.weights[together], self.active[together] = seed_norm * self.units[together], True

    def deactivate(self, seed_norm: float) -> None:
        """Active ones below this norm become dormant again."""
        resting = self.active & (np.linalg.norm(self.weights, axis=1) < seed_norm)
        for j in np.flatnonzero(resting):
            self.units[j] = self.weights[j] / max(np.linalg.norm(self.weights[j]), 1e-300)
        # One that was active has outgrown its start by all of the threshold.
        self.sides[resting], self.grown[resting] = self.units[resting], self.thresholds[resting]
        self.weights[resting], self.active[resting] = 0.0, False


def unit_rows(rows: Float[np.ndarray, "width size"]) -> Float[np.ndarray, "width size"]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class _NeuronCorrelation(eqx.Module):
    """`N` of one neuron of a network, all others being zero."""

    correlation: NeuralCorrelation
    model: PyTree

    def __call__(self, row: Array, index: Int[ArrayLike, ""]) -> Float[Array, ""]:
        rows = jnp.zeros_like(neuron_rows(self.model)).at[index].set(row)
        return self.correlation(with_rows(self.model, rows))


@fresh_jit
def output_overlaps(
    problem: EmpiricalRisk, model: PyTree, units: Float[Array, "width size"], others: Float[Array, "width size"]
) -> Float[Array, " width"]:
    """Inner products over the samples of the outputs of each neuron in two directions: negative on opposite sides."""

    def outputs(row: Array, index: Array) -> Array:
        return problem.predictions(with_rows(model, jnp.zeros_like(units).at[index].set(row)))

    def overlap(given: tuple[Array, Array, Array]) -> Float[Array, ""]:
        unit, other, index = given
        return jnp.sum(outputs(unit, index) * outputs(other, index))

    return jax.lax.map(overlap, (units, others, jnp.arange(units.shape[0])))


def nearest_points(
    correlation: NeuralCorrelation, model: PyTree, units: Float[Array, "width size"]
) -> tuple[Float[np.ndarray, "width size"], Float[np.ndarray, " width"]]:
    """The KKT point to which each neuron of a network climbs from its direction, and the correlation there."""
    scale = jnp.linalg.norm(correlation.labels).astype(units.dtype)
    ends, values, *_ = ascend(_NeuronCorrelation(correlation, model), units, scale, correlation.degree, 400)
    return np.asarray(ends), np.asarray(values)
