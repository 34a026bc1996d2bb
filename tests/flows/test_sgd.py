"""SGD and its diffusion: exact covariances, exact weak orders, an Ornstein-Uhlenbeck process, SGD's own averages."""

import itertools

import diffrax
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial import chebyshev
from scipy.linalg import expm

import gradflow as gf
from gradflow.runs import _drive
from gradflow.runs._progress import Bar

X, Y = np.array([[0.5], [1.0], [1.6], [-0.7]]), np.array([1.0, -0.5, 2.0, 0.3])
SAMPLES, START, HORIZON = 4, -1.0, 2.0


def linear(w, x):
    return x @ w


@pytest.fixture(scope="module")
def line():
    """Least squares in one unknown: first and second moments of SGD and of its flow close."""
    return gf.EmpiricalRisk(X, Y, gf.losses.square, predict=linear)


def batches(size, sampling):
    if sampling == "replacement":
        return list(itertools.product(range(SAMPLES), repeat=size))
    return list(itertools.combinations(range(SAMPLES), size))


def moments_of_sgd(eta, size, sampling):
    """`E w, E w^2` at the horizon, from the maps `w -> w - eta (h w - c)` of all batches."""
    chosen = [list(batch) for batch in batches(size, sampling)]
    slope = 1 - eta * np.array([np.mean(X[batch, 0] ** 2) for batch in chosen])
    shift = eta * np.array([np.mean(X[batch, 0] * Y[batch]) for batch in chosen])
    rows = [[1, 0, 0], [shift.mean(), slope.mean(), 0]]
    rows.append([np.mean(shift**2), 2 * np.mean(slope * shift), np.mean(slope**2)])
    return (np.linalg.matrix_power(np.array(rows), round(HORIZON / eta)) @ [1, START, START**2])[1:]


POINTS = jnp.array([[-1.0], [0.0], [1.0]])


def moments_of_flow(drift, variance):
    """The same of `dw = drift dt + noise`, from values at -1, 0, 1: drift is linear in `w`, variance quadratic."""
    b, s = np.polyfit([-1, 0, 1], drift, 1)[::-1], np.polyfit([-1, 0, 1], variance, 2)[::-1]
    generator = np.array([[0, 0, 0], [b[0], b[1], 0], [s[0], 2 * b[0] + s[1], 2 * b[1] + s[2]]])
    return (expm(generator * HORIZON) @ [1, START, START**2])[1:]


def moments_of_scheme(mean, variance, steps):
    """The same of a scheme whose step is of this mean and variance."""
    b, s = np.polyfit([-1, 0, 1], mean, 1)[::-1], np.polyfit([-1, 0, 1], variance, 2)[::-1]
    rows = [[1, 0, 0], [b[0], b[1], 0], [s[0] + b[0] ** 2, s[1] + 2 * b[0] * b[1], s[2] + b[1] ** 2]]
    return (np.linalg.matrix_power(np.array(rows), steps) @ [1, START, START**2])[1:]


@eqx.filter_jit
def drift_and_variance(flow):
    drift = jax.vmap(lambda w: flow.vector_field(jnp.zeros(()), w, None))(POINTS)[:, 0]
    increments = jax.vmap(lambda w: jax.vmap(lambda e: flow.noise(jnp.zeros(()), w, None, e))(jnp.eye(SAMPLES)))(POINTS)
    return drift, jnp.sum(increments[..., 0] ** 2, axis=1)


@eqx.filter_jit
def mean_and_variance(flow, solver, dt):
    """Of one step; increments enter linearly."""
    step = lambda w, dw: solver.step(flow, None, jnp.zeros(()), dt, w, dw)[0]  # noqa: E731
    mean = jax.vmap(lambda w: step(w, jnp.zeros(SAMPLES)))(POINTS)
    increments = jax.vmap(lambda w: jax.vmap(lambda e: step(w, jnp.sqrt(dt) * e))(jnp.eye(SAMPLES)))(POINTS)
    return mean, jnp.sum((increments - mean[:, None]) ** 2, axis=1)


