"""Alternating gradient flow where features have names: modular addition and linear attention, beside the flow itself.

Both models are sums of neurons of degree three. In that degree a neuron takes as long to turn as it takes to grow, so
that times predicted for random directions are right up to a factor; for neurons that start where they would turn to
they are exact as the start vanishes. Losses and the order of features are right for both.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.limits._alternating_flow import nearest_points

pytestmark = pytest.mark.slow

START = 1e-3
WAKING = {"seed_norm": 0.05, "tolerance": 1e-4, "solver": gf.solvers.Tsit5()}
"""In degree three a neuron of norm 1e-3 would take as long to grow as all others to converge."""


class Rows(eqx.Module):
    """A sum of neurons, one row each; `size` entries of it for each of the first two factors."""

    rows: jax.Array
    size: int = eqx.field(static=True)

    def neuron_weights(self):
        return self.rows

    def with_neuron_weights(self, rows):
        return eqx.tree_at(lambda m: m.rows, self, rows)

    def parts(self):
        return jnp.split(self.rows, [self.size, 2 * self.size], axis=1)


class QuadraticNet(Rows):
    """`f(a, b) = sum_j c_j (u_j . a + v_j . b)^2`."""

    def __call__(self, x):
        u, v, c = self.parts()
        return c.T @ (u @ x[0] + v @ x[1]) ** 2


class LinearAttention(Rows):
    """`f = sum_h c_h (k_h . s) (q_h . x)`, `s` the mean of `y_n x_n` over the context, `x` the query."""

    def __call__(self, x):
        k, q, c = self.parts()
        return jnp.sum(c[:, 0] * (k @ x[0]) * (q @ x[1]))


def turned(problem, model):
    """The same neurons, of the norm `START`, at the KKT points of their basins, and the values there."""
    ends, values = nearest_points(gf.NeuralCorrelation(problem, 3), model, model.rows)
    return model.with_neuron_weights(START * jnp.asarray(ends)), values


def jumps(problem, start, ts):
    sol = gf.solve(gf.NeuronPolarFlow(problem, 3), start, ts, rtol=1e-6, max_steps=10**6)
    assert sol.status == "ok"
    return gf.find_saddles(sol, problem)


def test_linear_attention_learns_principal_components_in_order():
    """In-context regression with `E[x x^T] = diag(l)`, `E[w w^T] = 1/3` and a long context, `s = diag(l) w`.

    `N = c k^T diag(l^2 / 3) q` has one maximum, `l_1^2 / (3 * 3^1.5)`, and saddles at the other components. The first
    head to wake, at `(1/|w_1| - 1) / (3 N_1)`, learns the first component, of loss `l_1 / 6`; then the others turn to
    the second, and so on: `t_{k+1} = t_k + (1/|w_{k+1}| - 1/|w_k|) / (3 N_{k+1})`.
    """
    spectrum = np.array([3.0, 2.5, 2.0])
    tasks, queries = np.eye(3), np.diag(np.sqrt(3 * spectrum))
    x = np.array([[spectrum * w, q] for w in tasks for q in queries])
    y = np.array([w @ q for w in tasks for q in queries])
    problem = gf.EmpiricalRisk(x, y, gf.losses.square)
    predicted = spectrum**2 / 3 / 3**1.5
    correlation = gf.NeuralCorrelation(problem, 3)
    points = gf.theory.kkt_points(correlation, LinearAttention(jnp.ones((1, 7)), 3), every=True)
    np.testing.assert_allclose(np.unique(points.values.round(9))[::-1], predicted, rtol=1e-7)
    assert {
        point_kind for value, point_kind in zip(points.values, points.kinds, strict=True) if value < 0.99 * predicted[0]
    } == {"saddle"}
    rows = np.random.default_rng(0).normal(size=(3, 7))
    norms = np.array([1e-2, 5e-3, 3e-3])
    model = LinearAttention(jnp.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True)), 3)
    computed = gf.alternating_flow(problem, model, np.log(norms), degree=3, **WAKING)
    times, losses = np.cumsum(np.diff(1 / norms, prepend=1.0) / (3 * predicted)), np.array([7.5, 4.5, 2, 0]) / 6
    np.testing.assert_allclose(computed.times[1:], times, rtol=1e-4)
    np.testing.assert_allclose(computed.losses, losses, atol=1e-4)
    np.testing.assert_allclose(computed.correlations, predicted, rtol=1e-6)
    assert computed.activated == (0, 1, 2)
    start = model.with_neuron_weights(model.rows * jnp.asarray(norms)[:, None])
    seen = jumps(problem, start, np.linspace(0, 5 * times[-1], 3001))
    np.testing.assert_allclose([s.loss for s in seen], losses, atol=1e-2)
    # Turning takes time: later than predicted, by a factor that does not vanish in this degree.
    late = np.array([s.entered for s in seen[1:]]) / times
    assert np.all((late > 1) & (late < 4))


def test_modular_addition_learns_frequencies_in_order():
    """`a + b mod 5`, every element the cyclic shift of one template without mean, as in Kunin et al. (2506.06489).

    In the discrete Fourier transform, `N = 2 p^2 sum_k Re(u_k v_k c_k^*) |x_k|^3` up to phases: maxima of one frequency
    each, `N_k = 4 p^2 |x_k|^3 / 6^1.5`, one family of phases each, and the loss `p^2 |x_k|^2` for neurons enough.
    Neurons start where they would turn to.
    """
    p, strengths = 5, np.array([1.0, 0.8])
    spectrum = np.zeros(p, complex)
    spectrum[1:3], spectrum[3:] = strengths, strengths[::-1]
    template = np.fft.ifft(spectrum, norm="ortho").real
    elements = np.stack([np.roll(template, a) for a in range(p)])
    x = np.array([[elements[a], elements[b]] for a in range(p) for b in range(p)])
    y = np.array([elements[(a + b) % p] for a in range(p) for b in range(p)])
    problem = gf.EmpiricalRisk(x, y, gf.losses.square, reduction="sum")
    predicted = 4 * p**2 * strengths**3 / 6**1.5
    correlation = gf.NeuralCorrelation(problem, 3)
    points = gf.theory.kkt_points(correlation, QuadraticNet(jnp.ones((1, 3 * p)), p), starts=32)
    np.testing.assert_allclose(np.unique(points.values.round(7)), predicted[::-1], rtol=1e-6)
    assert set(points.kinds) == {"degenerate"}
    # Half of the neurons start in the basin of each frequency, with any phases.
    rng, waves = np.random.default_rng(0), np.exp(2j * np.pi * np.outer([1, 2], np.arange(p)) / p)
    turns = np.exp(2j * np.pi * rng.random((2, 10, 3)))
    turns[..., 2] = turns[..., 0] * turns[..., 1]
    near = np.real(turns[..., None] * waves[:, None, None]).reshape(20, 3 * p)
    model = QuadraticNet(jnp.asarray(near + 0.1 * rng.normal(size=near.shape)), p)
    start, values = turned(problem, model)
    first = values > np.mean(predicted)
    assert min(first.sum(), (~first).sum()) >= 6
    times = (1 / START - 1) / (3 * predicted)
    losses = p**2 * np.append(np.cumsum(strengths[::-1] ** 2)[::-1], 0)
    seen = jumps(problem, start, np.linspace(0, 1.3 * times[-1], 1501))
    np.testing.assert_allclose([s.loss for s in seen], losses, atol=1e-3 * losses[0])
    assert seen[1].entered == pytest.approx(times[0], rel=2e-3)
    # The neurons of the first frequency rest at a saddle, with directions of their own to leave it by: they learn the
    # second one long before the neurons that are dormant there would wake, and alternating flow sees no stop.
    assert seen[1].index > 0
    assert seen[2].entered < 1.1 * times[0]
    computed = gf.alternating_flow(problem, start, np.log(START), degree=3, rounds=1, horizon=30.0, **WAKING)
    assert computed.times[1] == pytest.approx(times[0], rel=1e-4)
    assert computed.correlations[0] == pytest.approx(predicted[0], rel=1e-4)
    assert computed.losses[1] < 1e-4 * losses[0]
