"""Smoothed ReLU: formula, homogeneity, limits; sliding neurons against Filippov's solution from event location."""

import importlib.util
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.models._smoothed import length, smooth

BENCHMARK = pathlib.Path(gf.__file__).parent.parent / "benchmarks" / "nonsmooth.py"

pytestmark = pytest.mark.slow


TRACES = []


class Counting(eqx.Module):
    """A smoothing that tells when it is traced."""

    predict: gf.models.Smoothed

    def __call__(self, params, x):
        TRACES.append(1)
        return self.predict(params, x)

    def conserved(self, params):
        return self.predict.conserved(params)


def leaky(z):
    return jnp.where(z >= 0, z, 0.1 * z)


def by_hand(z, reach, low):
    """The quartic that joins `low * z` and `z` over `|z| < reach`."""
    u = np.clip(z / reach, -1, 1)
    bent = reach * (3 + 6 * u**2 - u**4) / 8
    return (1 + low) / 2 * z + (1 - low) / 2 * np.where(np.abs(z) < reach, bent, np.abs(z))


@pytest.mark.parametrize(("activation", "low"), [(jax.nn.relu, 0.0), (leaky, 0.1), (jnp.abs, -1.0)])
def test_rounding_follows_the_formula_and_is_twice_differentiable(activation, low):
    z = jnp.linspace(-1, 1, 401)
    fn = lambda z: smooth(activation, z, jnp.asarray(0.8), 0.5)  # noqa: E731
    np.testing.assert_allclose(jax.vmap(fn)(z), by_hand(np.asarray(z), 0.4, low), atol=1e-15)
    for order, slope in ((jax.grad(fn), 1 - low), (jax.grad(jax.grad(fn)), 0.0)):
        values = np.asarray(jax.vmap(order)(z))
        # Without a jump, neighbours on the grid differ in proportion to its spacing.
        steepest = 1.5 * (1 - low) / 2 * (1 / 0.4 if slope else 2 / 0.4**2)
        assert np.abs(np.diff(values)).max() <= 1.001 * steepest * 0.005
        assert np.isclose(values[-1] - values[0], slope, atol=1e-12)


def model_of(kind, key, **options):
    if kind == "two_layer":
        return gf.models.TwoLayer(3, 6, 2, key=key, **options)
    return gf.models.MLP(3, 6, 2, depth=3, activation=jax.nn.relu, use_bias=False, key=key, **options)


@pytest.mark.parametrize(("kind", "degree"), [("two_layer", 2), ("mlp", 4)])
def test_smoothed_networks_stay_homogeneous(kind, degree, key):
    x, model = jax.random.normal(jax.random.key(1), (20, 3)), model_of(kind, key, parametrisation="ntk")
    predict = gf.models.Smoothed(0.3)
    plain, base = jax.vmap(model)(x), predict(model, x)
    assert float(jnp.abs(base - plain).max()) > 1e-2  # bands were entered
    for c in (1e-6, 0.3, 1e4):
        scaled = jax.tree_util.tree_map(lambda leaf, c=c: c * leaf if eqx.is_inexact_array(leaf) else leaf, model)
        np.testing.assert_allclose(predict(scaled, x), c**degree * base, rtol=1e-11, atol=1e-13 * c**degree)
    if kind == "two_layer":  # of degree one in the input, too
        np.testing.assert_allclose(predict(model, 7 * x), 7 * base, rtol=1e-11, atol=1e-13)


def test_a_layer_with_biases_is_homogeneous_in_weights_and_biases(key):
    model = gf.models.MLP(3, 6, depth=2, activation=jax.nn.relu, key=key)
    keys = jax.random.split(key, 3)
    biases = tuple(jax.random.normal(k, b.shape) for k, b in zip(keys, model.biases, strict=True))
    model = eqx.tree_at(lambda m: m.biases, model, biases)
    where = lambda m: (m.weights[1], m.biases[1], m.weights[2])  # noqa: E731
    w, b, v = where(model)
    other = eqx.tree_at(where, model, (5 * w, 5 * b, v / 5))
    x, predict = jax.random.normal(jax.random.key(1), (20, 3)), gf.models.Smoothed(0.3)
    np.testing.assert_allclose(predict(other, x), predict(model, x), rtol=1e-12, atol=1e-13)
    assert float(jnp.abs(predict(model, x) - jax.vmap(model)(x)).max()) > 1e-3


