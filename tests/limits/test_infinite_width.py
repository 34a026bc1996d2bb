"""Width infinity by quadrature: convergence of the rules, estimates of the error, padding, and what is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runge_kutta import advanced

import gradflow as gf
from gradflow.models.nodes import Gaussian, GaussLegendre, MonteCarlo, Sobol, Uniform, default_rule

RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, (6, 2))
Y = np.sin(2 * X[:, 0]) - X[:, 1] ** 2
PROBLEM = gf.EmpiricalRisk(X, Y, gf.losses.square)
START = gf.models.MeanFieldStart(2, first=Uniform(-1, 1), middle=[Uniform(0, 2)], output=Uniform(-1, 1))
TS = [2.0, 5.0]


def stacked(nodes):
    return jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *nodes)


@eqx.filter_jit
@eqx.filter_vmap
def predictions(nodes):
    """Of many sets of nodes at once, padded to one shape."""
    return advanced(PROBLEM, nodes, TS, 40)


@pytest.fixture(scope="module")
def legendre():
    """Errors of grids of 3 to 10 nodes in each dimension, against 16, and the reference."""
    sizes = (3, 4, 6, 8, 10, 16)
    computed = np.asarray(predictions(stacked([START.nodes(GaussLegendre(n)).padded((256, 16)) for n in sizes])))
    return sizes[:-1], np.max(np.abs(computed[:-1] - computed[-1:]), axis=(1, 2)), computed[-1]


def test_gauss_legendre_falls_geometrically(legendre):
    """By at least a factor of 2.5 for each node more in a dimension, down to 2e-6."""
    sizes, errors, _ = legendre
    rates = np.diff(np.log(errors)) / np.diff(sizes)
    assert np.all(rates < -np.log(2.5))
    assert errors[-1] < 3e-6


@pytest.mark.slow
def test_sobol_and_monte_carlo(legendre):
    """Root mean square over 32 replicates, of the largest error over inputs and times; 32 to 512 nodes."""
    sizes, replicates, slopes = (32, 128, 512), 32, {}
    for rule in (Sobol, MonteCarlo):
        seeds = [(n, 1000 * n + r) for n in sizes for r in range(replicates)]
        nodes = [START.nodes((rule(n, seed), GaussLegendre(6))).padded((512, 16)) for n, seed in seeds]
        errors = np.max(np.abs(np.asarray(predictions(stacked(nodes))) - legendre[2]), axis=(1, 2)).reshape(
            len(sizes), -1
        )
        slopes[rule] = np.polyfit(np.log(sizes), np.log(np.sqrt(np.mean(errors**2, axis=1))), 1)[0]
    assert slopes[Sobol] <= -1.1
    assert abs(slopes[MonteCarlo] + 0.5) <= 0.1


def problems():
    """Ten of them: other data, laws and horizons, of equal shapes."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        x = rng.uniform(-1, 1, (6, 2))
        y = rng.uniform(0.5, 2) * np.sin(rng.uniform(1, 3) * x[:, 0] + x[:, 1])
        width, mean = rng.uniform(0.5, 1.5), rng.uniform(0, 2)
        laws = {"first": Uniform(-width, width), "middle": [Uniform(mean - 1, mean + 1)], "output": Uniform(-1, 1)}
        start = gf.models.MeanFieldStart(2, **laws)
        yield gf.EmpiricalRisk(x, y, gf.losses.square), start, [rng.uniform(1, 3), rng.uniform(4, 8)]


@pytest.mark.slow
def test_estimates_bound_the_errors_of_grids():
    """At least nine times in ten, for predictions and risks; and they are no more than the accuracy asked for."""
    bounded = {"predictions": 0, "risk": 0}
    for problem, start, ts in problems():
        computed = gf.infinite_width(problem, start, ts, accuracy=1e-5, rule=GaussLegendre(8))
        exact = gf.infinite_width(problem, start, ts, accuracy=1e-8, rule=GaussLegendre(18))
        assert float(computed.errors["predictions"]) <= 1e-5
        for name in bounded:
            error = float(jnp.max(jnp.abs(computed.observed[name] - exact.observed[name])))
            bounded[name] += error <= float(computed.errors[name])
    assert min(bounded.values()) >= 9


@pytest.mark.slow
def test_estimates_bound_the_errors_of_sobol_points():
    """The interval for the worst of twelve predictions holds for all of them, in nine of ten problems."""
    bounded = 0
    options = {"solver": gf.solvers.Tsit5(), "replicates": 8}
    for problem, start, ts in problems():
        rules = (Sobol(64), GaussLegendre(8))
        computed = gf.infinite_width(problem, start, ts, accuracy=3e-2, rule=rules, **options)
        exact = gf.infinite_width(problem, start, ts, accuracy=1e-6, rule=GaussLegendre(14))
        error = float(jnp.max(jnp.abs(computed.observed["predictions"] - exact.observed["predictions"])))
        bounded += error <= float(computed.errors["predictions"])
    assert bounded >= 9


