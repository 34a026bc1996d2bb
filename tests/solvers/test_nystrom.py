"""The Runge-Kutta-Nystrom pairs: order, embedded order, dense output, reach, damping, energy, calibration, counts."""

import json
from fractions import Fraction
from importlib import resources

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

import gradflow as gf
from gradflow._tree import split
from gradflow.solvers._nystrom import coefficients

METHOD = gf.solvers.Nystrom()
RNG = np.random.default_rng(0)
FACTOR = RNG.normal(size=(4, 4))
HESSIAN = FACTOR @ FACTOR.T + 0.2 * np.eye(4)


class Quadratic(eqx.Module):
    """`w^T H w / 2`."""

    hessian: jax.Array

    def __call__(self, w):
        return 0.5 * w @ (self.hessian @ w)


def quartic(w):
    """`X'' + a X' + c X^3 = 0` in every coordinate."""
    return 0.25 * jnp.sum(w**4)


def pendulum(w):
    return jnp.sum(1 - jnp.cos(w))


TOLERANCES = {4: 1e-2, 6: 1e-4, 8: 1e-8}
"""By the order of the pair that they select."""
PROBLEMS = {"linear": Quadratic(jnp.asarray(HESSIAN)), "cubic": quartic, "pendulum": pendulum}


@eqx.filter_jit
def take(flow, y, rate, dt, rtol):
    """A step of a given length: the state after it, the error over a tolerance of one, and the state half-way."""
    zero = jnp.zeros(())
    field = gf.solvers.Field(flow, None, zero, zero)
    control = gf.solvers.StepControl(rtol, jnp.asarray(1.0))
    state = METHOD.begin(field, y, rate, dt)
    scale = jax.tree_util.tree_map(jnp.zeros_like, flow.controlled(y))
    tried = METHOD.attempt(field, y, dt, control, scale, state)
    return tried.y1, tried.ratio, METHOD.interpolate(field, tried.dense, 0.37 * dt), tried.accepted


def run(flow, start, end, steps, order=8):
    """Fixed steps to `end` with the pair of this order; the state there and what the last step said."""
    y = flow.init(start, None)
    dt = jnp.asarray(end / steps)
    for _ in range(steps):
        rate = flow.vector_field(jnp.zeros(()), y, None)
        y, ratio, inside, _ = take(flow, y, rate, dt, jnp.asarray(TOLERANCES[order]))
    return y, float(ratio), inside


def exact(problem, flow, start, end):
    """DOP853 on the first-order form, with an unrelated right-hand side."""
    gradient = jax.jit(jax.grad(problem))
    a, c = float(flow.damping(jnp.zeros(()))), float(flow.gradient_weight(jnp.zeros(())))
    n, y0 = len(start), flow.init(start, None)

    def field(t, y):
        return np.concatenate([y[n:], -a * y[n:] - c * np.asarray(gradient(y[:n]))])

    y0 = np.concatenate([y0.position, y0.momentum])
    return scipy.integrate.solve_ivp(field, (0, end), y0, method="DOP853", rtol=1e-13, atol=1e-14).y[:, -1]


def test_the_published_coefficients_are_of_orders_eight_and_six():
    data = json.loads(resources.files("gradflow.solvers").joinpath("rkn86.json").read_text())
    nodes = [Fraction(c) for c in data["nodes"]]

    def moment(name, k):
        return sum(Fraction(b) * c**k for b, c in zip(data[name], nodes, strict=True))

    for k in range(8):
        assert (moment("velocity", k) == Fraction(1, k + 1)) or k == 7  # the last one holds to rounding of the source
    assert all(moment("position", k) == Fraction(1, (k + 1) * (k + 2)) for k in range(7))
    assert all(abs(float(moment("velocity_embedded", k) * (k + 1)) - 1) < 1e-14 for k in range(6))
    assert abs(float(moment("velocity_embedded", 6) * 7) - 1) > 1e-4
    # Stages are consistent, and the last one sits where the step ends.
    rows = [[Fraction(a) for a in row] for row in data["rows"]]
    assert all(sum(row) == c**2 / 2 for row, c in zip(rows, nodes, strict=True))
    assert rows[-1] == [Fraction(b) for b in data["position"][:8]]