@pytest.mark.parametrize("kind", ["two_layer", "mlp"])
def test_no_smoothing_is_the_plain_network_with_its_gradient(kind, key):
    x, model = jax.random.normal(jax.random.key(1), (20, 3)), model_of(kind, key)
    first = (lambda m: m.weight) if kind == "two_layer" else (lambda m: m.weights[0])
    model = eqx.tree_at(first, model, first(model).at[0].set(0.0))  # with a neuron of zero
    plain = gf.EmpiricalRisk(x, x[:, :2], gf.losses.square)
    none = gf.EmpiricalRisk(x, x[:, :2], gf.losses.square, predict=gf.models.Smoothed(0.0))
    for a, b in zip(*(jax.tree_util.tree_leaves(eqx.filter_grad(p)(model)) for p in (plain, none)), strict=True):
        np.testing.assert_array_equal(a, b)
    little = gf.EmpiricalRisk(x, x[:, :2], gf.losses.square, predict=gf.models.Smoothed(1e-9))
    np.testing.assert_allclose(little(model), plain(model), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e15])
def test_gradients_and_curvatures_are_finite_at_any_size(size, dtype, key):
    weight = jnp.asarray(size, dtype) * jax.random.normal(key, (4, 3), dtype)
    x = jnp.ones(3, dtype).at[0].set(0)
    weight = weight.at[0, 1:].set(0)  # exactly on the kink

    def f(w):
        z, reach = w @ x, length(w) * length(x)
        return jnp.sum(smooth(jax.nn.relu, z, reach, 0.01))

    gradient, curvature = jax.jvp(jax.grad(f), (weight,), (weight,))
    assert gradient.dtype == dtype
    assert np.all(np.isfinite(gradient))
    # A gradient of degree zero does not change along the ray.
    assert np.all(np.abs(curvature) <= 1e3 * float(jnp.finfo(dtype).eps))
    if size:
        unit = jax.grad(f)(weight / jnp.asarray(size, dtype))
        np.testing.assert_allclose(gradient, unit, rtol=2e-3 if dtype == jnp.float32 else 1e-11, atol=1e-7)


def test_neurons_beyond_the_band_see_nothing_of_it(key):
    x = jnp.array([[1.0, 0.0], [0.9, 0.1]])
    model = gf.models.TwoLayer(2, 2, key=key)
    dead, alive = jnp.array([-1.0, 0.0]), jnp.array([1.0, 0.2])
    model = eqx.tree_at(lambda m: m.weight, model, jnp.stack([dead, alive]))
    slopes = [
        eqx.filter_grad(gf.EmpiricalRisk(x, jnp.ones(2), gf.losses.square, predict=predict))(model)
        for predict in (gf.models.Smoothed(0.5), None)
    ]
    np.testing.assert_array_equal(slopes[0].weight[0], 0)
    np.testing.assert_allclose(slopes[0].weight, slopes[1].weight, rtol=1e-14)


def test_one_neuron_in_its_cone_follows_the_closed_form():
    """Orthonormal inputs, all active, aligned: `c' = 2 c (|y| - c)`, which a smoothing below `1 / |y|` leaves alone."""
    y = jnp.array([1.0, 2.0, 2.0])
    model = gf.models.TwoLayer(3, 1, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: (m.weight, m.output), model, (0.1 * y[None] / 3, jnp.array([0.1])))
    problem = gf.EmpiricalRisk(jnp.eye(3), y, gf.losses.square, predict=gf.models.Smoothed(0.1), reduction="sum")
    sol = gf.solve(gf.GradientFlow(problem), model, jnp.linspace(0, 3, 7), rtol=1e-8)
    computed = jnp.linalg.norm(sol.params.weight[:, 0], axis=1) * sol.params.output[:, 0]
    np.testing.assert_allclose(computed, 3 / (1 + (3 / 0.01 - 1) * jnp.exp(-6 * sol.ts)), rtol=1e-6)
    assert float(sol.drift["balancedness"]) < 1e-7


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused(key):
    for bad in (-0.1, 1.0, np.nan, "wide"):
        with pytest.raises(ValueError, match="`smoothing` must"):
            gf.models.Smoothed(bad)
    with pytest.raises(ValueError, match="must be a scalar"):
        gf.models.Smoothed(np.array([0.1, 0.2]))
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="homogeneous of degree one"):
        gf.models.Smoothed(0.1)(gf.models.MLP(3, 4, key=key), x)
    with pytest.raises(ValueError, match="take a `smoothing`"):
        gf.models.Smoothed(0.1)(gf.models.DiagonalLinear(3), x)
    problem = gf.EmpiricalRisk(x, jnp.ones(2), gf.losses.square)
    with pytest.raises(ValueError, match="`band` must be positive"):
        gf.observables.SlidingNeurons(problem, 0.0)
    with pytest.raises(ValueError, match="one hidden layer"):
        gf.observables.SlidingNeurons(problem, 0.1)(gf.models.DiagonalLinear(3))
    with pytest.raises(ValueError, match="not hold `until`"):
        gf.filippov(lambda s: gf.GradientFlow(problem), gf.models.TwoLayer(3, 4, key=key), [1.0], until=None)
    with pytest.raises(ValueError, match="`smoothing` must be positive"):
        gf.filippov(lambda s: gf.GradientFlow(problem), gf.models.TwoLayer(3, 4, key=key), [1.0], smoothing=0.0)


