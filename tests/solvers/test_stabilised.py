"""ROCK2, RKC2 and Hybrid: order, stability, stage times, spectral radius, counts, caps, dense output, reverse mode."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.solvers import _rkc2, _rock2, _spectral_radius

METHODS = [gf.solvers.ROCK2, gf.solvers.RKC2]
ALL = [*METHODS, gf.solvers.Hybrid]
FORCED = [3, 13, 63, 150]  # numbers of stages that both methods have

pytestmark = pytest.mark.slow


def given_radius(t, y, args):
    return args["radius"]


def product_for(solver, stages):
    """An `h rho` for which a method takes so many stages."""
    return solver.stability_limit(stages) * (1 - 1e-9)


def march(solver, field, y0, h, steps, radius):
    """Equal steps by hand, and the evaluations they report."""
    return _march(solver, field, y0, jnp.asarray(h), jnp.asarray(steps), jnp.asarray(radius))


@eqx.filter_jit
def _march(solver, field, y0, h, steps, radius):
    term, args = diffrax.ODETerm(field), {"radius": radius}

    def step(i, carry):
        y, state = carry
        y, _, _, state, _ = solver.step(term, i * h, (i + 1) * h, y, args, state, made_jump=False)
        return y, state

    state = solver.init(term, 0.0, h, y0, args)
    y, state = jax.lax.fori_loop(0, steps, step, (y0, state))
    return y, state.evaluations


def decoupled(t, y, args):
    return {
        "linear": -5 * y["linear"],
        "cubic": -(y["cubic"] ** 3),
        "robinson": -50 * (y["robinson"] - jnp.cos(t)) - jnp.sin(t),
        "quadrature": jnp.cos(t),
        "one": jnp.ones_like(t),
        "clock": t,
    }


START = {"linear": 1.0, "cubic": 1.0, "robinson": 1.0, "quadrature": 0.0, "one": 0.0, "clock": 0.0}
EXACT = {
    "linear": np.exp(-5),
    "cubic": 1 / np.sqrt(3),
    "robinson": np.cos(1),
    "quadrature": np.sin(1),
    "one": 1.0,
    "clock": 0.5,
}


@pytest.mark.parametrize("stages", FORCED)
@pytest.mark.parametrize("method", METHODS)
def test_order_is_two_at_few_and_at_many_stages(method, stages):
    """A decoupled system: each problem runs as it would alone. `y' = t` probes the stage times: exact to rounding."""
    solver = method(spectral_radius=given_radius)
    counts = 20 * 2 ** np.arange(6)
    errors = {name: [] for name in EXACT}
    for n in counts:
        start = jax.tree_util.tree_map(jnp.asarray, START)
        y, evaluations = march(solver, decoupled, start, 1 / n, n, product_for(solver, stages) * n)
        assert int(evaluations) == 1 + n * stages
        for name, exact in EXACT.items():
            errors[name].append(abs(float(y[name]) - exact))
    for name in ("linear", "cubic", "robinson", "quadrature"):
        slopes = np.log2(np.array(errors[name][:-1]) / np.array(errors[name][1:]))
        assert np.all(np.abs(slopes[-2:] - 2) < 0.15), (name, slopes)
    rounding = 10 * np.finfo(float).eps * (stages**2 + counts[-1])
    assert max(errors["one"]) < rounding
    assert max(errors["clock"]) < rounding


def attempt(solver, radius):
    """One step of length 0.1 on a field that knows the time; its ends, its error and the field at the end."""
    term = diffrax.ODETerm(lambda t, y, args: jnp.cos(3 * t) - y**3)
    args, y0 = {"radius": radius}, jnp.array([1.0, -0.4])
    state = solver.init(term, 0.2, 0.3, y0, args)
    y1, error, dense, *_ = eqx.filter_jit(solver.step)(term, 0.2, 0.3, y0, args, state, made_jump=False)
    return y1, error, dense


def test_short_steps_of_the_hybrid_are_those_of_bogacki_and_shampine():
    """Of diffrax, which has the method from its tableau. Longer steps are those of `ROCK2`, bit by bit."""
    hybrid, rock2 = gf.solvers.Hybrid(spectral_radius=given_radius), gf.solvers.ROCK2(spectral_radius=given_radius)
    reference = attempt(diffrax.Bosh3(), 0.0)
    for radius in (0.0, 24.9):
        computed = attempt(hybrid, radius)
        np.testing.assert_allclose(computed[0], reference[0], rtol=1e-15)
        np.testing.assert_allclose(computed[1], reference[1], rtol=0, atol=1e-16)
        np.testing.assert_allclose(computed[2]["k1"], 0.1 * (np.cos(0.9) - reference[0] ** 3), rtol=1e-14)
    for radius in (25.1, 2e3):
        for a, b in zip(attempt(hybrid, radius)[:2], attempt(rock2, radius)[:2], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("activation", "horizon", "rtol"), [("relu", 10.0, 1e-4), ("relu", 10.0, 1e-5), ("tanh", 400.0, 1e-3)]
)
def test_the_hybrid_takes_the_cheaper_method(activation, horizon, rtol, key):
    """What jumps often is a matter of errors, what is stiff one of stability."""
    data = gf.data.digits(n=60, centre=True, labels="onehot")
    model = gf.models.MLP(64, 16, 10, depth=1, activation=getattr(jax.nn, activation), key=key)
    flow = gf.GradientFlow(gf.EmpiricalRisk(*data, gf.losses.square))

    def cost(solver):
        sol = gf.solve(flow, model, [horizon], solver=solver, rtol=rtol, save_params=False)
        return int(sol.stats["gradient_evaluations"])

    explicit, stabilised = cost(gf.solvers.Bosh3()), cost(gf.solvers.ROCK2())
    assert explicit < 0.7 * stabilised if activation == "relu" else stabilised < 0.7 * explicit
    assert cost(gf.solvers.Hybrid()) < 1.15 * min(explicit, stabilised)


@pytest.mark.parametrize("method", METHODS)
def test_amplification_is_at_most_one_on_the_whole_real_interval(method):
    solver = method(spectral_radius=given_radius)
    stages = _rock2.load().stages if method is gf.solvers.ROCK2 else [2, 3, 5, 13, 60, 150, 200]
    assert method is gf.solvers.RKC2 or len(stages) == 46
    grid = jnp.linspace(0, 1.1, 11 * 4001)

    def field(t, y, args):
        return -args["radius"] * grid * y

    for s in stages:
        product = product_for(solver, int(s))
        y, evaluations = march(solver, field, jnp.ones_like(grid), 1.0, 1, product)
        assert int(evaluations) == 1 + s
        size = np.abs(np.asarray(y))
        assert size[grid <= 1].max() <= 1 + 1e-9, s
        assert s <= 3 or size.max() > 1, f"{s} stages reach further than is used"


def test_coefficients_of_rkc2_are_those_of_the_recurrences():
    """Chebyshev polynomials and their derivatives by their recurrences, in long precision."""
    for s in (2, 3, 13, 150):
        w0 = np.longdouble(1) + np.longdouble(2) / 13 / s**2  # Sommeijer, Shampine and Verwer (1998)
        t, d, dd = [[np.longdouble(v) for v in pair] for pair in ((1, w0), (0, 1), (0, 0))]
        for j in range(2, s + 1):
            t.append(2 * w0 * t[-1] - t[-2])
            d.append(2 * t[j - 1] + 2 * w0 * d[-1] - d[-2])
            dd.append(4 * d[j - 1] + 2 * w0 * dd[-1] - dd[-2])
        w1 = d[s] / dd[s]
        b = [dd[max(j, 2)] / d[max(j, 2)] ** 2 for j in range(s + 1)]
        for dtype, rtol in ((jnp.float64, 1e-12), (jnp.float32, 1e-5)):
            c, mu, nu, m, g = _rkc2.coefficients(jnp.asarray(s), 200, dtype)
            assert m[0] == pytest.approx(float(b[1] * w1), rel=rtol)
            for j in range(2, s + 1):
                expected = (2 * b[j] * w0 / b[j - 1], -b[j] / b[j - 2], 2 * b[j] * w1 / b[j - 1])
                computed = (mu[j - 1], nu[j - 1], m[j - 1])
                np.testing.assert_allclose(computed, np.array(expected, float), rtol=rtol)
                gamma = -(1 - b[j - 1] * t[j - 1]) * expected[2]
                np.testing.assert_allclose(g[j - 1], float(gamma), rtol=rtol, atol=rtol)
                np.testing.assert_allclose(c[j], float(w1 * dd[j] / d[j]), rtol=rtol)


@pytest.mark.parametrize("stages", [3, 63])
@pytest.mark.parametrize("method", METHODS)
def test_error_estimate_has_its_published_leading_term(method, stages):
    """`p q h^2 y''` for ROCK2; for RKC2 `h^3 y''' / 15` and 0.8 of the error of the step; on `y' = -y^3` from 1."""
    solver = method(spectral_radius=given_radius)
    h = 1e-3
    term, args = diffrax.ODETerm(lambda t, y, args: -(y**3)), {"radius": product_for(solver, stages) / h}
    y0 = jnp.array(1.0)
    y1, error, *_ = solver.step(term, 0.0, h, y0, args, solver.init(term, 0.0, h, y0, args), made_jump=False)
    if method is gf.solvers.RKC2:
        expected = -15 * h**3 / 15 + 0.8 * ((1 + 2 * h) ** -0.5 - float(y1))
    else:
        index = int(np.searchsorted(_rock2.load().stages, stages))
        rows = _rock2.load().rows[_rock2.load().starts[index] :]
        expected = rows[stages - 2, 1] * rows[stages - 1, 3] * 3 * h**2
    assert float(error) == pytest.approx(expected, rel=0.03)
    assert solver.order(term) == 2
    assert solver.error_order(term) == (3 if method is gf.solvers.RKC2 else 2)


def radius_of(field, y, dtype=jnp.float64):
    """What a fresh power method finds, and what it spends."""
    y = jax.tree_util.tree_map(lambda x: jnp.asarray(x, dtype), y)
    zeros = jax.tree_util.tree_map(jnp.zeros_like, y)
    reference, wanted = jnp.asarray(False), jnp.asarray(True)
    estimate = eqx.filter_jit(_spectral_radius.estimate_spectral_radius)
    return estimate(field, y, zeros, reference, wanted, zeros, jnp.asarray(0.1, dtype))


def symmetric(eigenvalues, seed=0):
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))[0]
    return jnp.asarray(basis * eigenvalues @ basis.T)


SPECTRA = {
    "geometric": -np.geomspace(1, 1000, 60),
    "even": -np.linspace(1, 1000, 60),
    "cluster": np.r_[-np.linspace(900, 1000, 20), -np.ones(40)],
    "one outlier": np.r_[-1000.0, -np.ones(59)],
    "pair of signs": np.r_[-1000.0, 990.0, -np.ones(58)],
    "one entry": np.array([-1000.0]),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_power_method_finds_known_spectra(name):
    matrix = symmetric(SPECTRA[name])
    y = jnp.asarray(np.random.default_rng(1).normal(size=len(matrix)))
    computed = radius_of(lambda y: matrix @ y, y)
    assert 1000 / 1.2 <= float(computed.radius) <= 1000 * (1 + 1e-6)
    assert int(computed.evaluations) <= 30
    np.testing.assert_allclose(computed.field, matrix @ y, rtol=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1.0, 1e10])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_power_method_follows_the_size_of_the_state(size, dtype):
    """The field is linear near the state only within its own size: `J = -1000` there."""
    rates = jnp.asarray(np.geomspace(1, 1000, 30), dtype)
    field = lambda y: -rates * y * jnp.where(jnp.abs(y) < 3 * size, 1, 1e6).astype(dtype)  # noqa: E731
    computed = radius_of(field, size * np.ones(30), dtype)
    assert 1000 / 1.2 <= float(computed.radius) <= 1000 * 1.05
    assert computed.radius.dtype == dtype


def test_power_method_sees_a_fast_mode_at_rest_and_ignores_quadratures():
    """Neither the field nor the state has a part along the fast mode; integrals of the state ride along."""

    def field(y):
        return {"slow": -y["slow"], "fast": -1000 * y["fast"], "integral": 50 * (y["slow"] + y["fast"])}

    computed = radius_of(field, {"slow": 1.0, "fast": 0.0, "integral": 30.0})
    assert float(computed.radius) == pytest.approx(1000, rel=0.02)


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_power_method_of_a_constant_field_is_zero_and_cheap(start):
    for rate in (0.0, 1.0):
        computed = radius_of(lambda y, rate=rate: jnp.full_like(y, rate), start * np.ones(3))
        assert float(computed.radius) == 0
        assert int(computed.evaluations) <= 3


def test_power_method_where_the_field_is_not_finite_says_nothing():
    computed = radius_of(lambda y: jnp.where(jnp.all(y == 1), -y, jnp.nan), np.ones(3))
    assert np.isnan(float(computed.radius))
    assert int(computed.evaluations) == 2
    assert np.all(np.asarray(computed.direction) == 0)


def linear(t, y, args):
    return -args * y


def solve(solver, field, y0, end, args=None, rtol=1e-5, **options):
    """Plain diffrax, with a controller."""
    control = diffrax.PIDController(rtol=rtol, atol=rtol * 1e-2)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field), solver, 0.0, end, 1e-6, y0, args, stepsize_controller=control, **options
    )


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("value", [1e4, -1e4, np.nan, None])
def test_given_spectral_radius_is_used_and_bad_ones_do_no_harm(method, value):
    given = None if value is None else lambda t, y, args: jnp.asarray(value)
    rates = jnp.array([1.0, 1e4])
    sol = solve(method(spectral_radius=given), linear, jnp.ones(2), 1.0, rates, rtol=1e-4, max_steps=20_000)
    assert float(sol.ys[0, 0]) == pytest.approx(np.exp(-1), rel=1e-3)
    if value is not None and np.isfinite(value):
        assert int(sol.stats["num_steps"]) < 500  # explicit methods need 3,000 and more


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("rate", [0.0, 2.0])
def test_field_without_a_jacobian_takes_the_fewest_stages(method, rate):
    solver = method()
    y, evaluations = march(solver, lambda t, y, args: rate * jnp.ones_like(y), jnp.zeros(3), 0.1, 10, 0.0)
    np.testing.assert_allclose(y, rate, rtol=1e-14)
    fewest = 2 if method is gf.solvers.RKC2 else 3
    assert 10 * fewest < int(evaluations) <= 10 * fewest + 4


@pytest.mark.parametrize("method", ALL)
def test_plain_diffrax_reports_what_is_counted(method):
    """Evaluations of the accepted steps' states; at equal steps these are all."""
    counter = []

    def field(t, y, args):
        jax.debug.callback(lambda: counter.append(1))
        return -jnp.array([1.0, 3e3]) * y - y**3

    _, evaluations = march(method(refresh=7), field, jnp.ones(2), 0.02, 30, 0.0)
    jax.effects_barrier()
    assert int(evaluations) == len(counter)
    assert int(evaluations) < 30 * 20


