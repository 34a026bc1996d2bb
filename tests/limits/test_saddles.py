"""Predictions for small initialisation against closed forms worked by hand and runs of the flows they are about."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf

SUM = {"reduction": "sum"}
EXPLICIT = gf.solvers.Tsit5()


def identity(z):
    return z


def square(z):
    return z**2


def quadratic_form(a, b):
    """Inputs and targets with `x^T x = a` and `x^T y = b`."""
    x = np.linalg.cholesky(np.array(a, float)).T
    return x, np.linalg.solve(x.T, np.array(b, float))


# KKT points


@pytest.mark.slow
def test_kkt_points_of_linear_nets_are_singular_vectors():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(7, 2))
    problem = gf.EmpiricalRisk(x, y, gf.losses.square, **SUM)
    left, s, right = np.linalg.svd(y.T @ x)
    neuron = gf.models.TwoLayer(3, 1, 2, activation=identity, key=jax.random.key(0))
    points = gf.theory.kkt_points(gf.NeuralCorrelation(problem), neuron)
    # The point and its negative, which is the same function; the second singular vector is a saddle of N.
    assert points.values.size == 2
    np.testing.assert_allclose(points.values, s[0] / 2, rtol=1e-9)
    assert points.kinds == ("maximum", "maximum")
    assert points.ties == 2
    assert points.found.sum() == 64
    best = points.params(0)
    along = np.sign(np.asarray(best.weight)[0] @ right[0])
    np.testing.assert_allclose(np.asarray(best.weight)[0] * np.sqrt(2), along * right[0], atol=1e-7)
    np.testing.assert_allclose(np.asarray(best.output)[:, 0] * np.sqrt(2), along * left[:, 0], atol=1e-7)
    # Hessian of a W_zx w on the tangent space: eigenvalues +-s_2 and -s_1, and zero beyond the rank.
    np.testing.assert_allclose(points.curvatures, s[1], rtol=1e-7)
    np.testing.assert_allclose(points.rates, s[0] - s[1], rtol=1e-6)
    # At the saddle where the first mode has been fitted, the second one is the first.
    whitened = gf.EmpiricalRisk(np.eye(3), np.diag([3.0, 2.0, 1.0]), gf.losses.square, **SUM)
    one = gf.models.TwoLayer(3, 1, 3, activation=identity, key=jax.random.key(0))
    fitted = one.with_neuron_weights(jnp.sqrt(3.0) * jnp.eye(6)[:1] + jnp.sqrt(3.0) * jnp.eye(6)[3:4])
    residual = gf.theory.kkt_points(gf.NeuralCorrelation(whitened, at=fitted), one)
    assert residual.values[0] == pytest.approx(1.0, rel=1e-9)
    ties = gf.EmpiricalRisk(np.eye(3), np.diag([2.0, 2.0, 1.0]), gf.losses.square, **SUM)
    assert set(gf.theory.kkt_points(gf.NeuralCorrelation(ties), one).kinds) == {"degenerate"}


@pytest.mark.slow
def test_kkt_points_of_relu_in_its_cones():
    """`N* = |D| / 2` with `D` the sum of `z_i x_i` over the cone: against the search over directions of one layer."""
    rng = np.random.default_rng(4)
    neuron = gf.models.TwoLayer(3, 1, key=jax.random.key(0))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(9, 3)), np.abs(rng.normal(size=9))
        points = gf.theory.kkt_points(gf.NeuralCorrelation(gf.EmpiricalRisk(x, y, gf.losses.square)), neuron)
        assert points.values[0] == pytest.approx(gf.theory.relu_escape(x, y).correlation, rel=1e-9)
        for direction, value in zip(points.directions, points.values, strict=True):
            w, a = direction[:3], direction[3]
            d = (x[x @ w > 0].T @ y[x @ w > 0]) / 9
            assert value == pytest.approx(np.linalg.norm(d) / 2, rel=1e-7)
            np.testing.assert_allclose(w * np.sqrt(2), np.sign(a) * d / np.linalg.norm(d), atol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_no_feature_correlates():
    problem = gf.EmpiricalRisk(np.eye(2), -np.ones(2), gf.losses.square)
    layer = gf.models.OneLayer(2, 1, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"Make one of a problem: gradflow\.NeuralCorrelation"):
        gf.theory.kkt_points(problem, layer)
    with pytest.raises(ValueError, match="`tolerance` must be positive"):
        gf.theory.kkt_points(gf.NeuralCorrelation(problem), layer, tolerance=0.0)
    with pytest.raises(ValueError, match="be positive somewhere"):
        gf.theory.kkt_points(gf.NeuralCorrelation(problem), layer, starts=4)


# Diagonal linear nets in the limit


BY_HAND = {
    "both stay": ([[1, 0.5], [0.5, 1]], [1, 0.8], [0, 1, 5 / 3], [[0, 0], [1, 0], [0.8, 0.4]]),
    "one leaves and comes back negative": (
        [[2, 1], [1, 0.7]],
        [0.6, 0.5],
        [0, 5 / 3, 5 / 2, 20],
        [[0, 0], [0.3, 0], [0, 5 / 7], [-0.2, 1]],
    ),
    "a tie": ([[1, 0], [0, 2]], [1, -1], [0, 1], [[0, 0], [1, -0.5]]),
}


@pytest.mark.parametrize("name", list(BY_HAND))
def test_diagonal_saddles_by_hand(name):
    a, b, times, predictors = BY_HAND[name]
    computed = gf.theory.diagonal_saddles(*quadratic_form(a, b), **SUM)
    np.testing.assert_allclose(computed.times, times, rtol=1e-12)
    np.testing.assert_allclose(computed.predictors, predictors, atol=1e-12)
    assert np.all(np.diff(computed.losses) < 0)
    mean = gf.theory.diagonal_saddles(*quadratic_form(a, b))
    np.testing.assert_allclose(mean.times, 2 * np.array(times), rtol=1e-12)


def test_diagonal_flow_approaches_its_limit_like_one_over_the_logarithm():
    """The second jump of the first problem, where `beta_2` passes half of its final value."""
    a, b, times, predictors = BY_HAND["both stay"]
    problem = gf.EmpiricalRisk(*quadratic_form(a, b), gf.losses.square, **SUM)
    logs, off = np.log(10) * np.array([2.0, 16.0, 100.0, 1000.0]), []
    half = gf.Until(lambda model: model.v[1] * model.u[1], above=predictors[-1][1] / 2)

    def jump(log):
        start = gf.models.LogDiagonal(2, log_scale=-log)
        return gf.solve(gf.LogDiagonalFlow(problem), start, [1e5], until=half, save_params=False, throw=False)

    sol = jax.jit(jax.vmap(jump))(jnp.asarray(logs))
    assert set(sol.status) == {"stopped"}
    off = np.asarray(sol.t_final) / logs / times[-1] - 1
    orders = -np.diff(np.log(np.abs(off))) / np.diff(np.log(logs))
    np.testing.assert_allclose(orders[-2:], 1, atol=0.1)
    assert abs(off[-1]) < 2e-3


@pytest.mark.slow
def test_coordinate_that_leaves_and_comes_back():
    """The exact flow at `alpha = 1e-1000` passes the predicted saddles at the predicted times."""
    a, b, _, predictors = BY_HAND["one leaves and comes back negative"]
    problem = gf.EmpiricalRisk(*quadratic_form(a, b), gf.losses.square, **SUM)
    log = np.log(10) * 1000
    between = np.array([1.0, 2.1, 10.0, 21.0])
    sol = gf.solve(gf.LogDiagonalFlow(problem), gf.models.LogDiagonal(2, log_scale=-log), between * log)
    np.testing.assert_allclose(sol.params.beta(), predictors, atol=1e-3)


# Linear nets, detection


@pytest.fixture(scope="module")
def staircase():
    s = np.array([3.0, 2.0, 1.0])
    problem = gf.EmpiricalRisk(np.eye(3), np.diag(s), gf.losses.square, **SUM)
    model = gf.models.TwoLayer(3, 4, 3, activation=identity, key=jax.random.key(0))
    log = 100 * np.log(10)
    ts = np.linspace(0, 1.3 * log, 2001)
    return s, problem, log, gf.solve(gf.PolarFlow(problem), gf.Polar(model, -log), ts)


@pytest.mark.slow
def test_linear_net_visits_the_predicted_saddles(staircase):
    s, problem, log, sol = staircase
    predicted = gf.theory.linear_saddles(np.eye(3), np.diag(s), **SUM)
    saddles = gf.find_saddles(sol, problem)
    assert len(saddles) == 4
    np.testing.assert_allclose([f.loss for f in saddles], predicted.losses, atol=1e-3)
    # Time in units of ln(1/delta), up to O(1 / ln(1/delta)).
    np.testing.assert_allclose([f.entered / log for f in saddles], predicted.times, atol=2 / log)
    assert [f.index > 0 for f in saddles] == [True, True, True, False]
    np.testing.assert_allclose([f.rate for f in saddles[:3]], s, rtol=1e-3)
    # Predicted from each saddle alone, right to the time that a jump itself takes.
    for f in saddles[:3]:
        assert abs(f.predicted - f.left) < 3 / f.rate


def test_linear_saddles_need_modes_that_do_not_mix():
    computed = gf.theory.linear_saddles(np.eye(2), np.array([[2.0, 0.0], [0.0, 1.0]]), depth=3)
    np.testing.assert_allclose(computed.times, [0, 1, 2])
    # Principal axes of unequal variances, 4 and 1: the predictors are those of least squares.
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(5, 2)))[0]
    x, y = turn * np.array([2.0, 1.0]), turn @ np.diag([1.0, 3.0])
    computed = gf.theory.linear_saddles(x, y, **SUM)
    np.testing.assert_allclose(computed.times, [0, 1 / 3, 1 / 2])
    np.testing.assert_allclose(computed.predictors[-1], np.linalg.lstsq(x, y)[0].T, atol=1e-12)
    np.testing.assert_allclose(computed.losses, [5, 0.5, 0], atol=1e-12)
    with pytest.raises(ValueError, match="`x` must have the modes as principal axes"):
        gf.theory.linear_saddles(np.diag([1.0, 2.0]), np.array([[1.0, 0.5], [0.5, 1.0]]))


@pytest.mark.slow
def test_saddles_of_a_run_need_its_parameters(staircase):
    _, problem, _, sol = staircase
    with pytest.raises(ValueError, match="`sol` must hold the parameters"):
        gf.find_saddles(eqx.tree_at(lambda s: s.params, sol, None), problem)


# Algorithms that follow the theory


@pytest.mark.slow
def test_alternating_flow_equals_the_limit_of_a_diagonal_net():
    a, b, times, predictors = BY_HAND["both stay"]
    problem = gf.EmpiricalRisk(*quadratic_form(a, b), gf.losses.square, **SUM)
    computed = gf.alternating_flow(problem, gf.models.DiagonalLinear(2), -1000.0, solver=EXPLICIT)
    np.testing.assert_allclose(computed.times, 1000 * np.array(times), rtol=1e-5)
    betas = [np.asarray(saddle.beta()) for saddle in computed.saddles]
    np.testing.assert_allclose(betas, predictors[1:], atol=1e-4)
    assert computed.ended == "fitted"
    assert computed.activated == (0, 1)


@pytest.mark.slow
def test_alternating_flow_of_relu_neurons_predicts_the_flow():
    """Orthonormal inputs with labels of both signs, and neurons enough for each: two jumps, up to `O(1)` in time."""
    y = np.array([2.0, 1.0, -1.5])
    problem = gf.EmpiricalRisk(np.eye(3), y, gf.losses.square, **SUM)
    model = gf.models.TwoLayer(3, 12, key=jax.random.key(3))
    log = 300.0
    computed = gf.alternating_flow(problem, model, -log, solver=EXPLICIT)
    start = gf.Polar(model, -log * np.ones(12))
    ts = np.linspace(0, 1.5 * computed.times[-1], 1501)
    sol = gf.solve(gf.NeuronPolarFlow(problem), start, ts)
    seen = gf.find_saddles(sol, problem)
    assert len(seen) == len(computed.times)
    np.testing.assert_allclose([f.entered for f in seen[1:]], computed.times[1:], rtol=10 / log)
    np.testing.assert_allclose([f.loss for f in seen], computed.losses, atol=1e-2 * computed.losses[0])


@pytest.mark.slow
def test_alternating_flow_of_degree_three():
    """`a (w . x)^2`, orthonormal inputs: `c = 1/|w| - 1` at the speed `3 N`, `N = 2 |y| / 3^1.5`.

    Both neurons turn to the label 2 first; when the one of norm 0.01 has fitted it, the other has `99` of its `199`.
    """
    problem = gf.EmpiricalRisk(np.eye(2), np.array([1.0, 2.0]), gf.losses.square, **SUM)
    model = gf.models.TwoLayer(2, 2, activation=square, key=jax.random.key(0))
    rows = jnp.array([[1.0, 0.2, 0.5], [0.1, 1.0, 0.5]])
    computed = gf.alternating_flow(problem, model.with_neuron_weights(rows), np.log([5e-3, 1e-2]), degree=3, rounds=2)
    speed = 3 * 2 * 2.0 / 3**1.5
    np.testing.assert_allclose(computed.times[1:], [99 / speed, 99 / speed + 100 / (speed / 2)], rtol=1e-5)
    assert computed.activated == (1, 0)
    assert computed.losses[-1] < 1e-6


@pytest.mark.slow
def test_neuron_pursuit_lowers_the_loss_neuron_by_neuron():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 2))
    y, smoothed = np.abs(x[:, 0]) - 0.5 * np.maximum(x[:, 1], 0), gf.models.Smoothed(0.02)
    problem = gf.EmpiricalRisk(x, y, gf.losses.square, predict=smoothed)
    neuron = gf.models.TwoLayer(2, 1, key=jax.random.key(0))
    computed = gf.neuron_pursuit(problem, neuron, rounds=3, tolerance=1e-4, starts=16, solver=EXPLICIT)
    assert np.all(np.diff(computed.losses) < 0)
    # Three ReLU neurons make this target up.
    assert computed.losses[3] < 0.02 * computed.losses[0]
    assert computed.params.weight.shape == (3, 2)
    for options, message in (
        ({"seed_norm": 0.0}, "`seed_norm` must be positive"),
        ({"tolerance": -1.0}, "`tolerance` must be positive"),
        ({"horizon": np.nan}, "`horizon` must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            gf.alternating_flow(problem, gf.models.DiagonalLinear(2), -100.0, **options)
    with pytest.raises(ValueError, match=r"`log_norms` must be one number or 2, but is of shape \(3,\)"):
        gf.alternating_flow(problem, gf.models.DiagonalLinear(2), np.zeros(3))
    with pytest.raises(ValueError, match="`log_norms` must be finite"):
        gf.alternating_flow(problem, gf.models.DiagonalLinear(2), np.nan)
    with pytest.raises(ValueError, match="be a network of one neuron"):
        gf.neuron_pursuit(problem, gf.models.TwoLayer(2, 2, key=jax.random.key(0)))


@pytest.mark.slow
def test_diagonal_network_by_default():
    """In logarithmic coordinates, when all is learned: a stabilised method, against a tight explicit run."""
    x = jax.random.normal(jax.random.key(0), (20, 4))
    problem = gf.EmpiricalRisk(x, x @ jnp.array([3.0, -2.0, 1.0, 0.0]), gf.losses.square)
    flow, start = gf.LogDiagonalFlow(problem), gf.models.LogDiagonal(4, log_scale=-20.0)
    ts = [20.0, 40.0, 1000.0]
    plain = gf.solve(flow, start, ts, rtol=1e-8, solver=gf.solvers.Tsit5())
    sol = gf.solve(flow, start, ts)
    np.testing.assert_allclose(sol.params.beta(), plain.params.beta(), atol=1e-3)
    assert sol.stats["gradient_evaluations"] < plain.stats["gradient_evaluations"] / 8


def test_diagonal_network_from_far_below_the_smallest_number():
    """Two features that appear at 1/2 and 1, from 1e-1000, run on until thrice that time: at a hundredth of the cost
    of a method whose steps stability limits (39,651 gradients of `Tsit5`)."""
    problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([1.0, -2.0]), gf.losses.square, reduction="sum")
    start = gf.models.LogDiagonal(2, log_scale=-2302.585)
    sol = gf.solve(gf.LogDiagonalFlow(problem), start, jnp.array([0.4, 0.6, 3.0]) * 2302.585)
    np.testing.assert_allclose(sol.params.beta(), [[0, 0], [0, -2], [1, -2]], atol=1e-5)
    assert sol.method == "RKC2"
    assert int(sol.stats["gradient_evaluations"]) < 4000
