"""Networks of degree three without biases: directions and blow-up constants, against closed forms and scipy."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import gradflow as gf
from gradflow.observables import LogNorm
from gradflow.theory._ascent import eigenvalues

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    return rng.normal(size=(6, 3)), rng.normal(size=6)


def blow_up(problem, model, rtol):
    """When `u' = grad N(u)` of degree three blows up from the direction of the model, and `N` at its last direction.

    DOP853 to a norm of 10^4; from there on along the ray, where `1 / |u|` falls at the rate `3 N`.
    """
    correlation = gf.NeuralCorrelation(problem, 3)
    flat, unflatten = jax.flatten_util.ravel_pytree(model)
    slope = jax.jit(jax.grad(lambda v: correlation(unflatten(v))))

    def large(_, v):
        return np.linalg.norm(v) - 1e4

    large.terminal = True
    start = np.asarray(flat / jnp.linalg.norm(flat))
    options = {"method": "DOP853", "rtol": rtol, "atol": 1e-3 * rtol, "events": large}
    run = scipy.integrate.solve_ivp(lambda _, v: np.asarray(slope(v)), (0, 1e3), start, **options)
    end = run.y[:, -1]
    size = np.linalg.norm(end)
    last = float(correlation(unflatten(end / size)))
    return run.t[-1] + 1 / (3 * last * size), last


@pytest.fixture(scope="module")
def linear(data):
    problem = gf.EmpiricalRisk(*data, gf.losses.square)
    model = gf.models.DeepLinear(3, 2, depth=3, key=jax.random.key(0))
    return problem, model, [gf.first_escape(problem, gf.Polar(model, log), degree=3) for log in (-50.0, -1000.0)]


def test_three_linear_layers_align_with_the_singular_vector(data, linear):
    """`N = W_3 W_2 W_1 b` is largest, `|b| / 3^1.5`, for layers of rank one and of the norm `1 / sqrt(3)` each."""
    x, y = data
    residual = x.T @ y / 6
    _, _, (_, computed) = linear
    assert float(computed.correlation) == pytest.approx(np.linalg.norm(residual) / 3**1.5, rel=1e-7)
    assert float(computed.slope) == pytest.approx(3**0.5 / np.linalg.norm(residual), rel=1e-7)
    layers = [np.asarray(w) for w in computed.state.direction.weights]
    np.testing.assert_allclose([np.linalg.norm(w) for w in layers], 3**-0.5, rtol=1e-5)
    for w in layers:
        assert np.sum(np.linalg.svd(w, compute_uv=False)[1:]) < 1e-4
    whole = computed.state.direction.end_to_end()[0]
    np.testing.assert_allclose(whole / np.linalg.norm(whole), residual / np.linalg.norm(residual), atol=1e-4)


def test_three_linear_layers_blow_up_at_a_constant_time(linear):
    """Over `1/delta` the escape time is the blow-up constant of the flow of `N`, for every `delta`."""
    problem, model, (high, low) = linear
    exact, last = blow_up(problem, model, 1e-10)
    assert float(low.time) == pytest.approx(exact, rel=1e-9)
    assert float(high.time) == pytest.approx(float(low.time), rel=1e-12)
    assert float(low.correlation) == pytest.approx(last, rel=1e-7)
    assert int(high.gradient_evaluations) == int(low.gradient_evaluations)
    assert float(low.time) == pytest.approx(float(low.slope + low.offset), rel=1e-12)
    # The flow itself, without the shortcut, in Sundman time from 1e-434 to a norm of 1e-3.
    until = gf.Until(LogNorm(), above=np.log(1e-3))
    sol = gf.solve(gf.PolarFlow(problem, 3, time="sundman"), gf.Polar(model, -1000.0), [1e6], until=until)
    assert float(sol.final.clock) == pytest.approx(exact, rel=1e-5)
    # A start on the ray takes what theory says.
    ray = gf.first_escape(problem, gf.Polar(low.state.direction, -5.0), degree=3, norm=0.9)
    along = gf.theory.escape(float(low.correlation), -5.0, degree=3)
    assert float(ray.time) * np.exp(5.0) == pytest.approx(along.time - along.slope / 0.9, rel=1e-4)
    assert float(ray.slope) == pytest.approx(along.slope, rel=1e-6)


def test_three_relu_layers_align_and_blow_up(data):
    """Rounded homogeneously, two hidden layers of ReLU come to rest at a KKT point that no direction leaves."""
    x, y = data
    problem = gf.EmpiricalRisk(x, y, gf.losses.square, gf.models.Smoothed(0.05))
    model = gf.models.MLP(3, 3, depth=2, use_bias=False, activation=jax.nn.relu, key=jax.random.key(1))
    escape = gf.first_escape(problem, gf.Polar(model, -1000.0), degree=3, tolerance=1e-6, rtol=1e-7)
    exact, last = blow_up(problem, model, 1e-8)
    assert float(escape.time) == pytest.approx(exact, rel=1e-6)
    assert float(escape.correlation) == pytest.approx(last, rel=1e-5)
    assert float(escape.residual) <= 1.0001e-6
    correlation = gf.NeuralCorrelation(problem, 3)
    unit, unflatten = jax.flatten_util.ravel_pytree(escape.state.direction)
    spectrum = jax.jit(lambda u: eigenvalues(lambda v: correlation(unflatten(v)), u))(unit)
    assert float(spectrum[-1]) <= 3 * float(escape.correlation) * (1 + 1e-4)