ETAS = 0.2 / 2.0 ** np.arange(5)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("size", "sampling"), [(1, "replacement"), (2, "replacement"), (2, "batch")])
def test_weak_order_against_exact_moments_of_sgd(line, order, size, sampling):
    gaps = []
    for eta in ETAS:
        flow = gf.SGDFlow(line, eta, size, order=order, sampling=sampling)
        gaps.append(np.abs(moments_of_flow(*drift_and_variance(flow)) - moments_of_sgd(eta, size, sampling)))
    slopes = np.log2(np.array(gaps[:-1]) / np.array(gaps[1:]))
    np.testing.assert_allclose(slopes[-2:], order, atol=0.15)


@pytest.mark.parametrize(
    ("solver", "order", "expected"), [("EulerMaruyama", 1, 1), ("EulerMaruyama", 2, 1), ("SmallNoise", 2, 2)]
)
def test_schemes_with_steps_of_the_learning_rate_keep_the_order(line, solver, order, expected):
    """The second order needs a scheme that keeps it: that is `SmallNoise`, the default for it."""
    gaps = []
    for eta in ETAS:
        flow = gf.SGDFlow(line, eta, 2, order=order)
        computed = mean_and_variance(flow, getattr(gf.solvers, solver)(), jnp.asarray(eta))
        gaps.append(np.abs(moments_of_scheme(*computed, round(HORIZON / eta)) - moments_of_sgd(eta, 2, "replacement")))
    if order == 1:
        # Steps of Euler's method on the first-order flow have the first two moments of SGD's own.
        assert np.max(gaps) < 1e-13
    else:
        slopes = np.log2(np.array(gaps[:-1]) / np.array(gaps[1:]))
        np.testing.assert_allclose(slopes[-2:], expected, atol=0.15)


@pytest.mark.parametrize("stages", [1, 2, 9])
def test_the_stabilised_method_is_of_weak_order_one(line, stages):
    """In few stages and in many, against the exact moments of the flow, whose noise depends on the state."""
    flow = gf.SGDFlow(line, 0.2, 1)
    exact, gaps = moments_of_flow(*drift_and_variance(flow)), []
    solver = gf.solvers.SKROCK(0.1, stages=stages)
    for steps in (20, 40, 80, 160, 320):
        computed = mean_and_variance(flow, solver, jnp.asarray(HORIZON / steps))
        gaps.append(np.abs(moments_of_scheme(*computed, steps) - exact))
    slopes = np.log2(np.array(gaps[:-1]) / np.array(gaps[1:]))
    np.testing.assert_allclose(slopes[-2:], 1, atol=0.15)


@pytest.mark.parametrize("stages", [2, 5, 20])
def test_the_stabilised_method_is_stable_as_far_as_it_says(stages):
    """Its step on `dy = -l y dt + dW`, against Chebyshev polynomials, up to the end of the interval of stability."""
    end = 1.9333 * (stages - 0.5) ** 2 - 1.5
    rates = np.linspace(0.01, end, 400)
    flow = OrnsteinUhlenbeck(jnp.asarray(rates))
    solver = gf.solvers.SKROCK(1.0, spectral_radius=end)
    assert solver.stages == stages
    run = jax.jit(lambda y, dw: solver.step(flow, None, jnp.zeros(()), jnp.ones(()), y, dw))
    factor, noise = (np.asarray(run(jnp.full(400, a), jnp.full(400, 1 - a))) for a in (1.0, 0.0))
    w0, top = 1 + 0.05 / stages**2, np.eye(stages + 1)[stages]
    slope = chebyshev.chebder(top)
    w1 = chebyshev.chebval(w0, top) / chebyshev.chebval(w0, slope)
    inside = w0 - w1 * rates
    np.testing.assert_allclose(factor, chebyshev.chebval(inside, top) / chebyshev.chebval(w0, top), atol=1e-11)
    expected = chebyshev.chebval(inside, slope) / chebyshev.chebval(w0, slope) * (1 - w1 * rates / 2)
    np.testing.assert_allclose(noise, expected, atol=1e-11)
    assert np.all(np.abs(factor) < 1)
    # The noise of a direction never piles up: the stationary variance stays below the exact one, and reaches it.
    ratio = 2 * rates * noise**2 / (1 - factor**2)
    assert ratio.max() <= 1
    assert ratio[0] > 0.99