@pytest.mark.parametrize("method", ALL)
def test_field_is_traced_a_fixed_number_of_times_and_not_again(method):
    traces = []

    def field(t, y, args):
        traces.append(1)
        return -y

    march(method(), field, jnp.ones(2), 0.02, 3, 0.0)
    first = len(traces)
    assert first <= 4
    march(method(), field, 2 * jnp.ones(2), 0.01, 5, 0.0)
    assert len(traces) == first


@pytest.mark.parametrize("method", ALL)
def test_vmap_equals_a_loop(method):
    """Members that differ in stiffness, and so in stages and in steps."""
    run = jax.jit(lambda rate: solve(method(), linear, jnp.ones(2), 1.0, jnp.stack([jnp.ones(()), rate])).ys[0])
    rates = jnp.array([0.0, 10.0, 1e3, 3e4])
    together = jax.jit(jax.vmap(run))(rates)
    for i, rate in enumerate(rates):
        np.testing.assert_allclose(together[i], run(rate), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("size", [1.0, 1e-30])
def test_float32(method, size):
    """Stiff decay at `rtol = 1e-3`: the answer has its own type and is within `rtol^(2/3)`."""
    rates = jnp.asarray([1.0, 2e4], jnp.float32)
    y0 = jnp.asarray([size, size], jnp.float32)
    sol = gf.solve(gf.GradientFlow(Bowl(rates)), y0, [1.0], solver=method(), rtol=1e-3)
    assert sol.final.dtype == jnp.float32
    assert float(sol.final[0]) / size == pytest.approx(np.exp(-1), rel=1e-2)
    assert abs(float(sol.final[1])) < 1e-2 * size


class Bowl(eqx.Module):
    rates: jax.Array

    def __call__(self, w):
        return 0.5 * jnp.sum(self.rates * w * w)


@pytest.mark.parametrize("method", ALL)
def test_step_beyond_the_cap_is_refused_at_no_cost(method):
    solver = method(max_stages=10, spectral_radius=given_radius)
    term, args, y0 = diffrax.ODETerm(linear), {"radius": 1e3}, jnp.ones(1)
    field = diffrax.ODETerm(lambda t, y, args: -args["radius"] * y)
    state = solver.init(term, 0.0, 1.0, y0, args)
    y1, error, _, tried, _ = solver.step(field, 0.0, 1.0, y0, args, state, made_jump=False)
    assert np.isnan(np.asarray(y1)).all()
    assert np.isinf(np.asarray(error)).all()
    assert int(tried.evaluations) == 1  # the field at the start
    again = solver.rejected(tried, state)
    assert float(again.radius) == 1e3
    h = solver.longest_step(again)
    y1, error, _, done, _ = solver.step(field, 0.0, h, y0, args, again, made_jump=False)
    assert np.isfinite(np.asarray(error)).all()
    assert int(done.evaluations) - int(tried.evaluations) == 1 + 10
    # Rejected for another reason, an estimate that has aged is asked for anew, one made just now is not.
    assert int(solver.rejected(tried, state).age) == 0
    assert int(solver.rejected(eqx.tree_at(lambda s: s.age, done, jnp.asarray(5)), again).age) == solver.refresh


@pytest.mark.parametrize("method", ALL)
def test_capped_stages_still_arrive(method):
    sol = solve(method(max_stages=10), linear, jnp.ones(2), 1.0, jnp.array([1.0, 1e4]))
    assert float(sol.ys[0, 0]) == pytest.approx(np.exp(-1), rel=1e-3)
    flow = gf.GradientFlow(Bowl(jnp.array([1.0, 1e4])))
    sol = gf.solve(flow, jnp.ones(2), [1.0], solver=method(max_stages=10), rtol=1e-3)
    assert float(sol.final[0]) == pytest.approx(np.exp(-1), rel=1e-2)
    min_evaluations = 1e4 / method().stability_limit(10)
    assert min_evaluations < int(sol.stats["accepted"]) < 2 * min_evaluations
    assert int(sol.stats["rejected"]) <= 3


@pytest.mark.parametrize("method", ALL)
def test_dense_output_is_of_third_order_within_a_step(method):
    """The error within one step from exact data, at four places, falls like that of the step itself, `h^3`."""
    solver = method(spectral_radius=given_radius)
    term = diffrax.ODETerm(lambda t, y, args: -(y**3) * jnp.cos(t))
    errors = []
    for h in 0.2 * 0.5 ** np.arange(6):
        args, y0 = {"radius": 20 / h}, jnp.array(1.0)
        state = solver.init(term, 0.0, h, y0, args)
        _, _, dense, _, _ = solver.step(term, 0.0, h, y0, args, state, made_jump=False)
        inside = solver.interpolation_cls(t0=0.0, t1=h, **dense)
        ts = h * np.array([0.2, 0.5, 0.8, 1.0])
        errors.append(max(abs(float(inside.evaluate(t)) - 1 / np.sqrt(1 + 2 * np.sin(t))) for t in ts))
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(slopes[-2:] - 3) < 0.15), slopes


