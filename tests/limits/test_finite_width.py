"""Networks of finite width beside their limit: SGD, rates of convergence, fluctuations, parametrisations."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runge_kutta import advanced

import gradflow as gf
from gradflow._tree import split
from gradflow.models.nodes import Gaussian, GaussLegendre, Uniform

RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, (6, 2))
Y = np.sin(2 * X[:, 0]) - X[:, 1] ** 2
PROBLEM = gf.EmpiricalRisk(X, Y, gf.losses.square)
LAWS = {"first": Uniform(-1, 1), "output": Uniform(0, 2)}
TWO = gf.models.MeanFieldStart(2, middle=[Uniform(0, 2)], **LAWS)
TS = [1.0, 3.0]


def networks(start, width, count):
    return jax.vmap(lambda key: start.draw(width, key))(jax.random.split(jax.random.key(width), count))


@eqx.filter_jit
@eqx.filter_vmap
def flows(nodes):
    """Predictions of many networks under gradient flow."""
    return advanced(PROBLEM, nodes, TS, 12)


def limit(start, ts=TS):
    return np.asarray(eqx.filter_jit(advanced)(PROBLEM, start.nodes(GaussLegendre(12)), ts, 40))


# SGD


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("depth", "batch_size"), [(2, 1), pytest.param(1, 3, marks=SLOW), pytest.param(4, 2, marks=SLOW)]
)
def test_sgd_is_an_euler_step_of_the_field(depth, batch_size):
    """The literal update by automatic gradients, against the drift on the same samples, to rounding."""
    start = gf.models.MeanFieldStart(2, middle=[Uniform(0, 2)] * (depth - 1), **LAWS)
    net, weights = start.draw([5, 3, 4, 2][:depth], jax.random.key(0))
    rule = gf.MeanFieldSGD(PROBLEM, weights, batch_size=batch_size, key=jax.random.key(1))
    trainable, frozen = split(net)
    k = jnp.asarray(7)
    after, loss = eqx.filter_jit(lambda rule, state: rule.step(k, state, frozen))(rule, trainable)
    chosen = rule.samples(k)
    batch = gf.EmpiricalRisk(PROBLEM.x[chosen], PROBLEM.y[chosen], gf.losses.square)
    rate = net.velocity(batch.x, weights, batch.residuals)
    assert float(rule.time(1)) == pytest.approx(1 / 5)
    for new, old, v in zip(*map(jax.tree_util.tree_leaves, (after, net, rate)), strict=True):
        np.testing.assert_allclose(new, old + v / 5, rtol=0, atol=5e-15)
    assert float(loss) == pytest.approx(float(gf.MeanFieldFlow(batch, weights).risk(net)))


def test_sgd_updates_of_the_source_by_hand():
    """`a_C = N2 / N1, a_W1 = 1, a_W2 = N2`, entry by entry."""
    net, weights = TWO.draw((4, 3), jax.random.key(0))
    rule = gf.MeanFieldSGD(PROBLEM, weights, key=jax.random.key(1))
    trainable, frozen = split(net)
    after, _ = eqx.filter_jit(lambda rule, state: rule.step(jnp.asarray(0), state, frozen))(rule, trainable)
    i = int(rule.samples(jnp.asarray(0))[0])
    x, y, N1, N2 = X[i], Y[i], 4, 3
    W1, W2, C = (np.asarray(leaf) for leaf in (*net.layers, net.output))
    H = np.tanh(W1 @ x)
    Z = W2.T @ H / N1
    e = y - C @ np.tanh(Z) / N2
    slope = 1 - np.tanh(Z) ** 2
    a_C, a_W1, a_W2 = N2 / N1, 1.0, N2
    np.testing.assert_allclose(after.output, C + a_C / N2 * e * np.tanh(Z), rtol=1e-13)
    np.testing.assert_allclose(after.layers[1], W2 + a_W2 / (N1 * N2) * e * np.outer(H, C * slope), rtol=1e-13)
    V = W2 @ (C * slope) / N2
    np.testing.assert_allclose(after.layers[0], W1 + a_W1 / N1 * e * np.outer(V * (1 - H**2), x), rtol=1e-13)


@pytest.mark.slow
def test_sgd_approaches_the_limit():
    """Networks of 32 to 256 nodes, 64 of each: error of one run like the width to the power -1/2.

    Below, steps of `1 / N` are long, and their own error of first order makes the slope steeper.
    """
    widths, exact, errors = (32, 64, 128, 256), limit(TWO, [2.0]), []
    for n in widths:

        def one(nodes, key, n=n):
            rule = gf.MeanFieldSGD(PROBLEM, nodes.weights, key=key)
            sol = gf.iterate(rule, nodes.net, 2 * n, save_every=2 * n, save_params=False, throw=False)
            return gf.MeanFieldFlow(PROBLEM, nodes.weights).predictions(sol.final)

        keys = jax.random.split(jax.random.key(1), 64)
        computed = eqx.filter_jit(eqx.filter_vmap(one))(networks(TWO, n, 64), keys)
        errors.append(np.sqrt(np.mean((np.asarray(computed) - exact[-1]) ** 2)))
    assert abs(np.polyfit(np.log(widths), np.log(errors), 1)[0] + 0.5) <= 0.07


# Gradient flow


@pytest.fixture(scope="module")
def ensembles():
    """Predictions of many networks of each width, and of the limit."""
    counts = {4: 2000, 8: 2000, 16: 2000, 32: 1000, 64: 200}
    return {n: np.asarray(flows(networks(TWO, n, count))) for n, count in counts.items()}, limit(TWO)


@pytest.mark.slow
def test_finite_networks_approach_the_limit(ensembles):
    """One network like `N^-1/2`, the mean over networks like `1 / N`."""
    computed, exact = ensembles
    widths = np.array(list(computed))
    paths = [np.sqrt(np.mean(np.max(np.abs(g - exact), axis=(1, 2)) ** 2)) for g in computed.values()]
    assert abs(np.polyfit(np.log(widths), np.log(paths), 1)[0] - gf.theory.FLUCTUATION) <= 0.07
    few = widths[:4]
    bias = np.array([np.sqrt(np.mean((np.mean(computed[n], axis=0) - exact) ** 2)) for n in few])
    noise = np.array([np.sqrt(np.mean(np.var(computed[n], axis=0) / len(computed[n]))) for n in few])
    assert np.all(bias > 2 * noise)
    assert abs(np.polyfit(np.log(few), np.log(bias), 1)[0] - gf.theory.BIAS) <= 0.2
    # What finite widths alone say of the limit.
    values = np.stack([computed[n][:1000] for n in (8, 16, 32)])
    reported = gf.theory.extrapolate_width([8, 16, 32], values)
    assert np.max(np.abs(reported.limit - exact) / reported.error) < 4.5
    assert (
        np.max(np.abs(reported.limit - exact)) < 0.5 * np.max(np.abs(values[-1].mean(axis=0) - exact)) + 3 * noise[-1]
    )


@pytest.mark.slow
def test_fluctuations_are_predicted(ensembles):
    """The standard deviation of every prediction, from derivatives of the limit: 200 networks of 64 know it to 5 %."""
    computed, exact = ensembles
    predicted = gf.width_fluctuations(PROBLEM, TWO, TS, rule=GaussLegendre(5))
    np.testing.assert_allclose(predicted.limit, exact, rtol=0, atol=2e-3)
    for n, within in ((32, 0.15), (64, 0.2)):
        np.testing.assert_allclose(np.std(computed[n], axis=0), predicted.std(n), rtol=within)


@pytest.mark.slow
def test_fluctuations_at_the_start():
    """Those of averages of independent terms, in closed form for one layer."""
    start = gf.models.MeanFieldStart(2, **LAWS)
    computed = gf.width_fluctuations(PROBLEM, start, [0.0, 0.5], rule=GaussLegendre(6))
    points, mass = GaussLegendre(6)([Uniform(-1, 1), Uniform(-1, 1), Uniform(0, 2)])
    terms = points[:, 2:] * np.tanh(points[:, :2] @ X.T)
    variance = mass @ terms**2 - (mass @ terms) ** 2
    np.testing.assert_allclose(computed.std(100)[0], np.sqrt(variance / 100), rtol=1e-10)
    assert bool(jnp.all(computed.std(100)[1] != computed.std(100)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("depth", [3, 4])
def test_deep_networks_approach_the_collapsed_limit(depth):
    """Three and four hidden layers: -1/2 in the width, against a limit with one node in each interior layer."""
    start = gf.models.MeanFieldStart(2, middle=[Uniform(0, 2)] * (depth - 1), **LAWS)
    exact, widths = limit(start), (8, 16, 32, 64)
    errors = []
    for n in widths:
        g = np.asarray(flows(networks(start, n, 200)))
        errors.append(np.sqrt(np.mean((g - exact) ** 2)))
    assert abs(np.polyfit(np.log(widths), np.log(errors), 1)[0] + 0.5) <= 0.07


# Parametrisations


@pytest.mark.parametrize("kind", [pytest.param("mean_field", marks=SLOW), "mup"])
def test_two_layer_networks_as_nodes(kind):
    """Gradient flow of the network, by automatic gradients, is the mean-field flow at another pace."""
    model = gf.models.TwoLayer(2, 4, activation=jnp.tanh, parametrisation=kind, key=jax.random.key(0))
    nodes, pace = gf.models.as_nodes(model)
    a, b = (model.multipliers.of(layer, float) for layer in (0, 1))
    np.testing.assert_allclose(jax.vmap(nodes.net)(jnp.asarray(X)), jax.vmap(model)(jnp.asarray(X)), rtol=1e-12)
    slope, rate = jax.grad(PROBLEM)(model), nodes.net.velocity(jnp.asarray(X), nodes.weights, PROBLEM.residuals)
    np.testing.assert_allclose(-pace * a * slope.weight, rate.layers[0], rtol=1e-11)
    np.testing.assert_allclose(-pace * 4 * b * slope.output, rate.output, rtol=1e-11)


def test_what_has_no_limit_is_refused():
    model = gf.models.TwoLayer(2, 4, activation=jnp.tanh, parametrisation="ntk", key=jax.random.key(0))
    with pytest.raises(ValueError, match="be a network of one pace, but is one whose layers move at the speeds"):
        gf.models.as_nodes(model)
    assert gf.theory.width_limit("mup").flow == gf.theory.width_limit(gf.models.mean_field, 5).flow == "MeanFieldFlow"
    with pytest.raises(ValueError, match=r"'mup' with 2 hidden layers.*memory.*extrapolate_width"):
        gf.theory.width_limit("mup", 2)
    with pytest.raises(ValueError, match="at one learning rate, but is 'standard'"):
        gf.theory.width_limit("standard", 1)


def test_extrapolation_is_exact_on_a_line():
    widths = np.array([4.0, 8.0, 16.0])
    noise = np.random.default_rng(0).normal(size=(3, 50, 2)) * np.array([[[0.01]], [[0.02]], [[0.005]]])
    noise -= noise.mean(axis=1, keepdims=True)
    computed = gf.theory.extrapolate_width(widths, np.array([1.0, -2.0]) + 3 / widths[:, None, None] + noise)
    np.testing.assert_allclose(computed.limit, [1.0, -2.0], rtol=1e-12)
    assert computed.slope == pytest.approx(-1)
    assert np.all(computed.error > 0)


MISTAKES = {
    "weights": (
        lambda: gf.MeanFieldSGD(PROBLEM, TWO.nodes(GaussLegendre(3)).weights, key=jax.random.key(0)),
        "be 1 / 9 for each of 9 nodes, but is not. Width infinity takes a flow",
    ),
    "rate": (
        lambda: gf.MeanFieldSGD(PROBLEM, (jnp.ones(1),), -1.0, key=jax.random.key(0)),
        "`learning_rate` must be positive",
    ),
    "key": (lambda: gf.MeanFieldSGD(PROBLEM, (jnp.ones(1),), key=0), "`key` must be a random key"),
    "order": (
        lambda: gf.MeanFieldSGD(PROBLEM, (jnp.ones(1),), key=jax.random.key(0)).flow(2),
        "`order` must be one of",
    ),
    "widths": (lambda: gf.theory.extrapolate_width([4], np.ones((1, 3, 1))), "at least two different widths"),
    "values": (lambda: gf.theory.extrapolate_width([4, 8], np.ones((2, 1))), r"`values` must have shape \(2, seeds"),
    "start": (lambda: gf.width_fluctuations(PROBLEM, None, [1.0]), "`start` must be"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.usefixtures("unchecked")
def test_mistakes(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()


def test_unbounded_and_gaussian_run_with_a_warning():
    """Outside of the theorems: a warning, once, and a run."""
    start = gf.models.MeanFieldStart(2, first=Gaussian(), output=Uniform(0, 2), activation=jax.nn.relu)
    net, weights = start.draw(5, jax.random.key(0))
    flow = gf.MeanFieldFlow(PROBLEM, weights)
    with pytest.warns(gf.TheoryWarning, match="bounded activation") as message:
        flow.check_values(*split(net))
    assert len(message) == 1
    with pytest.warns(gf.TheoryWarning, match="laws of bounded support") as message:
        start.nodes(GaussLegendre(2))
    assert len(message) == 1