class OrnsteinUhlenbeck(gf.flows.AbstractStochasticFlow):
    """`dy_i = -rate_i y_i dt + dW_i`."""

    rates: jax.Array
    noise_size = property(lambda self: self.rates.size)
    weak_order = 1
    time_step = property(lambda self: jnp.ones(()))

    def init(self, trainable, frozen):
        return trainable

    def params(self, state):
        return state

    def vector_field(self, t, state, frozen):
        return -self.rates * state

    def noise(self, t, state, frozen, increments):
        return increments

    def moved(self, t, dt, state, frozen, increments):
        return state + dt * self.vector_field(t, state, frozen) + increments


def test_the_stabilised_method_on_a_stiff_process(key):
    """Mean and variance of a slow direction beside one a thousand times faster, which stays bounded."""
    flow, steps, paths = OrnsteinUhlenbeck(jnp.array([1.0, 1000.0])), 20, 2000
    solver = gf.solvers.SKROCK(1 / steps, spectral_radius=1000.0)

    @jax.jit
    @jax.vmap
    def run(key):
        return gf.solve(flow, jnp.array([3.0, 0.0]), [1.0], solver=solver, key=key, save_params=False)

    sol = run(jax.random.split(key, paths))
    assert int(sol.stats["gradient_evaluations"][0]) == steps * (solver.stages + 1) < 200
    slow, fast = np.asarray(sol.final).T
    variance = (1 - np.exp(-2)) / 2
    assert abs(slow.mean() - 3 * np.exp(-1)) < 4 * np.sqrt(variance / paths) + 0.06
    assert abs(slow.var() / variance - 1) < 4 * np.sqrt(2 / paths) + 0.02
    assert fast.var() < 1 / 2000