@pytest.mark.parametrize("method", ALL)
def test_reverse_mode_of_the_bounded_variant_matches_differences(method):
    solver, h = method(max_stages=13, bounded=True), 0.05
    term = diffrax.ODETerm(lambda t, y, args: -args * y + jnp.cos(t))

    @jax.jit
    def final(rate):
        rates, y0 = jnp.stack([jnp.ones(()), rate]), jnp.ones(2)

        def step(carry, t):
            y, _, _, state, _ = solver.step(term, t, t + h, carry[0], rates, carry[1], made_jump=False)
            return (y, state), None

        start = (y0, solver.init(term, 0.0, h, y0, rates))
        (y, _), _ = jax.lax.scan(step, start, h * jnp.arange(20))
        return jnp.sum(y**2)

    numeric = (final(300.0 + 1e-4) - final(300.0 - 1e-4)) / 2e-4
    assert float(jax.grad(final)(300.0)) == pytest.approx(float(numeric), rel=1e-5)
    plain = method(max_stages=13)
    ends = [march(s, lambda t, y, args: -300 * y + jnp.cos(t), jnp.ones(2), 0.05, 20, 0.0) for s in (solver, plain)]
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-12)
    assert int(ends[0][1]) == int(ends[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ALL)
def test_reverse_mode_through_diffrax_matches_differences(method):
    solver, fixed = method(max_stages=13, bounded=True), diffrax.ConstantStepSize()
    term = diffrax.ODETerm(lambda t, y, args: -args * y + jnp.cos(t))

    @jax.jit
    def final(rate):
        rates = jnp.stack([jnp.ones(()), rate])
        sol = diffrax.diffeqsolve(
            term, solver, 0.0, 1.0, 0.05, jnp.ones(2), rates, stepsize_controller=fixed, max_steps=30
        )
        return jnp.sum(sol.ys**2)

    h = 1e-4
    numeric = (final(300.0 + h) - final(300.0 - h)) / (2 * h)
    assert float(jax.grad(final)(300.0)) == pytest.approx(float(numeric), rel=1e-5)


@pytest.mark.parametrize("method", ALL)
def test_backward_in_time(method):
    field = lambda t, y, args: y  # noqa: E731
    control = diffrax.PIDController(rtol=1e-6, atol=1e-9)
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(field), method(), 1.0, 0.0, -1e-3, jnp.ones(2), stepsize_controller=control
    )
    np.testing.assert_allclose(sol.ys[0], np.exp(-1), rtol=1e-4)


