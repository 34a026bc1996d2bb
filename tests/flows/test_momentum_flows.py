"""Momentum flows against closed forms, scipy on the Hessian form, and the methods that they idealise."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.linalg
import scipy.special

import gradflow as gf

RNG = np.random.default_rng(0)
FACTOR = RNG.normal(size=(3, 3))
HESSIAN = FACTOR @ FACTOR.T / 3 + 0.3 * np.eye(3)
START = np.array([1.0, -0.5, 0.8])


class Quadratic(eqx.Module):
    """`w^T H w / 2`."""

    hessian: jax.Array

    def __call__(self, w):
        return 0.5 * w @ (self.hessian @ w)


class Soft(eqx.Module):
    """A strongly convex function that is not quadratic; gradient and Hessian by hand below."""

    matrix: jax.Array

    def __call__(self, w):
        return jnp.sum(jax.nn.softplus(self.matrix @ w - 0.5)) + 0.15 * jnp.sum(w**2)


QUADRATIC, SOFT = Quadratic(jnp.asarray(HESSIAN)), Soft(jnp.asarray(2 * HESSIAN))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def soft_gradient(w):
    return 2 * HESSIAN @ sigmoid(2 * HESSIAN @ w - 0.5) + 0.3 * w


def soft_hessian(w):
    p = sigmoid(2 * HESSIAN @ w - 0.5)
    return 4 * HESSIAN @ np.diag(p * (1 - p)) @ HESSIAN + 0.3 * np.eye(3)


def generic(problem, flow, t=0.0):
    """A flow with constant coefficients, with these as leaves: one program serves them all."""
    t = jnp.asarray(t)
    a, b, c = flow.damping(t), flow.hessian_damping(t), flow.gradient_weight(t)
    initial = flow.initial_momentum()
    return gf.SecondOrderFlow(problem, a, b, c, velocity=0.0 if initial is None else initial - b)


def stack(flows):
    return jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *flows)


@eqx.filter_jit
def solve_all(flows, start, ts, rtol, problem_axis=None):
    """All flows of one kind in one program; `ts` a row for each."""
    solver = gf.solvers.Dopri8()

    def one(flow, ts):
        return gf.solve(flow, start, ts, rtol=rtol, solver=solver, throw=False, max_steps=20_000)

    return eqx.filter_vmap(one)(flows, ts)


def expm_solution(a, b, c, velocity, ts):
    zero, one = np.zeros((3, 3)), np.eye(3)
    field = np.block([[zero, one], [-c * HESSIAN, -a * one - b * HESSIAN]])
    start = np.concatenate([START, velocity * HESSIAN @ START])
    return np.stack([(scipy.linalg.expm(field * t) @ start)[:3] for t in ts])


MU, S = 0.3, 0.04
H, R = S**0.5, (MU * S) ** 0.5
# Flow, and what its equation and its start say: a, b, c, X'(0) over the gradient.
NAMED = {
    "heavy_ball": (gf.HeavyBallFlow(QUADRATIC, MU, S), (2 * MU**0.5, 0, 1 + R, -1.5 * H)),
    "heavy_ball, paper": (gf.HeavyBallFlow(QUADRATIC, MU, S, start="paper"), (2 * MU**0.5, 0, 1 + R, -2 * H / (1 + R))),
    "heavy_ball, rest": (gf.HeavyBallFlow(QUADRATIC, MU, S, start="rest"), (2 * MU**0.5, 0, 1 + R, -0.5 * H)),
    "heavy_ball, low": (gf.HeavyBallFlow(QUADRATIC, MU, S, "low"), (2 * MU**0.5, 0, 1, 0)),
    "nesterov": (gf.NesterovFlow(QUADRATIC, MU, S), (2 * MU**0.5, H, 1 + R, -1.5 * H)),
    "nesterov, paper": (gf.NesterovFlow(QUADRATIC, MU, S, start="paper"), (2 * MU**0.5, H, 1 + R, -2 * H / (1 + R))),
    "nesterov, low": (gf.NesterovFlow(QUADRATIC, MU, S, "low"), (2 * MU**0.5, 0, 1, 0)),
    "undamped": (gf.HeavyBallFlow(QUADRATIC, 0.0, S, "low"), (0, 0, 1, 0)),
    # eps = 0.08, K = 1.5
    "fixed": (gf.MomentumFlow(QUADRATIC, 0.04, 0.5), (1 / 0.12, 0, 1 / 0.12, -1 / 3)),
    "fixed, Nesterov": (gf.MomentumFlow(QUADRATIC, 0.04, 0.5, nesterov=True), (1 / 0.12, 1 / 3, 1 / 0.12, -2 / 3)),
}


def test_constant_coefficients_equal_the_matrix_exponential():
    ts = np.array([0.0, 0.3, 1.0, 2.5])
    flows = stack([generic(QUADRATIC, flow) for flow, _ in NAMED.values()])
    computed = solve_all(flows, jnp.asarray(START), jnp.broadcast_to(ts, (len(NAMED), 4)), 1e-10)
    assert (computed.code == 0).all()
    for row, (_, numbers) in zip(computed.params, NAMED.values(), strict=True):
        np.testing.assert_allclose(row, expm_solution(*numbers, ts), rtol=0, atol=1e-8)
    assert float(np.max(computed.drift["energy"])) < 1e-8


@pytest.mark.parametrize("name", NAMED)
def test_named_flows_are_their_equations(name):
    """The vector field at a few states, and the start, against the second-order equation by hand."""
    flow, (a, b, c, velocity) = NAMED[name]
    x, v = RNG.normal(size=(2, 3))
    state = gf.flows.MomentumState(jnp.asarray(x), jnp.asarray(v), jnp.zeros(()))
    rate = flow.vector_field(jnp.asarray(0.7), state, None)
    dx = v - b * HESSIAN @ x
    np.testing.assert_allclose(rate.position, dx, atol=1e-13)
    # X'' = V' - b H X'
    np.testing.assert_allclose(
        rate.momentum - b * HESSIAN @ dx, -a * dx - b * HESSIAN @ dx - c * HESSIAN @ x, atol=1e-12
    )
    began = flow.init(jnp.asarray(x), None)
    np.testing.assert_allclose(began.momentum - b * HESSIAN @ x, velocity * HESSIAN @ x, atol=1e-13)
    assert flow.start_cost == (0 if velocity == 0 else 1, 0)
    assert flow.oscillatory
    assert flow.autonomous


# Time-dependent coefficients


def a_of(t):
    return 3 / t


def b_of(t):
    return 0.5 + 0.4 * jnp.sin(2 * t)


def c_of(t):
    return 1 + 0.5 * jnp.cos(t)


class WithoutDerivative(gf.SecondOrderFlow):
    """A mutant: `b'` dropped from the first-order form."""

    def coefficients(self, t):
        a, b, c = self.damping(t), self.hessian_damping(t), self.gradient_weight(t)
        return a, b, c - a * b


def test_hessian_free_form_equals_the_hessian_form():
    """Against scipy on `X'' + a X' + b Hess f X' + c grad f = 0` itself; dropping `b'` is far off."""

    def field(t, y):
        x, v = y[:3], y[3:]
        b, c = 0.5 + 0.4 * np.sin(2 * t), 1 + 0.5 * np.cos(t)
        return np.concatenate([v, -3 / t * v - b * soft_hessian(x) @ v - c * soft_gradient(x)])

    ts = np.array([0.5, 1.0, 2.0, 4.0])
    begin = np.concatenate([START, -0.2 * soft_gradient(START)])
    exact = scipy.integrate.solve_ivp(field, (0.5, 4), begin, "DOP853", ts, rtol=1e-13, atol=1e-14).y[:3].T
    errors = []
    for flow_class in (gf.SecondOrderFlow, WithoutDerivative):
        flow = flow_class(SOFT, a_of, b_of, c_of, velocity=-0.2, t0=0.5)
        sol = gf.solve(flow, jnp.asarray(START), ts, rtol=1e-12, solver=gf.solvers.Dopri8())
        errors.append(np.max(np.abs(np.asarray(sol.params) - exact)))
    assert errors[0] < 1e-9
    assert errors[1] > 0.02


def test_bessel():
    """Su, Boyd and Candes: modes `2 J_1(z) / z` with `z = t sqrt(lambda)`, from the singular start at `t = 0`."""
    values = np.array([0.25, 1.0, 9.0])
    flow = gf.NesterovConvexFlow(Quadratic(jnp.diag(jnp.asarray(values))), s=1.0, resolution="low")
    ts = np.array([0.5, 2.0, 6.0])
    sol = gf.solve(flow, jnp.ones(3), ts, rtol=1e-11, solver=gf.solvers.Dopri8())
    z = ts[:, None] * np.sqrt(values)
    np.testing.assert_allclose(sol.params, 2 * scipy.special.j1(z) / z, rtol=0, atol=1e-8)


@pytest.mark.parametrize("alpha", [3.0, 5.0])
def test_convex_flow_is_its_equation(alpha):
    h = 0.2
    flow = gf.NesterovConvexFlow(QUADRATIC, h**2, alpha)
    assert float(flow.t0) == pytest.approx(alpha * h / 2)
    same = gf.SecondOrderFlow(
        QUADRATIC, lambda t: alpha / t, h, lambda t: 1 + alpha * h / (2 * t), velocity=-h, t0=alpha * h / 2
    )
    x, v = RNG.normal(size=(2, 3))
    state = gf.flows.MomentumState(jnp.asarray(x), jnp.asarray(v), jnp.zeros(()))
    for t in (alpha * h / 2, 1.0, 7.0):
        ours, theirs = (f.vector_field(jnp.asarray(t), state, None) for f in (flow, same))
        np.testing.assert_allclose(ours.position, theirs.position, rtol=1e-13)
        np.testing.assert_allclose(ours.momentum, theirs.momentum, rtol=1e-12, atol=1e-14)
    assert np.all(np.asarray(same.init(jnp.asarray(x), None).momentum) == 0)
    assert np.all(np.asarray(flow.init(jnp.asarray(x), None).momentum) == 0)


# Orders


def heavy_ball(gradient, w, beta, s, steps, first):
    rows = [w, w - first * s * gradient(w)]
    while len(rows) <= steps:
        rows.append(rows[-1] + beta * (rows[-1] - rows[-2]) - s * gradient(rows[-1]))
    return np.array(rows)


def nesterov(gradient, w, betas, s, steps):
    rows, v = [w], w
    for k in range(steps):
        descended = rows[-1] - s * gradient(rows[-1])
        rows.append(descended + betas(k) * (descended - v))
        v = descended
    return np.array(rows)


STEPS = np.array([0.025, 0.0125, 0.00625])
TIMES = 0.25 * np.arange(9)


def slopes(rows, flows, steps=STEPS):
    """Order in `s = h^2`, from the two smallest steps, of the largest distance at the times compared."""
    gaps = np.max(np.linalg.norm(np.asarray(rows) - np.asarray(flows), axis=2), axis=1)
    return float(np.log(gaps[-2] / gaps[-1]) / np.log(steps[-2] ** 2 / steps[-1] ** 2))


def test_orders_of_resolutions_and_starts():
    """Not on a quadratic: 1/2 at low resolution and with the published start, 1 with the matched one."""
    settings = {
        "low": (lambda s: gf.HeavyBallFlow(SOFT, MU, s, "low"), "heavy_ball", 0.5),
        "paper": (lambda s: gf.HeavyBallFlow(SOFT, MU, s, start="paper"), "heavy_ball", 0.49),
        "matched": (lambda s: gf.HeavyBallFlow(SOFT, MU, s), "heavy_ball", 0.99),
        "rest": (lambda s: gf.HeavyBallFlow(SOFT, MU, s, start="rest"), "rest", 0.99),
        "Nesterov low": (lambda s: gf.NesterovFlow(SOFT, MU, s, "low"), "nesterov", 0.5),
        "Nesterov paper": (lambda s: gf.NesterovFlow(SOFT, MU, s, start="paper"), "nesterov", 0.49),
        "Nesterov matched": (lambda s: gf.NesterovFlow(SOFT, MU, s), "nesterov", 0.99),
    }
    flows = stack([generic(SOFT, make(h**2)) for make, _, _ in settings.values() for h in STEPS])
    computed = solve_all(flows, jnp.asarray(START), jnp.broadcast_to(TIMES, (3 * len(settings), 9)), 1e-10)
    runs = {"heavy_ball": [], "rest": [], "nesterov": []}
    for h in STEPS:
        r = (MU * h**2) ** 0.5
        beta, every, steps = (1 - r) / (1 + r), round(0.25 / h), round(2 / h)
        runs["heavy_ball"].append(heavy_ball(soft_gradient, START, beta, h**2, steps, 1 + beta)[::every])
        runs["rest"].append(heavy_ball(soft_gradient, START, beta, h**2, steps, 1)[::every])
        runs["nesterov"].append(nesterov(soft_gradient, START, lambda k, beta=beta: beta, h**2, steps)[::every])
    for i, (name, (_, method, order)) in enumerate(settings.items()):
        assert abs(slopes(runs[method], computed.params[3 * i : 3 * i + 3]) - order) <= 0.03, name


@pytest.mark.parametrize("method", ["heavy_ball", "nesterov"])
def test_orders_on_a_quadratic(method):
    """The same from matrix exponentials and hand-written iterates alone."""
    flow_class = gf.HeavyBallFlow if method == "heavy_ball" else gf.NesterovFlow
    for resolution, start, order in (("low", "matched", 0.5), ("high", "paper", 0.49), ("high", "matched", 0.99)):
        rows, exact = [], []
        for h in STEPS:
            r = (MU * h**2) ** 0.5
            beta, every, steps = (1 - r) / (1 + r), round(0.25 / h), round(2 / h)
            if method == "heavy_ball":
                run = heavy_ball(lambda w: HESSIAN @ w, START, beta, h**2, steps, 1 + beta)
            else:
                run = nesterov(lambda w: HESSIAN @ w, START, lambda k, beta=beta: beta, h**2, steps)
            flow = generic(QUADRATIC, flow_class(QUADRATIC, MU, h**2, resolution, start))
            rows.append(run[::every])
            exact.append(expm_solution(*(float(n) for n in (flow.a, flow.b, flow.c, flow.velocity)), TIMES))
        assert abs(slopes(rows, exact) - order) <= 0.03, (resolution, start)


@pytest.mark.slow
@pytest.mark.parametrize(("resolution", "order"), [("high", 0.99), ("low", 0.49)])
def test_order_of_the_convex_flow(resolution, order):
    """At `t = (k + 3/2) sqrt(s)`, first order at high resolution with no matching of the start."""
    steps = STEPS / 2
    flows = stack([gf.NesterovConvexFlow(SOFT, h**2, resolution=resolution) for h in steps])
    ks = [np.round(TIMES / h).astype(int) for h in steps]
    ts = jnp.stack([(jnp.asarray(k) + 1.5) * h for k, h in zip(ks, steps, strict=True)])
    computed = solve_all(flows, jnp.asarray(START), ts, 1e-10)
    rows = [
        nesterov(soft_gradient, START, lambda k: k / (k + 3), h**2, k[-1])[k] for k, h in zip(ks, steps, strict=True)
    ]
    assert abs(slopes(rows, computed.params, steps) - order) <= 0.03


# Modified flows


def late_gaps(order, nesterov_, start, etas, beta, method_rows):
    """Distance at a time when the transient of momentum is over."""
    flows = stack([gf.ModifiedFlow(SOFT, eta, beta, nesterov_, order, start) for eta in etas])
    computed = solve_all(flows, jnp.asarray(START), jnp.full((len(etas), 1), 2.0), 1e-11)
    return np.linalg.norm(np.asarray(computed.params)[:, 0] - method_rows, axis=1)


def last_rows(etas, beta, nesterov_):
    """Iterates of the methods, from rest, at `t = 2`."""
    rows = []
    for eta in etas:
        steps = round(2 * (1 - beta) / eta)
        if nesterov_:
            rows.append(nesterov(soft_gradient, START, lambda k: beta, eta, steps)[-1])
        else:
            rows.append(heavy_ball(soft_gradient, START, beta, eta, steps, 1)[-1])
    return np.array(rows)


def test_second_order_flow_of_fixed_momentum():
    """Second order after the transient; the heavy ball and Nesterov's method from rest, in one program."""
    beta, etas = 0.5, 0.5 * np.array([0.04, 0.02, 0.01])
    flows = [gf.MomentumFlow(SOFT, eta, beta, is_nesterov) for is_nesterov in (False, True) for eta in etas]
    computed = solve_all(
        stack([generic(SOFT, flow) for flow in flows]), jnp.asarray(START), jnp.full((6, 1), 2.0), 1e-11
    )
    for i, is_nesterov in enumerate((False, True)):
        rows = last_rows(etas, beta, is_nesterov)
        gaps = np.linalg.norm(np.asarray(computed.params)[3 * i : 3 * i + 3, 0] - rows, axis=1)
        assert abs(np.log2(gaps[1] / gaps[2]) - 2) <= 0.1