def test_the_stabilised_method_refuses_bad_input():
    build = gf.solvers.SKROCK
    assert build(0.1, spectral_radius=450.0).stages == 6
    for options, message in (
        ({}, "`spectral_radius` must be given, or else `stages`, but is missing"),
        ({"spectral_radius": 1.0, "stages": 2}, "but is given together with `stages`"),
        ({"spectral_radius": -1.0}, "`spectral_radius` must be positive"),
        ({"stages": 0}, "`stages` must be an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            build(0.1, **options)
    with pytest.raises(ValueError, match="`dt` must be positive"):
        build(None, stages=2)
    with pytest.raises(ValueError, match="`spectral_radius` must be known when the solver is built"):
        jax.jit(lambda r: build(0.1, spectral_radius=r).dt)(1.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sampling", ["replacement", "batch"])
def test_covariance_is_that_of_all_batches(reduction, sampling, key):
    """On a network: `G G^T / eta` against the covariance over every batch of two out of four samples."""
    x, y = np.random.default_rng(0).normal(size=(SAMPLES, 2)), np.array([0, 1, 1, 2])
    model = gf.models.MLP(2, 3, 3, activation=jnp.tanh, key=key)
    problem = gf.EmpiricalRisk(x, y, gf.losses.cross_entropy, reduction=reduction)
    trainable, frozen = eqx.partition(model, eqx.is_inexact_array)
    flat, back = jax.flatten_util.ravel_pytree(trainable)
    rule = gf.SGD(problem, 0.3, batch_size=2, key=key, sampling=sampling)
    flow = rule.flow(1)

    @eqx.filter_jit
    def both(flow):
        noise = lambda e: jax.flatten_util.ravel_pytree(flow.noise(jnp.zeros(()), trainable, frozen, e))[0]  # noqa: E731
        per_sample = lambda v: flow.problem.per_sample(eqx.combine(back(v), frozen))  # noqa: E731
        return jax.vmap(noise)(jnp.eye(SAMPLES)), jax.jacobian(per_sample)(flat)

    increments, gradients = (np.asarray(a) for a in both(flow))
    means = np.stack([gradients[list(batch)].mean(axis=0) for batch in batches(2, sampling)])
    means *= SAMPLES if reduction == "sum" else 1
    np.testing.assert_allclose(increments.T @ increments / 0.3, np.cov(means.T, bias=True), atol=1e-12)


@pytest.mark.slow
def test_one_gradient_moves_as_drift_and_noise_do(line):
    w, xi = jnp.array([0.7]), jax.random.normal(jax.random.key(3), (SAMPLES,))
    zero, dt = jnp.zeros(()), jnp.asarray(0.2)
    for order in (1, 2):
        flow = gf.SGDFlow(line, 0.3, 1, order=order)
        apart = w + dt * flow.vector_field(zero, w, None) + flow.noise(zero, w, None, xi)
        np.testing.assert_allclose(flow.moved(zero, dt, w, None, xi), apart, rtol=1e-13)


def largest(jaxpr):
    """Entries of the largest array that a program forms, its inner programs included."""
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    inner = [p for eqn in jaxpr.eqns for p in jax.tree_util.tree_leaves(list(eqn.params.values()))]
    sizes += [largest(getattr(p, "jaxpr", p)) for p in inner if hasattr(p, "jaxpr") or hasattr(p, "eqns")]
    return max(sizes, default=0)


def test_no_matrix_of_parameters_by_parameters_is_formed(key):
    """Three samples, 420 parameters: nothing larger than what a gradient takes, in any scheme."""
    model = gf.models.TwoLayer(20, 20, key=key)
    trainable, frozen = eqx.partition(model, eqx.is_inexact_array)
    problem = gf.EmpiricalRisk(np.ones((3, 20)), np.ones(3), gf.losses.logistic)
    flow, now = gf.SGDFlow(problem, 0.1, 1, order=2), jnp.asarray(0.1)
    for solver in (gf.solvers.EulerMaruyama(), gf.solvers.SmallNoise(), gf.solvers.SKROCK(0.1, stages=3)):
        step = jax.make_jaxpr(lambda y, dw, s=solver: s.step(flow, frozen, now, now, y, dw))(trainable, jnp.ones(3))
        assert largest(step.jaxpr) <= 3 * 20 * 20
    assert largest(jax.make_jaxpr(lambda v: jnp.outer(v, v).sum())(jnp.ones(420)).jaxpr) == 420**2


class Shifts(eqx.Module):
    """`l_i = |A (w - z_i)|^2 / 2`, so that gradients differ by constants: an Ornstein-Uhlenbeck process."""

    matrix: jax.Array

    def __call__(self, w, x):
        return (x * 0 + w[None]) @ self.matrix.T


@pytest.fixture(scope="module")
def ornstein():
    rng = np.random.default_rng(1)
    z, matrix = rng.normal(size=(5, 2)), np.array([[1.0, 0.4], [0.0, 0.7]])
    problem = gf.EmpiricalRisk(z, z @ matrix.T, gf.losses.square, predict=Shifts(jnp.asarray(matrix)))
    return problem, z, matrix.T @ matrix


def test_ornstein_uhlenbeck_mean_and_covariance(ornstein):
    problem, z, hessian = ornstein
    eta, size, start, paths = 0.4, 2, np.array([2.0, -1.0]), 4000
    flow = gf.SGDFlow(problem, eta, size)
    solver = gf.solvers.SmallNoise(dt=0.05)

    @jax.jit
    @jax.vmap
    def run(key):
        return gf.solve(flow, jnp.asarray(start), [0.0, 1.0, 3.0], solver=solver, key=key).params

    computed = np.asarray(run(jax.random.split(jax.random.key(4), paths)))
    values, vectors = np.linalg.eigh(hessian)
    noise = eta / size * hessian @ np.cov(z.T, bias=True) @ hessian
    inner = vectors.T @ noise @ vectors
    for row, t in ((1, 1.0), (2, 3.0)):
        decay = vectors @ np.diag(np.exp(-values * t)) @ vectors.T
        mean = z.mean(axis=0) + decay @ (start - z.mean(axis=0))
        rates = values[:, None] + values[None, :]
        covariance = vectors @ (inner * (1 - np.exp(-rates * t)) / rates) @ vectors.T
        sample = computed[:, row]
        spread = np.sqrt(np.diag(covariance) / paths)
        assert np.all(np.abs(sample.mean(axis=0) - mean) < 4 * spread)
        diagonal = np.diag(covariance)
        error = np.sqrt((diagonal[:, None] * diagonal[None] + covariance**2) / paths)
        # Four standard errors of Monte Carlo, and the scheme's own at this step.
        assert np.all(np.abs(np.cov(sample.T) - covariance) < 4 * error + 0.03 * np.sqrt(np.outer(diagonal, diagonal)))
        assert np.all(4 * error < 0.12 * np.sqrt(np.outer(diagonal, diagonal)))


@pytest.mark.slow
def test_averages_of_sgd_on_a_network(key):
    """The mean loss of 4,000 runs of SGD against as many paths: the second order comes nearer than the first."""
    x, y = gf.data.correlated(8, 3, dtype="float64")
    model = gf.models.MLP(3, 4, activation=jnp.tanh, key=key)
    problem = gf.EmpiricalRisk(x, y, gf.losses.logistic)
    eta, steps, paths = 0.5, 8, 4000
    keys = jax.random.split(jax.random.key(5), paths)
    rule = gf.SGD(problem, eta, batch_size=1, key=key)

    @eqx.filter_jit
    def descend(keys):
        one = lambda k: gf.iterate(eqx.tree_at(lambda r: r.key, rule, k), model, steps, save_params=False).loss[1]  # noqa: E731
        return jax.vmap(one)(keys)

    @eqx.filter_jit
    def diffuse(flow, keys):
        one = lambda k: gf.solve(flow, model, [steps * eta], key=k, solver=solver, save_params=False).loss[1]  # noqa: E731
        return jax.vmap(one)(keys)

    solver = gf.solvers.SmallNoise(dt=eta / 4)
    discrete = np.asarray(descend(keys))
    error = discrete.std() / np.sqrt(paths)
    off = {}
    for order in (1, 2):
        computed = np.asarray(diffuse(rule.flow(order), keys))
        error_of_both = np.hypot(error, computed.std() / np.sqrt(paths))
        off[order] = (computed.mean() - discrete.mean()) / error_of_both
    print(f"mean loss of SGD {discrete.mean():.5f} +- {error:.5f}; off by standard errors: {off}")
    assert abs(off[2]) < abs(off[1])
    assert abs(off[1]) > 4


@pytest.mark.slow
def test_batches_are_what_the_sampling_says(line, key):
    def draws(sampling, size, steps):
        rule = gf.SGD(line, 0.1, batch_size=size, key=key, sampling=sampling)
        return np.asarray(jax.jit(jax.vmap(rule.batch))(jnp.arange(steps)))

    counts = np.bincount(draws("replacement", 2, 2000).ravel(), minlength=SAMPLES) / 4000
    np.testing.assert_allclose(counts, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / 4000))
    pairs = draws("batch", 2, 2000)
    assert np.all(pairs[:, 0] != pairs[:, 1])
    counts = np.bincount(pairs.ravel(), minlength=SAMPLES) / 4000
    np.testing.assert_allclose(counts, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / 4000))
    passes = draws("epochs", 2, 20).reshape(10, SAMPLES)
    np.testing.assert_array_equal(np.sort(passes, axis=1), np.tile(np.arange(SAMPLES), (10, 1)))
    assert len({tuple(row) for row in passes}) > 3
    assert draws("epochs", 3, 4).shape == (4, 3)  # one sample of each pass is left out


@pytest.mark.slow
def test_full_batches_are_gradient_descent(line, key):
    rule = gf.SGD(line, 0.3, batch_size=SAMPLES, key=key, sampling="batch")
    exact = gf.iterate(gf.GradientDescent(line, 0.3), jnp.array([START]), 10).final
    np.testing.assert_allclose(gf.iterate(rule, jnp.array([START]), 10).final, exact, rtol=1e-12)
    flow = rule.flow(1)
    np.testing.assert_allclose(flow.noise(jnp.zeros(()), jnp.array([START]), None, jnp.arange(4.0)), 0, atol=1e-15)
    epochs = gf.SGD(line, 0.3, batch_size=1, key=key, sampling="epochs")
    assert isinstance(epochs.flow(1), gf.GradientFlow)
    with pytest.raises(ValueError, match="`order` must be one of"):
        epochs.flow(2)


TRACES = []


class Counting(eqx.Module):
    def __call__(self, w, x):
        TRACES.append(1)
        return x @ w


@pytest.mark.slow
def test_paths_one_by_one_and_together_are_the_same(key):
    problem = gf.EmpiricalRisk(X, Y, gf.losses.square, predict=Counting())
    flow = gf.SGDFlow(problem, 0.1, 1)
    keys = jax.random.split(key, 3)
    see = {"loss": problem}
    alone = [gf.solve(flow, jnp.array([START]), [0.0, 0.25, 1.0], key=k, observe=see) for k in keys]
    before = len(TRACES)
    again = gf.solve(gf.SGDFlow(problem, 0.1, 1), jnp.array([START]), [0.0, 0.25, 1.0], key=keys[0], observe=see)
    assert len(TRACES) == before, "a second key or flow was compiled anew"
    np.testing.assert_array_equal(again.params, alone[0].params)
    assert alone[0].ts.tolist() == [0.0, 0.25, 1.0]
    assert float(alone[0].t_final) == 1.0
    # Steps of 0.1 at the most: three of a twelfth, then eight.
    assert {name: int(n) for name, n in alone[0].stats.items()} == {
        "steps": 11,
        "accepted": 11,
        "rejected": 0,
        "gradient_evaluations": 11,
        "hessian_vector_products": 0,
    }
    run = lambda k: gf.solve(flow, jnp.array([START]), [0.0, 0.25, 1.0], key=k, observe=see)  # noqa: E731
    together = jax.vmap(run)(keys)
    np.testing.assert_allclose(together.params, jnp.stack([sol.params for sol in alone]), rtol=1e-12)
    assert "SGDFlow" in str(alone[0])
    assert "EulerMaruyama" in str(alone[0])
    assert alone[0].observed["loss"].shape == (3,)
    diffrax_euler = gf.solvers.FixedSteps(diffrax.Euler())
    other = gf.solve(flow, jnp.array([START]), [0.0, 0.25, 1.0], key=keys[0], solver=diffrax_euler)
    np.testing.assert_allclose(other.params, alone[0].params, rtol=1e-12)


@pytest.mark.slow
def test_diffrax_takes_the_terms(line, key):
    flow = gf.SGDFlow(line, 0.1, 1, order=2)
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (SAMPLES,), key)
    sol = diffrax.diffeqsolve(flow.terms(path), diffrax.Euler(), 0.0, 1.0, 0.05, jnp.array([START]))
    assert np.all(np.isfinite(sol.ys))
    with pytest.raises(ValueError, match="`path` must be a Brownian motion"):
        flow.terms()


