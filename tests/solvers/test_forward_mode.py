"""Forward mode through every method, against closed forms and central differences."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf

STABILISED = (gf.solvers.RKC2, gf.solvers.ROCK2, gf.solvers.Hybrid)
METHODS = (*STABILISED, gf.solvers.NDF, gf.solvers.Automatic, gf.solvers.Tsit5, lambda: None)

NOISE = jax.random.normal(jax.random.key(0), (12, 3))
Y = jnp.sin(NOISE[:, 0])
# Two opposite clusters, on either of which every unit is active or far from it: no kink is crossed, where the
# derivative of the exact flow would jump, which no derivative of a step sees.
X = jnp.where(jnp.arange(12) % 2 == 0, 1.0, -1.0)[:, None] * (1 + 0.2 * NOISE)
SIGNS = jnp.tile(jnp.array([1.0, -1.0, 1.0, -1.0]), 4)
START = SIGNS * (0.5 + 0.1 * jax.random.normal(jax.random.key(1), (16,)))
LENGTH = 0.3


def predictions(activation, w):
    return activation(X @ w[:12].reshape(3, 4)) @ w[12:]


def end(solver, activation, w, y, factor):
    flow = gf.GradientFlow(lambda w: 5 * factor * jnp.mean((predictions(activation, w) - y) ** 2))
    return gf.solve(flow, w, [LENGTH], solver=solver, rtol=1e-8).final


def central(fn):
    step = 1e-3
    return (8 * (fn(step) - fn(-step)) - (fn(2 * step) - fn(-2 * step))) / (12 * step)


@pytest.mark.parametrize(
    "make", [pytest.param(s, marks=() if s is gf.solvers.Hybrid else pytest.mark.slow) for s in STABILISED]
)
def test_derivative_of_linear_decay(make):
    """`w(1) = w(0) exp(-c)`: both derivatives are known, and both modes of asking for them agree."""

    def final(w, c):
        flow = gf.GradientFlow(lambda w: 0.5 * c * jnp.sum(w**2))
        return gf.solve(flow, w, [1.0], solver=make(), rtol=1e-7).final[0]

    ones, zero = jnp.ones(1), jnp.zeros(1)
    by_start = jax.jvp(final, (ones, jnp.array(1.0)), (ones, jnp.array(0.0)))[1]
    by_constant = jax.jvp(final, (ones, jnp.array(1.0)), (zero, jnp.array(1.0)))[1]
    np.testing.assert_allclose(by_start, np.exp(-1), rtol=1e-4)
    np.testing.assert_allclose(by_constant, -np.exp(-1), rtol=1e-4)
    np.testing.assert_allclose(jax.jacfwd(final)(ones, jnp.array(1.0))[0], by_start, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("make", STABILISED)
def test_derivative_under_plain_diffrax(make):
    term = diffrax.ODETerm(lambda t, y, rate: -rate * y)

    def final(w, rate):
        control = diffrax.PIDController(1e-7, 1e-9)
        adjoint = diffrax.ForwardMode()
        run = diffrax.diffeqsolve(term, make(), 0.0, 1.0, 1e-2, w, rate, stepsize_controller=control, adjoint=adjoint)
        return run.ys[-1, 0]

    by_start, by_rate = jax.jacfwd(final, argnums=(0, 1))(jnp.ones(1), jnp.array(1.0))
    np.testing.assert_allclose(by_start[0], np.exp(-1), rtol=1e-4)
    np.testing.assert_allclose(by_rate, -np.exp(-1), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("make", STABILISED)
def test_slope_that_overflows_at_the_end(make):
    """Such a step is turned down, by an error that is not finite: the slope would be the first of the next step."""
    term = diffrax.ODETerm(lambda t, y, args: jnp.where(y >= 0.3 - 1e-12, jnp.inf, 1.0) * jnp.ones_like(y))
    solver = make(spectral_radius=lambda t, y, args: jnp.array(1.0))
    y = jnp.zeros(1)
    _, error, _, _, _ = solver.step(term, 0.0, 0.3, y, None, solver.init(term, 0.0, 0.3, y, None), made_jump=False)
    assert not bool(jnp.all(jnp.isfinite(error)))


@pytest.mark.slow
@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.relu])
@pytest.mark.parametrize("make", METHODS)
def test_derivative_of_a_network(make, activation):
    """With respect to start, labels and a constant of the flow, for smooth and ReLU networks."""
    dw, dy = jax.random.normal(jax.random.key(2), START.shape), jax.random.normal(jax.random.key(3), Y.shape)
    moves = (
        lambda e: end(make(), activation, START + e * dw, Y, 1.0),
        lambda e: end(make(), activation, START, Y + e * dy, 1.0),
        lambda e: end(make(), activation, START, Y, 1.0 + e),
    )
    first, last = (X @ w[:12].reshape(3, 4) for w in (START, end(gf.solvers.Tsit5(), activation, START, Y, 1.0)))
    assert bool(jnp.all(first * last > 0))
    assert float(jnp.min(jnp.minimum(jnp.abs(first), jnp.abs(last)))) > 0.1
    # The tolerance is one of the state, by the law of the method: the derivative by the constant is a hundredth of it.
    scale = float(jnp.linalg.norm(START))
    error_of_state = 1e-8 ** (2 / 3) * scale if make is gf.solvers.RKC2 else 1e-8 * scale
    for move in moves:
        fn = jax.jit(move)
        expected, computed = central(fn), jax.jvp(fn, (0.0,), (1.0,))[1]
        assert float(jnp.linalg.norm(computed - expected)) <= 1e-4 * float(jnp.linalg.norm(expected)) + error_of_state