MODIFIED = [
    (2, 0.0, False, "matched", 2),
    (3, 0.0, False, "matched", 3),
    pytest.param(2, 0.5, False, "plain", 1, marks=pytest.mark.slow),
    (2, 0.5, False, "matched", 2),
    (3, 0.5, False, "matched", 3),
    pytest.param(2, 0.5, True, "matched", 2, marks=pytest.mark.slow),
    pytest.param(3, 0.5, True, "matched", 3, marks=pytest.mark.slow),
    pytest.param(3, 0.5, True, "plain", 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("order", "beta", "nesterov_", "start", "expected"), MODIFIED)
def test_orders_of_modified_flows(order, beta, nesterov_, start, expected):
    """From rest: as stated with the offset of the start, first order without it."""
    etas = (1 - beta) * np.array([0.04, 0.02, 0.01])
    gaps = late_gaps(order, nesterov_, start, etas, beta, last_rows(etas, beta, nesterov_))
    assert abs(np.log2(gaps[1] / gaps[2]) - expected) <= 0.1


@pytest.mark.parametrize("nesterov_", [False, True])
def test_modified_flow_of_one_mode(nesterov_):
    """On a quadratic mode the slow manifold is the larger root of the recursion; its logarithm, power by power."""
    beta, lam = 0.6, 1.3
    problem = Quadratic(jnp.asarray([[lam]]))
    for order in (1, 2, 3):
        errors = []
        for eta in (0.004, 0.002):
            shrunk = 1 - eta * lam if nesterov_ else 1
            trace = (1 + beta) * (1 - eta * lam) if nesterov_ else 1 + beta - eta * lam
            root = (trace + np.sqrt(trace**2 - 4 * beta * shrunk)) / 2
            flow = gf.ModifiedFlow(problem, eta, beta, nesterov_, order)
            rate = float(flow.vector_field(jnp.zeros(()), jnp.ones(1), None)[0])
            errors.append(abs(rate - np.log(root) * (1 - beta) / eta))
        assert abs(np.log2(errors[0] / errors[1]) - order) <= 0.1


def test_principal_flow_is_gradient_descent_on_a_quadratic():
    """At learning rates up to 1.9 / sharpness, where iterates change sign at every step: compared after two."""
    sharpness = np.linalg.eigvalsh(HESSIAN)[-1]
    etas = np.array([0.1, 0.9, 1.9]) / sharpness
    flows = stack([gf.PrincipalFlow(QUADRATIC, eta, iterations=3) for eta in etas])
    computed = solve_all(flows, jnp.asarray(START), jnp.asarray(np.outer(etas, [2, 4])), 1e-11)
    for row, eta in zip(computed.params, etas, strict=True):
        step = np.eye(3) - eta * HESSIAN
        exact = [np.linalg.matrix_power(step, k) @ START for k in (2, 4)]
        np.testing.assert_allclose(row, exact, rtol=0, atol=1e-9)
    assert int(computed.stats["hessian_vector_products"][0]) == 3 * int(computed.stats["gradient_evaluations"][0])


@pytest.mark.slow
def test_costs_and_traits_of_modified_flows():
    costs = {order: gf.ModifiedFlow(SOFT, 0.1, 0.5, order=order) for order in (1, 2, 3)}
    assert [f.products_per_evaluation for f in costs.values()] == [0, 1, 3]
    assert [f.start_cost for f in costs.values()] == [(0, 0), (1, 0), (1, 1)]
    assert [f.symmetric_jacobian for f in costs.values()] == [True, True, False]
    for order in (2, 3):
        jacobian = jax.jacobian(lambda w, order=order: costs[order].vector_field(jnp.zeros(()), w, None))(
            jnp.asarray(START)
        )
        asymmetry = float(jnp.max(jnp.abs(jacobian - jacobian.T)))
        assert (asymmetry < 1e-12) == (order == 2)


# Mechanics


def test_every_gradient_is_counted():
    calls = []

    def problem(w):
        jax.debug.callback(lambda: calls.append(1))
        return 0.5 * jnp.sum(w**2) + 0.25 * jnp.sum(w**4)

    sol = gf.solve(gf.NesterovFlow(problem, 0.5, 0.1), jnp.array([1.0, 2.0]), [3.0], rtol=1e-6)
    jax.effects_barrier()
    # Loss and energy at both ends, and the gradient that the start takes once more for the energy there.
    assert int(sol.stats["gradient_evaluations"]) + 5 == len(calls)
    assert sol.drift["energy"] < 1e-5


def test_float32_and_frozen_leaves():
    params = {"w": jnp.ones(2, jnp.float32), "scale": 2, "fn": jnp.tanh}
    flow = gf.NesterovConvexFlow(lambda p: jnp.sum(p["fn"](p["w"]) ** 2) * p["scale"], 0.01)
    sol = gf.solve(flow, params, [1.0, 3.0], rtol=1e-4)
    assert sol.final["w"].dtype == jnp.float32
    assert sol.status == "ok"
    assert sol.final["scale"] == 2
    assert float(sol.loss[1]) < 0.5 * float(sol.loss[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gf.HeavyBallFlow(SOFT, -0.1, 0.1), "`mu` must not be negative, but is -0.1"),
        (lambda: gf.HeavyBallFlow(SOFT, 11.0, 0.1), "`mu` must be at most 1 / s = 10, but is 11"),
        (lambda: gf.HeavyBallFlow(SOFT, 1.0, 0.0), "`s` must be positive, but is 0"),
        (lambda: gf.HeavyBallFlow(SOFT, 1.0, 0.1, "medium"), "`resolution` must be one of 'high', 'low'"),
        (lambda: gf.NesterovFlow(SOFT, 1.0, 0.1, start="rest"), "`start` must be one of 'matched', 'paper'"),
        (lambda: gf.NesterovFlow(SOFT, np.nan, 0.1), "`mu` must not be negative, but is nan"),
        (lambda: gf.NesterovConvexFlow(SOFT, 0.1, alpha=0.0), "`alpha` must be positive"),
        (
            lambda: gf.solve(gf.NesterovConvexFlow(SOFT, 0.04), jnp.ones(3), [0.1, 1.0]),
            "`ts` must not start before the flow does, at t = 0.3, but is 0.1 first",
        ),
        (lambda: gf.MomentumFlow(SOFT, 0.1, 1.0), r"`momentum` must lie in \[0, 1\), but is 1"),
        (lambda: gf.ModifiedFlow(SOFT, 0.1, order=4), "`order` must be 1, 2 or 3, but is 4"),
        (lambda: gf.ModifiedFlow(SOFT, -0.1), "`learning_rate` must be positive"),
        (lambda: gf.ModifiedFlow(SOFT, 0.1, first_step=np.nan), "`first_step` must be finite"),
        (lambda: gf.PrincipalFlow(SOFT, 0.1, iterations=0), "`iterations` must be an integer of at least 1"),
        (lambda: gf.SecondOrderFlow(SOFT, np.inf), "`damping` must be finite"),
        (lambda: gf.SecondOrderFlow(SOFT, np.ones(2)), "`damping` must be a scalar"),
        (lambda: gf.SecondOrderFlow(SOFT, "much"), "`damping` must be a number or a function of time"),
        (
            lambda: gf.HeavyBall(SOFT, 0.1),
            "Exactly one of the arguments `mu` and `momentum` must be given, but neither",
        ),
        (lambda: gf.HeavyBall(SOFT, 0.1, mu=1.0, momentum=0.9), "but both is"),
        (lambda: gf.HeavyBall(SOFT, 0.1, momentum=-0.1), "`momentum` must lie"),
        (lambda: gf.HeavyBall(SOFT, 0.1, mu=1.0).with_learning_rate(2.0), "`mu` must be at most 1 / s = 0.5"),
        (lambda: gf.HeavyBall(SOFT, 0.1, mu=1.0).flow(2), r"`order` must be one of \(1,\) for HeavyBall, but is 2"),
        (lambda: gf.Nesterov(SOFT, 0.1, mu=1.0, momentum=0.9), "`momentum` must be None when `mu` is given"),
        (lambda: gf.Nesterov(SOFT, -1.0), "`learning_rate` must be positive"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Rules


def test_rules_equal_loops_by_hand():
    r = (MU * S) ** 0.5
    beta = (1 - r) / (1 + r)
    runs = [
        (gf.HeavyBall(SOFT, S, mu=MU), heavy_ball(soft_gradient, START, beta, S, 12, 1 + beta)),
        (gf.HeavyBall(SOFT, S, mu=MU, start="rest"), heavy_ball(soft_gradient, START, beta, S, 12, 1)),
        (gf.Nesterov(SOFT, S, mu=MU), nesterov(soft_gradient, START, lambda k: beta, S, 12)),
        (gf.Nesterov(SOFT, S), nesterov(soft_gradient, START, lambda k: k / (k + 3), S, 12)),
        (gf.Nesterov(SOFT, S, alpha=5.0), nesterov(soft_gradient, START, lambda k: k / (k + 5), S, 12)),
    ]
    clocks = [(0, H), (0, H), (0, H), (1.5, H), (2.5, H)]
    for (rule, rows), (shift, unit) in zip(runs, clocks, strict=True):
        sol = gf.iterate(rule, jnp.asarray(START), 12, save_every=1)
        np.testing.assert_allclose(sol.params, rows, rtol=1e-12)
        np.testing.assert_allclose(sol.ts, (np.arange(13) + shift) * unit, rtol=1e-14)


@pytest.mark.parametrize("nesterov_", [False, True])
def test_fixed_momentum_is_optax(nesterov_):
    rule_class = gf.Nesterov if nesterov_ else gf.HeavyBall
    ours = gf.iterate(rule_class(SOFT, S, momentum=0.9), jnp.asarray(START), 20)
    theirs = gf.iterate(gf.OptaxRule(SOFT, optax.sgd(S, momentum=0.9, nesterov=nesterov_), S), jnp.asarray(START), 20)
    np.testing.assert_allclose(ours.params, theirs.params, rtol=1e-12)
    np.testing.assert_allclose(ours.ts, 10 * theirs.ts, rtol=1e-13)


def test_two_root_formula():
    """The iterates on a quadratic mode are `c+ r+^k + c- r-^k`."""
    beta, eta, lam = 0.8, 0.05, np.array([0.1, 1.0, 30.0])
    rule = gf.HeavyBall(Quadratic(jnp.diag(jnp.asarray(lam))), eta, momentum=beta)
    sol = gf.iterate(rule, jnp.ones(3), 60, save_every=10)
    trace = (1 + beta - eta * lam).astype(complex)
    root = np.sqrt(trace**2 - 4 * beta)
    plus, minus = (trace + root) / 2, (trace - root) / 2
    weight = (1 - eta * lam - minus) / (plus - minus)
    k = np.asarray(10 * np.arange(7))[:, None]
    np.testing.assert_allclose(sol.params, np.real(weight * plus**k + (1 - weight) * minus**k), atol=1e-12)


def test_flows_of_rules():
    rule = gf.HeavyBall(SOFT, S, mu=MU)
    assert isinstance(rule.flow(), gf.HeavyBallFlow)
    assert (rule.flow().start, rule.flow(1, "low").resolution) == ("matched", "low")
    assert gf.HeavyBall(SOFT, S, mu=MU, start="rest").flow().start == "rest"
    assert isinstance(gf.Nesterov(SOFT, S).flow(), gf.NesterovConvexFlow)
    assert isinstance(gf.Nesterov(SOFT, S, mu=MU).flow(1, "low"), gf.NesterovFlow)
    fixed = gf.Nesterov(SOFT, S, momentum=0.9)
    assert isinstance(fixed.flow(), gf.MomentumFlow)
    assert (fixed.flow(3).order, fixed.flow(3).nesterov) == (3, True)
    assert list(rule.limits()) == ["low resolution", "high resolution"]
    assert list(fixed.limits()) == ["order 1", "second order ODE", "order 2"]
    assert gf.GradientDescent(SOFT, 0.1).flow(2).order == 2


def test_the_rule_diverges_beyond_its_limit_and_the_flow_does_not():
    for rule_class, name in ((gf.HeavyBall, "heavy_ball"), (gf.Nesterov, "nesterov")):
        limit = gf.theory.stable_step(1.0, 0.5, name)
        for factor, status in ((0.98, "ok"), (1.02, "diverged")):
            rule = rule_class(Quadratic(jnp.eye(1)), factor * limit, momentum=0.5)
            assert gf.iterate(rule, jnp.ones(1), 2000, throw=False).status == status
    flow = gf.HeavyBallFlow(Quadratic(jnp.eye(1)), 0.1, 9.0)
    assert abs(float(gf.solve(flow, jnp.ones(1), [60.0]).final[0])) < 1e-4
