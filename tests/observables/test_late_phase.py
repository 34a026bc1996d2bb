"""The late phase: margins, the maximum-margin problem, and runs to t = 1e8."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.observables import Margins, MaxMarginResidual, NormalisedMargin, ParameterNorm

SAMPLES = 20


def late(loss):
    x, y = gf.data.correlated(SAMPLES, 8, dtype="float64")
    problem = gf.EmpiricalRisk(x, y, loss)
    model = gf.models.mildly_parametrised(8, 16, key=jax.random.key(1))
    see = {"loss": problem, "margin": NormalisedMargin(problem), "residual": MaxMarginResidual(problem)}
    see |= {"norm": ParameterNorm()}
    ts = np.concatenate([[0], np.geomspace(0.1, 1e8, 46)])
    return gf.solve(gf.GradientFlow(problem), model, ts, observe=see, solver=gf.solvers.Tsit5(), save_params=False)


@pytest.mark.parametrize(
    "loss", [gf.losses.exponential, pytest.param(gf.losses.logistic, marks=pytest.mark.slow)], ids=lambda loss: "loss"
)
def test_the_late_phase_to_a_hundred_million(loss):
    """Steps grow in proportion to time, since the curvature falls like `1/t`: no change of the clock is needed."""
    sol = late(loss)
    assert sol.status == "ok"
    assert int(sol.stats["gradient_evaluations"]) < 3000
    assert float(sol.drift["energy"]) < 1e-4
    product = np.asarray(sol.ts * sol.observed["loss"])
    # Bounded, for it falls from t = 100 on: in a network of degree two the loss is even smaller than 1/t.
    assert np.all(np.diff(product[sol.ts > 100]) < 0)
    assert product[-1] > 0.01
    reported = np.asarray(sol.observed["loss"]) < 1 / SAMPLES
    margin = np.asarray(sol.observed["margin"])[reported]
    assert np.all(np.diff(margin) > 0)
    smooth = (-np.log(SAMPLES * np.asarray(sol.observed["loss"])) / np.asarray(sol.observed["norm"]) ** 2)[reported]
    assert np.all(np.diff(smooth) > 0)
    np.testing.assert_array_less(smooth, margin)
    stationarity, slackness = np.asarray(sol.observed["residual"])[reported].T
    print(f"at t = 1e8: stationarity {stationarity[-1]:.3f}, slackness {slackness[-1]:.3f}, margin {margin[-1]:.4f}")
    assert np.all(np.diff(slackness[10:]) < 0)
    assert slackness[-1] < 0.05
    assert stationarity[-1] < 0.1
    assert np.all(np.diff(stationarity[-9:]) < 0)


def linear(w, x):
    return x @ w


@pytest.mark.slow
def test_a_linear_model_finds_the_widest_street():
    """Three support vectors and one sample beyond: direction `(1, 0)`, margin 1, known without training."""
    x, y = np.array([[1.0, 1.0], [1.0, -2.0], [-1.0, 0.5], [3.0, 4.0]]), np.array([1.0, 1.0, -1.0, 1.0])
    problem = gf.EmpiricalRisk(x, y, gf.losses.exponential, predict=linear)
    see = {"margin": NormalisedMargin(problem, degree=1), "residual": MaxMarginResidual(problem)}
    ts = [1.0, 1e2, 1e4, 1e8, 1e12]
    sol = gf.solve(gf.GradientFlow(problem), jnp.array([0.1, 0.1]), ts, observe=see, solver=gf.solvers.Tsit5())
    margin, residual = np.asarray(sol.observed["margin"]), np.asarray(sol.observed["residual"])
    assert np.all(margin < 1)
    # Once the loss is below 1/n.
    assert np.all(np.diff(margin[1:]) > 0)
    assert 1 - margin[-1] < 0.02
    assert np.all(np.diff(residual[1:], axis=0) < 0)
    assert residual[-1].max() < 0.1


def test_the_residual_vanishes_exactly_at_kkt_points_and_only_there():
    problem = gf.EmpiricalRisk(np.eye(2), np.array([1.0, -1.0]), gf.losses.exponential, predict=linear)
    residual = eqx.filter_jit(MaxMarginResidual(problem))
    np.testing.assert_allclose(residual(jnp.array([7.0, -7.0])), 0, atol=1e-7)
    assert float(residual(jnp.array([7.0, -6.0])).min()) > 0.01
    # A sample that is on the wrong side: no such problem.
    assert np.all(np.isnan(residual(jnp.array([7.0, 7.0]))))


def test_margins_of_classes_agree_with_numpy(key):
    x, label = np.random.default_rng(0).normal(size=(5, 3)), np.array([0, 2, 1, 1, 0])
    model = gf.models.TwoLayer(3, 4, 3, key=key)
    scores = np.asarray(jax.vmap(model)(jnp.asarray(x)))
    others = np.where(np.eye(3)[label] == 1, -np.inf, scores).max(axis=1)
    expected = scores[np.arange(5), label] - others
    for y in (label, np.eye(3)[label]):
        problem = gf.EmpiricalRisk(x, y, gf.losses.cross_entropy)
        np.testing.assert_allclose(eqx.filter_jit(Margins(problem))(model), expected, rtol=1e-12)
    norm = np.sqrt(np.sum(np.asarray(model.weight) ** 2) + np.sum(np.asarray(model.output) ** 2))
    np.testing.assert_allclose(eqx.filter_jit(NormalisedMargin(problem))(model), expected.min() / norm**2, rtol=1e-12)
    assert eqx.filter_eval_shape(MaxMarginResidual(problem), model).shape == (2,)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="be a gradflow"):
        Margins(lambda w: w)
    with pytest.raises(ValueError, match=r"`y` must hold labels \+1 and -1, or class indices, but is 0\.3"):
        MaxMarginResidual(gf.EmpiricalRisk(np.eye(2), np.array([1.0, 0.3]), gf.losses.square, predict=linear))
    problem = gf.EmpiricalRisk(np.eye(2), np.ones(2), gf.losses.exponential, predict=linear)
    with pytest.raises(ValueError, match="`degree` must be an integer of at least 1"):
        NormalisedMargin(problem, degree=0)