@pytest.fixture(scope="module")
def sliding():
    """Two directions: problem, model, times, Filippov's solution, its events, and the extrapolated run."""
    spec = importlib.util.spec_from_file_location("nonsmooth", BENCHMARK)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    problem, model, ts, reference, log = bench.two_directions()

    def build(smoothing):
        predict = Counting(gf.models.Smoothed(smoothing))
        return gf.GradientFlow(gf.EmpiricalRisk(problem.x, problem.y, problem.loss, predict=predict))

    observe = {"loss": problem, "sliding": gf.observables.SlidingNeurons(problem, 0.005)}
    gf.solve(build(0.3), model, ts, rtol=1e-6, observe=observe, solver=gf.solvers.Tsit5())
    before = len(TRACES)
    computed = gf.filippov(build, model, ts, smoothing=0.02, rtol=1e-6, observe=observe, solver=gf.solvers.Tsit5())
    assert len(TRACES) == before, "another smoothing was compiled anew"
    return bench, problem, model, ts, reference, log, computed


def test_error_is_of_first_order_and_extrapolation_removes_it(sliding):
    bench, *_, reference, _, computed = sliding
    gaps = [np.linalg.norm(bench.history(run.params) - reference, axis=1) for run in computed.runs]
    at_end = [gap[-1] for gap in gaps]
    slopes = np.log2(np.array(at_end[:-1]) / np.array(at_end[1:]))
    np.testing.assert_allclose(slopes, 1, atol=0.15)
    assert abs(float(computed.order[-1]) - 1) < 0.15
    left = np.linalg.norm(bench.history(computed.params) - reference, axis=1)
    assert left[-1] < at_end[-1] / 10
    assert left.max() < gaps[-1].max() / 2
    # The estimate covers the error, and is not absurdly large.
    assert left[-1] < float(computed.error[-1]) < 20 * left[-1]
    assert "extrapolated to 0" in str(computed)
    assert int(computed.stats["steps"]) == sum(int(run.stats["steps"]) for run in computed.runs)


def test_the_observable_tells_who_slides_and_when(sliding):
    _, problem, _, ts, _, log, computed = sliding
    finest = computed.runs[-1]
    observed = np.asarray(finest.observed["sliding"])
    observable = gf.observables.SlidingNeurons(problem, 0.005)
    np.testing.assert_array_equal(eqx.filter_jit(eqx.filter_vmap(observable))(finest.params), observed)
    started = {(j, i): t for t, j, i, event in log if event == 2}
    ended = {(j, i): t for t, j, i, event in log if event == 1}
    assert set(ended) < set(started)
    columns = {0: slice(0, 3), 1: slice(3, 4)}  # the first input stands there three times
    for (j, i), began in started.items():
        inside = (ts > began + 0.5) & (ts < ended.get((j, i), np.inf) - 0.5)
        outside = (ts < began - 0.5) | (ts > ended.get((j, i), np.inf) + 0.5)
        assert observed[inside, columns[i], j].all()
        assert not observed[outside, columns[i], j].any()


