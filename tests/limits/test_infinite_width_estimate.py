"""The estimate of `infinite_width` against explicit NumPy on Gauss grids of its own, integrated by DOP853."""

import itertools
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow.models.nodes import Discrete, Gaussian, GaussLegendre, Sobol, Uniform

T = 2.0
ACTIVATIONS = {
    "tanh": (jnp.tanh, np.tanh, lambda h, z: 1 - h**2),
    "relu": (lambda z: jnp.maximum(z, 0), lambda z: np.maximum(z, 0), lambda h, z: (z > 0).astype(float)),
}


def data(d, n=5):
    """Points of a Kronecker sequence, which takes no seed, and a smooth target."""
    roots = np.sqrt([2.0, 3.0, 5.0, 7.0, 11.0])[:d]
    x = 2 * np.mod(np.outer(np.arange(1, n + 1), roots), 1) - 1
    return x, np.sin(2 * x[:, 0]) + 0.5 * np.cos(x.sum(axis=1))


def axis(law, n):
    """Quadrature of one law: Legendre, Hermite, or its own values."""
    if isinstance(law, Discrete):
        return np.asarray(law.values), np.asarray(law.probabilities)
    if isinstance(law, Gaussian):
        z, w = np.polynomial.hermite_e.hermegauss(n)
        return law.location + law.std * z, w / w.sum()
    z, w = np.polynomial.legendre.leggauss(n)
    return law.low + (law.high - law.low) * (z + 1) / 2, w / 2


def grid(laws, n):
    parts = [axis(law, m) for law, m in zip(laws, n, strict=True)]
    nodes = np.array(list(itertools.product(*(z for z, _ in parts))))
    return nodes, np.prod(np.array(list(itertools.product(*(w for _, w in parts)))), axis=1)


def one_layer(x, y, laws, n, name, rtol):
    """Predictions at the end; the loss is the mean of half squares."""
    nodes, p = grid(laws, n)
    _, act, slope = ACTIVATIONS[name]

    def outputs(state):
        s = state.reshape(len(p), -1)
        z = s[:, :-1] @ x.T
        return s, z, act(z)

    def field(t, state):
        s, z, h = outputs(state)
        e = (y - (p * s[:, -1]) @ h) / len(y)
        return np.concatenate([s[:, -1:] * ((slope(h, z) * e) @ x), (h @ e)[:, None]], axis=1).ravel()

    end = solve_ivp(field, (0, T), nodes.ravel(), method="DOP853", rtol=rtol, atol=rtol / 10).y[:, -1]
    s, _, h = outputs(end)
    return (p * s[:, -1]) @ h


def two_layers(x, y, first, mean, output, n, m, rtol):
    """The same with two hidden layers of tanh, the entries between by their mean."""
    w, p = grid(first, n)
    c, q = grid([output], [m])
    k, d = w.shape

    def parts(state):
        a, remaining = state[: k * d].reshape(k, d), state[k * d :]
        u, v = remaining[: k * len(q)].reshape(k, len(q)), remaining[k * len(q) :]
        h = np.tanh(a @ x.T)
        return a, u, v, h, np.tanh((u * p[:, None]).T @ h)

    def field(t, state):
        _, u, v, h, top = parts(state)
        e = (y - (q * v) @ top) / len(y)
        back = v[:, None] * (1 - top**2) * e
        down = (u * q) @ back
        return np.concatenate([((down * (1 - h**2)) @ x).ravel(), (h @ back.T).ravel(), top @ e])

    begin = np.concatenate([w.ravel(), np.full(k * len(q), mean), c[:, 0]])
    end = solve_ivp(field, (0, T), begin, method="DOP853", rtol=rtol, atol=rtol / 10).y[:, -1]
    _, _, v, _, top = parts(end)
    return (q * v) @ top


def case(d, kind):
    """Start, reference and options of one problem. Dimension of the labels: `d + 1`."""
    x, y = data(d)
    fine = {1: 40, 2: 30, 3: 14, 4: 9}[d]
    first, output, n = [Uniform(-1, 1.5)] * d, Uniform(-1, 2), [fine] * d + [8 if d > 2 else 14]
    # Random points to the end would take a minute each.
    options = {"accuracy": 1e-9} | ({"max_weights": 20_000} if d > 2 else {})
    if kind == "smooth":
        options = {"accuracy": 1e-4}
    elif kind == "atoms":
        first, output, n = [Gaussian(0.2, 0.5)] * d, Discrete([-0.5, 1.0], [0.3, 0.7]), [min(fine + 4, 24)] * d + [0]
        options = {"accuracy": 1e-3}
    elif kind == "relu":
        # Kinks take fine grids.
        output, n, options = Uniform(-0.5, 1.0), [600 if d == 1 else 60] * d + [4], {"accuracy": 3e-3}
    name = "relu" if kind == "relu" else "tanh"
    start = gf.models.MeanFieldStart(d, first=first, output=output, activation=ACTIVATIONS[name][0])
    # Neurons that cross a kink make the field jump, where small steps are many; the accuracy asked for is 3e-3.
    rtol = 1e-5 if kind == "relu" else 1e-11 if d <= 2 else 1e-8
    return x, y, start, one_layer(x, y, [*first, output], n, name, rtol), options


