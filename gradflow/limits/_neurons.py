"""What theories of small initialisation that go neuron by neuron have in common."""

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from gradflow import _checks
from gradflow.flows import GradientFlow
from gradflow.models._polar import neuron_rows, with_rows
from gradflow.observables import GradientNorm
from gradflow.problems import EmpiricalRisk
from gradflow.runs._solve import solve
from gradflow.runs._until import Until
from gradflow.solvers import AbstractMethod


class NeuronPursuitResult(eqx.Module):
    """Saddles visited one after the other, the first being zero.

    - `times (rounds + 1,)`: of arrival at each, on the clock of gradient flow; zero throughout for `neuron_pursuit`.
    - `losses (rounds + 1,)`; `params`: parameters at the last one. `saddles`: parameters of each but the first.
    - `activated`: the neuron that became active first in each round. `correlations (rounds,)`: `N` of its direction.
    - `ended`: why it ended: `"fitted"`, `"nothing grows"`, or `"rounds"`.
    """

    times: Float[np.ndarray, " saddles"]
    losses: Float[np.ndarray, " saddles"]
    params: PyTree
    saddles: tuple[PyTree, ...]
    activated: tuple[int, ...]
    correlations: Float[np.ndarray, " rounds"]
    ended: str = eqx.field(static=True)


def residuals_at_origin(problem: EmpiricalRisk, model: PyTree) -> Array:
    """Residuals `-dL/dp_i` at predictions of zero."""
    return problem.residuals(jnp.zeros_like(problem.predictions(model)))


def check_numbers(seed_norm: float, tolerance: float, horizon: float) -> None:
    for name, value in (("seed_norm", seed_norm), ("tolerance", tolerance), ("horizon", horizon)):
        _checks.check_positive(name, value)


def settle(
    problem: EmpiricalRisk,
    model: PyTree,
    weights: np.ndarray,
    tolerance: float,
    horizon: float,
    rtol: float,
    solver: diffrax.AbstractSolver | AbstractMethod | None,
) -> np.ndarray:
    """Weights after gradient flow to convergence."""
    start = with_rows(model, jnp.asarray(weights, neuron_rows(model).dtype))
    force = GradientNorm(problem)
    # The gradient of a neuron just added is small: the scale is that of the residuals at the origin, but at most a
    # tenth of the gradient norm at the start.
    bound = min(tolerance * float(jnp.linalg.norm(residuals_at_origin(problem, model))), 0.1 * float(force(start)))
    until, flow = Until(force, below=bound), GradientFlow(problem)
    sol = solve(flow, start, [horizon], rtol=rtol, until=until, save_params=False, solver=solver)
    return np.array(neuron_rows(sol.final))
