"""Spectral rates, Lyapunov functions, the linearised flow and wide networks, each against something independent."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

import gradflow as gf
from gradflow.theory import effective_mu, faster_method, momentum_rates, relu_gram, stable_step

# Rates


LAMBDAS = np.array([0.01, 0.1, 1.0, 3.0])


def companion(lam, mu, s, method, resolution):
    """Rate of a mode from the eigenvalues of its matrix."""
    r, h = np.sqrt(mu * s), np.sqrt(s)
    if resolution == "discrete":
        beta, shrunk = (1 - r) / (1 + r), 1 - s * lam if method == "nesterov" else 1
        trace = (1 + beta) * shrunk if method == "nesterov" else 1 + beta - s * lam
        return -np.log(np.max(np.abs(np.linalg.eigvals([[trace, -beta * shrunk], [1, 0]])))) / h
    r, h = (r, h) if resolution == "high" else (0, 0)
    p = 2 * np.sqrt(mu) + (h * lam if method == "nesterov" else 0)
    return -np.max(np.linalg.eigvals([[0, 1], [-(1 + r) * lam, -p]]).real)


@pytest.mark.parametrize("resolution", ["high", "low", "discrete"])
@pytest.mark.parametrize("method", ["heavy_ball", "nesterov"])
def test_rates_are_those_of_the_companion_matrix(method, resolution):
    for mu in (1e-4, 0.0123, 0.5, 2.5):
        computed = momentum_rates(LAMBDAS, mu, 0.3, method, resolution)
        exact = [companion(lam, mu, 0.3, method, resolution) for lam in LAMBDAS]
        np.testing.assert_allclose(computed, exact, rtol=1e-6, atol=1e-9)


def test_underdamped_rates_and_the_tie():
    s, min_eigenvalue = 0.2, 0.5
    crossover = min_eigenvalue - s * min_eigenvalue**2 / 4
    for mu in (0.01, 0.2, 0.99 * crossover):
        assert momentum_rates([min_eigenvalue], mu, s, "heavy_ball")[0] == pytest.approx(np.sqrt(mu), rel=1e-12)
        expected = np.sqrt(mu) + np.sqrt(s) * min_eigenvalue / 2
        assert momentum_rates([min_eigenvalue], mu, s, "nesterov")[0] == pytest.approx(expected, rel=1e-12)
        assert faster_method([min_eigenvalue, 4.0], mu, s).name == "nesterov"
    assert faster_method([min_eigenvalue, 4.0], 0.2, s).crossover == pytest.approx(crossover, rel=1e-14)
    # Both decay at sqrt(lambda) where mu is the smallest eigenvalue; above it Nesterov's method is the slower one.
    tie = faster_method([min_eigenvalue, 4.0], min_eigenvalue, s)
    assert (tie.name, tie.heavy_ball) == ("tie", pytest.approx(np.sqrt(min_eigenvalue), rel=1e-12))
    assert tie.nesterov == pytest.approx(np.sqrt(min_eigenvalue), rel=1e-12)
    for mu in (1.01 * min_eigenvalue, 1.5 * min_eigenvalue, 4.0):
        assert faster_method([min_eigenvalue, 4.0], mu, s).name == "heavy_ball"


def test_effective_mu_and_stable_steps():
    s, beta = 0.01, 0.9
    r = np.sqrt(effective_mu(beta, s) * s)
    assert (1 - r) / (1 + r) == pytest.approx(beta, rel=1e-14)
    for method in ("heavy_ball", "nesterov"):
        limit = stable_step(2.0, 0.6, method)
        mu_of = lambda step: effective_mu(0.6, step)  # noqa: E731
        for factor, sign in ((0.99, 1), (1.01, -1)):
            step = factor * limit
            assert np.sign(momentum_rates([2.0], min(mu_of(step), 2.0), step, method, "discrete")[0]) in (sign, 0, 1)


@pytest.mark.parametrize("kind", [gf.HeavyBallFlow, gf.NesterovFlow])
def test_measured_rates(kind):
    """Of the flow on a quadratic, from its closed form at late times, within a percent of the prediction."""
    s, y = 0.2, jnp.zeros(3)
    lam = np.array([0.3, 1.0, 4.0])
    problem = gf.EmpiricalRisk(jnp.diag(jnp.sqrt(lam)), y, gf.losses.square, predict_linear, reduction="sum")
    for mu in (0.05, 0.3, 1.2):
        flow = gf.LinearisedFlow(problem, jnp.ones(3), kind(problem, mu, s))
        # Over whole stretches the phase of the oscillation averages out.
        ts = np.linspace(40, 120, 4001)
        size = np.log(np.abs(np.asarray(flow.exact(ts))))
        method = "heavy_ball" if kind is gf.HeavyBallFlow else "nesterov"
        for mode, rate in enumerate(momentum_rates(lam, mu, s, method)):
            assert -np.polyfit(ts, size[:, mode], 1)[0] == pytest.approx(rate, rel=0.03 if mu == 0.3 else 0.01)


def predict_linear(w, x):
    return x @ w


# The tangent kernel


def test_gram_matrix_of_relu_networks():
    """The limit by averaging over many neurons, within its error; the empirical one is the tangent kernel."""
    x = np.random.default_rng(0).normal(size=(6, 4)) * np.array([1, 1, 1, 2, 0.5, 1])[:, None]
    limit = relu_gram(x)
    model = gf.models.SignedTwoLayer(4, 40_000, key=jax.random.key(1))
    weight = np.asarray(model.weight)
    empirical = relu_gram(x, weight)
    bound = 5 * np.abs(x @ x.T) * 0.5 / np.sqrt(40_000)
    assert np.all(np.abs(empirical - limit) <= bound)
    np.testing.assert_allclose(np.diag(limit), np.sum(x**2, axis=1) / 2, rtol=1e-14)
    small = gf.models.SignedTwoLayer(4, 30, key=jax.random.key(2))
    problem = gf.EmpiricalRisk(x, np.ones(6), gf.losses.square)
    np.testing.assert_allclose(gf.observables.NTK(problem)(small), relu_gram(x, small.weight), atol=1e-13)
    assert np.linalg.eigvalsh(limit)[0] > 0


def test_signs_do_not_flow():
    model = gf.models.SignedTwoLayer(3, 8, key=jax.random.key(0))
    problem = gf.EmpiricalRisk(np.eye(3), np.ones(3), gf.losses.square)
    sol = gf.iterate(gf.HeavyBall(problem, 0.1, momentum=0.9), model, 5)
    assert np.array_equal(sol.final.signs, model.signs)
    assert set(np.asarray(model.signs).tolist()) <= {-1, 1}
    movement = gf.observables.NeuronMovement(model)(sol.final)
    np.testing.assert_allclose(
        movement, np.linalg.norm(np.asarray(sol.final.weight - model.weight), axis=1), rtol=1e-12
    )


# The linearised flow


@pytest.fixture(scope="module")
def linear_problem():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(5, 7)), rng.normal(size=5)
    return gf.EmpiricalRisk(x, y, gf.losses.square, predict_linear), jnp.asarray(rng.normal(size=7))


SLOW_FLOWS = [pytest.param(flow, marks=pytest.mark.slow) for flow in (None, gf.HeavyBallFlow)]


@pytest.mark.parametrize("kind", [gf.NesterovFlow, *SLOW_FLOWS])
def test_closed_form_of_a_linear_model(linear_problem, kind):
    """Where the model is linear nothing is approximated: predictions of the flow of its parameters."""
    problem, start = linear_problem
    flow = gf.GradientFlow(problem) if kind is None else kind(problem, 0.05, 0.2)
    linear = gf.LinearisedFlow(problem, start, None if kind is None else flow)
    ts = np.array([0.0, 0.5, 3.0, 20.0])
    sol = gf.solve(flow, start, ts, rtol=1e-10, solver=gf.solvers.Tsit5())
    np.testing.assert_allclose(linear.exact(ts), sol.params @ problem.x.T, atol=1e-8)
    if kind is gf.NesterovFlow:
        direct = gf.solve(linear, linear.start, ts, rtol=1e-10, solver=gf.solvers.Tsit5())
        np.testing.assert_allclose(direct.params, linear.exact(ts), atol=1e-8)
        path = (jnp.array([0.0, 30.0]), jnp.stack([linear.kernel, linear.kernel]))
        moving = gf.LinearisedFlow(problem, start, flow, path)
        again = gf.solve(moving, moving.start, ts, rtol=1e-10, solver=gf.solvers.Tsit5())
        np.testing.assert_allclose(again.params, direct.params, atol=1e-9)


def test_double_roots_and_overdamped_modes():
    from gradflow.flows._linearised_flow import oscillation

    t = jnp.array([[0.0], [1e-3], [1.0], [50.0], [1000.0]])
    p, q = jnp.array([2.0, 2.0, 2.0, 5.0, 2.0, 200.0]), jnp.array([1.0, 1 + 1e-13, 1 - 1e-13, 1e-6, 100.0, 1.0])
    computed = np.asarray(oscillation(t, p[None], q[None], jnp.full((1, 6), 1.5), jnp.full((1, 6), -0.5)))
    for j in range(6):
        matrix = np.array([[0, 1], [-float(q[j]), -float(p[j])]])
        for i in range(5):
            exact = (scipy.linalg.expm(matrix * float(t[i, 0])) @ [1.5, -0.5])[0]
            assert computed[i, j] == pytest.approx(exact, rel=1e-6, abs=1e-9)


def test_bad_coefficients_of_momentum():
    for momentum in (1.0, np.array([0.5, 1.5])):
        with pytest.raises(ValueError, match=r"`momentum` must lie in \[0, 1\)"):
            effective_mu(momentum, 0.1)
    with pytest.raises(ValueError, match="`momentum` must not be negative"):
        effective_mu(-0.1, 0.1)
    with pytest.raises(ValueError, match="`beta` must not be negative"):
        stable_step(1.0, -0.1, "nesterov")


def test_bad_input_of_the_linearised_flow(linear_problem):
    problem, start = linear_problem
    with pytest.raises(ValueError, match=r"`path` must be times \(T,\) and kernels"):
        gf.LinearisedFlow(problem, start, path=(jnp.ones(2), jnp.ones((2, 3, 3))))
    kernels = jnp.stack([gf.LinearisedFlow(problem, start).kernel] * 2)
    with pytest.raises(ValueError, match="`path` must have increasing times"):
        gf.LinearisedFlow(problem, start, path=(jnp.array([1.0, 0.0]), kernels))
    with pytest.raises(ValueError, match="have constant coefficients"):
        gf.LinearisedFlow(problem, start, gf.NesterovConvexFlow(problem, 0.1)).exact([1.0])
    with pytest.raises(ValueError, match=r"Start from flow\.start"):
        gf.solve(gf.LinearisedFlow(problem, start), start, [1.0])
    other = gf.EmpiricalRisk(problem.x, jnp.sign(problem.y), gf.losses.logistic, predict_linear)
    with pytest.raises(ValueError, match=r"have the loss gradflow\.losses\.square"):
        gf.LinearisedFlow(other, start).exact([1.0])


# Lyapunov functions


class Convex(eqx.Module):
    """Softplus terms, a few nearly kinks, and a quadratic that makes it `mu`-strongly convex."""

    matrix: jax.Array
    shift: jax.Array
    mu: jax.Array

    def __call__(self, w):
        return jnp.sum(jax.nn.softplus(self.matrix @ w - self.shift)) + 0.5 * self.mu * jnp.sum(w**2)


@pytest.fixture(scope="module")
def convex():
    """A hundred of them, of sharpness up to one hundred, with minimum and start."""
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(100, 6, 3)) * np.exp(rng.uniform(-1, 1.5, size=(100, 6, 1)))
    shifts, mus = rng.normal(size=(100, 6)), np.exp(rng.uniform(-3, 0, size=100))
    minima = []
    for a, b, mu in zip(matrices, shifts, mus, strict=True):

        def gradient(w, a=a, b=b, mu=mu):
            return a.T @ (1 / (1 + np.exp(-(a @ w - b)))) + mu * w

        sol = scipy.optimize.root(gradient, np.zeros(3), tol=1e-14)
        assert np.linalg.norm(gradient(sol.x)) < 1e-10
        minima.append(sol.x)
    problems = Convex(jnp.asarray(matrices), jnp.asarray(shifts), jnp.asarray(mus))
    return problems, jnp.asarray(np.array(minima)), jnp.asarray(rng.normal(size=(100, 3)) * 2)


def lyapunov_along(make, convex, horizon, versions=("sharp", "published")):
    problems, minima, starts = convex
    # Step sizes of the method up to one over the sharpness, and so for the flow.
    bound = 0.25 * jnp.sum(problems.matrix**2, axis=(1, 2)) + problems.mu
    distances = jnp.exp(jnp.asarray(np.random.default_rng(1).uniform(-4, 0, size=100)))

    def run(problem, minimum, start, s):
        observe = {version: gf.observables.Lyapunov(minimum, kind=version) for version in versions}
        flow = make(problem, s)
        ts = jnp.asarray(flow.t0) + horizon * jnp.linspace(0, 1, 101)
        return gf.solve(flow, start, ts, rtol=1e-9, observe=observe, throw=False, save_params=False)

    return eqx.filter_jit(eqx.filter_vmap(run))(problems, minima, starts, distances / bound)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [gf.HeavyBallFlow, gf.NesterovFlow])
@pytest.mark.parametrize("resolution", ["high", "low"])
def test_lyapunov_functions_of_strongly_convex_flows(convex, kind, resolution):
    """They fall at the rates stated, `exp(-sqrt(mu) t)` and `exp(-sqrt(mu) t / 4)`, on every problem."""
    sol = lyapunov_along(lambda problem, s: kind(problem, problem.mu, s, resolution), convex, 8.0)
    assert (sol.code == 0).all()
    root = np.sqrt(np.asarray(convex[0].mu))[:, None]
    for name, rate in (("sharp", root), ("published", root / 4)):
        values = np.asarray(sol.observed[name])
        assert np.all(values >= -1e-9)
        scaled = values * np.exp(rate * np.asarray(sol.ts))
        assert np.all(np.diff(scaled, axis=1) <= 1e-7 * scaled[:, :1]), name


@pytest.mark.slow
@pytest.mark.parametrize(("resolution", "alpha"), [("high", 3.0), ("low", 3.0), ("high", 5.0)])
def test_lyapunov_function_of_the_convex_flow(convex, resolution, alpha):
    sol = lyapunov_along(
        lambda problem, s: gf.NesterovConvexFlow(problem, s, alpha, resolution), convex, 8.0, ("sharp",)
    )
    assert (sol.code == 0).all()
    values = np.asarray(sol.observed["sharp"])
    assert np.all(np.diff(values, axis=1) <= 1e-7 * values[:, :1])


def test_a_lyapunov_function_along_one_run_and_where_there_is_none():
    problem, s = Convex(jnp.eye(2), jnp.zeros(2), jnp.array(0.5)), 0.1
    sharp = gf.observables.Lyapunov(jnp.full(2, -0.5))
    with pytest.raises(ValueError, match="observing a GradientDescent, which has none"):
        gf.iterate(gf.GradientDescent(problem, s), jnp.ones(2), 3, observe={"e": sharp})
    with pytest.raises(ValueError, match="observing a GradientFlow, which has none"):
        gf.solve(gf.GradientFlow(problem), jnp.ones(2), [1.0], observe={"e": sharp})


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_lyapunov_function_is_refused():
    with pytest.raises(ValueError, match="`kind` must be one of 'sharp', 'published'"):
        gf.observables.Lyapunov(jnp.zeros(2), kind="dull")


# Wide networks


@pytest.fixture(scope="module")
def wide_networks():
    """Eight digits, networks of increasing width, several seeds each; the heavy ball and Nesterov's method."""
    data = gf.data.digits(classes=(0, 1), n=8, centre=True, unit_norm=True, labels="pm1")
    problem = gf.EmpiricalRisk(*data, gf.losses.square, reduction="sum")
    gram = relu_gram(data.x)
    values = np.linalg.eigvalsh(gram)
    s, mu = 0.1 / values[-1], values[0]
    return problem, s, mu


