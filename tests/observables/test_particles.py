"""One hidden layer as a distribution of particles: the radial reduction, histograms, distances."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import j0
from scipy.stats import chi, wasserstein_distance

import gradflow as gf
from gradflow.models.nodes import Discrete, Gaussian, GaussLegendre, Radius, Uniform

TIGHT = {"rtol": 1e-10, "solver": gf.solvers.Dopri8()}


def test_radial_activations_in_closed_form():
    """Means of the cosine over circle and sphere; a sign has no direction left."""
    z = jnp.linspace(-6, 6, 7)
    np.testing.assert_allclose(gf.models.RadialActivation(jnp.cos, 2)(z), j0(np.asarray(z)), rtol=0, atol=1e-13)
    np.testing.assert_allclose(gf.models.RadialActivation(jnp.cos, 3)(z), np.sinc(np.asarray(z) / np.pi), atol=1e-13)
    np.testing.assert_allclose(gf.models.RadialActivation(jnp.exp, 1)(z), np.cosh(z), rtol=1e-13)
    assert float(jnp.max(jnp.abs(gf.models.RadialActivation(jnp.tanh, 5)(z)))) < 1e-14


def radial(x_radii, x_mass, target, start):
    """The flow of shells: one input, the length."""
    problem = gf.PopulationRisk(x_radii, target(x_radii[:, 0]), x_mass, gf.losses.square)
    net, weights = start
    flow = gf.MeanFieldFlow(problem, weights)
    options = {"observe": {"g": flow.predictions, "risk": flow.risk}}
    return gf.solve(flow, net, [1.0, 4.0], **options, **TIGHT)


def bump(z):
    return jnp.exp(-(z**2) / 2)


def target(r):
    return np.exp(-(r**2) / 4)


@pytest.mark.slow
def test_particles_in_the_plane_are_those_of_the_radial_reduction():
    """Isotropic Gaussian data in two dimensions, weights on circles: positions, outputs, predictions, risk."""
    radii, mass = GaussLegendre(10)([Radius(2)])
    angles = 2 * np.pi * np.arange(40) / 40
    data = np.stack([np.outer(radii[:, 0], np.cos(angles)), np.outer(radii[:, 0], np.sin(angles))], axis=-1)
    x = data.reshape(-1, 2)
    problem = gf.PopulationRisk(x, target(np.linalg.norm(x, axis=1)), np.repeat(mass / 40, 40), gf.losses.square)
    laws = {"first": Uniform(0.5, 1.5), "output": Discrete([-0.5, 1.0])}
    start = gf.models.MeanFieldStart(1, **laws, activation=gf.models.RadialActivation(bump, 2, 64))
    shells = start.nodes(GaussLegendre(3))
    reduced = radial(radii, mass, target, shells)
    turned = 2 * np.pi * (np.arange(40) + 0.3) / 40
    r = np.asarray(shells.net.layers[0])
    around = np.stack([r * np.cos(turned), r * np.sin(turned)], axis=-1).reshape(-1, 2)
    net = gf.models.MeanFieldNet((jnp.asarray(around),), jnp.repeat(shells.net.output, 40), bump)
    flow = gf.MeanFieldFlow(problem, (jnp.repeat(shells.weights[0] / 40, 40),))
    observe = {"g": flow.predictions, "risk": flow.risk}
    full = gf.solve(flow, net, [1.0, 4.0], observe=observe, **TIGHT)
    np.testing.assert_allclose(full.observed["risk"], reduced.observed["risk"], rtol=0, atol=1e-8)
    g = full.observed["g"].reshape(2, 10, 40)
    np.testing.assert_allclose(g, np.repeat(reduced.observed["g"][:, :, None], 40, axis=2), rtol=0, atol=1e-7)
    lengths = np.linalg.norm(full.final.layers[0], axis=1).reshape(6, 40)
    np.testing.assert_allclose(lengths, np.repeat(reduced.final.layers[0], 40, axis=1), rtol=0, atol=1e-7)
    assert float(np.max(np.abs(np.asarray(reduced.final.layers[0]) - r))) > 0.05
    assert float(reduced.loss[1]) < 0.7 * float(reduced.loss[0])


@pytest.mark.slow
def test_particles_in_ten_dimensions_tend_to_the_radial_reduction():
    """Mean risks of 24 networks, each on 500 inputs of its own: above the limit by `1 / N`, without that at the limit.

    Networks deviate from the limit like `N^-1/2`, and their risks are higher by half the square of that.
    """
    dim, ts = 10, [1.0, 4.0]
    laws = {"first": Radius(dim, 0.3), "output": Discrete([1.0])}
    start = gf.models.MeanFieldStart(1, **laws, activation=gf.models.RadialActivation(bump, dim))
    radii, mass = GaussLegendre(24)([Radius(dim)])
    with pytest.warns(gf.TheoryWarning, match="bounded support"):
        shells = start.nodes(GaussLegendre(24))
    reduced = radial(radii, mass, lambda r: np.exp(-(r**2) / 20), shells)
    plain = gf.models.MeanFieldStart(dim, first=Gaussian(0, 0.3), output=Discrete([1.0]), activation=bump)

    @eqx.filter_jit
    @eqx.filter_vmap
    def risks(key, width):
        net, weights = plain.draw(width, key)
        x = jax.random.normal(jax.random.fold_in(key, 999), (500, dim))
        y = jnp.exp(-jnp.sum(x**2, axis=1) / 20)
        problem = gf.EmpiricalRisk(x, y, gf.losses.square)
        flow = gf.MeanFieldFlow(problem, weights)
        options = {"observe": {"risk": flow.risk}, "solver": gf.solvers.Heun(), "save_params": False, "throw": False}
        return gf.solve(flow, net, ts, rtol=1e-4, **options).observed["risk"]

    keys = jax.random.split(jax.random.key(0), 24)
    computed = np.stack([risks(keys, width) for width in (50, 200)])
    reported = gf.theory.extrapolate_width([50, 200], computed)
    assert np.all(np.abs(reported.limit - reduced.observed["risk"]) < 4 * reported.error)
    assert np.all(reported.error < 0.05 * reported.limit)


def test_law_of_radii():
    law = Radius(4, 0.5)
    x, w = law.legendre(40)
    exact = chi(4, scale=0.5)
    assert law.mean == pytest.approx(exact.mean())
    assert w @ x**3 == pytest.approx(exact.moment(3), rel=1e-8)
    np.testing.assert_allclose(law.quantile(np.array([0.1, 0.9])), exact.ppf([0.1, 0.9]), rtol=1e-10)
    assert float(jnp.mean(law.draw(jax.random.key(0), (20_000,)))) == pytest.approx(law.mean, rel=0.01)


def test_histograms_count_with_weights():
    net = gf.models.MeanFieldNet((jnp.array([[0.1], [0.4], [0.6], [2.0]]),), jnp.array([1.0, -1.0, 1.0, 3.0]))
    weights = (jnp.array([0.1, 0.2, 0.3, 0.4]),)
    problem = gf.EmpiricalRisk(np.ones((1, 1)), np.zeros(1), gf.losses.square)
    edges = [0.0, 0.5, 1.0, 3.0]
    observe = {"w": gf.observables.ParticleHistogram(edges)}
    observe["c"] = gf.observables.ParticleHistogram([-2.0, 0.0, 2.0], value=lambda net: net.output)
    flow = gf.MeanFieldFlow(problem, weights)
    sol = gf.solve(flow, net, [0.0, 0.1], observe=observe, solver=gf.solvers.Heun())
    np.testing.assert_allclose(sol.observed["w"][0], [0.3, 0.3, 0.4], rtol=1e-12)
    np.testing.assert_allclose(sol.observed["c"][0], [0.2, 0.4], rtol=1e-12)
    by_hand = np.histogram(np.abs(sol.params.layers[0][1, :, 0]), edges, weights=weights[0])[0]
    np.testing.assert_allclose(sol.observed["w"][1], by_hand, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_distances():
    """On a line against scipy; of a shifted cloud; between draws of one law, falling with their number."""
    rng = np.random.default_rng(0)
    x, p, y, q = rng.normal(size=5), rng.uniform(size=5), rng.normal(size=7), rng.uniform(size=7)
    computed = gf.observables.wasserstein(*map(jnp.asarray, (x, p, y, q)), order=1.0)
    assert float(computed) == pytest.approx(wasserstein_distance(x, y, p, q), rel=1e-12)
    start = gf.models.MeanFieldStart(2, first=Uniform(-1, 1), output=Uniform(-1, 1))
    a = start.draw(50, jax.random.key(0))
    shifted = a._replace(net=gf.models.MeanFieldNet((a.net.layers[0] + jnp.array([[0.3, 0.0]]),), a.net.output))
    # The mean of the square of an entry of a unit vector in three dimensions is a third.
    assert float(gf.observables.particle_distance(a, shifted, 500)) == pytest.approx(0.3 / 3**0.5, rel=0.06)
    limit = start.nodes(GaussLegendre(8))
    few, many = (float(gf.observables.particle_distance(start.draw(n, jax.random.key(1)), limit)) for n in (10, 1000))
    assert many < 0.4 * few
    with pytest.raises(ValueError, match="`a` must have one hidden layer"):
        gf.observables.particle_distance(a._replace(weights=a.weights * 2), a)
    with pytest.raises(ValueError, match=r"`b` must be gradflow\.models\.MeanFieldNodes, but is of type MeanFieldNet"):
        gf.observables.particle_distance(a, a.net)
    with pytest.raises(ValueError, match="`layer` must be below 1, the number of hidden layers, but is 1"):
        gf.observables.ParticleHistogram([0.0, 1.0], layer=1)(a.net)
    with pytest.raises(ValueError, match=r"`order` must be at least 1, but is 0\.5"):
        gf.observables.wasserstein(jnp.ones(2), jnp.ones(2), jnp.ones(2), jnp.ones(2), 0.5)
    with pytest.raises(ValueError, match="`edges` must increase"):
        gf.observables.ParticleHistogram([1.0, 0.0])
