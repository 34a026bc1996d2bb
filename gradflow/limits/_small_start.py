"""Predictions without training for a two-layer ReLU network from small weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gradflow.limits._alternating_flow import alternating_flow
from gradflow.models import Smoothed, TwoLayer
from gradflow.models._polar import neuron_rows, with_rows
from gradflow.problems import EmpiricalRisk
from gradflow.solvers import Tsit5
from gradflow.theory import ReLUEscape, relu_escape


class SmallStartPrediction(NamedTuple):
    """Neurons of positive, and of negative output weight turn to `escape.directions`, of correlations `values`."""

    problem: EmpiricalRisk
    escape: ReLUEscape
    values: Float[np.ndarray, " 2"]

    def time(self, model: TwoLayer, drop: float) -> float:
        """When the loss has fallen by `drop`, to leading order in `ln(1/scale)`.

        Near zero the loss falls by `sum_j N_j |w_j|^2`, and `|w_j|` grows like `exp(2 N_j t)`; here from the start on,
        as if every neuron had turned already.
        """
        grows = self.values > 0
        logs = np.log(self.values[grows]) + 2 * self.log_norms(model)[grows]
        rates = 4 * self.values[grows]
        low, high = 0.0, float(np.max((np.log(drop) - logs) / rates))
        for _ in range(100):
            middle = (low + high) / 2
            grown = np.logaddexp.reduce(logs + rates * middle)
            low, high = (middle, high) if grown < np.log(drop) else (low, middle)
        return high

    def loss_at_zero(self) -> float:
        y = self.problem.y
        return float(jnp.mean(jax.vmap(self.problem.loss)(jnp.zeros_like(y), y)))

    def saddles(self, model: TwoLayer, rounds: int = 3) -> tuple[np.ndarray, np.ndarray]:
        """Times and losses of the saddles of alternating gradient flow, the first being zero.

        All neurons of one sign turn to the same direction, and so act as a single one of their joint norm.
        """
        logs = self.log_norms(model)
        smooth = EmpiricalRisk(self.problem.x, self.problem.y, self.problem.loss, predict=Smoothed(0.01))
        rows = np.column_stack([self.escape.directions, [1.0, -1.0]])[np.isfinite(logs)] / np.sqrt(2)
        two = with_rows(model, jnp.asarray(rows, model.weight.dtype))
        options = {"tolerance": 1e-3, "horizon": 1e4, "rtol": 1e-4, "solver": Tsit5()}
        limit = alternating_flow(smooth, two, logs[np.isfinite(logs)], rounds=rounds, **options)
        return limit.times, limit.losses

    def log_norms(self, model: TwoLayer) -> Float[np.ndarray, " 2"]:
        """Logarithms of the joint norms of the neurons of either sign; minus infinity where there is none."""
        squares = np.sum(np.asarray(neuron_rows(model), float) ** 2, axis=1)
        signs = np.asarray(model.output) > 0
        with np.errstate(divide="ignore"):
            return np.log([squares[signs].sum(), squares[~signs].sum()]) / 2


def predict_small_start(problem: EmpiricalRisk) -> SmallStartPrediction:
    """From the derivative of the loss at zero."""
    residuals = -jax.jit(jax.vmap(jax.grad(problem.loss)))(jnp.zeros_like(problem.y), problem.y)
    x, z = np.asarray(problem.x, float), np.asarray(residuals, float)
    escape = relu_escape(x, z)
    hidden = np.maximum(escape.directions @ x.T, 0)
    return SmallStartPrediction(problem, escape, np.array([1.0, -1.0]) * (hidden @ z) / (2 * len(z)))