def train(problem, s, mu, width, seeds, steps=150):
    def run(key):
        model = gf.models.SignedTwoLayer(64, width, key=key)
        rule = gf.Nesterov(problem, s, mu=mu)
        observe = {"moved": gf.observables.NeuronMovement(model), "u": problem.predictions}
        return gf.iterate(rule, model, steps, observe=observe, save_params=False, throw=False), model

    return eqx.filter_vmap(run)(jax.random.split(jax.random.key(0), seeds))


@pytest.mark.slow
def test_neurons_move_less_in_wider_networks_and_the_linearised_flow_tracks_them(wide_networks):
    """Largest movement like `width^(-1/2)`, all together not at all; errors of a few percent."""
    problem, s, mu = wide_networks
    widths, seeds = [512, 2048, 8192], 6
    largest, whole, errors = [], [], []
    for width in widths:
        sol, models = train(problem, s, mu, width, seeds)
        movement = np.asarray(sol.observed["moved"])[:, -1]
        largest.append(np.mean(np.max(movement, axis=1)))
        whole.append(np.linalg.norm(movement, axis=1))
        for seed in range(2 if width == widths[-1] else 0):
            model = eqx.filter(models, eqx.is_array)
            model = eqx.combine(jax.tree_util.tree_map(lambda leaf, i=seed: leaf[i], model), models)
            linear = gf.LinearisedFlow(problem, model, gf.NesterovFlow(problem, mu, s)).exact(sol.ts[seed])
            u = np.asarray(sol.observed["u"])[seed]
            away = np.linalg.norm(u - np.asarray(linear), axis=1)
            errors.append(np.max(away) / np.linalg.norm(u[0] - np.asarray(problem.y)))
    slope = np.polyfit(np.log(widths), np.log(largest), 1)[0]
    assert abs(slope + 0.5) <= 0.05
    # One slope from each seed; their mean is zero within three standard errors.
    each = np.polyfit(np.log(widths), np.log(np.array(whole)), 1)[0]
    assert abs(np.mean(each)) <= 3 * np.std(each, ddof=1) / np.sqrt(seeds)
    # What is left in a wide network is the distance of the method from its flow, of order s.
    assert max(errors) < 0.03


def test_flow_on_one_sample_and_one_neuron():
    problem = gf.EmpiricalRisk(np.ones((1, 2)), np.ones(1), gf.losses.square)
    model = gf.models.SignedTwoLayer(2, 1, key=jax.random.key(3))
    linear = gf.LinearisedFlow(problem, model)
    assert linear.exact([0.0, 1.0]).shape == (2, 1)
    assert linear.eigenvalues.shape == (1,)
