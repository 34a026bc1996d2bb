"""Derivatives of runs that cross kinks, against central differences of tight runs and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.problems._switching import Sides, switching
from gradflow.runs._setup import Setup

WIDTH, SAMPLES = 4, 8
TS = jnp.array([0.5, 1.0, 1.5, 2.0, 3.0])
SEED = 1  # seven pairs of sample and neuron change sides; in 0, 3 and 5, neurons slide


def draws(seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (SAMPLES, 3))
    y = jnp.sin(2 * x[:, 0]) + x[:, 1]
    w = 0.7 * jax.random.normal(keys[1], (4 * WIDTH,))
    return x, y, w, jax.random.normal(keys[2], w.shape), jax.random.normal(keys[3], y.shape)


def relu_net(w, x):
    return jax.nn.relu(x @ w[: 3 * WIDTH].reshape(3, WIDTH)) @ w[3 * WIDTH :]


def own_relu_net(w, x):
    return jnp.maximum(x @ w[: 3 * WIDTH].reshape(3, WIDTH), 0) @ w[3 * WIDTH :]


def leaky_net(w, x):
    z = x @ w[: 3 * WIDTH].reshape(3, WIDTH)
    return jnp.where(z > 0, z, 0.1 * z) @ w[3 * WIDTH :]


def absolute_net(w, x):
    return jnp.abs(x @ w[: 3 * WIDTH].reshape(3, WIDTH)) @ w[3 * WIDTH :]


def path(seed, predict=relu_net, flow=gf.GradientFlow, ts=TS, of=lambda sol: sol.params, **options):
    """A run as a function of one number, on which start, labels and a constant of the flow depend."""
    x, y, w, dw, dy = draws(seed)

    def run(e):
        risk = lambda w: 0.5 * (1 + 0.3 * e) * jnp.mean((predict(w, x) - y - e * dy) ** 2)  # noqa: E731
        return of(gf.solve(flow(risk), w + e * dw, ts, **options))

    return run


def gap(result, fn, step=1e-5):
    """The relative error of a derivative, by central differences."""
    fn = jax.jit(fn)
    expected = (np.asarray(fn(step)) - np.asarray(fn(-step))) / (2 * step)
    return float(np.linalg.norm(np.asarray(result) - expected) / np.linalg.norm(expected))


def derivative(fn):
    return jax.jit(lambda: jax.jvp(fn, (0.0,), (1.0,))[1])()


def tight(seed, **options):
    return path(seed, solver=gf.solvers.Dopri8(), rtol=1e-10, **options)


def sides(seed, predict=relu_net):
    """How many pairs of sample and neuron change sides in a run."""
    x, _, w, _, _ = draws(seed)
    ends = w, path(seed, predict, of=lambda sol: sol.final)(0.0)
    first, last = (x @ end[: 3 * WIDTH].reshape(3, WIDTH) > 0 for end in ends)
    return int(jnp.sum(first != last))


def climb(w, c, ts=(3.0,), **options):
    """`w' = 1` up to `c` and `2` beyond: `w(3) = c + 2 (3 - c + w(0))`."""
    flow = gf.GradientFlow(lambda w: -w - jax.nn.relu(w - c))
    return gf.solve(flow, w, jnp.stack([jnp.asarray(t) for t in ts]), solver=gf.solvers.Bosh3(), **options)


def test_jump_at_a_surface_in_closed_form():
    """By the start, by the place of the surface, and by the time of the end; steps alone give 1, 0 and 2."""
    end = lambda w, c, t: climb(w, c, [1.0, t]).params  # noqa: E731
    result = jax.jacfwd(end, argnums=(0, 1, 2))(jnp.array(0.5), jnp.array(2.0), jnp.array(3.0))
    np.testing.assert_allclose(jnp.stack(result, 1), [[1, 0, 0], [2, -1, 2]], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_neuron_that_dies_forgets_where_it_came_from():
    end = lambda w: gf.solve(gf.GradientFlow(lambda w: jnp.maximum(w, 0)), w, [0.5, 2.0]).params  # noqa: E731
    np.testing.assert_allclose(jax.jacfwd(end)(jnp.array(1.0)), [1, 0], atol=1e-6)


def finished(fn, *args):
    """Calls a function and waits for all that it says at run time."""
    jax.block_until_ready(fn(*args))
    jax.effects_barrier()


def test_a_surface_that_is_not_crossed_is_told_of_at_run_time():
    options = {"solver": gf.solvers.Bosh3(), "max_steps": 50, "throw": False}
    slide = jax.jit(lambda w: gf.solve(gf.GradientFlow(jnp.abs), w, [2.0], **options).final)
    assert np.isfinite(slide(1.0))  # without a derivative nothing is said, and warnings are errors here
    with pytest.warns(gf.DerivativeWarning, match=r"slides along kinks.*central differences.*Smoothed"):
        finished(jax.jvp, slide, (1.0,), (1.0,))


def test_kinks_that_are_not_followed_are_named_at_run_time():
    largest = gf.GradientFlow(lambda w: jnp.sum((jnp.sort(w)[-1:] - 2.0) ** 2))
    end = lambda w: gf.solve(largest, w, [0.1], solver=gf.solvers.Bosh3()).final  # noqa: E731
    with pytest.warns(gf.DerivativeWarning, match="not followed: sort"):
        finished(jax.jacfwd(end), jnp.array([0.5, 0.2]))


@pytest.mark.slow
def test_values_are_those_of_a_run_without_derivatives(monkeypatch):
    result = jax.jit(lambda w: climb(w, 2.0).final)(0.5), jax.jvp(lambda w: climb(w, 2.0).final, (0.5,), (1.0,))[0]
    monkeypatch.setattr(Setup, "under_trace", lambda setup: setup)
    assert result == (jax.jit(lambda w: climb(w, 2.0).final)(0.5),) * 2


def test_field_on_either_side_of_its_switches():
    """Of a maximum over three entries, within a loop: where all switches are held as they stand, nothing changes."""
    x, w = jax.random.normal(jax.random.key(0), (5, 3)), jax.random.normal(jax.random.key(1), (9,))

    def loss(w):
        scores = jax.lax.map(lambda row: jnp.max(row @ w.reshape(3, 3)), x)
        return jnp.sum(scores**2) + jnp.sum(jnp.where(w > 0, w, 0.1 * w))

    result = switching(lambda _, t, w, frozen: jax.grad(loss)(w), None, jnp.array(0.0), w, None)
    rate, values = result(jnp.array(0.0), w)
    held, up = jnp.ones(values.shape, bool), values > 0
    np.testing.assert_allclose(rate, jax.grad(loss)(w), rtol=1e-12)
    np.testing.assert_array_equal(result(jnp.array(0.0), w, Sides(held, up))[0], rate)
    # Held where they stand, they take the field along to another state, beyond its kinks.
    other = -w
    one_sided = result(jnp.array(0.0), other, Sides(held, up))[0]
    chosen = jnp.argmax(x @ w.reshape(3, 3), axis=1)
    linear = lambda v: jnp.sum(jnp.take_along_axis(x @ v.reshape(3, 3), chosen[:, None], 1) ** 2)  # noqa: E731
    expected = jax.grad(linear)(other) + jnp.where(w > 0, 1, 0.1)
    np.testing.assert_allclose(one_sided, expected, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 4, 9])
def test_derivative_across_kinks_by_default(seed):
    """At all save times, before, between and after the crossings; by steps alone it is 20 % off at seed 1."""
    assert sides(seed) >= 2
    assert gap(derivative(path(seed)), tight(seed)) < 3e-3


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["Tsit5", "Bosh3", "ROCK2", "RKC2", "NDF", "Automatic"])
def test_derivative_across_kinks_by_every_method(solver):
    last = {"of": lambda sol: sol.final, "ts": TS[-1:]}
    assert gap(derivative(path(4, solver=getattr(gf.solvers, solver)(), **last)), tight(4, **last)) < 3e-3


@pytest.mark.slow
@pytest.mark.parametrize("predict", [own_relu_net, leaky_net, absolute_net])
def test_derivative_across_kinks_of_other_networks(predict):
    assert sides(2, predict) >= 1
    assert gap(derivative(path(2, predict)), tight(2, predict=predict)) < 3e-3


@pytest.mark.slow
@pytest.mark.parametrize("solver", [None, gf.solvers.Nystrom()])
def test_derivative_of_a_heavy_ball_across_kinks(solver):
    options = {"flow": lambda risk: gf.HeavyBallFlow(risk, mu=0.5, s=1.0)}
    assert gap(derivative(path(SEED, solver=solver, **options)), tight(SEED, **options)) < 5e-3


@pytest.mark.slow
def test_derivative_of_a_continued_run_across_kinks():
    """A run in pieces, which end within steps across kinks, has the derivative of the whole."""
    x, y, w, dw, dy = draws(SEED)

    def pieces(e):
        risk = lambda w: 0.5 * (1 + 0.3 * e) * jnp.mean((relu_net(w, x) - y - e * dy) ** 2)  # noqa: E731
        sol = gf.solve(gf.GradientFlow(risk), w + e * dw, [0.3])
        for end in (0.55, 1.13, 2.0, 3.0):
            sol = gf.solve(gf.GradientFlow(risk), sol, [end])
        return sol.final

    assert gap(derivative(pieces), tight(SEED, of=lambda sol: sol.final)) < 3e-3