@pytest.mark.parametrize(
    ("name", "damping", "end", "fewest"),
    [
        ("linear", 0.0, 4.0, 16),
        ("linear", 0.6, 4.0, 16),
        ("cubic", 0.6, 4.0, 16),
        ("pendulum", 0.6, 6.0, 8),
    ],
)
@pytest.mark.parametrize("order", [4, 6, 8])
def test_order(name, damping, end, fewest, order):
    """Fixed steps, up to four times as many, where rounding begins: order eight leaves no room for more halvings."""
    flow = gf.HeavyBallFlow(PROBLEMS[name], mu=damping**2 / 4, s=0.04)
    start = jnp.asarray([1.0, -0.5, 0.8, 1.7])
    reference = exact(PROBLEMS[name], flow, start, end)
    fewest = {4: 32, 6: 24 if name == "cubic" else 16, 8: fewest}[order]
    counts, errors = (fewest * 2 ** (np.arange(5) / 2)).astype(int), []
    for count in counts:
        y, *_ = run(flow, start, end, count, order)
        errors.append(np.linalg.norm(np.concatenate([y.position, y.momentum]) - reference))
    slope, _ = np.polyfit(np.log(counts), -np.log(errors), 1)
    assert slope == pytest.approx(order, abs=0.15), errors


@pytest.mark.parametrize(("order", "estimate", "dense"), [(4, 4, [4, 4]), (6, 6, [5, 4]), (8, 7, [7, 6])])
def test_orders_of_the_estimate_and_of_dense_output_in_a_step(order, estimate, dense):
    flow = gf.HeavyBallFlow(pendulum, mu=0.09, s=0.04)
    start = jnp.asarray([1.0, -0.5, 2.0])
    ratios, gaps = [], []
    for dt in 0.8 / 2.0 ** np.arange(5 if order == 4 else 4):
        _, ratio, inside = run(flow, start, dt, 1, order)
        ratios.append(ratio)
        reference = exact(pendulum, flow, start, 0.37 * dt)
        gaps.append([np.linalg.norm(inside.position - reference[:3]), np.linalg.norm(inside.momentum - reference[3:])])
    assert np.diff(-np.log2(ratios))[-2:] == pytest.approx([estimate, estimate], abs=0.3)
    slopes = np.diff(-np.log2(gaps), axis=0)
    np.testing.assert_allclose(slopes[3:] if order == 4 else slopes[1:3], [dense] * (1 if order == 4 else 2), atol=0.15)


def turn(pair, z, share=1.0):
    """What a step of this pair makes of `w'' = -w` over `z`, for both starts, less the rotation; in numpy."""
    table = jax.tree_util.tree_map(lambda part: np.asarray(part)[pair], coefficients())
    powers = share ** np.arange(1, 12)
    if share == 1:
        position, velocity = table.position, table.velocity
    else:
        position, velocity = table.dense[1] @ powers[1:], table.dense[0] @ powers[:-1]
    stages = np.linalg.solve(np.eye(9) + z**2 * table.rows, np.stack([np.ones(9), z * table.nodes], axis=1))
    matrix = np.array([[1, share * z], [0, 1]]) - np.stack([z**2 * position @ stages, z * velocity @ stages])
    c, s = np.cos(share * z), np.sin(share * z)
    return matrix, np.linalg.norm(matrix - np.array([[c, s], [-s, c]]), 2)


@pytest.mark.parametrize(
    ("pair", "reach", "error", "inside", "growth"), [(0, 8.75, 1.6e-3, 3.5e-3, 1.1e-3), (1, 6.0, 4e-5, 1e-4, 4e-5)]
)
def test_oscillations_are_followed_as_far_as_said(pair, reach, error, inside, growth):
    """The error of a step stays small up to `reach`, at its end and inside, and explodes beyond."""
    assert coefficients().stability_limit[pair] == reach
    steps = [turn(pair, z) for z in np.linspace(0.05, reach, 300)]
    assert max(gap for _, gap in steps) < error
    assert max(np.abs(np.linalg.eigvals(matrix)).max() for matrix, _ in steps) < 1 + growth
    assert max(turn(pair, z, share)[1] for z in np.linspace(0.05, reach, 100) for share in (0.1, 0.37, 0.8)) < inside
    assert turn(pair, 1.15 * reach)[1] > 100 * error
    # Order eight is off by more than that at half the length.
    assert turn(2, 0.8 * reach)[1] > error


