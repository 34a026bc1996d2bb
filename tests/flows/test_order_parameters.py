"""The order-parameter flow: one expected step of SGD, closed forms, limits, invariants, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special

import gradflow as gf
from gradflow.flows._order_parameters import REGIMES


def erf(x):
    return scipy.special.erf(x / np.sqrt(2))


def slope(x):
    return np.sqrt(2 / np.pi) * np.exp(-(x**2) / 2)


PLATEAUS = [(1.0, 1e-5), (1.0, 1e-4), (1.0, 1e-3), (0.1, 1e-3), (0.01, 1e-3), (0.001, 1e-3)]
"""Learning rates over width and noises; the last four are those of d = 1, 10^2, 10^4, 10^6 at kappa + delta = 1/2."""


@pytest.fixture(scope="module")
def long_runs():
    """Eight students, four teachers, an informed start, to t = 10^6: one program for all of them.

    The last run is one without noise and with next to no learning rate: the green region at infinite `d`. Its risk
    falls to 2e-11, which takes parameters to better than the root of a hundredth of that.
    """
    problem = gf.TeacherStudent.orthogonal(200, 4)
    start = problem.order_parameters(problem.informed(8, jax.random.key(0)))
    ts = np.append(0, np.geomspace(1e2, 1e6, 9))

    def lowest(params):
        joint = jnp.block([[params.Q, params.M], [params.M.T, jnp.eye(4)]])
        return jnp.linalg.eigvalsh(joint)[0]

    def skew(params):
        return jnp.max(jnp.abs(params.Q - params.Q.T))

    def run(g, noise):
        flow = gf.OrderParameterFlow(problem.P, gamma_over_p=g, noise=noise)
        observe = {"risk": flow.risk, "lowest": lowest, "skew": skew}
        return gf.solve(flow, start, ts, rtol=1e-6 if noise else 1e-8, observe=observe, save_params=False)

    return {pair: run(*pair) for pair in [*PLATEAUS, (1e-12, 0.0)]}


def march(flow, start, t, steps):
    """Fourth-order Runge-Kutta steps of one size: a program that compiles at once."""

    @jax.jit
    def run(state):
        def step(_, y):
            dt, field = t / steps, lambda y: flow.vector_field(jnp.zeros(()), y, None)
            add = lambda y, h, k: jax.tree_util.tree_map(lambda a, b: a + h * b, y, k)  # noqa: E731
            one = field(y)
            two = field(add(y, dt / 2, one))
            three = field(add(y, dt / 2, two))
            four = field(add(y, dt, three))
            return add(add(add(add(y, dt / 6, one), dt / 3, two), dt / 3, three), dt / 6, four)

        return flow.loss(jax.lax.fori_loop(0, steps, step, state), None)

    return float(run(flow.init(start, None)))


def small(noise=1e-2, **options):
    problem = gf.TeacherStudent.orthogonal(50, 2, noise=noise, **options)
    return problem, problem.order_parameters(problem.uninformed(3, jax.random.key(0)))


# One expected step


def step_by_simulation(W, teacher, v, g, noise, samples, seed, normalised=True, batch=1):
    """Mean and standard error of `d / g` times the change of `Q`, `M` and `v` in one step of SGD."""
    rng = np.random.default_rng(seed)
    p, d = W.shape
    k = teacher.shape[0]
    over_p, over_k = (p, k) if normalised else (1, 1)
    x = rng.normal(size=(samples, d))
    fields, taught = x @ W.T / np.sqrt(d), x @ teacher.T / np.sqrt(d)
    error = erf(taught).sum(axis=1) / over_k + np.sqrt(noise) * rng.normal(size=samples) - erf(fields) @ v / over_p
    push = g / np.sqrt(d) * (error[:, None] * v * slope(fields))
    displacement = push[:, :, None] * x[:, None, :]
    displacement = displacement.reshape(-1, batch, p, d).mean(axis=1)
    dM = displacement @ teacher.T / d
    cross = displacement @ W.T / d
    dQ = cross + cross.transpose(0, 2, 1) + np.einsum("sja,sla->sjl", displacement, displacement) / d
    dv = (g / d * error[:, None] * erf(fields)).reshape(-1, batch, p).mean(axis=1)
    scaled = [change * d / g for change in (dQ, dM, dv)]
    return [(np.mean(change, axis=0), np.std(change, axis=0) / np.sqrt(len(change))) for change in scaled]


@pytest.mark.slow
@pytest.mark.parametrize(("normalised", "batch"), [(True, 1), (False, 1), (False, 4)])
def test_expected_step_of_sgd_is_met_exactly_at_any_dim(normalised, batch):
    """Six inputs, a step large enough that its square matters, noise and a second layer; 4 10^5 samples.

    Eighteen numbers within 4.5 standard errors, which chance exceeds once in 10^4. The correction in `d` is the
    largest of them by more than twice that, so that half of it would be told from the whole.
    """
    d, g, noise = 6, 2.0, 0.3
    rng = np.random.default_rng(0)
    W, teacher, v = rng.normal(size=(3, d)), rng.normal(size=(2, d)), np.array([1.0, 0.5, -0.8])
    problem = gf.TeacherStudent(teacher, noise=noise, normalised=normalised)
    params = problem.order_parameters((W, v))
    measured = step_by_simulation(W, teacher, v, g, noise, 400_000, 1, normalised, batch)

    def rate(dim):
        flow = gf.OrderParameterFlow(problem, gamma_over_p=g, dim=dim, second_layer_rate=1.0, batch_size=batch)
        computed = flow.vector_field(jnp.zeros(()), flow.init(params, None), None)
        return flow.params(computed).Q, computed.M, computed.output

    for ours, (mean, error) in zip(rate(d), measured, strict=True):
        assert np.all(np.abs(np.asarray(ours) - mean) <= 4.5 * error)
    (mean, error), *_ = measured
    assert np.max(np.abs(np.asarray(rate(None)[0]) - mean) / error) > 2 * 4.5


# Whole runs


def test_groups_of_terms_add_up():
    problem, start = small()
    flow = gf.OrderParameterFlow(problem, gamma_over_p=1.0)
    state = flow.init(start, None)
    parts = [gf.OrderParameterFlow(problem, gamma_over_p=1.0, terms=[name]) for name in REGIMES["full"]]
    rates = jax.jit(lambda s: [part.vector_field(jnp.zeros(()), s, None) for part in [flow, *parts]])(state)
    together = jax.tree_util.tree_map(lambda *leaves: sum(leaves), *rates[1:])
    for whole, summed in zip(jax.tree_util.tree_leaves(rates[0]), jax.tree_util.tree_leaves(together), strict=True):
        np.testing.assert_allclose(whole, summed, rtol=1e-12, atol=1e-15)
    assert not np.any(rates[2].M)
    assert not np.any(rates[1].Q)
    # The green terms are what is left as `g` goes to zero.
    green, tiny = (
        jax.jit(lambda s, f=f: f.vector_field(jnp.zeros(()), s, None))(state)
        for f in (
            gf.OrderParameterFlow(problem, gamma_over_p=1.0, terms="green"),
            gf.OrderParameterFlow(problem, gamma_over_p=1e-30),
        )
    )
    np.testing.assert_allclose(green.Q, tiny.Q, rtol=1e-12, atol=1e-15)
    assert set(REGIMES["green"]) | set(REGIMES["orange"]) == set(REGIMES["blue"]) == set(REGIMES["full"])


@pytest.mark.slow
def test_state_stays_a_covariance_to_a_million(long_runs):
    """`Q` is symmetric by construction; `[[Q, M], [M^T, P]]`, of rank four of twelve at the start, stays semi-definite.

    To a tenth of the tolerance, for without noise and learning rate the rank stays four, and the errors of the solve
    have either sign.
    """
    for sol in long_runs.values():
        assert not np.any(sol.observed["skew"])
        assert np.min(sol.observed["lowest"]) >= -0.1 * 1e-6
        assert int(sol.stats["gradient_evaluations"]) < 30_000


@pytest.mark.slow
def test_plateau_law(long_runs):
    """`A g noise / (1 - 2 A g)`, `A = 1 / (2 pi sqrt 3)`: within 2 % at `g = 1`, within 0.2 % for `g <= 0.1`.

    At `g = 1` the height is in proportion to the noise within 1 % over two decades, and no longer moves.
    """
    A = 1 / (2 * np.pi * np.sqrt(3))
    computed = {pair: np.asarray(long_runs[pair].observed["risk"]) for pair in PLATEAUS}
    for (g, noise), risk in computed.items():
        law = A * g * noise / (1 - 2 * A * g)
        assert risk[-1] == pytest.approx(law, rel=0.02 if g == 1 else 0.002)
        assert risk[-1] == pytest.approx(risk[-2], rel=0.005)
    ratios = [computed[1.0, noise][-1] / noise for noise in (1e-5, 1e-4, 1e-3)]
    np.testing.assert_allclose(ratios, ratios[1], rtol=0.01)


@pytest.mark.slow
def test_plateau_at_finite_dim(long_runs):
    """`g = d^-1/2`, that is `kappa + delta = 1/2`: the power of `d` is -0.50 within 0.01 from 10^2 to 10^6.

    It is steeper at small `d`, by the factor `1 / (1 - 2 A g)`: -0.53 between 1 and 10^2.
    """
    rates = np.array([1.0, 0.1, 0.01, 0.001])
    heights = [float(long_runs[g, 1e-3].observed["risk"][-1]) for g in rates]
    slopes = np.diff(np.log(heights)) / np.diff(np.log(rates**-2.0))
    np.testing.assert_allclose(slopes[1:], -0.5, rtol=0, atol=0.01)
    assert -0.56 < slopes[0] < -0.51


@pytest.mark.slow
def test_tail_of_the_green_region(long_runs):
    """Twice as many erf students as teachers, no noise: `R ~ t^-2`, within 0.05 over the last decades."""
    sol = long_runs[1e-12, 0.0]
    ts, risk = np.asarray(sol.ts)[-5:], np.asarray(sol.observed["risk"])[-5:]
    local = np.diff(np.log(risk)) / np.diff(np.log(ts))
    np.testing.assert_allclose(local, gf.theory.GREEN_TAIL, rtol=0, atol=0.06)
    assert local[-1] == pytest.approx(gf.theory.GREEN_TAIL, abs=0.015)


@pytest.mark.slow
def test_no_noise_no_step_size_is_gradient_flow_of_the_risk():
    """With the terms of order `g` left out the flow is gradient flow of the population risk over the weights."""
    problem = gf.TeacherStudent.orthogonal(12, 2, noise=0.5)
    W = problem.uninformed(3, jax.random.key(1))
    ts = np.array([0.0, 3.0, 30.0])
    short = {"rtol": 1e-7, "solver": gf.solvers.Tsit5()}
    weights = gf.solve(gf.GradientFlow(problem), W, 12 * 3 * ts, **short)
    flow = gf.OrderParameterFlow(problem, gamma_over_p=1.0, terms="green")
    sol = gf.solve(flow, problem.order_parameters(W), ts, **short)
    overlaps = jax.vmap(problem.order_parameters)(weights.params)
    # One unit of t is d/g steps of size gamma / (p d) on w / sqrt d: d p units of gradient flow time.
    np.testing.assert_allclose(sol.params.Q, overlaps.Q, rtol=0, atol=1e-6)
    np.testing.assert_allclose(sol.params.M, overlaps.M, rtol=0, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(flow.risk)(sol.params), jax.vmap(problem)(weights.params), rtol=0, atol=1e-7)


@pytest.mark.slow
def test_overparametrised_reduction_is_the_limit_of_wide_students():
    """The gap to the full system without terms of order `g` falls like `1/p`; it grows with time."""
    sizes, times = (16, 32, 64), (1.0, 5.0)
    gaps = np.zeros((2, 3))
    problem = gf.TeacherStudent.orthogonal(2000, 2)
    drawn = problem.order_parameters(problem.uninformed(64, jax.random.key(0))).M
    full = gf.OrderParameterFlow(problem, gamma_over_p=1.0, terms="green")
    reduced = gf.flows.OverparametrisedFlow(problem)
    for j, p in enumerate(sizes):
        M = drawn[:p]
        start = gf.OrderParameters(M @ M.T + jnp.diag(jnp.linspace(0.5, 1.5, p)), M)
        for i, t in enumerate(times):
            exact = march(full, start, t, 20 * int(t))
            gaps[i, j] = abs(march(reduced, reduced.reduce(start), t, 20 * int(t)) / exact - 1)
    slopes = np.diff(np.log(gaps)) / np.log(2)
    np.testing.assert_allclose(slopes[:, -1], -1, rtol=0, atol=0.1)
    np.testing.assert_allclose(gaps[:, -1] * 64, [1.5, 13], rtol=0.05)


@pytest.mark.slow
def test_mean_field_tail_of_phase_retrieval():
    """`x^2`, one teacher, many students: `R ~ t^-2`, the classical mean-field limit."""
    problem = gf.TeacherStudent.orthogonal(500, 1, activation="square")
    flow = gf.flows.OverparametrisedFlow(problem)
    start = flow.reduce(problem.order_parameters(problem.uninformed(100, jax.random.key(0))))
    ts = np.geomspace(20, 2000, 9)
    sol = gf.solve(flow, start, ts, rtol=1e-7, observe={"risk": flow.risk})
    local = np.diff(np.log(sol.observed["risk"])) / np.diff(np.log(ts))
    assert local[-1] == pytest.approx(-2, abs=0.1)


@pytest.mark.slow
def test_schedules_and_second_layers():
    """A constant schedule is another learning rate on another clock; a second layer of ones that rests is none."""
    problem, start = small()
    short = {"rtol": 1e-7, "solver": gf.solvers.Tsit5()}
    plain = gf.solve(gf.OrderParameterFlow(problem, gamma_over_p=0.5), start, [20.0], **short).final
    half = gf.OrderParameterFlow(problem, gamma_over_p=1.0, schedule=lambda t: 0.5)
    with_output = gf.OrderParameters(start.Q, start.M, jnp.ones(3))
    both = gf.solve(half, with_output, [40.0], **short).final
    np.testing.assert_allclose(both.Q, plain.Q, rtol=1e-6)
    np.testing.assert_allclose(both.M, plain.M, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(both.output, np.ones(3))


@pytest.mark.slow
def test_vmap_over_constants_and_derivatives():
    """Learning rate and noise are leaves; derivatives with respect to them are those of differences."""
    problem, start = small()

    @jax.jit
    def last(g, noise):
        mine = gf.OrderParameterFlow(problem.P, gamma_over_p=g, noise=noise)
        return mine.risk(gf.solve(mine, start, [20.0], rtol=1e-7, throw=False, solver=gf.solvers.Tsit5()).final)

    rates, noises = jnp.array([0.25, 0.5, 1.0]), jnp.array([0.0, 1e-3, 1e-2])
    batch = jax.jit(jax.vmap(last))(rates, noises)
    np.testing.assert_allclose(batch, [last(g, n) for g, n in zip(rates, noises, strict=True)], rtol=1e-7)
    _, tangent = jax.jvp(last, (jnp.array(0.5), jnp.array(1e-3)), (jnp.array(1.0), jnp.array(0.1)))
    h = 1e-4
    numerical = (last(0.5 + h, 1e-3 + 0.1 * h) - last(0.5 - h, 1e-3 - 0.1 * h)) / (2 * h)
    assert float(tangent) == pytest.approx(float(numerical), rel=1e-4)


# What is refused


def good():
    return gf.OrderParameters(jnp.eye(2), jnp.zeros((2, 1)))


def solve_from(params, **options):
    return gf.solve(gf.OrderParameterFlow(jnp.eye(1), gamma_over_p=1.0, **options), params, [1.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gf.OrderParameterFlow(jnp.zeros((2, 2)), gamma_over_p=1.0), "`P` must be positive definite"),
        (lambda: gf.OrderParameterFlow(jnp.diag(jnp.array([1.0, -1.0])), gamma_over_p=1.0), "`P` must be positive def"),
        (
            lambda: gf.OrderParameterFlow(jnp.full((2, 2), jnp.nan), gamma_over_p=1.0),
            "`P` must be symmetric and finite",
        ),
        (lambda: gf.OrderParameterFlow(jnp.eye(2)[0], gamma_over_p=1.0), "`P` must be a square matrix"),
        (lambda: gf.OrderParameterFlow(jnp.eye(2), gamma_over_p=-1.0), "`gamma_over_p` must be positive"),
        (lambda: gf.OrderParameterFlow(jnp.eye(2), gamma_over_p=1.0, noise=-0.1), "`noise` must not be negative"),
        (
            lambda: gf.OrderParameterFlow(jnp.eye(2), gamma_over_p=1.0, second_layer_rate=-1.0),
            "`second_layer_rate` must not be negative",
        ),
        (lambda: gf.OrderParameterFlow(jnp.eye(2), gamma_over_p=1.0, terms="red"), "`terms` must be one of 'full'"),
        (lambda: gf.OrderParameterFlow(jnp.eye(2), gamma_over_p=1.0, terms=["I4"]), "`terms` must be one of 'full'"),
        (
            lambda: gf.OrderParameterFlow(jnp.eye(2), gamma_over_p=40.0, dim=1000),
            r"`gamma_over_p` must be at most sqrt\(dim\).*run gradflow.OnePassSGD",
        ),
        (lambda: gf.OrderParameters(jnp.zeros((2, 3)), jnp.zeros((2, 1))), "`Q` must be a square matrix"),
        (lambda: gf.OrderParameters(jnp.eye(2), jnp.zeros((3, 1))), "`M` must have 2 rows"),
        (lambda: gf.OrderParameters(jnp.array([[1.0, 0.5], [0.0, 1.0]]), jnp.zeros((2, 1))), "`Q` must be symmetric"),
        (lambda: gf.OrderParameters(jnp.eye(2), jnp.zeros((2, 1)), jnp.ones(3)), "`output` must have shape"),
        (lambda: solve_from(gf.OrderParameters(jnp.eye(2), jnp.ones((2, 1)))), r"make \[\[Q, M\].* positive semi-def"),
        (lambda: solve_from(gf.OrderParameters(jnp.eye(2), jnp.zeros((2, 3)))), "one column for each teacher unit"),
        (lambda: solve_from(gf.OrderParameters(jnp.eye(2) * jnp.nan, jnp.zeros((2, 1)))), "`params` must be finite"),
        (lambda: solve_from(jnp.eye(2)), "`params` must be gradflow.OrderParameters"),
        (lambda: gf.TeacherStudent(jnp.ones((2, 5))), "`P` must be positive definite"),
        (lambda: gf.TeacherStudent(jnp.ones(5)), "`teacher` must hold weights"),
        (lambda: gf.TeacherStudent.orthogonal(3, 4), "`units` must be at most dim = 3"),
        (
            lambda: gf.TeacherStudent.orthogonal(3, 2)(jnp.ones((2, 4))),
            r"`params` must hold weights of shape \(units, 3\)",
        ),
        (
            lambda: gf.OrderParameterFlow(gf.TeacherStudent.orthogonal(3, 2), gamma_over_p=1.0, noise=0.1),
            "`noise` must be left to the problem",
        ),
        (lambda: gf.flows.OverparametrisedFlow(jnp.zeros((1, 1))), "`P` must be positive definite"),
        (
            lambda: gf.solve(gf.flows.OverparametrisedFlow(jnp.eye(1)), good(), [1.0]),
            "must be reduced order parameters",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_float64_is_asked_for():
    """By all three flows, under `jit` too; with consent float32 works, to the accuracy stated."""
    problem = gf.TeacherStudent.orthogonal(100, 2, noise=1e-2)
    double = problem.order_parameters(problem.informed(2, jax.random.key(0)))
    single = gf.OrderParameters(double.Q.astype(jnp.float32), double.M.astype(jnp.float32))
    flow, wide = gf.OrderParameterFlow(problem, gamma_over_p=0.5), gf.flows.OverparametrisedFlow(problem)
    spread = gf.flows.FluctuationFlow(flow, 2, dim=100, key=jax.random.key(0))
    message = "`params` must be in float64, but is in float32.*jax_enable_x64.*allow_float32=True"
    for asked, start in ((flow, single), (wide, wide.reduce(single)), (spread, spread.start(single))):
        with pytest.raises(ValueError, match=message):
            gf.solve(asked, start, [1.0])
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda params: gf.solve(flow, params, [1.0]).final.M)(single)
    allowed = gf.OrderParameterFlow(problem, gamma_over_p=0.5, allow_float32=True)
    options = {"rtol": 1e-4, "solver": gf.solvers.Tsit5()}
    sol = gf.solve(allowed, single, [20.0], **options)
    assert sol.final.Q.dtype == jnp.float32
    exact = float(flow.risk(gf.solve(flow, double, [20.0], **options).final))
    assert float(flow.risk(sol.final)) == pytest.approx(exact, abs=1e-6)


def test_what_is_too_large_is_refused_before_it_runs():
    """A thousand erf units are refused; without the terms of order `g`, and with `x^2`, they are not."""
    start = gf.OrderParameters(jnp.eye(1000), jnp.zeros((1000, 4)))
    erf_flow = gf.OrderParameterFlow(jnp.eye(4), gamma_over_p=1.0)
    message = r"`params.Q` must hold so few units .* 1e\+11 .* of 1000, which take 2.5e\+11"
    with pytest.raises(ValueError, match=message):
        erf_flow.check(start, None)
    gf.OrderParameterFlow(jnp.eye(4), gamma_over_p=1.0, terms="green").check(start, None)
    square = gf.OrderParameterFlow(jnp.eye(4), "square", gamma_over_p=1.0)
    rate = jax.jit(lambda y: square.params(square.vector_field(jnp.zeros(()), y, None)).Q[0, 0])(
        square.init(start, None)
    )
    # Orthonormal units: 2 E s'(x_j) x_j (y - f) + E s'(x_j)^2 (y - f)^2 by hand.
    expected = -8 / 1000 + 4 * (2 / 4 + 2 / 1000) + 32 / 1000**2
    np.testing.assert_allclose(rate, expected, rtol=1e-9)
    spread = gf.flows.FluctuationFlow(erf_flow, 200, dim=100, samples=500, key=jax.random.key(0))
    many = jax.eval_shape(lambda: spread.start(gf.OrderParameters(jnp.eye(200), jnp.zeros((200, 4)))))
    with pytest.raises(ValueError, match="at most 16 GiB with what its derivative needs, but is of 200 units"):
        spread.check(many, None)


def test_one_student_one_teacher():
    """The smallest system there is; started at the teacher without noise it stays."""
    flow = gf.OrderParameterFlow(jnp.eye(1), gamma_over_p=0.5)

    def risk(start):
        options = {"rtol": 1e-7, "solver": gf.solvers.Tsit5()}
        return gf.solve(flow, start, [100.0, 200.0], observe={"risk": flow.risk}, **options)

    plateau = risk(gf.OrderParameters(jnp.eye(1), jnp.eye(1)))
    np.testing.assert_allclose(plateau.final.Q, [[1.0]], atol=1e-12)
    # It falls exponentially, and the risk is linear in the overlaps: what is left is the error of the solve.
    assert np.all(np.abs(risk(gf.OrderParameters(jnp.eye(1), 0.1 * jnp.eye(1))).observed["risk"]) < 1e-6)


def tanh_by_dop853(g, noise, start, end):
    """One tanh student of one teacher, integrals on a fine grid and the equations by SciPy."""
    z = np.linspace(-9, 9, 241)
    first, second = np.meshgrid(z, z, indexing="ij")
    weights = np.outer(*[np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * (z[1] - z[0])] * 2)

    def field(_, y):
        Q, M = y
        x, taught = np.sqrt(Q) * first, M / np.sqrt(Q) * first + np.sqrt(max(1 - M**2 / Q, 0)) * second
        slope, error = 1 / np.cosh(x) ** 2, np.tanh(taught) - np.tanh(x)
        spread = np.sum(weights * slope**2 * (error**2 + noise))
        return [2 * np.sum(weights * slope * x * error) + g * spread, np.sum(weights * slope * taught * error)]

    return scipy.integrate.solve_ivp(field, (0, end), start, method="DOP853", rtol=1e-9, atol=1e-10).y[:, -1]


@pytest.mark.slow
def test_an_activation_by_quadrature_along_a_run():
    """Right as its variance grows from 1 to 4.3; where the nodes are not made for that, the run says so."""
    exact = tanh_by_dop853(2.0, 0.5, [1.0, 0.3], 10.0)
    start = gf.OrderParameters(jnp.eye(1), 0.3 * jnp.eye(1))

    def run(activation):
        flow = gf.OrderParameterFlow(jnp.eye(1), activation, gamma_over_p=2.0, noise=0.5)
        return gf.solve(flow, start, [10.0], rtol=1e-6)

    computed = run(jnp.tanh)
    np.testing.assert_allclose([computed.final.Q[0, 0], computed.final.M[0, 0]], exact, rtol=1e-4)
    assert float(computed.errors["quadrature"]) < 1e-5
    assert "quadrature" in str(computed)
    quadrature = gf.problems.activations.Quadrature
    with pytest.warns(gf.PrecisionWarning, match=r"off by .* variance 1: give the largest diagonal entry"):
        narrow = run(quadrature(jnp.tanh, accuracy=1e-3, variance=1.0))
    off = np.abs(np.array([narrow.final.Q[0, 0], narrow.final.M[0, 0]]) / exact - 1)
    assert float(narrow.errors["quadrature"]) > np.max(off) / 3
    assert run("erf").errors is None


@pytest.mark.slow
def test_a_sweep_keeps_the_quadrature_error():
    def build(g):
        flow = gf.OrderParameterFlow(jnp.eye(1), jnp.tanh, gamma_over_p=g)
        return flow, gf.OrderParameters(jnp.eye(1), 0.3 * jnp.eye(1))

    ds = gf.sweep(build, {"g": jnp.array([0.5, 1.0])}, [1.0], progress=False)
    assert ds.error_quadrature.dims == ("g",)
    assert np.all(ds.error_quadrature < 1e-5)


@pytest.mark.slow
def test_fluctuations_against_the_covariance_itself():
    """A factor of the covariance is integrated; DOP853 on the covariance agrees, with a start that has one."""
    problem = gf.TeacherStudent.orthogonal(100, 1, noise=0.1)
    mean = gf.OrderParameterFlow(problem, gamma_over_p=0.5)
    flow = gf.flows.FluctuationFlow(mean, 1, dim=100, samples=512, key=jax.random.key(0))
    start, given = gf.OrderParameters(jnp.eye(1), 0.3 * jnp.eye(1)), 1e-3 * np.array([[1.0, 0.2], [0.2, 0.5]])
    ts = np.array([0.01, 1.0, 100.0])
    sol = gf.solve(flow, flow.start(start, given), ts, rtol=1e-6)

    def overlaps(y):
        return gf.OrderParameters(y[:1, None], y[1:, None])

    def rate(y):
        derivative = mean.vector_field(jnp.zeros(()), mean.init(overlaps(y), None), None)
        return jnp.concatenate([derivative.Q, derivative.M[0]])

    slopes = jax.jit(lambda y: (rate(y), jax.jacfwd(rate)(y), flow._diffusion(jnp.ones(()), overlaps(y))))

    def field(_, z):
        value, J, D = (np.asarray(part) for part in slopes(z[:2]))
        S = z[2:].reshape(2, 2)
        return np.concatenate([value, (J @ S + S @ J.T + D).ravel()])

    z = np.concatenate([[1.0, 0.3], given.ravel()])
    exact = scipy.integrate.solve_ivp(field, (0, 100), z, t_eval=ts, method="DOP853", rtol=1e-9, atol=1e-14).y
    np.testing.assert_allclose(sol.params.covariance.reshape(3, 4).T, exact[2:], rtol=1e-3)
    for bad, message in (
        (np.diag([1.0, -1.0]), "one with eigenvalue -1.0e"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (np.eye(3), r"shape \(3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            flow.start(start, bad)


@pytest.mark.slow
def test_fluctuations_of_a_student_at_its_teacher_are_none():
    """Nothing diffuses there without noise; nothing is divided by that."""
    problem = gf.TeacherStudent.orthogonal(100, 1, noise=0.0)
    mean = gf.OrderParameterFlow(problem, gamma_over_p=1.0)
    flow = gf.flows.FluctuationFlow(mean, 1, dim=100, samples=512, key=jax.random.key(0))
    sol = gf.solve(flow, flow.start(problem.order_parameters(problem.teacher)), [1.0, 100.0])
    assert np.all(np.abs(sol.params.covariance) < 1e-20)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 1e-3])
@pytest.mark.parametrize("informed", [True, False])
def test_fluctuations_late_in_a_run_are_good_to_the_tolerance(informed, noise):
    """Entries of the covariance differ by orders of magnitude then."""
    problem = gf.TeacherStudent.orthogonal(300, 2, noise=noise)
    mean = gf.OrderParameterFlow(problem, gamma_over_p=1.0)
    flow = gf.flows.FluctuationFlow(mean, 3, dim=300, samples=512, key=jax.random.key(5))
    weights = (problem.informed if informed else problem.uninformed)(3, jax.random.key(0))
    options = {"observe": {"error": flow.risk_error}, "save_params": False}
    loose, tight = (
        gf.solve(
            flow,
            flow.start(problem.order_parameters(weights)),
            np.array([1.0, 10.0, 100.0, 1000.0]),
            rtol=rtol,
            **options,
        )
        for rtol in (1e-5, 1e-8)
    )
    np.testing.assert_allclose(loose.observed["error"], tight.observed["error"], rtol=2e-3)
    assert np.all(tight.observed["error"] > 0)
