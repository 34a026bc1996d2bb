"""Small initialisation with logistic loss: directions, jump times, saddles and events, from the residuals `y / 2`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from scipy.special import expit

import gradflow as gf
from gradflow.observables import Aligned, LogNorm, LossRate

MODES = (3.0, 2.0)


def identity(z):
    return z


def entropy(count):
    """The least loss of eight samples at one input, `count` of them positive."""
    return -count * np.log(count / 8) - (8 - count) * np.log(1 - count / 8)


LOSSES = np.cumsum([32 * np.log(2), entropy(7) - 8 * np.log(2), entropy(6) - 8 * np.log(2)])
"""At zero, and where the first mode and both have been fitted."""


@pytest.fixture(scope="module")
def two_modes():
    """Two inputs, eight times each; outputs with 7 and 6 positive labels at their own input, and half at the other.

    The residual correlations at zero are `diag(3, 2)`; the loss is least at the predictions `diag(ln 7, ln 3)`.
    """
    half = np.where(np.arange(8) % 2, 1.0, -1.0)
    mostly = [np.where(np.arange(8) < count, 1.0, -1.0) for count in (7, 6)]
    y = np.concatenate([np.stack([mostly[0], half], axis=1), np.stack([half, mostly[1]], axis=1)])
    problem = gf.EmpiricalRisk(np.repeat(np.eye(2), 8, axis=0), y, gf.losses.logistic, reduction="sum")
    return problem, gf.models.TwoLayer(2, 3, 2, activation=identity, key=jax.random.key(0))


@pytest.fixture(scope="module")
def run(two_modes):
    problem, model = two_modes
    ts = np.linspace(0, 24, 1201)
    return ts, gf.solve(gf.PolarFlow(problem), gf.Polar(model, np.log(1e-12)), ts)


def crossings(ts, products):
    """When the first and the second mode pass half of what they come to."""
    computed = []
    for k, level in enumerate((np.log(7) / 2, np.log(3) / 2)):
        i = int(np.argmax(products[:, k, k] > level))
        low, high = products[i - 1 : i + 1, k, k]
        computed.append(ts[i - 1] + (ts[i] - ts[i - 1]) * (level - low) / (high - low))
    return np.array(computed)


@pytest.mark.slow
def test_jump_times_agree_with_the_written_out_equations(two_modes, run):
    problem, model = two_modes
    ts, sol = run
    positive = np.array([[7.0, 4.0], [4.0, 6.0]])

    def field(_, flat):
        w, a = flat[:6].reshape(3, 2), flat[6:].reshape(2, 3)
        p = a @ w
        residual = positive * expit(-p) - (8 - positive) * expit(p)
        return np.concatenate([(a.T @ residual).ravel(), (residual @ w.T).ravel()])

    plain = gf.Polar(model, np.log(1e-12)).ordinary()
    begin = np.concatenate([np.ravel(plain.weight), np.ravel(plain.output)])
    exact = scipy.integrate.solve_ivp(field, (0, 24), begin, method="DOP853", t_eval=ts, rtol=1e-11, atol=1e-26).y.T
    products = np.einsum("tij,tjk->tik", exact[:, 6:].reshape(-1, 2, 3), exact[:, :6].reshape(-1, 3, 2))
    reference = crossings(ts, products)
    observe = {"p": lambda m: m.output @ m.weight}
    neurons = gf.solve(gf.NeuronPolarFlow(problem), plain, ts, observe=observe, save_params=False)
    ours = jax.vmap(lambda m: m.ordinary().output @ m.ordinary().weight)(sol.params)
    for computed in (ours, neurons.observed["p"]):
        np.testing.assert_allclose(crossings(ts, np.asarray(computed)), reference, rtol=1e-5)
    # Up to O(1), modes appear at ln(1/delta) / s_k.
    np.testing.assert_allclose(reference * MODES, -np.log(1e-12), rtol=0.1)  # measured: 0.07


@pytest.mark.slow
def test_run_visits_the_saddles_in_closed_form(two_modes, run):
    problem, _ = two_modes
    saddles = gf.find_saddles(run[1], problem)
    np.testing.assert_allclose([s.loss for s in saddles], LOSSES, rtol=1e-3)
    assert [s.index > 0 for s in saddles] == [True, True, False]
    np.testing.assert_allclose([s.rate for s in saddles[:2]], MODES, rtol=1e-2)
    for s in saddles[:2]:
        assert abs(s.predicted - s.left) < 3 / s.rate


@pytest.mark.slow
def test_directions_are_those_of_half_the_labels(two_modes):
    problem, _ = two_modes
    neuron = gf.models.TwoLayer(2, 1, 2, activation=identity, key=jax.random.key(0))
    points = gf.theory.kkt_points(gf.NeuralCorrelation(problem), neuron, every=True)
    np.testing.assert_allclose(points.values, np.repeat(MODES, 2) / 2, rtol=1e-9)
    assert points.kinds == ("maximum", "maximum", "saddle", "saddle")
    # At the first saddle the second mode is the best one.
    fitted = neuron.with_neuron_weights(jnp.sqrt(jnp.log(7.0)) * jnp.array([[1.0, 0.0, 1.0, 0.0]]))
    residual = gf.theory.kkt_points(gf.NeuralCorrelation(problem, at=fitted), neuron)
    assert residual.values[0] == pytest.approx(MODES[1] / 2, rel=1e-9)


@pytest.mark.slow
def test_alternating_flow_of_a_diagonal_net():
    """Coordinates wake at `ln(1/|w|) / s_k` and go to `ln 7` and `ln 3`."""
    y = np.concatenate([np.where(np.arange(8) < count, 1.0, -1.0) for count in (6, 7)])
    problem = gf.EmpiricalRisk(np.repeat(np.eye(2), 8, axis=0), y, gf.losses.logistic, reduction="sum")
    computed = gf.alternating_flow(problem, gf.models.DiagonalLinear(2), -600.0, solver=gf.solvers.Tsit5())
    np.testing.assert_allclose(computed.times, [0, 200, 300], rtol=1e-5)
    assert computed.activated == (1, 0)
    np.testing.assert_allclose(computed.losses, LOSSES - 16 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(computed.params.beta(), [np.log(3), np.log(7)], rtol=1e-3)


@pytest.mark.slow
def test_events_mark_norms_alignment_and_plateaus(two_modes, run):
    """Ended and gone on from: the times add up to those of the run as a whole, and the events come in their order."""
    problem, model = two_modes
    rate = LossRate(problem, LOSSES[0])
    leave, enter = gf.Until(rate, above=1e-2), gf.Until(rate, below=1e-3)
    flow, state, clock, marks = gf.PolarFlow(problem), gf.Polar(model, np.log(1e-12)), 0.0, []
    for until in (leave, enter, leave, enter):
        sol = gf.solve(flow, state, [100.0], until=until, save_params=False)
        assert sol.status == "stopped"
        clock += float(sol.t_final)
        state = sol.final
        marks.append((clock, float(problem(state.ordinary()))))
    times, losses = np.array(marks).T
    np.testing.assert_allclose(losses[[1, 3]], LOSSES[1:], rtol=5e-3)
    jumps = [s.left for s in gf.find_saddles(run[1], problem)][:2]
    assert times[0] < jumps[0] < times[1] < times[2] < jumps[1] < times[3]
    # Along the run as a whole the rate crosses these values at the same times.
    ts, whole = run
    rates = np.asarray(jax.vmap(lambda p: rate(p.ordinary()))(whole.params))
    rising, falling = (np.diff((rates > value).astype(int)) for value in (1e-2, 1e-3))
    crossed = np.sort(np.concatenate([np.flatnonzero(rising > 0), np.flatnonzero(falling < 0)]))
    assert np.all((ts[crossed] <= times + 1e-3) & (times - 1e-3 <= ts[crossed + 1]))
    # Neuron by neuron: the norm of all weights, and a KKT residual or that norm, whichever comes first.
    neurons, begin = gf.NeuronPolarFlow(problem), gf.Polar.of(gf.Polar(model, -100.0).ordinary(), neurons=True)
    norm = gf.solve(neurons, begin, [100.0], until=gf.Until(LogNorm(whole=True), above=-3.0), save_params=False)
    same = gf.solve(flow, gf.Polar(model, -100.0), [100.0], until=gf.Until(LogNorm(), above=-3.0), save_params=False)
    assert float(norm.t_final) == pytest.approx(float(same.t_final), rel=1e-5)
    aligned = gf.Until(Aligned(problem, tolerance=1e-2, norm=1e-3), above=0.0)
    early = gf.solve(neurons, begin, [100.0], until=aligned, save_params=False)
    assert float(early.t_final) < 0.5 * float(norm.t_final)
    assert float(gf.observables.KKTResidual(problem)(early.final)) == pytest.approx(1e-2, rel=1e-6)


def test_scale_of_a_rate_must_be_positive():
    with pytest.raises(ValueError, match="`scale` must be positive"):
        LossRate(lambda w: w, 0.0)