def test_the_highest_frequency_is_seen_and_holds_the_steps():
    """Oscillations that have died away must not let steps grow to where the method would wake them."""
    hessian = np.diag([1.0, 0.9, 0.3, 1e-4])
    flow = gf.HeavyBallFlow(Quadratic(jnp.asarray(hessian)), mu=1e-3, s=1.0)
    start, r = jnp.ones(4), np.sqrt(1e-3)
    y = flow.init(start, None)
    rate = flow.vector_field(jnp.zeros(()), y, None)
    *_, state = take(flow, y, rate, jnp.asarray(5.0), jnp.asarray(1e-2))
    assert float(state.highest) == pytest.approx(1 + r, rel=0.05)
    assert float(state.highest) <= (1 + r) * (1 + 1e-9)
    ts = np.linspace(0, 400, 9)
    sol = gf.solve(flow, start, ts, rtol=1e-2, solver=METHOD)
    zero, one = np.zeros((4, 4)), np.eye(4)
    field = np.block([[zero, one], [-(1 + r) * hessian, -2 * np.sqrt(1e-3) * one]])
    whole = np.concatenate([start, -1.5 * hessian @ start])
    reference = np.array([(scipy.linalg.expm(field * t) @ whole)[:4] for t in ts])
    assert np.abs(sol.params - reference).max() < 1e-2
    assert np.abs(sol.final - reference[-1])[:3].max() < 1e-4  # in the fast ones, which have lost all but 3e-6
    assert int(sol.stats["rejected"]) == 0
    radians = 400 * np.sqrt(1 + r)
    assert radians * 8 / 9.1 < int(sol.stats["gradient_evaluations"]) < 1.15 * radians


@pytest.mark.parametrize("mu", [0.25, 1.0, 4.0])
def test_what_decays_without_turning(mu):
    """Damped beyond every frequency: not what coefficients were fitted to, and within the tolerance all the same."""
    hessian = np.diag(np.geomspace(1e-3, 1, 6))
    flow = gf.HeavyBallFlow(Quadratic(jnp.asarray(hessian)), mu=mu, s=0.25)
    y, ts = flow.init(jnp.ones(6), None), np.linspace(0, 60, 13)
    zero, one = np.zeros((6, 6)), np.eye(6)
    field = np.block([[zero, one], [-(1 + np.sqrt(mu * 0.25)) * hessian, -2 * np.sqrt(mu) * one]])
    reference = np.array([scipy.linalg.expm(field * t) @ np.concatenate([y.position, y.momentum]) for t in ts])[:, :6]
    for rtol in (3e-2, 1e-2, 1e-3, 1e-4):
        sol = gf.solve(flow, jnp.ones(6), ts, rtol=rtol)
        assert np.abs(sol.params - reference).max() < rtol
        assert int(sol.stats["gradient_evaluations"]) < 100 + 8 * 60 / 6 * 2 * np.sqrt(
            mu
        )  # steps of 6 over the damping


@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_leaving_a_saddle(rtol):
    """Growth, not rotation: coefficients that are fitted to oscillations follow it to the tolerance all the same."""
    flow = gf.HeavyBallFlow(lambda w: jnp.sum(w**4 / 4 - w**2 / 2), mu=0.01, s=0.04)
    start = jnp.asarray([1e-3, -0.02, 0.4])
    for end in (4.0, 8.0, 30.0):
        sol = gf.solve(flow, start, [end], rtol=rtol)
        reference = exact(lambda w: jnp.sum(w**4 / 4 - w**2 / 2), flow, start, end)[:3]
        assert np.linalg.norm(sol.final - reference) < 10 * rtol * np.linalg.norm(reference)


def test_damping_is_exact():
    """Without a force `X'` falls like `exp(-a t)` in any step, however long."""
    flow = gf.HeavyBallFlow(lambda w: 0.0 * jnp.sum(w), mu=25.0, s=0.01)
    y = flow.init(jnp.ones(2), None)._replace(momentum=jnp.ones(2))
    rate = flow.vector_field(jnp.zeros(()), y, None)
    for dt, tolerance in ((0.05, 1e-11), (0.1, 1e-9), (0.2, 1e-6)):
        y1, *_ = take(flow, y, rate, jnp.asarray(dt), jnp.asarray(TOLERANCES[8]))
        np.testing.assert_allclose(y1.momentum, np.exp(-10 * dt), rtol=tolerance)


