"""A network of small weights while its loss does not take part: how its neurons turn, and what that time costs."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow.flows import GradientFlow
from gradflow.models import TwoLayer
from gradflow.observables import Correlation
from gradflow.problems import EmpiricalRisk, NeuralCorrelation, losses
from gradflow.problems._correlation import residuals_at_origin
from gradflow.runs._solve import solve
from gradflow.solvers import Tsit5

LARGEST_LOG_NORM = 40.0
"""Logarithm of the factor by which weights grow at most: all neurons have turned by then, in either precision."""


class Rising(eqx.Module):
    """The neural correlation as a loss that falls."""

    correlation: NeuralCorrelation

    def __call__(self, model: TwoLayer) -> Float[Array, ""]:
        return -self.correlation(model)


class Alignment(NamedTuple):
    """The flow of the neural correlation `N` from a start of scale one.

    It is homogeneous, so from `scale` times that start all weights are `scale` times as large: one run serves all
    scales. The loss has fallen by `N(w)` to leading order.
    """

    ts: Float[np.ndarray, " times"]
    logs: Float[np.ndarray, " times"]  # ln N(w(t)); minus infinity before N becomes positive
    rate: float  # at which the logarithm goes on to grow
    final: TwoLayer

    def time(self, drop: float, scale: float) -> float:
        """When the loss has fallen by `drop`, had it not taken part; not a number where it never does."""
        level = math.log(drop) - 2 * math.log(scale)
        above = np.flatnonzero(self.logs >= level)
        if not above.size:
            late = (level - self.logs[-1]) / self.rate if self.rate > 0 else math.nan
            return float(self.ts[-1] + late)
        # `N` grows without pause along its own flow.
        first = int(above[0])
        if first == 0 or not np.isfinite(self.logs[first - 1]):
            return float(self.ts[first])
        share = (level - self.logs[first - 1]) / (self.logs[first] - self.logs[first - 1])
        return float(self.ts[first - 1] + share * (self.ts[first] - self.ts[first - 1]))

    def at(self, drop: float) -> TwoLayer:
        """The aligned network, so small that the loss has fallen by `drop`."""
        factor = math.exp((math.log(drop) - self.logs[-1]) / 2)
        return jax.tree_util.tree_map(lambda leaf: factor * leaf if eqx.is_inexact_array(leaf) else leaf, self.final)


def align(problem: EmpiricalRisk, model: TwoLayer, slope: float, *, saves: int, rtol: float) -> Alignment:
    """From a model of scale one, until its weights have grown by many orders of magnitude.

    `slope` is the flow time in which the largest weights grow by a factor e.
    """
    # The residuals are all that is left of the loss, so that all losses share a compiled program.
    alike = EmpiricalRisk(problem.x, problem.y, losses.square)
    correlation = NeuralCorrelation(alike, labels=residuals_at_origin(problem))
    ts = jnp.linspace(0, LARGEST_LOG_NORM * slope, saves)
    observe = {"value": correlation}
    sol = solve(GradientFlow(Rising(correlation)), model, ts, observe=observe, solver=Tsit5(), rtol=rtol)
    values = np.asarray(sol.observed["value"], float)
    with np.errstate(divide="ignore"):
        logs = np.log(np.maximum(values, 0))
    rate = 4 * float(Correlation(correlation)(sol.final))
    return Alignment(np.asarray(sol.ts, float), logs, rate, sol.final)
