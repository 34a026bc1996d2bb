"""Alternating flow of diagonal networks whose dormant features change the sign of their residual correlation."""

import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf

LOG = 1000.0


def random_problem(seed, size=3):
    """Correlated features: residual correlations change sign as others are learned."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size + 2, size)) + 1.5 * rng.normal(size=(size + 2, 1))
    return x, x @ rng.normal(size=size)


def alternating(x, y, **options):
    problem = gf.EmpiricalRisk(jnp.asarray(x), jnp.asarray(y), gf.losses.square, reduction="mean")
    model = gf.models.DiagonalLinear(x.shape[1])
    return problem, gf.alternating_flow(problem, model, -LOG, rounds=60, **options)


def check_limit(x, y):
    """All saddles up to the first of a loss below 1e-8 of that at zero, which convergence here does not resolve."""
    limit = gf.theory.diagonal_saddles(x, y)
    _, computed = alternating(x, y, tolerance=1e-7)
    small = np.flatnonzero(limit.losses < 1e-8 * limit.losses[0])
    last = small[0] + 1 if small.size else len(limit.losses)
    limit = gf.theory.Saddles(limit.times[:last], limit.predictors[:last], limit.losses[:last])
    assert len(computed.times) == last
    np.testing.assert_allclose(computed.times, LOG * limit.times, rtol=0.02)
    np.testing.assert_allclose(computed.losses, limit.losses, atol=1e-4 * limit.losses[0])
    for saddle, beta in zip(computed.saddles, limit.predictors[1:], strict=True):
        rows = np.asarray(saddle.neuron_weights())
        np.testing.assert_allclose(rows[:, 0] * rows[:, 1], beta, atol=1e-2 * np.abs(limit.predictors).max())


def test_dormant_feature_whose_correlation_changes_sign_counts_back():
    """The residual correlation of the second feature is -1.8, and 0.216 once the first, of 2.52, is learned at `t_1`.

    So `t_2 = t_1 + (1 + 1.8 t_1) / 0.216`.
    """
    x = np.linalg.cholesky(np.array([[1.0, 0.8], [0.8, 1.0]])).T * np.sqrt(2)
    _, computed = alternating(x, x @ np.array([3.0, -0.6]))
    first = 1 / 2.52
    np.testing.assert_allclose(computed.times, LOG * np.array([0, first, first + (1 + 1.8 * first) / 0.216]), rtol=1e-3)
    assert computed.activated == (0, 1)


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_random_diagonal_problem(seed):
    check_limit(*random_problem(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_random_diagonal_problems(seed):
    check_limit(*random_problem(seed, 3 + seed % 3))