@pytest.mark.parametrize("mu", [0.0, 1e-3, 0.2])
def test_closed_form_on_a_quadratic(mu):
    flow = gf.HeavyBallFlow(PROBLEMS["linear"], mu=mu, s=0.04)
    ts = np.linspace(0.0, 20.0, 7)
    start = np.array([1.0, -0.5, 0.8, 0.1])
    sol = gf.solve(flow, jnp.asarray(start), ts, rtol=1e-10)
    assert sol.method == "Nystrom"
    r = np.sqrt(mu * 0.04)
    zero, one = np.zeros((4, 4)), np.eye(4)
    field = np.block([[zero, one], [-(1 + r) * HESSIAN, -2 * np.sqrt(mu) * one]])
    whole = np.concatenate([start, -1.5 * 0.2 * HESSIAN @ start])
    reference = [(scipy.linalg.expm(field * t) @ whole)[:4] for t in ts]
    np.testing.assert_allclose(sol.params, reference, atol=1e-9)


@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("name", ["cubic", "pendulum"])
def test_what_is_asked_for_is_what_one_gets(name, rtol):
    """Over ten oscillations: error within a factor of ten of the tolerance, and the energy tells of it."""
    flow = gf.HeavyBallFlow(PROBLEMS[name], mu=1e-3, s=0.04)
    start = jnp.asarray([1.0, -0.5, 0.8, 1.7])
    sol = gf.solve(flow, start, [60.0], rtol=rtol)
    error = np.linalg.norm(sol.final - exact(PROBLEMS[name], flow, start, 60.0)[:4]) / np.linalg.norm(start)
    assert error < 10 * rtol
    assert sol.drift["energy"] < 10 * rtol
    tighter = gf.solve(flow, start, [60.0], rtol=rtol / 1000)
    assert tighter.drift["energy"] < sol.drift["energy"] / 4


@pytest.mark.slow
def test_fewer_gradients_than_order_eight_without_nystrom():
    """At equal error on a network, by two fifths."""
    problem = gf.EmpiricalRisk(*gf.data.digits(n=40, centre=True, labels="onehot"), gf.losses.square)
    model = gf.models.MLP(64, 8, 10, key=jax.random.key(0))
    sharpness = float(gf.observables.Sharpness(problem)(model))
    flow = gf.HeavyBallFlow(problem, 1e-3 * sharpness, 1 / sharpness)
    ts = [60 / np.sqrt(sharpness)]
    reference = gf.solve(flow, model, ts, rtol=1e-11, solver=gf.solvers.Dopri8()).final
    cost = {}
    for solver in (gf.solvers.Nystrom(), gf.solvers.Dopri8()):
        for rtol in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5):
            sol = gf.solve(flow, model, ts, rtol=rtol, solver=solver)
            gap = jax.tree_util.tree_map(jnp.subtract, split(sol.final)[0], split(reference)[0])
            if gf._tree.tree_norm(gap) < 1e-3 * gf._tree.tree_norm(reference):
                cost[sol.method] = int(sol.stats["gradient_evaluations"])
                break
    assert cost["Nystrom"] < 0.6 * cost["Dopri8"]


def test_every_gradient_is_counted():
    calls = []

    def problem(w):
        jax.debug.callback(lambda: calls.append(1))
        return 0.5 * jnp.sum(w**2) + 0.25 * jnp.sum(w**4)

    sol = gf.solve(gf.HeavyBallFlow(problem, 0.5, 0.1), jnp.array([1.0, 2.0]), [3.0], rtol=1e-6)
    jax.effects_barrier()
    assert sol.method == "Nystrom"
    # Loss and energy at both ends, and the gradient that the start takes once more for the energy there.
    assert int(sol.stats["gradient_evaluations"]) + 5 == len(calls)