@pytest.mark.parametrize("method", ALL)
def test_network_on_digits_agrees_with_an_ordinary_method(method, small_mlp):
    problem, model = small_mlp
    flow = gf.GradientFlow(problem)
    reference = gf.solve(flow, model, [20.0], rtol=1e-6, save_params=False)
    sol = gf.solve(flow, model, [20.0], rtol=1e-4, solver=method(), save_params=False)
    assert sol.status == "ok"
    leaves = zip(*(jax.tree_util.tree_leaves(eqx.filter(s.final, eqx.is_array)) for s in (sol, reference)), strict=True)
    for a, b in leaves:
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-3)
    assert float(sol.loss[1]) == pytest.approx(float(reference.loss[1]), rel=1e-2)


def test_table_is_whole():
    table = _rock2.load()
    ends = table.starts + table.stages
    assert table.rows.shape == (int(ends[-1]) + 1 + len(_rock2.BOGACKI_SHAMPINE), 5)
    assert table.nonstiff == ends[-1] + 1
    assert np.all(table.rows[table.starts, 0] == 0)
    assert np.all(table.rows[ends, 0] == 1)
    np.testing.assert_allclose(table.rows[ends - 1, 0] + table.rows[ends - 1, 1], 1, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh": 0}, r"`refresh` must be an integer of at least 1, but is 0"),
        ({"max_stages": 1}, r"`max_stages` must be an integer of at least \d, but is 1"),
    ],
)
@pytest.mark.parametrize("method", ALL)
def test_bad_options_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


