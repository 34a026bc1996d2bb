"""All KKT points of a correlation function, with their kinds, and residuals at kinks of ReLU."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import gradflow as gf
from gradflow.observables import KKTResidual
from gradflow.problems._clarke import nearest_element
from gradflow.theory._kkt import Table, _distinct

SUM = {"reduction": "sum"}


def identity(z):
    return z


def quadratic_form(w, x):
    return (x @ w) ** 2


@pytest.mark.slow
def test_every_eigenvector_of_a_quadratic_form_with_its_kind():
    """`N = w^T M w`: the KKT points are the eigenvectors, a maximum, saddles, and a minimum."""
    rng = np.random.default_rng(0)
    half = rng.normal(size=(4, 4))
    m, x = half @ half.T, rng.normal(size=(10, 4))
    outer = np.stack([np.outer(row, row).ravel() for row in x], axis=1)
    z = np.linalg.lstsq(outer, m.ravel(), rcond=None)[0]
    problem = gf.EmpiricalRisk(x, z, gf.losses.square, quadratic_form, **SUM)
    points = gf.theory.kkt_points(gf.NeuralCorrelation(problem), jnp.ones(4), every=True)
    values, vectors = np.linalg.eigh(m)
    np.testing.assert_allclose(points.values, np.repeat(values[::-1], 2), rtol=1e-9)
    assert points.kinds == ("maximum",) * 2 + ("saddle",) * 4 + ("minimum",) * 2
    overlaps = np.abs(np.einsum("kd,dk->k", points.directions, np.repeat(vectors[:, ::-1], 2, axis=1)))
    np.testing.assert_allclose(overlaps, 1, rtol=1e-12)
    # The Hessian is 2 M; on the tangent space its largest eigenvalue is that of the others.
    np.testing.assert_allclose(points.rates[:2], 2 * (values[-1] - values[-2]), rtol=1e-9)
    assert np.all(points.rates[2:] < 0)
    few = gf.theory.kkt_points(gf.NeuralCorrelation(problem), jnp.ones(4))
    assert few.kinds == ("maximum",) * 2


def test_poor_copies_of_a_point_are_not_points_of_their_own():
    """`N = w^T diag(3, 2, 1) w`: rows near its saddle `e_2`, which may lie higher, and one that belongs to no point."""
    m = np.diag([3.0, 2.0, 1.0])
    rows = np.array([[0.001, 1, 0], [0, 1, 0], [0, 1, 0.02], [1, 0, 0], [0.6, 0.8, 0.5]])
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    values = np.einsum("ki,ij,kj->k", units, m, units)
    residuals = np.linalg.norm(2 * units @ m - 2 * values[:, None] * units, axis=1)
    spectra = np.array([[6.0, 2.0], [6.0, 2.0], [6.0, 2.0], [4.0, 2.0], [5.0, 2.0]])
    table = Table(units, values, residuals, spectra, np.zeros(5, int), np.zeros(5, int))
    assert values[0] > values[1]
    chosen, hits = _distinct(table, residuals < 1e-9, 2, 1e-4)
    assert chosen.tolist() == [3, 4, 1]
    assert hits.tolist() == [1, 1, 3]


@pytest.mark.slow
def test_every_singular_vector_of_a_linear_neuron():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(7, 3))
    problem = gf.EmpiricalRisk(x, y, gf.losses.square, **SUM)
    neuron = gf.models.TwoLayer(3, 1, 3, activation=identity, key=jax.random.key(0))
    points = gf.theory.kkt_points(gf.NeuralCorrelation(problem), neuron, every=True)
    s = np.linalg.svd(y.T @ x, compute_uv=False)
    np.testing.assert_allclose(points.values, np.repeat(s / 2, 2), rtol=1e-9)
    assert points.kinds == ("maximum",) * 2 + ("saddle",) * 4


def in_the_plane(x, z):
    """Values and kinds of all critical points of `a sum_i z_i relu(w . x_i)` with `N > 0`, by hand.

    Inside a cone `w` is parallel to the sum `D` over its active inputs. On the kink of `x_i` some share of `z_i x_i`
    has to cancel what `D` has along `x_i`; `N` then rises from it to both sides if `a z_i > 0`, and falls otherwise.
    """
    angles, computed = np.arctan2(x[:, 1], x[:, 0]), []
    kinks = [(i, angles[i] + side * np.pi / 2) for i in range(len(x)) for side in (1, -1)]
    edges = np.sort(np.array([angle for _, angle in kinks]) % (2 * np.pi))
    for low, high in itertools.pairwise([*edges, edges[0] + 2 * np.pi]):
        middle = np.array([np.cos((low + high) / 2), np.sin((low + high) / 2)])
        total = (x @ middle > 0) * z @ x
        for side in (1, -1):
            angle = (np.arctan2(side * total[1], side * total[0]) - low) % (2 * np.pi)
            if total.any() and angle < high - low:
                computed.append((np.linalg.norm(total) / 2, "maximum"))
    for i, angle in kinks:
        w = np.array([np.cos(angle), np.sin(angle)])
        active = x @ w > 0
        active[i] = False
        total = active * z @ x
        weight = -(total @ x[i]) / (z[i] * (x[i] @ x[i]))
        if 0 < weight < 1 and total.any():
            computed.append((abs(total @ w) / 2, "saddle" if (total @ w) * z[i] > 0 else "maximum"))
    return sorted(computed, reverse=True)


@pytest.mark.slow
def test_every_point_of_a_relu_neuron_in_the_plane():
    """Against enumeration by hand, kinks included: nothing is made up, and what 256 starts miss are weak features."""
    key, expected, missed = jax.random.key(0), 0, 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x, z = rng.normal(size=(6, 2)), rng.normal(size=6)
        correlation = gf.NeuralCorrelation(gf.EmpiricalRisk(x, z, gf.losses.square, **SUM))
        neuron = gf.models.TwoLayer(2, 1, key=key)
        points = gf.theory.kkt_points(correlation, neuron, every=True, starts=256)
        by_hand = in_the_plane(x, z)
        assert points.settled.all()
        for value, point_kind, kinks in zip(points.values, points.kinds, points.kinks, strict=True):
            match = [k for v, k in by_hand if abs(v - value) < 1e-7]
            assert point_kind in match
            assert kinks == 1 or point_kind == "maximum"
        assert points.values[0] == pytest.approx(by_hand[0][0], rel=1e-9)
        expected += len(by_hand)
        missed += sum(not np.any(np.abs(points.values - value) < 1e-7) for value, _ in by_hand)
    assert expected > 20
    assert missed <= 0.05 * expected


@pytest.mark.slow
def test_residual_on_kinks_is_the_least_element_of_the_subdifferential():
    """Three neurons on kinks of several samples: against a bounded least-squares solver of scipy, neuron by neuron."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(7, 4)), rng.normal(size=(7, 2))
    problem = gf.EmpiricalRisk(x, y, gf.losses.square, **SUM)
    rows = rng.normal(size=(3, 6))
    for j in range(3):  # orthogonal to the inputs 0 ... j
        normal = x[: j + 1]
        rows[j, :4] -= np.linalg.pinv(normal) @ (normal @ rows[j, :4])
    rows /= np.linalg.norm(rows)
    model = gf.models.TwoLayer(4, 3, 2, key=jax.random.key(0)).with_neuron_weights(jnp.asarray(rows))
    correlation = gf.NeuralCorrelation(problem)
    computed = nearest_element(correlation, model, 1e-9)
    assert computed.on.sum() == 6
    total, value = 0.0, float(correlation(model))
    for j in range(3):
        w, a = rows[j, :4], rows[j, 4:]
        active = (x @ w > 0) & ~np.asarray(computed.on)[:, j]
        residual = y @ a
        left = 2 * value * w - (active * residual) @ x
        columns = (residual[:, None] * x)[: j + 1].T
        fit = scipy.optimize.lsq_linear(columns, left, (0, 1), tol=1e-14)
        total += np.sum(fit.fun**2) + np.sum(((active * (x @ w)) @ y - 2 * value * a) ** 2)
    assert float(computed.distance) == pytest.approx(np.sqrt(total), rel=1e-8)
    # A sample on the kink drives it either way where inputs and labels agree, and holds the neuron where they do not.
    on = np.asarray(computed.on)
    np.testing.assert_allclose(np.asarray(computed.jumps)[on], (y @ rows[:, 4:].T)[on], rtol=1e-12)