def single_precision(d):
    x, y, start, want, _ = case(d, "tight")
    half = gf.models.MeanFieldStart(d, first=start.first, output=start.output, dtype=jnp.float32)
    return x, y, half, want, {"accuracy": 1e-7}


def deep(output, rule, accuracy, max_weights=1_000_000):
    """Two hidden layers: the rule of the first, and of the second."""
    x, y = data(2)
    first = [Uniform(-1, 1.5)] * 2
    start = gf.models.MeanFieldStart(2, first=first, middle=[Uniform(0, 2)], output=output)
    want = two_layers(x, y, first, 1.0, output, [20, 20], 40, 1e-9)
    return x, y, start, want, {"accuracy": accuracy, "rule": rule, "max_weights": max_weights}


PROBLEMS = {f"{name}, dimension {d + 1}": (case, d, name) for d in range(1, 5) for name in ("smooth", "tight", "atoms")}
PROBLEMS |= {f"ReLU, dimension {d + 1}": (case, d, "relu") for d in (1, 2)}
PROBLEMS |= {f"float32, dimension {d + 1}": (single_precision, d) for d in (1, 2)}
PROBLEMS |= {
    "two layers, grids": (deep, Uniform(-1, 1), (GaussLegendre(6), GaussLegendre(6)), 1e-4),
    "two layers, few weights": (deep, Uniform(-1, 1), (GaussLegendre(4), GaussLegendre(4)), 1e-8, 1000),
    "two layers, random points": (deep, Gaussian(0.5, 1.0), (Sobol(64), GaussLegendre(16)), 1e-2),
    # The error of the two nodes above is the same in all replicates.
    "two layers, random points and two nodes": (deep, Gaussian(1.0, 2.0), (Sobol(1024), GaussLegendre(2)), 0.1, 4000),
}


def told_and_true(x, y, start, want, options):
    problem = gf.EmpiricalRisk(x, y, gf.losses.square)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sol = gf.infinite_width(problem, start, [T], save_params=False, **options)
    assert sol.errors is not None
    reported = float(sol.errors["predictions"])
    message = [one for one in caught if one.category is gf.PrecisionWarning]
    # Met in silence, or a single warning and a status that says so.
    assert (sol.status, len(message)) == (("ok", 0) if reported <= options["accuracy"] else ("inaccurate", 1))
    assert len({str(one.message) for one in caught}) == len(caught)
    return reported, float(np.max(np.abs(np.asarray(sol.observed["predictions"], float)[-1] - want))), sol


@pytest.mark.slow
def test_a_grid_that_is_too_large_gets_replicates():
    """Twelve nodes in each of five dimensions: once the same 4,096 points at every refinement."""
    x, y, start, want, _ = case(4, "smooth")
    options = {"accuracy": 1e-5, "rule": GaussLegendre(12), "max_weights": 4096}
    reported, true, sol = told_and_true(x, y, start, want, options)
    assert sol.title.endswith("mean of 8")
    assert sol.status == "inaccurate"
    assert true <= 3 * reported


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_estimate_is_at_least_a_third_of_the_error(name):
    """Twenty problems, in and out of reach, with labels of dimension 2 to 5."""
    make, *arguments = PROBLEMS[name]
    reported, true, _ = told_and_true(*make(*arguments))
    assert true <= 3 * reported


def test_rules_know_what_fits():
    laws = [Uniform(-1, 1)] * 5
    assert [GaussLegendre(n).fits(laws) for n in (10, 11)] == [True, False]
    assert Sobol(2**18).fits(laws)
    assert GaussLegendre(12).coarsened().refined() == GaussLegendre(12)


def test_replicates_are_scrambled_independently():
    """Of 16 replicates, points with the same number are as far apart as independent ones."""
    points = np.stack([Sobol(256).replicate(r)([Uniform(0, 1)] * 2)[0] for r in range(16)])
    spread = np.mean(np.var(points, axis=0, ddof=1))
    assert abs(spread - 1 / 12) < 0.01
