"""Mean-field flow: its field against formulas and gradients, exact solutions, symmetries, invariants, particles."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import gradflow as gf
from gradflow._tree import split
from gradflow.models.nodes import Discrete, Gaussian, GaussLegendre, Uniform

RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, (6, 2))
Y = np.sin(2 * X[:, 0]) - X[:, 1] ** 2
PROBLEM = gf.EmpiricalRisk(X, Y, gf.losses.square)
WIDE = Uniform(-1, 1)
TIGHT = {"rtol": 1e-12, "solver": gf.solvers.Dopri8()}


def layered(middle, activation=jnp.tanh, **options):
    settings = {"first": WIDE, "output": WIDE, "activation": activation} | options
    return gf.models.MeanFieldStart(2, middle=middle, **settings)


def drift(problem, nodes, decay=0.0):
    flow = gf.MeanFieldFlow(problem, nodes.weights, decay)
    return velocity(flow, nodes.net)


@eqx.filter_jit
def velocity(flow, net):
    trainable, frozen = split(net)
    return flow.vector_field(jnp.zeros(()), flow.init(trainable, frozen), frozen)[0]


# The field


def test_field_of_two_hidden_layers_by_hand():
    """The formulas of the source, entry by entry, with weights of all sizes, zero among them."""
    nodes = layered([WIDE], jax.nn.sigmoid).draw((3, 4), jax.random.key(1))
    p1, p2 = np.array([0.5, 0.2, 0.0]), np.array([0.1, 0.0, 0.3, 0.6])
    computed = drift(PROBLEM, nodes._replace(weights=(jnp.asarray(p1), jnp.asarray(p2))))
    W1, W2, C = (np.asarray(leaf) for leaf in (*nodes.net.layers, nodes.net.output))

    def s(z):
        return 1 / (1 + np.exp(-z))

    first, second, output = np.zeros_like(W1), np.zeros_like(W2), np.zeros_like(C)
    for x, y in zip(X, Y, strict=True):
        H = [s(W1[j] @ x) for j in range(3)]
        Z = [sum(p1[j] * W2[j, i] * H[j] for j in range(3)) for i in range(4)]
        e = (y - sum(p2[i] * C[i] * s(Z[i]) for i in range(4))) / len(X)
        slope = [s(z) * (1 - s(z)) for z in Z]
        for i in range(4):
            output[i] += e * s(Z[i])
        for j in range(3):
            V = sum(p2[i] * C[i] * slope[i] * W2[j, i] for i in range(4))
            first[j] += e * V * H[j] * (1 - H[j]) * x
            for i in range(4):
                second[j, i] += e * C[i] * slope[i] * H[j]
    for a, b in zip((*computed.layers, computed.output), (first, second, output), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("depth", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_finite_networks_follow_scaled_gradients(depth):
    """The gradient of the plain network, times the nodes that an entry joins; three outputs."""
    start = layered([WIDE] * (depth - 1), out_size=3)
    nodes = start.draw([5, 3, 4][:depth], jax.random.key(2))
    problem = gf.EmpiricalRisk(X, np.stack([Y, -Y, Y**2], axis=1), gf.losses.square)
    computed = drift(problem, nodes)
    gradient = jax.grad(problem)(nodes.net)
    widths = nodes.net.widths
    sizes = [widths[0]] + [a * b for a, b in itertools.pairwise(widths)]
    for velocity, slope, size in zip(computed.layers, gradient.layers, sizes, strict=True):
        np.testing.assert_allclose(velocity, -size * slope, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(computed.output, -widths[-1] * gradient.output, rtol=1e-11)


@pytest.mark.slow
def test_one_hidden_layer_is_the_two_layer_network_at_another_pace():
    """`gf.models.TwoLayer` in mean-field parametrisation takes `N t` for `t`."""
    model = gf.models.TwoLayer(2, 4, activation=jnp.tanh, parametrisation="mean_field", key=jax.random.key(0))
    net = gf.models.MeanFieldNet((model.weight,), model.output, jnp.tanh)
    flow = gf.MeanFieldFlow(PROBLEM, (jnp.full(4, 0.25),))
    slow = gf.solve(gf.GradientFlow(PROBLEM), model, [8.0], **TIGHT).final
    fast = gf.solve(flow, net, [2.0], **TIGHT).final
    np.testing.assert_allclose(fast.layers[0], slow.weight, rtol=1e-10)
    np.testing.assert_allclose(fast.output, slow.output, rtol=1e-10)


def test_weight_decay_and_loss_of_other_kinds():
    """Every layer decays at its own rate; the residual of logistic loss is its slope."""
    nodes = layered([WIDE]).draw(3, jax.random.key(1))
    plain, decaying = drift(PROBLEM, nodes), drift(PROBLEM, nodes, [0.1, 0.2, 0.3])
    for rate, a, b, w in zip((0.1, 0.2), plain.layers, decaying.layers, nodes.net.layers, strict=True):
        np.testing.assert_allclose(b, a - rate * w, rtol=1e-13, atol=1e-16)
    np.testing.assert_allclose(decaying.output, plain.output - 0.3 * nodes.net.output, rtol=1e-13)
    problem = gf.EmpiricalRisk(X, np.sign(Y), gf.losses.logistic)
    gradient = jax.grad(problem)(nodes.net)
    np.testing.assert_allclose(drift(problem, nodes).layers[1], -9 * gradient.layers[1], rtol=1e-11)


def test_population_risk_weighs_its_nodes():
    """Equal weights are a data set; nodes of quadrature give the integral."""
    net, weights = layered([WIDE]).draw(3, jax.random.key(1))
    same = gf.PopulationRisk(X, Y, np.full(6, 1 / 6), gf.losses.square)
    nodes = gf.models.MeanFieldNodes(net, weights)
    for a, b in zip(*map(jax.tree_util.tree_leaves, (drift(PROBLEM, nodes), drift(same, nodes))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    x, w = GaussLegendre(20)([WIDE, WIDE])
    population = gf.PopulationRisk(x, x[:, 0] * x[:, 1], w, gf.losses.square)
    flow = gf.MeanFieldFlow(population, weights)
    zero = eqx.tree_at(lambda n: n.output, net, jnp.zeros(3))
    assert float(flow.risk(zero)) == pytest.approx(1 / 18)
    assert float(population(zero)) == pytest.approx(1 / 18)


# Along runs


def linear_reference(x, y, mean, first, second, ts):
    """The closed system for a linear activation: `W1 = B (1, w)`, `W2 = (1, c)^T K (1, w)`, `C = v . (1, c)`.

    `first`, `second` are the matrices of second moments of `(1, w)` and `(1, c)`; 14 numbers for two inputs.
    """
    d = x.shape[1]
    B0, K0, v0 = np.eye(d + 1)[1:], np.zeros((2, d + 1)), np.array([0.0, 1.0])
    K0[0, 0] = mean

    def unpack(state):
        return np.split(state, [B0.size, B0.size + K0.size])

    def field(t, state):
        B, K, v = (part.reshape(like.shape) for part, like in zip(unpack(state), (B0, K0, v0), strict=True))
        g = x @ (B @ first @ K.T @ second @ v)
        r = (y - g) @ x / len(y)
        dB, dK, dv = np.outer(r, K.T @ second @ v), np.outer(v, B.T @ r), K @ first @ B.T @ r
        return np.concatenate([dB.ravel(), dK.ravel(), dv])

    begin = np.concatenate([B0.ravel(), K0.ravel(), v0])
    states = solve_ivp(field, (0, ts[-1]), begin, "DOP853", ts, rtol=1e-13, atol=1e-14).y.T
    computed = []
    for state in states:
        B, K, v = (part.reshape(like.shape) for part, like in zip(unpack(state), (B0, K0, v0), strict=True))
        computed.append(x @ (B @ first @ K.T @ second @ v))
    return np.array(computed)


def test_linear_activation_is_exact():
    """Against the closed system, to 1e-10; Gauss-Legendre nodes are exact for polynomials."""
    nodes = layered([Uniform(-0.5, 1.5)], lambda z: z).nodes(GaussLegendre(4))
    flow = gf.MeanFieldFlow(PROBLEM, nodes.weights)
    ts = np.linspace(0, 10, 6)
    with pytest.warns(gf.TheoryWarning, match="ask for a bounded activation"):
        sol = gf.solve(flow, nodes.net, ts, observe={"g": flow.predictions}, **TIGHT)
    moments = np.diag([1.0, 1 / 3, 1 / 3])
    exact = linear_reference(X, Y, 0.5, moments, moments[:2, :2], ts)
    assert np.max(np.abs(exact[-1] - exact[0])) > 0.3
    np.testing.assert_allclose(sol.observed["g"], exact, rtol=0, atol=1e-10)
    assert float(sol.drift["energy"]) < 1e-11


@pytest.fixture(scope="module")
def symmetric():
    """A run with everything symmetric, decay, and test particles: at labels of nodes, and elsewhere."""
    start = layered([Uniform(-1, 1)])
    nodes = start.nodes(GaussLegendre(4))
    particles = nodes.with_particles(
        [[0.3, -0.9], *np.asarray(nodes.net.layers[0][5:6])], nodes.net.output[jnp.array([2, 2])]
    )
    # An entry `u` between two of them that is not the mean.
    net = eqx.tree_at(lambda n: n.layers[1], particles.net, replace_fn=lambda entries: entries.at[16, 4].set(0.7))
    particles = particles._replace(net=net)
    flow = gf.MeanFieldFlow(PROBLEM, particles.weights, [0.0, 0.3, 0.1])
    return nodes, particles, gf.solve(flow, particles.net, [0.0, 2.0, 4.0], observe={"g": flow.predictions}, **TIGHT)


def test_parity(symmetric):
    """An odd activation and laws of mean zero: everything is odd in both labels, though the data are not symmetric."""
    _, _, sol = symmetric
    net = sol.final
    first, second, output = net.layers[0][:16], net.layers[1][:16, :4], net.output[:4]
    assert float(jnp.max(jnp.abs(second))) > 0.01
    np.testing.assert_allclose(first, -first[::-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(output, -output[::-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(second, -second[:, ::-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(second, -second[::-1], rtol=0, atol=1e-12)


def test_test_particles_are_not_seen(symmetric):
    """The field of the nodes stays what it was, to rounding; a particle at the label of a node goes along with it."""
    nodes, particles, sol = symmetric
    alone, with_particles = drift(PROBLEM, nodes), drift(PROBLEM, particles)
    np.testing.assert_allclose(with_particles.layers[0][:16], alone.layers[0], rtol=0, atol=1e-15)
    np.testing.assert_allclose(with_particles.layers[1][:16, :4], alone.layers[1], rtol=0, atol=1e-15)
    np.testing.assert_allclose(with_particles.output[:4], alone.output, rtol=0, atol=1e-15)
    np.testing.assert_allclose(sol.final.layers[0][17], sol.final.layers[0][5], rtol=0, atol=1e-13)
    np.testing.assert_allclose(sol.final.output[4], sol.final.output[2], rtol=0, atol=1e-13)
    np.testing.assert_allclose(sol.final.layers[1][:16, 4], sol.final.layers[1][:16, 2], rtol=0, atol=1e-13)


def test_entries_between_layers_move_by_what_does_not_depend_on_them(symmetric):
    """`W2 = u e^(-decay t) + A`: entries of equal labels that start at `u = 0.7` and at zero keep their distance."""
    entries = symmetric[2].final.layers[1]
    assert abs(float(entries[16, 5])) > 1e-3
    np.testing.assert_allclose(entries[16, 4] - entries[16, 5], 0.7 * np.exp(-0.3 * 4.0), rtol=1e-10)
    np.testing.assert_allclose(entries[16, 5], entries[16, 2], rtol=1e-10)


def test_energy_with_decay(symmetric):
    """The loss, the penalty and what was spent; the drift falls with the tolerance."""
    nodes, _, sol = symmetric
    assert float(sol.drift["energy"]) < 1e-11
    flow = gf.MeanFieldFlow(PROBLEM, nodes.weights, [0.0, 0.3, 0.1])
    run = eqx.filter_jit(lambda rtol: gf.solve(flow, nodes.net, [4.0], rtol=rtol, solver=gf.solvers.Tsit5()).drift)
    loose, tight = (float(run(jnp.asarray(rtol))["energy"]) for rtol in (1e-3, 1e-6))
    assert tight < 0.05 * loose < 1e-3


# Depth


def test_interior_layers_collapse():
    """Equal nodes of an interior layer stay equal, and one stands for them all."""
    start = layered([Uniform(0, 1), Uniform(0, 2)], output=Uniform(0, 1))
    one = start.nodes(GaussLegendre(3))
    assert one.net.widths == (9, 1, 3)
    many = one.padded((9, 4, 3))._replace(weights=(one.weights[0], jnp.array([0.1, 0.2, 0.3, 0.4]), one.weights[2]))
    for _ in range(4):
        one, many = (euler(nodes, 0.5) for nodes in (one, many))
    np.testing.assert_allclose(many.net.layers[1], jnp.tile(one.net.layers[1], 4), rtol=0, atol=1e-14)
    np.testing.assert_allclose(many.net.layers[2], jnp.tile(one.net.layers[2], (4, 1)), rtol=0, atol=1e-14)
    np.testing.assert_allclose(many.net.layers[0], one.net.layers[0], rtol=0, atol=1e-14)


def euler(nodes, step):
    rate = drift(PROBLEM, nodes)
    return nodes._replace(net=jax.tree_util.tree_map(lambda w, v: w + step * v, nodes.net, rate))


def test_kernels_do_not_collapse():
    """Labels of interior layers matter, unless the kernel ignores them; finite draws use the same kernels."""

    def kernel(a, b):
        return 1 + jnp.sin(3 * b[0]) * (1 + a[0])

    upper = {"output": Uniform(0, 1)}
    constant = layered([lambda a, b: 0.5 + 0 * a[0], Uniform(0, 2)], **upper).nodes(GaussLegendre(5))
    law = layered([Uniform(0, 1), Uniform(0, 2)], **upper).nodes(GaussLegendre(5))
    assert (constant.net.widths, law.net.widths) == ((25, 5, 5), (25, 1, 5))
    labelled, plain = drift(PROBLEM, constant).layers[1], drift(PROBLEM, law).layers[1]
    assert float(jnp.max(jnp.abs(plain))) > 1e-3
    np.testing.assert_allclose(labelled, jnp.tile(plain, 5), rtol=1e-10)
    start = layered([kernel, Uniform(0, 2)], **upper)
    labelled = start.nodes(GaussLegendre(5))
    computed = drift(PROBLEM, labelled).layers[1]
    assert float(jnp.max(jnp.std(computed, axis=1))) > 0.01 * float(jnp.max(jnp.abs(computed)))
    drawn = start.draw((2, 3, 4), jax.random.key(0)).net
    labels = np.arcsin(np.asarray(drawn.layers[1] - 1) / (1 + np.asarray(drawn.layers[0][:, :1]))) / 3
    assert np.ptp(np.sin(3 * labels), axis=0).max() < 1e-12


def test_frozen_case_warns():
    """Three layers, odd activation, symmetric laws; means of both upper layers make it move, finite networks do."""
    frozen = layered([Uniform(-1, 1), Uniform(-1, 1)])
    nodes = frozen.nodes(GaussLegendre(2))
    with pytest.warns(gf.TheoryWarning, match="does not move"):
        gf.MeanFieldFlow(PROBLEM, nodes.weights).check_values(*split(nodes.net))
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree_util.tree_leaves(drift(PROBLEM, nodes))) < 1e-15
    means = layered([Uniform(0, 1)] * 2, output=Uniform(0, 1)).nodes(GaussLegendre(2))
    for moving in (frozen.draw((4, 1, 2), jax.random.key(0)), means):
        gf.MeanFieldFlow(PROBLEM, moving.weights).check_values(*split(moving.net))


# Input


@pytest.mark.slow
def test_small_and_single():
    """Width one, one sample, float32."""
    problem = gf.EmpiricalRisk(X[:1], Y[:1], gf.losses.square)
    net, weights = layered([WIDE], dtype=jnp.float32).draw(1, jax.random.key(0))
    sol = gf.solve(gf.MeanFieldFlow(problem, weights), net, [1.0], rtol=1e-4, solver=gf.solvers.Heun())
    assert sol.final.output.dtype == jnp.float32
    assert sol.status == "ok"
    assert float(sol.drift["energy"]) < 1e-4


def test_laws():
    """Means, quantiles and nodes agree; a Gaussian has moments beyond its truncation."""
    for law in (Uniform(-1, 3), Gaussian(0.5, 2.0), Discrete([2.0, -1.0], [0.25, 0.75])):
        x, w = law.legendre(60)
        u = (np.arange(200_000) + 0.5) / 200_000
        for power in (1, 2, 4):
            assert w @ x**power == pytest.approx(np.mean(law.quantile(u) ** power), rel=2e-3)
        assert w @ x == pytest.approx(law.mean, abs=1e-10)
        drawn = law.draw(jax.random.key(0), (20_000,))
        assert float(jnp.mean(drawn)) == pytest.approx(law.mean, abs=0.06)


MISTAKES = {
    "law": (lambda: layered([0.5]), r"`middle\[0\]` must be a law"),
    "laws": (lambda: gf.models.MeanFieldStart(2, first=[WIDE], output=WIDE), "`first` must be one law or 2"),
    "middle": (lambda: layered(WIDE), "`middle` must be a sequence"),
    "width": (lambda: layered([WIDE]).draw((2, 3, 4), jax.random.key(0)), "`width` must be one number, or 2"),
    "rule": (lambda: layered([WIDE]).nodes("sobol"), "`rule` must be a rule"),
    "kernel": (lambda: layered([lambda a, b: a]).nodes(), "return scalars"),
    "ends": (lambda: Uniform(1, 1), "`high` must be above low = 1, but is 1. A single value is Discrete"),
    "std": (lambda: Gaussian(0, 0), "`std` must be positive"),
    "power of two": (lambda: gf.models.nodes.Sobol(100), "`n` must be a power of two, but is 100"),
    "problem": (lambda: gf.MeanFieldFlow(lambda w: 0.0, ()), "`problem` must be an EmpiricalRisk or a Pop"),
    "weights": (lambda: gf.MeanFieldFlow(PROBLEM, (jnp.array([-1.0]),)), r"`weights\[0\]` must not be negative"),
    "decay": (lambda: gf.MeanFieldFlow(PROBLEM, (jnp.ones(1),), [0.1]), "`decay` must be one rate or 2"),
    "data": (lambda: gf.PopulationRisk(X, Y, -np.ones(6), gf.losses.square), "`weights` must not be negative"),
    "particles": (lambda: layered([WIDE]).nodes().with_particles(first=[0.3]), "`first` must have shape"),
    "NaN": (lambda: gf.EmpiricalRisk(X * np.nan, Y, gf.losses.square), "`x` must be finite"),
    "net": (lambda: gf.models.MeanFieldNet((jnp.ones((2, 2)),), jnp.ones(3)), "`layers` must fit each other"),
    "start": (lambda: gf.infinite_width(PROBLEM, None, [1.0]), "`start` must be"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.usefixtures("unchecked")
def test_mistakes(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()


def test_mistakes_of_shape():
    nodes = layered([WIDE]).draw(3, jax.random.key(0))
    with pytest.raises(ValueError, match=r"`weights` must hold an entry for each node of params, \(3, 3\)"):
        gf.solve(gf.MeanFieldFlow(PROBLEM, nodes.weights[:1]), nodes.net, [1.0])
    with pytest.raises(ValueError, match="`params` must be a gradflow"):
        gf.solve(gf.MeanFieldFlow(PROBLEM, nodes.weights), jnp.ones(3), [1.0])
    wider = gf.EmpiricalRisk(np.ones((2, 3)), np.ones(2), gf.losses.square)
    with pytest.raises(ValueError, match="take the 3 inputs"):
        gf.solve(gf.MeanFieldFlow(wider, nodes.weights), nodes.net, [1.0])
