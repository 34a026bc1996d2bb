"""Parts whose failure hides in an error tolerance: each test here falls where its part is switched off."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.runs._adaptive import begin
from gradflow.runs._arguments import Recorded
from gradflow.runs._attempt import attempt
from gradflow.runs._solve import Integration, prepare
from gradflow.solvers import _rkc2, _sk_rock

CIRCLE = gf.EmpiricalRisk(*gf.data.circle(8), gf.losses.square)


class NearStart:
    """A loss that looks at the width of a network, but only where the weights have left a ball around zero."""

    def __init__(self, radius):
        self.radius = radius

    def __call__(self, model):
        beyond = jax.nn.relu(jnp.sum(model.weight**2) - self.radius)
        return CIRCLE(model) + 1e-2 * model.weight.shape[0] * beyond**2


@pytest.mark.parametrize("radius", [1e-3, 1.0])
def test_what_looks_at_shapes_away_from_the_start_is_not_padded(radius):
    """At the start padding changes nothing; in the larger ball, nothing within many times the size of the start."""

    def build(width):
        model = gf.models.TwoLayer(2, width, activation=jnp.tanh, init_scale=1e-2, key=jax.random.key(0))
        return gf.GradientFlow(loss), model

    loss = NearStart(radius)

    assert float(jnp.sum(build(5)[1].weight ** 2)) < 1e-3
    with pytest.raises(ValueError, match="zeros added at width=5 change"):
        gf.sweep(build, {"width": [5, 7]}, [0.0, 30.0], solver=gf.solvers.Tsit5(), pad=True, progress=False)


def test_time_is_summed_with_its_rounding():
    """A slow mode tells how long a run in single precision has been: 28,521 steps of about 0.035, held short by a fast
    mode, where a step is 500 units of the last place of `t`. Measured: 5e-7; without compensation 3.3e-4."""
    with jax.enable_x64(False):
        curvature = jnp.asarray([100.0, 1e-3], jnp.float32)
        flow = gf.GradientFlow(lambda w: 0.5 * jnp.sum(curvature * w**2))
        sol = gf.solve(flow, jnp.ones(2, jnp.float32), [1000.0], solver=gf.solvers.Tsit5(), rtol=1e-3)
        assert sol.ts.dtype == jnp.float32
    assert float(sol.final[1]) == pytest.approx(np.exp(-1.0), rel=2e-5)


def test_damping_constants_are_the_published_ones():
    """Sommeijer, Shampine and Verwer (1998) for RKC2; Abdulle, Almuslimani and Vilmart (2018) for SK-ROCK."""
    assert pytest.approx(2 / 13, rel=1e-15) == _rkc2.DAMPING
    assert pytest.approx(0.05, rel=1e-15) == _sk_rock.DAMPING


@pytest.mark.parametrize("stages", [5, 20])
def test_damping_of_fast_modes_by_rkc2(stages):
    """Beyond its first oscillations the stability polynomial swings between 1/3 and 1: its amplitude in between is
    `a + b T_s`, with `|b| = T_s''(w0) / T_s'(w0)^2` and `a = 1 - |b| T_s(w0)`."""
    w0 = np.polynomial.chebyshev.Chebyshev.basis(stages)
    at = 1 + 2 / 13 / stages**2
    b = w0.deriv(2)(at) / w0.deriv(1)(at) ** 2
    a = 1 - b * w0(at)
    interval = (stages**2 - 1) * 2 / 3 * (1 - 2 / 15 * 2 / 13)
    z = np.linspace(0, interval, 2001)[200:]
    slope = w0.deriv(1)(at) / w0.deriv(2)(at)
    expected = a + b * w0(at - z * slope)
    _, mu, nu, m, g = (np.asarray(v) for v in _rkc2.coefficients(jnp.asarray(stages), 50, jnp.float64))
    before, now = np.ones_like(z), 1 - m[0] * z
    for j in range(1, stages):
        before, now = now, (1 - mu[j] - nu[j]) + mu[j] * now + nu[j] * before - m[j] * z * now - g[j] * z
    np.testing.assert_allclose(now, expected, atol=1e-10)
    assert np.abs(now).max() < 0.98  # damped: the undamped polynomial returns to one


def test_nystrom_forgets_high_frequencies_slowly():
    """The frequency of `w'' + 0.2 w' = -w^3` falls with the amplitude, and steps grow: 889 of them, none rejected;
    13,685 where the highest frequency is never forgotten. It pulsates, too: forgotten at once, 5 are rejected."""
    flow = gf.HeavyBallFlow(lambda w: jnp.sum(w**4) / 4, mu=0.01, s=1e-6, resolution="low")
    sol = gf.solve(flow, jnp.array([30.0]), [200.0], solver=gf.solvers.Nystrom(), rtol=1e-3)
    assert int(sol.stats["rejected"]) == 0
    assert int(sol.stats["accepted"]) < 1500


def test_ndf_holds_steps_to_the_instability_it_has_met():
    """`w' = w` where the error would allow any step. The first one is too long; the next follows from the curvature
    that it met, and no other is rejected: steps of 0.5 and then 0.7 of `alpha = 1.185`, of order one, over the
    curvature (Shampine and Reichelt 1997 for alpha; the shares keep `1 - h / alpha` positive)."""
    flow = gf.GradientFlow(lambda w: -0.5 * jnp.sum(jnp.array([1.0, 0.25]) * w**2))
    integration = Integration(gf.solvers.NDF(), rtol=1e-3, atol=1e30, max_steps=1000)
    setup = prepare(flow, jnp.ones(2), [40.0], Recorded(None, False, None), integration)
    carry, step, proposed = begin(setup), eqx.filter_jit(attempt), []
    for _ in range(12):
        carry = step(setup, carry, None)
        proposed.append(float(carry.dt))
    assert int(carry.steps - carry.accepted) == 1
    assert proposed[0] == pytest.approx(0.5 * 1.185, rel=0.01)
    np.testing.assert_allclose(proposed[1:], 0.7 * 1.185, rtol=0.01)
