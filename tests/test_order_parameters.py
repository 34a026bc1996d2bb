"""The order-parameter flow: one expected step of SGD, closed forms, limits, invariants, and what it refuses."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import gradflow as gf
from gradflow.flows._order_parameters import REGIMES


def erf(x):
    return scipy.special.erf(x / np.sqrt(2))


def slope(x):
    return np.sqrt(2 / np.pi) * np.exp(-(x**2) / 2)


@pytest.fixture(scope="module")
def blue():
    """Eight students, four teachers, an informed start, and a very long run."""
    problem = gf.TeacherStudent.orthogonal(200, 4, noise=1e-3)
    start = problem.order_parameters(problem.informed(8, jax.random.key(0)))
    flow = gf.OrderParameterFlow(problem, gamma_over_p=1.0)
    ts = np.geomspace(10, 2e5, 9)
    return flow, gf.solve(flow, start, ts, solver=gf.solvers.RKC2(), rtol=1e-5, observe={"risk": flow.risk})


def small(noise=1e-2, **options):
    problem = gf.TeacherStudent.orthogonal(50, 2, noise=noise, **options)
    return problem, problem.order_parameters(problem.uninformed(3, jax.random.key(0)))


# One expected step


def step_by_simulation(W, teacher, v, g, noise, samples, seed, normalised=True):
    """Mean and standard error of `d / g` times the change of `Q`, `M` and `v` in one step of SGD."""
    rng = np.random.default_rng(seed)
    p, d = W.shape
    k = teacher.shape[0]
    over_p, over_k = (p, k) if normalised else (1, 1)
    x = rng.normal(size=(samples, d))
    fields, taught = x @ W.T / np.sqrt(d), x @ teacher.T / np.sqrt(d)
    error = erf(taught).sum(axis=1) / over_k + np.sqrt(noise) * rng.normal(size=samples) - erf(fields) @ v / over_p
    push = g / np.sqrt(d) * (error[:, None] * v * slope(fields))
    moved = push[:, :, None] * x[:, None, :]
    dM = moved @ teacher.T / d
    cross = moved @ W.T / d
    dQ = cross + cross.transpose(0, 2, 1) + np.einsum("sja,sla->sjl", moved, moved) / d
    dv = g / d * error[:, None] * erf(fields)
    scaled = [change * d / g for change in (dQ, dM, dv)]
    return [(np.mean(change, axis=0), np.std(change, axis=0) / np.sqrt(samples)) for change in scaled]


@pytest.mark.parametrize("normalised", [True, False])
def test_expected_step_of_sgd_is_met_exactly_at_any_dim(normalised):
    """Six inputs, a step large enough that its square matters, noise and a second layer; 4 10^5 samples.

    Without the correction in `d` the same comparison fails by far.
    """
    d, g, noise = 6, 2.0, 0.3
    rng = np.random.default_rng(0)
    W, teacher, v = rng.normal(size=(3, d)), rng.normal(size=(2, d)), np.array([1.0, 0.5, -0.8])
    problem = gf.TeacherStudent(teacher, noise=noise, normalised=normalised)
    params = problem.order_parameters((W, v))
    measured = step_by_simulation(W, teacher, v, g, noise, 400_000, 1, normalised)

    def rate(dim):
        flow = gf.OrderParameterFlow(problem, gamma_over_p=g, dim=dim, second_layer_rate=1.0)
        found = flow.vector_field(jnp.zeros(()), flow.init(params, None), None)
        return flow.params(found).Q, found.M, found.output

    for ours, (mean, error) in zip(rate(d), measured, strict=True):
        assert np.all(np.abs(np.asarray(ours) - mean) <= 4.5 * error)
    (mean, error), *_ = measured
    assert np.max(np.abs(np.asarray(rate(None)[0]) - mean) / error) > 10


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
    assert set(REGIMES["green"]) | set(REGIMES["orange"]) == set(REGIMES["blue"]) == set(REGIMES["full"])


def test_plateau_and_state_to_200000(blue):
    """`Q` is symmetric by construction, positive semi-definite throughout, and the risk stays on its plateau.

    The plateau is `A g noise / (1 - 2 A g)`, `A = 1 / (2 pi sqrt 3)`, within 1.5 %, once the tail has died out.
    """
    flow, sol = blue
    Q, M, risk = (np.asarray(x) for x in (sol.params.Q, sol.params.M, sol.observed["risk"]))
    np.testing.assert_array_equal(Q, Q.transpose(0, 2, 1))
    P = np.broadcast_to(np.asarray(flow.P), (len(M), 4, 4))
    joint = np.concatenate([np.concatenate([Q, M], 2), np.concatenate([M.transpose(0, 2, 1), P], 2)], 1)
    # The start has rank four of twelve.
    assert np.linalg.eigvalsh(joint).min() >= -1e-9
    A = 1 / (2 * np.pi * np.sqrt(3))
    np.testing.assert_allclose(risk[sol.ts >= 15_000], A * 1e-3 / (1 - 2 * A), rtol=0.015)
    assert int(sol.stats["steps"]) < 20_000


@pytest.mark.slow
def test_no_noise_no_step_size_is_gradient_flow_of_the_risk():
    """With the terms of order `g` left out the flow is gradient flow of the population risk over the weights."""
    problem = gf.TeacherStudent.orthogonal(12, 2, noise=0.5)
    W = problem.uninformed(3, jax.random.key(1))
    ts = np.array([0.0, 3.0, 30.0])
    weights = gf.solve(gf.GradientFlow(problem), W, 12 * 3 * ts, rtol=1e-7)
    flow = gf.OrderParameterFlow(problem, gamma_over_p=1.0, terms="green")
    sol = gf.solve(flow, problem.order_parameters(W), ts, rtol=1e-7)
    overlaps = jax.vmap(problem.order_parameters)(weights.params)
    # One unit of t is d/g steps of size gamma / (p d) on w / sqrt d: d p units of gradient flow time.
    np.testing.assert_allclose(sol.params.Q, overlaps.Q, rtol=0, atol=1e-6)
    np.testing.assert_allclose(sol.params.M, overlaps.M, rtol=0, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(flow.risk)(sol.params), jax.vmap(problem)(weights.params), rtol=0, atol=1e-7)


@pytest.mark.slow
def test_overparametrised_reduction_is_the_limit_of_wide_students():
    """The gap to the full system without terms of order `g` falls like `1/p`."""
    gaps = []
    for p in (8, 16, 32):
        problem = gf.TeacherStudent.orthogonal(2000, 2)
        M = problem.order_parameters(problem.uninformed(32, jax.random.key(0))).M[:p]
        start = gf.OrderParameters(M @ M.T + jnp.diag(jnp.linspace(0.5, 1.5, p)), M)
        full = gf.OrderParameterFlow(problem, gamma_over_p=1.0, terms="green")
        reduced = gf.flows.OverparametrisedFlow(problem)
        one = gf.solve(full, start, [1.0], rtol=1e-7)
        two = gf.solve(reduced, reduced.reduce(start), [1.0], rtol=1e-7)
        gaps.append(abs(float(full.risk(one.final) - reduced.risk(two.final))) / float(full.risk(one.final)))
    slopes = np.diff(np.log(gaps)) / np.log(2)
    assert gaps[0] < 0.2
    assert -1.25 < slopes[-1] < -0.75


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
    plain = gf.solve(gf.OrderParameterFlow(problem, gamma_over_p=0.5), start, [20.0], rtol=1e-7).final
    half = gf.OrderParameterFlow(problem, gamma_over_p=1.0, schedule=lambda t: 0.5)
    with_output = gf.OrderParameters(start.Q, start.M, jnp.ones(3))
    both = gf.solve(half, with_output, [40.0], rtol=1e-7).final
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
        return mine.risk(gf.solve(mine, start, [50.0], rtol=1e-7, throw=False).final)

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
    ("make", "said"),
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
def test_bad_input(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.slow
def test_single_precision_says_so_and_works():
    problem = gf.TeacherStudent.orthogonal(100, 2, noise=1e-2)
    double = problem.order_parameters(problem.informed(2, jax.random.key(0)))
    single = gf.OrderParameters(double.Q.astype(jnp.float32), double.M.astype(jnp.float32))
    flow = gf.OrderParameterFlow(problem, gamma_over_p=0.5)
    with pytest.warns(gf.PrecisionWarning, match="float32 resolve risks no better"):
        found = gf.solve(flow, single, [100.0], rtol=1e-4)
    assert found.final.Q.dtype == jnp.float32
    exact = float(flow.risk(gf.solve(flow, double, [100.0], rtol=1e-7).final))
    assert float(flow.risk(found.final)) == pytest.approx(exact, abs=3e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gf.solve(flow, double, [1.0])


def test_one_student_one_teacher():
    """The smallest system there is; started at the teacher without noise it stays."""
    flow = gf.OrderParameterFlow(jnp.eye(1), gamma_over_p=0.5)
    rest = gf.solve(flow, gf.OrderParameters(jnp.eye(1), jnp.eye(1)), [100.0])
    np.testing.assert_allclose(rest.final.Q, [[1.0]], atol=1e-12)
    start = gf.OrderParameters(jnp.eye(1), 0.1 * jnp.eye(1))
    risk = gf.solve(flow, start, [100.0, 200.0], rtol=1e-7, observe={"risk": flow.risk}).observed["risk"]
    # It falls exponentially, and the risk is linear in the overlaps: what is left is the error of the solve.
    assert np.all(np.abs(risk) < 1e-6)