@pytest.mark.slow
def test_a_neuron_that_slides_to_a_kink_is_at_rest_there():
    """Inputs 60 degrees apart, labels 1 and -3: the maximum is at right angles to the second input.

    The plain residual stays at a tenth and more. That of Clarke falls to the angle over which the flow chatters, about
    0.003 at this tolerance, so kinks have to count from a little farther away.
    """
    x = np.array([[1.0, 0.0], [0.5, np.sqrt(3) / 2]])
    problem = gf.EmpiricalRisk(x, np.array([1.0, -3.0]), gf.losses.square, **SUM)
    neuron = gf.models.TwoLayer(2, 1, key=jax.random.key(0))
    start = neuron.with_neuron_weights(jnp.array([[1.0, -0.3, 0.8]]))
    observe = {"plain": KKTResidual(problem), "clarke": KKTResidual(problem, kink=1e-2)}
    sol = gf.solve(gf.PolarFlow(problem), gf.Polar(start, -300.0), [0.0, 10.0, 20.0], rtol=1e-4, observe=observe)
    assert np.all(np.asarray(sol.observed["plain"]) > 0.1)
    assert float(sol.observed["clarke"][0]) == pytest.approx(float(sol.observed["plain"][0]))
    assert np.asarray(sol.observed["clarke"])[1:].max() < 0.01
    aligned = gf.observables.Aligned(problem, tolerance=0.01, kink=1e-2)
    stopped = gf.solve(
        gf.PolarFlow(problem), gf.Polar(start, -300.0), [100.0], rtol=1e-4, until=gf.Until(aligned, above=0)
    )
    assert float(stopped.t_final) < 15
    points = gf.theory.kkt_points(gf.NeuralCorrelation(problem), neuron)
    # The larger one, of a negative output weight, sees both inputs.
    assert points.kinds == ("maximum", "maximum")
    assert points.kinks.tolist() == [0, 1]
    held = points.params(1)
    np.testing.assert_allclose(np.sqrt(2) * np.asarray(held.weight)[0], [np.sqrt(3) / 2, -0.5], atol=1e-9)
    assert points.residuals[1] < 1e-12


@pytest.mark.slow
def test_points_in_float32():
    x = np.array([[1.0, 0.0], [0.5, np.sqrt(3) / 2]], np.float32)
    problem = gf.EmpiricalRisk(x, np.array([1.0, -3.0], np.float32), gf.losses.square, **SUM)
    neuron = gf.models.TwoLayer(2, 1, dtype=jnp.float32, key=jax.random.key(0))
    points = gf.theory.kkt_points(gf.NeuralCorrelation(problem), neuron, every=True)
    assert points.params(0).weight.dtype == np.float32
    assert points.settled.all()
    # As exact as the data: the root of three quarters is rounded to float32.
    np.testing.assert_allclose(points.values, [np.sqrt(7) / 2, np.sqrt(3) / 4], rtol=1e-7)


def test_kink_must_be_positive():
    problem = gf.EmpiricalRisk(np.eye(2), np.ones(2), gf.losses.square)
    with pytest.raises(ValueError, match="`kink` must be positive"):
        KKTResidual(problem, kink=0.0)