@pytest.mark.slow
def test_reverse_mode_through_diffrax_agrees_with_forward_mode_through_solve():
    """The derivative of the final loss by the initial scale and by a target, both ways, and by central differences."""
    x = jnp.asarray([[1.0, 0.3], [-0.2, 0.8], [0.5, -1.0]])

    def predict(w, x):
        return jnp.tanh(x @ w["in"]) @ w["out"]

    start = {"in": jnp.asarray([[0.4, -0.3], [0.2, 0.7]]), "out": jnp.asarray([0.5, -0.6])}

    def flow_of(target):
        return gf.GradientFlow(gf.EmpiricalRisk(x, jnp.stack([1.0, -1.0, target]), gf.losses.square, predict=predict))

    def scaled(scale):
        return jax.tree_util.tree_map(lambda w: scale * w, start)

    def forward(scale, target):
        flow = flow_of(target)
        sol = gf.solve(flow, scaled(scale), [3.0], rtol=1e-9)
        return flow.problem(sol.final)

    def backward(scale, target):
        flow, params = flow_of(target), scaled(scale)
        frozen = jax.tree_util.tree_map(lambda _: None, params)
        control = diffrax.PIDController(rtol=1e-6, atol=1e-9)
        solver = gf.solvers.RKC2(bounded=True, max_stages=20)
        y = flow.init(params, frozen)
        done = diffrax.diffeqsolve(flow.terms(), solver, 0.0, 3.0, 0.01, y, frozen, stepsize_controller=control)
        return flow.problem(flow.params(jax.tree_util.tree_map(lambda leaf: leaf[-1], done.ys)))

    point, h = (jnp.asarray(0.7), jnp.asarray(0.5)), 1e-4
    differences = []
    for i in range(2):
        ends = [forward(*(p + sign * h * (j == i) for j, p in enumerate(point))) for sign in (1, -1)]
        differences.append((ends[0] - ends[1]) / (2 * h))
    np.testing.assert_allclose(jax.jacfwd(forward, argnums=(0, 1))(*point), differences, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(backward, argnums=(0, 1))(*point), differences, rtol=1e-3)
