"""Momentum beyond its stability threshold: centre and alternating amplitude against the methods themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf


def threshold(momentum, nesterov):
    """`eta lambda` at which the multiplier of the amplitude is one."""
    return 2 * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)


def exact_growth(eta_lambda, momentum, nesterov):
    """Logarithm of the multiplier per step of the alternating mode of the method on a quadratic."""
    factor = 1 - eta_lambda
    if nesterov:
        roots = np.roots([1, -(1 + momentum) * factor, momentum * factor])
    else:
        roots = np.roots([1, -(1 + momentum - eta_lambda), momentum])
    return np.log(np.max(-roots.real))


def quadratic(w):
    return 0.5 * jnp.sum(jnp.array([1.0, 1e-3]) * w**2)


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [False, True], ids=["heavy ball", "nesterov"])
def test_growth_of_the_amplitude_near_the_threshold(nesterov):
    # The flow keeps all terms of the method but those of order three in the rate.
    momentum = 0.5
    errors = []
    for excess in (0.08, 0.04, 0.02, 0.01):
        eta_lambda = threshold(momentum, nesterov) + excess
        flow = gf.MomentumDescentAscentFlow(quadratic, eta_lambda, momentum, nesterov, warm_up=40)
        unit = eta_lambda / (1 - momentum)
        sol = gf.solve(flow, jnp.ones(2), unit * np.array([80.0, 120.0]), rtol=1e-9, observe=observe_log_size())
        growth = float(np.diff(sol.observed["log_size"])[0] / 40)
        errors.append(abs(growth - exact_growth(eta_lambda, momentum, nesterov)))
    slopes = np.diff(np.log(errors)) / np.log(0.5)
    assert np.all(np.abs(slopes[-2:] - 3) < 0.3), (errors, slopes)


def observe_log_size():
    return {"log_size": gf.observables.State(lambda state: state.log_size)}


VALLEY = 2.5e-3


def valley(w):
    return (w[1] + w[0]) * w[0] ** 2 / 2 - VALLEY * (w[0] + w[1])


@pytest.mark.slow
def test_a_burst_of_the_heavy_ball_in_a_valley():
    """The sharpness grows along the valley, the heavy ball bursts beyond `2 (1 + beta)/eta` and is thrown back."""
    momentum, start = 0.5, jnp.array([0.1, 6.3])
    learning_rate = threshold(momentum, False) / 6.6666
    iterates = gf.iterate(gf.HeavyBall(valley, learning_rate, momentum=momentum), start, 500, save_every=1).params
    midpoints = np.asarray(iterates[:-2] + 2 * iterates[1:-1] + iterates[2:]) / 4  # of the iterates 1, 2, ...
    unit, steps = learning_rate / (1 - momentum), np.array([60, 200, 371, 450])
    # The iterates alternate in an entry whose rounding is far below that of the whole.
    flow = gf.MomentumDescentAscentFlow(valley, learning_rate, momentum, rounding=0)
    sol = gf.solve(flow, start, unit * steps, rtol=1e-7)
    without = gf.solve(gf.MomentumFlow(valley, learning_rate, momentum), start, unit * steps)
    before, thrown_back = slice(0, 3), midpoints[449, 1] - midpoints[370, 1]
    assert np.max(np.abs(sol.params[before] - midpoints[steps[before] - 1])) < 1e-5  # 1.1e-6 measured
    assert thrown_back < -1
    jump = float(sol.params[3, 1] - sol.params[2, 1])
    assert abs(jump / thrown_back - 1) < 0.1  # 0.06 measured; its size depends on the seed
    assert float(without.params[3, 1] - without.params[2, 1]) > 0


def test_arguments():
    for keywords, name in (
        ({"learning_rate": -1.0, "momentum": 0.5}, "learning_rate"),
        ({"learning_rate": 0.1, "momentum": 1.0}, "momentum"),
        ({"learning_rate": 0.1, "momentum": 0.5, "warm_up": 4}, "warm_up"),
    ):
        with pytest.raises(ValueError, match=f"Argument `{name}`"):
            gf.MomentumDescentAscentFlow(valley, **keywords)
    with pytest.raises(ValueError, match="Argument `warm_up`"):
        jax.jit(lambda beta: gf.MomentumDescentAscentFlow(valley, 0.1, beta).t0)(0.5)
    with pytest.raises(ValueError, match="Argument `ts`"):
        gf.solve(gf.MomentumDescentAscentFlow(valley, 0.1, 0.5), jnp.ones(2), [1.0])


@pytest.mark.slow
def test_learning_rates_at_once():
    def end(learning_rate):
        flow = gf.MomentumDescentAscentFlow(lambda w: jnp.sum((w**2 - 1) ** 2) / 4, learning_rate, 0.5, warm_up=10)
        return gf.solve(flow, jnp.array([0.2, 1.7]), [10.0]).final

    rates = jnp.array([0.2, 0.3])
    assert np.allclose(jax.vmap(end)(rates), jnp.stack([end(rate) for rate in rates]), rtol=1e-12)


def test_amplitudes_that_no_float_holds():
    # Below the threshold the amplitude decays like beta^(k/2), to 1e-700 after 4,650 steps, and keeps its digits.
    flow = gf.MomentumDescentAscentFlow(lambda w: 0.5 * jnp.sum(jnp.array([1.0, 2.0]) * w**2), 1.0, 0.5, rounding=0)
    unit = 2.0
    sol = gf.solve(flow, jnp.ones(2), unit * np.array([1000.0, 4650.0]), observe=observe_log_size())
    decay = float(np.diff(sol.observed["log_size"])[0]) / 3650
    assert abs(decay + 1 / 3) < 1e-3  # 1 / (2 K), K = 3/2