@pytest.mark.slow
def test_a_batch_equals_a_loop_and_float32_is_kept():
    def end(mu, start):
        return gf.solve(gf.HeavyBallFlow(pendulum, mu, 0.04), start, [10.0], rtol=1e-7, throw=False).final

    mus, starts = jnp.array([0.0, 0.1, 0.5]), jnp.array([[1.0, 0.2], [2.0, 0.1], [0.3, 3.0]])
    batch = jax.vmap(end)(mus, starts)
    alone = jnp.stack([end(mu, start) for mu, start in zip(mus, starts, strict=True)])
    np.testing.assert_allclose(batch, alone, rtol=1e-6)
    single = gf.solve(gf.HeavyBallFlow(pendulum, 0.1, 0.04), jnp.array([2.0, 0.1], jnp.float32), [10.0], rtol=1e-4)
    assert single.final.dtype == jnp.float32
    np.testing.assert_allclose(single.final, alone[1], rtol=1e-3, atol=1e-4)


def test_forward_mode_agrees_with_differences():
    def end(mu):
        return gf.solve(gf.HeavyBallFlow(pendulum, mu, 0.04), jnp.array([1.0, 2.0]), [5.0], rtol=1e-9).final

    _, slope = jax.jvp(end, (jnp.asarray(0.1),), (jnp.asarray(1.0),))
    np.testing.assert_allclose(slope, (end(0.1001) - end(0.0999)) / 2e-4, rtol=1e-4)


@pytest.mark.slow
def test_who_gets_it():
    smooth = gf.EmpiricalRisk(np.eye(2), np.ones(2), gf.losses.square)
    tanh = gf.models.MLP(2, 3, key=jax.random.key(0))
    relu = gf.models.TwoLayer(2, 3, key=jax.random.key(0))
    heavy, slow = gf.HeavyBallFlow(smooth, 0.1, 0.1), gf.NesterovFlow(smooth, 0.1, 0.1, "low")
    for flow in (heavy, slow, gf.MomentumFlow(smooth, 0.1, 0.9)):
        assert gf.solve(flow, tanh, [0.1]).method == "Nystrom"
        assert gf.solve(flow, relu, [0.1]).method == "Tsit5"
    corrected = gf.NesterovFlow(smooth, 0.1, 0.1)
    methods = [gf.solve(corrected, tanh, [0.1], rtol=rtol).method for rtol in (1e-3, 1e-4, 1e-6)]
    assert methods == ["Bosh3", "Tsit5", "Dopri8"]
    with pytest.raises(ValueError, match="one for a NesterovFlow, but is Nystrom: the flow has velocities"):
        gf.solve(corrected, tanh, [0.1], solver=METHOD)
    with pytest.raises(ValueError, match="one for a GradientFlow, but is Nystrom: the flow has no `damping` and no"):
        gf.solve(gf.GradientFlow(smooth), tanh, [0.1], solver=METHOD)


def test_a_field_that_is_not_finite_ends_the_run():
    def problem(w):
        return jnp.where(jnp.sum(w**2) < 0.5, jnp.nan, 0.5) * jnp.sum(w**2)

    sol = gf.solve(gf.HeavyBallFlow(problem, 0.1, 0.1), jnp.ones(2), [1.0, 10.0], throw=False)
    assert sol.status == "nonfinite"


@pytest.mark.parametrize("wrong", ["position", "velocity", "rows", "damping"])
def test_mutants_are_of_another_order(wrong, monkeypatch):
    """A weight, a row, or the term `a^2 / 4` changed by a thousandth: the error no longer falls by 2^8."""
    table = coefficients()
    if wrong == "damping":
        real = gf.HeavyBallFlow.damping
        monkeypatch.setattr(METHOD.__class__, "_damping", lambda self, field, like: 1.001 * real(field.flow, field.t))
    else:
        change = np.zeros_like(getattr(table, wrong))
        change[(2, 4, 2) if wrong == "rows" else (2, 4)] = 1e-3
        monkeypatch.setattr(
            "gradflow.solvers._nystrom.coefficients", lambda: table._replace(**{wrong: getattr(table, wrong) + change})
        )
    jax.clear_caches()
    flow = gf.HeavyBallFlow(pendulum, mu=0.09, s=0.04)
    start = jnp.asarray([1.0, -0.5, 0.8])
    reference = exact(pendulum, flow, start, 6.0)
    errors = []
    for count in (8, 16):
        y, *_ = run(flow, start, 6.0, count)
        errors.append(np.linalg.norm(np.concatenate([y.position, y.momentum]) - reference))
    jax.clear_caches()
    assert np.log2(errors[0] / errors[1]) < 6.5