def test_the_flow_keeps_alive_what_a_large_step_kills(sliding):
    """Early-stage theory's trap (arXiv 2305.12467): gradient descent sticks where the flow goes on falling."""
    _, problem, model, ts, reference, _, computed = sliding
    killed = gf.iterate(gf.GradientDescent(problem, 0.5), model, int(ts[-1] / 0.5))
    pattern = gf.observables.ActivationPattern(problem.x)
    assert not pattern(killed.final)[:, 2:].any()
    assert float(problem(killed.final)) > 0.249  # all it can still fit is the majority
    assert pattern(computed.final)[3, 2:].all()
    loss = np.asarray(computed.runs[-1].observed["loss"])
    assert np.all(np.diff(loss) < 0)
    exact = eqx.tree_at(lambda m: (m.weight, m.output), model, (reference[-1, :8].reshape(4, 2), reference[-1, 8:]))
    np.testing.assert_allclose(float(computed.observed["loss"][-1]), float(problem(exact)), rtol=1e-3)
    fine = gf.iterate(gf.GradientDescent(problem, 0.05), model, int(ts[-1] / 0.05))
    np.testing.assert_allclose(float(problem(fine.final)), float(problem(exact)), rtol=1e-2)


def test_sliding_costs_less_smoothed_and_the_energy_identity_holds(sliding):
    bench, problem, model, ts, reference, _, computed = sliding
    rough = gf.solve(gf.GradientFlow(problem), model, ts, rtol=1e-3, solver=gf.solvers.Tsit5())
    gap = np.linalg.norm(bench.history(rough.params) - reference, axis=1)
    left = np.linalg.norm(bench.history(computed.params) - reference, axis=1)
    assert left[-1] < gap[-1] / 5
    assert left.max() < gap.max()
    finest = computed.runs[-1]
    assert int(rough.stats["gradient_evaluations"]) > 2 * int(finest.stats["gradient_evaluations"])
    # Chattering, the squared gradient exceeds that of the average field, at any tolerance.
    assert float(rough.drift["energy"]) > 0.1
    assert float(finest.drift["energy"]) < 1e-4
    assert float(finest.drift["balancedness"]) < 1e-6


@pytest.mark.slow
def test_cost_against_the_unsmoothed_flow_at_a_tight_tolerance(sliding):
    bench, problem, model, ts, reference, _, computed = sliding
    tight = gf.solve(gf.GradientFlow(problem), model, ts, rtol=1e-4, solver=gf.solvers.Tsit5())
    gap = np.linalg.norm(bench.history(tight.params) - reference, axis=1)
    left = np.linalg.norm(bench.history(computed.params) - reference, axis=1)
    # How far off the unsmoothed run is depends on where its steps fall.
    assert left[-1] < gap[-1]
    ratio = int(tight.stats["gradient_evaluations"]) / int(computed.stats["gradient_evaluations"])
    print(f"unsmoothed over extrapolated: {ratio:.1f} times the gradients")
    assert ratio > 7


def test_many_smoothings_in_one_program(key):
    x = jax.random.normal(jax.random.key(1), (6, 3))
    model = gf.models.TwoLayer(3, 4, key=key)

    @jax.jit
    def run(smoothings):
        def one(s):
            predict = Counting(gf.models.Smoothed(s))
            flow = gf.GradientFlow(gf.EmpiricalRisk(x, x[:, 0], gf.losses.square, predict=predict))
            return gf.solve(flow, model, [2.0], rtol=1e-6, solver=gf.solvers.Bosh3()).final.weight

        return jax.vmap(one)(smoothings)

    together = run(jnp.array([0.3, 0.1, 0.0]))
    before = len(TRACES)
    again = run(jnp.array([0.2, 0.1, 0.0]))
    assert len(TRACES) == before
    np.testing.assert_allclose(again[1:], together[1:], rtol=1e-12)
    assert float(jnp.abs(again[0] - together[0]).max()) > 1e-6


@pytest.mark.slow
def test_float32_follows_float64(sliding):
    bench, problem, model, ts, _, _, computed = sliding
    cast = lambda tree: jax.tree_util.tree_map(  # noqa: E731
        lambda leaf: leaf.astype(jnp.float32) if eqx.is_inexact_array(leaf) else leaf, tree
    )
    flow = cast(bench.smoothed(problem)(0.02))
    sol = gf.solve(flow, cast(model), ts[:21], rtol=1e-5)
    assert sol.final.weight.dtype == jnp.float32
    wide = bench.history(computed.runs[0].params)[:21]
    np.testing.assert_allclose(bench.history(sol.params), wide, atol=2e-4)