@pytest.mark.slow
def test_float32_one_sample_and_divergence(key):
    single = gf.EmpiricalRisk(X[:1].astype("f"), Y[:1].astype("f"), gf.losses.square, predict=linear)
    sol = gf.solve(gf.SGDFlow(single, 0.1, 1), jnp.array([START], jnp.float32), [1.0], key=key)
    assert sol.final.dtype == jnp.float32
    exact = gf.iterate(gf.GradientDescent(single, 0.1), jnp.array([START], jnp.float32), 10).final
    np.testing.assert_allclose(sol.final, exact, rtol=1e-5)  # one sample has no noise
    wild = gf.solve(gf.SGDFlow(single, 20.0, 1), jnp.array([START], jnp.float32), [2000.0], key=key, throw=False)
    assert wild.status == "nonfinite"


def test_until_and_progress_at_every_step_of_a_path(key, monkeypatch):
    """One sample has no noise: `w_k = 0.9^k`, which falls to a half at step seven, far from any save time."""
    problem = gf.EmpiricalRisk(np.ones((1, 1)), np.zeros(1), gf.losses.square, predict=linear)
    flow, start, reported = gf.SGDFlow(problem, 0.1, 1), jnp.array([1.0]), []
    until = gf.Until(lambda w: w[0], below=0.5)
    sol = gf.solve(flow, start, [0.0, 5.0, 10.0], key=key, until=until)
    assert (sol.status, int(sol.stats["steps"]), int(sol.saved)) == ("stopped", 7, 1)
    assert float(sol.t_final) == pytest.approx(0.7)
    np.testing.assert_allclose(sol.final, 0.9**7, rtol=1e-12)
    at_once = gf.solve(flow, start, [5.0], key=key, until=gf.Until(lambda w: w[0], below=2.0))
    assert (at_once.status, int(at_once.stats["steps"]), int(at_once.saved)) == ("stopped", 0, 0)
    monkeypatch.setattr(_drive, "SEGMENT", 1e-9)
    monkeypatch.setattr(Bar, "reach", lambda bar, done, remark: reported.append((done, remark.split(",")[0])))
    gf.solve(flow, start, [0.5], key=key, progress=True)
    assert reported == [(pytest.approx(100 * k / 5), f"step {k}") for k in range(1, 6)]


