"""Neuron pursuit: a network trained by adding the best next neuron."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from gradflow import _checks
from gradflow.limits._neurons import NeuronPursuitResult, check_numbers, residuals_at_origin, settle
from gradflow.models._polar import neuron_rows, with_rows
from gradflow.problems import EmpiricalRisk, NeuralCorrelation
from gradflow.solvers import AbstractMethod
from gradflow.theory import kkt_points


def neuron_pursuit(
    problem: EmpiricalRisk,
    neuron: PyTree,
    *,
    rounds: int = 10,
    starts: int = 32,
    seed_norm: float = 1e-2,
    tolerance: float = 1e-5,
    horizon: float = 1e5,
    rtol: float = 1e-6,
    solver: diffrax.AbstractSolver | AbstractMethod | None = None,
    key: PRNGKeyArray | None = None,
) -> NeuronPursuitResult:
    """Trains a network neuron by neuron, the best next one at a time.

    That is the best KKT point of what is left to explain.

    Each round maximises the correlation of one neuron of length one with the current residuals `-dL/dp_i`, from random
    starts; appends a small multiple of the best; and follows gradient flow of the whole network to a stationary point.

    **Arguments**: `neuron`: a network of one neuron, homogeneous of degree 2, such as `TwoLayer(d, 1, key=key)`.
    `rounds`: neurons to add. `starts`, `key`: of the search. `seed_norm`: of a neuron when it is appended. `tolerance`,
    `horizon`, `rtol`, `solver`: as for `alternating_flow`.

    **Returns** a `NeuronPursuitResult`. **Raises** `ValueError` for a network of more than one neuron, and for numbers
    that are not positive.

    Source: A. Kumar and J. Haupt (2025), arXiv 2509.12154.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([1.0, -2.0]), gf.losses.square, reduction="sum")
    >>> result = gf.neuron_pursuit(problem, gf.models.TwoLayer(2, 1, key=jax.random.key(0)), rounds=3)
    >>> [round(float(loss), 4) for loss in result.losses], result.ended
    ([2.5, 0.5, 0.0], 'fitted')
    """
    rows = neuron_rows(neuron)
    if rows.shape[0] != 1:
        raise _checks.fail("neuron", "be a network of one neuron", f"one of {rows.shape[0]}")
    _checks.check_count("rounds", rounds)
    check_numbers(seed_norm, tolerance, horizon)
    dtype, key = rows.dtype, jax.random.key(0) if key is None else key
    # Neurons of zeros stay zero, and are there for one program to serve all rounds.
    weights = np.zeros((rounds, rows.shape[1]))
    losses = [float(problem(with_rows(neuron, jnp.zeros_like(rows))))]
    start = float(jnp.linalg.norm(residuals_at_origin(problem, neuron)))
    saddles, correlations, ended = [], [], "rounds"
    for index in range(rounds):
        labels = problem.residuals(problem.predictions(with_rows(neuron, jnp.asarray(weights, dtype))))
        if float(jnp.linalg.norm(labels)) <= 10 * tolerance * start:
            ended = "fitted"
            break
        correlation = NeuralCorrelation(problem, labels=labels)
        points = kkt_points(correlation, neuron, starts=starts, key=jax.random.fold_in(key, index))
        if points.values[0] <= 1e-6 * float(jnp.linalg.norm(labels)):
            ended = "nothing grows"
            break
        best = np.asarray(neuron_rows(points.params(0)))
        weights[index] = seed_norm * best[0]
        weights = settle(problem, neuron, weights, tolerance, horizon, rtol, solver)
        here = with_rows(neuron, jnp.asarray(weights[: index + 1], dtype))
        saddles.append(here)
        correlations.append(float(points.values[0]))
        losses.append(float(problem(here)))
    final = saddles[-1] if saddles else with_rows(neuron, jnp.zeros_like(rows))
    names = tuple(range(len(saddles)))
    return NeuronPursuitResult(
        np.zeros(len(losses)), np.array(losses), final, tuple(saddles), names, np.array(correlations), ended
    )
