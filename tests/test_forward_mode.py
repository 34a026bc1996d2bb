"""Forward mode through every method, against closed forms and central differences."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf

STABILISED = (gf.solvers.RKC2, gf.solvers.ROCK2, gf.solvers.Hybrid)
METHODS = (*STABILISED, gf.solvers.NDF, gf.solvers.Automatic, gf.solvers.Tsit5, lambda: None)

X = jax.random.normal(jax.random.key(0), (12, 3))
Y = jnp.sin(X[:, 0])
START = 0.5 * jax.random.normal(jax.random.key(1), (16,))


def predictions(activation, w):
    return activation(X @ w[:12].reshape(3, 4)) @ w[12:]


def end(solver, activation, w, y, factor):
    """The parameters at `t = 1.5`; fourth-order differences of it are good to seven digits."""
    flow = gf.GradientFlow(lambda w: 5 * factor * jnp.mean((predictions(activation, w) - y) ** 2))
    return gf.solve(flow, w, [1.5], solver=solver, rtol=1e-8).final


def central(fn):
    step = 1e-3
    return (8 * (fn(step) - fn(-step)) - (fn(2 * step) - fn(-2 * step))) / (12 * step)


@pytest.mark.parametrize("make", STABILISED)
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
    for move in moves:
        fn = jax.jit(move)
        expected, found = central(fn), jax.jvp(fn, (0.0,), (1.0,))[1]
        assert float(jnp.linalg.norm(found - expected)) <= 1e-4 * float(jnp.linalg.norm(expected))