@pytest.mark.slow
def test_two_grids_tell_the_error(legendre):
    sol = gf.infinite_width(PROBLEM, START, TS, accuracy=1e-4, rule=GaussLegendre(8))
    error = float(np.max(np.abs(np.asarray(sol.observed["predictions"]) - legendre[2])))
    assert error <= float(sol.errors["predictions"]) <= 1e-4
    assert sol.title == "MeanFieldFlow at width infinity, 144 x 12 nodes"
    assert "errors   predictions" in str(sol)
    assert "(estimates, the largest over the run)" in str(sol)
    np.testing.assert_allclose(sol.observed["risk"][0], np.mean((Y - sol.observed["predictions"][0]) ** 2) / 2)


@pytest.mark.slow
def test_refines_until_it_is_accurate(legendre):
    sol = gf.infinite_width(PROBLEM, START, TS, accuracy=1e-5, rule=GaussLegendre(6))
    error = float(np.max(np.abs(np.asarray(sol.observed["predictions"]) - legendre[2])))
    assert error <= float(sol.errors["predictions"]) <= 1e-5
    assert sol.title == "MeanFieldFlow at width infinity, 169 x 13 nodes"


@pytest.mark.slow
def test_says_when_the_accuracy_is_out_of_reach():
    """What was reached stands in the solution; a Gaussian law in four dimensions gets Sobol points."""
    x = np.random.default_rng(1).uniform(-1, 1, (6, 4))
    start = gf.models.MeanFieldStart(4, first=Gaussian(), middle=[Uniform(0, 2)], output=Uniform(-1, 1))
    assert [type(rule).__name__ for rule in start.rules()] == ["Sobol", "GaussLegendre"]
    problem = gf.EmpiricalRisk(x, Y, gf.losses.square)
    options = {"accuracy": 1e-9, "rule": (Sobol(16384), GaussLegendre(20)), "replicates": 2}
    law, out = "laws of bounded support", "accuracy = 1e-09 is out of reach of 1,000,000 weights"
    with pytest.warns(gf.TheoryWarning, match=law), pytest.warns(gf.PrecisionWarning, match=out):
        sol = gf.infinite_width(problem, start, [1.0], **options)
    assert 1e-9 < float(sol.errors["predictions"]) < 1e-2


def test_default_rules_by_law_and_dimension():
    two, four = default_rule([Uniform(-1, 1)] * 2), default_rule([Uniform(-1, 1)] * 4)
    assert (type(two), two.n, type(four)) == (GaussLegendre, 12, Sobol)
    assert default_rule([Gaussian()] * 3).n == 16


def test_grids_too_large_become_sobol_points():
    with pytest.warns(UserWarning, match=r"has 2.0e\+06 nodes: taking Sobol\(4096\)"):
        nodes, weights = GaussLegendre(5)([Uniform(-1, 1)] * 9)
    assert nodes.shape == (4096, 9)
    assert weights.sum() == pytest.approx(1)


# Padding and sweeps


def build(width, seed):
    """Sigmoid, which is not zero at zero."""
    laws = {"first": Uniform(-1, 1), "middle": [Uniform(0, 2)], "output": Uniform(-1, 1)}
    start = gf.models.MeanFieldStart(2, **laws, activation=jax.nn.sigmoid)
    net, weights = start.at(width, jax.random.key(int(seed)), (GaussLegendre(3), GaussLegendre(13)))
    return gf.MeanFieldFlow(PROBLEM, weights), net


@pytest.mark.slow
def test_infinity_is_a_width_like_others():
    """9 x 13 nodes of the limit and 12 x 12 of a network in one program, padded, the steps of each as if alone."""
    options = {"solver": gf.solvers.Tsit5(), "observe": lambda flow: {"g": flow.predictions, "risk": flow.risk}}
    axes = {"width": [12.0, np.inf], "seed": [3]}
    ds = gf.sweep(build, axes, TS, pad=True, progress=False, **options)
    for i, width in enumerate(axes["width"]):
        flow, net = build(width, 3)
        sol = gf.solve(flow, net, TS, observe=options["observe"](flow), solver=options["solver"])
        assert int(ds.steps[i, 0]) == int(sol.stats["steps"])
        np.testing.assert_allclose(ds.g[i, 0], sol.observed["g"], rtol=1e-12, atol=1e-15)
        assert float(ds.drift_energy[i, 0]) == pytest.approx(float(sol.drift["energy"]), abs=1e-12)


def test_nodes_of_weight_zero_are_inert():
    """Padding with copies of weight zero changes the field of the others by rounding at most."""
    flow, net = build(np.inf, 0)
    wide = gf.models.MeanFieldNodes(net, flow.weights).padded((16, 16))
    velocity = eqx.filter_jit(lambda nodes: nodes.net.velocity(PROBLEM.x, nodes.weights, PROBLEM.residuals))
    both = [velocity(nodes) for nodes in (gf.models.MeanFieldNodes(net, flow.weights), wide)]
    for a, b in zip((*both[0].layers, both[0].output), (*both[1].layers, both[1].output), strict=True):
        unpadded = b[tuple(slice(size) for size in a.shape)]
        np.testing.assert_allclose(unpadded, a, rtol=1e-13, atol=1e-17)
    with pytest.raises(ValueError, match=r"`widths` must be at least \(9, 13\)"):
        gf.models.MeanFieldNodes(net, flow.weights).padded((8, 16))