def test_a_flow_without_a_loss_reports_none(key):
    run = lambda: gf.solve(OrnsteinUhlenbeck(jnp.ones(2)), jnp.ones(2), [1.0], key=key)  # noqa: E731
    assert run().loss is None
    assert jax.jit(lambda: run().final)().shape == (2,)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused(line, key):
    with pytest.raises(ValueError, match="`batch_size` must be at most 4, the number of samples, but is 5"):
        gf.SGD(line, 0.1, batch_size=5, key=key)
    with pytest.raises(ValueError, match="`batch_size` must be an integer of at least 1"):
        gf.SGDFlow(line, 0.1, 0)
    with pytest.raises(ValueError, match="`problem` must be a gradflow"):
        gf.SGD(lambda w: w, 0.1, batch_size=1, key=key)
    with pytest.raises(ValueError, match="`sampling` must be one of"):
        gf.SGD(line, 0.1, batch_size=1, key=key, sampling="all")
    with pytest.raises(ValueError, match="`key` must be a random key, but is of type int"):
        gf.SGD(line, 0.1, batch_size=1, key=0)
    with pytest.raises(ValueError, match="`key` must be a random key, but is of type int"):
        gf.solve(gf.SGDFlow(line, 0.1, 1), jnp.array([START]), [1.0], key=0)
    with pytest.raises(ValueError, match="`order` must be 1 or 2"):
        gf.SGDFlow(line, 0.1, 1, order=3)
    with pytest.raises(ValueError, match="`dt` must be positive"):
        gf.solvers.EulerMaruyama(dt=0.0)
    with pytest.raises(ValueError, match="in Ito's sense"):
        gf.solvers.FixedSteps(diffrax.EulerHeun())
    flow, w = gf.SGDFlow(line, 0.1, 1), jnp.array([START])
    with pytest.raises(ValueError, match="`key` must be a random key for a stochastic flow, but is None"):
        gf.solve(flow, w, [1.0])
    with pytest.raises(ValueError, match="`solver` must be a method for stochastic flows"):
        gf.solve(flow, w, [1.0], key=key, solver=gf.solvers.Tsit5())
    with pytest.raises(ValueError, match="`solver` must be one for a flow without noise"):
        gf.solve(gf.GradientFlow(line), w, [1.0], solver=gf.solvers.EulerMaruyama())
    with pytest.raises(ValueError, match="`key` must be None for a deterministic flow"):
        gf.solve(gf.GradientFlow(line), w, [1.0], key=key)
    with pytest.raises(ValueError, match="`max_steps` must be at least the number of steps"):
        gf.solve(flow, w, [1.0], key=key, max_steps=3)
