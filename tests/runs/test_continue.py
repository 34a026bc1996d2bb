"""A `Solution` in place of parameters: the run goes on from its whole state, its clock and the memory of its method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradflow as gf

CURVATURES = jnp.array([0.3, 1.0, 8.0])
START = jnp.array([1.0, -2.0, 0.5])


def quadratic(w):
    return 0.5 * jnp.sum(CURVATURES * w**2)


def quartic(w):
    return quadratic(w) + 0.25 * jnp.sum(w**4)


def in_pieces(flow, start, edges, **options):
    """The last solution, and the gradients of all pieces together."""
    sol, total = start, 0
    for edge in edges:
        sol = gf.solve(flow, sol, [edge], **options)
        total += int(sol.stats["gradient_evaluations"])
    return sol, total


@pytest.mark.parametrize("transform", [optax.adam, optax.sgd, lambda rate: optax.sgd(rate, momentum=0.9)])
def test_a_rule_in_two_parts_is_the_rule_in_one(transform):
    rule = gf.OptaxRule(quartic, transform, learning_rate=0.05)
    half = gf.iterate(rule, START, 25)
    whole, second = gf.iterate(rule, START, 50), gf.iterate(rule, half, 25)
    assert np.array_equal(second.final, whole.final)
    assert float(second.ts[0]) == float(half.t_final)
    assert float(second.t_final) == float(whole.t_final)
    assert int(second.stats["gradient_evaluations"]) == int(second.stats["steps"]) == 25


def test_random_numbers_go_on_where_they_stopped(key):
    x = jax.random.normal(key, (20, 3))
    problem = gf.EmpiricalRisk(x, x @ START, gf.losses.square, predict=lambda w, x: x @ w)
    rule = gf.SGD(problem, 0.05, batch_size=4, key=key)
    assert np.array_equal(gf.iterate(rule, gf.iterate(rule, START, 13), 7).final, gf.iterate(rule, START, 20).final)
    flow, see = gf.SGDFlow(problem, 0.05, batch_size=4), {"key": key}
    first = gf.solve(flow, START, [0.5], **see)
    second, whole = gf.solve(flow, first, [1.0, 1.5]), gf.solve(flow, START, [0.5, 1.0, 1.5], **see)
    assert np.allclose(second.final, whole.final, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("flow", "end"),
    [
        (gf.GradientFlow(quartic), 8.0),
        pytest.param(gf.HeavyBallFlow(quartic, mu=0.3, s=0.05), 20.0, marks=pytest.mark.slow),
        pytest.param(gf.NesterovConvexFlow(quartic, s=0.05), 20.0, marks=pytest.mark.slow),
    ],
)
def test_many_pieces_cost_as_much_as_one_run_and_end_in_the_same_place(flow, end):
    exact = gf.solve(flow, START, [end], rtol=1e-11).final
    one = gf.solve(flow, START, [end])
    sol, total = in_pieces(flow, START, np.linspace(0, end, 41)[1:])
    assert float(sol.t_final) == end
    assert total <= 1.2 * int(one.stats["gradient_evaluations"])
    assert np.linalg.norm(sol.final - exact) <= 1e-4
    # Measured from the start of the first piece, over steps that the error control has accepted.
    assert float(sol.drift["energy"]) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("solver", [gf.solvers.NDF(), gf.solvers.ROCK2(), gf.solvers.Hybrid(), gf.solvers.Tsit5()])
def test_pieces_with_every_kind_of_method(solver):
    flow, options = gf.GradientFlow(quartic), {"solver": solver, "rtol": 1e-6}
    exact = gf.solve(flow, START, [8.0], rtol=1e-11).final
    one = gf.solve(flow, START, [8.0], **options)
    sol, total = in_pieces(flow, START, np.linspace(0, 8, 41)[1:], **options)
    assert total <= 1.25 * int(one.stats["gradient_evaluations"])
    assert np.linalg.norm(sol.final - exact) <= 1e-4 * np.linalg.norm(START)


@pytest.mark.slow
def test_rows_between_pieces_are_those_of_one_run():
    flow, ts = gf.GradientFlow(quartic), np.linspace(0, 2, 9)
    whole = gf.solve(flow, START, ts, rtol=1e-8)
    first = gf.solve(flow, START, ts[:4], rtol=1e-8)
    second = gf.solve(flow, first, ts[4:6], rtol=1e-8)
    third = gf.solve(flow, second, ts[5:], rtol=1e-8)
    assert np.allclose(third.params[0], second.final, rtol=0, atol=1e-12)
    rows = np.concatenate([first.params, second.params, third.params[1:]])
    assert np.allclose(rows, whole.params, rtol=0, atol=1e-6)


def test_a_run_out_of_steps_goes_on():
    flow = gf.GradientFlow(quartic)
    part = gf.solve(flow, START, [5.0], max_steps=6, throw=False)
    assert part.status == "max_steps"
    assert np.allclose(gf.solve(flow, part, [5.0]).final, gf.solve(flow, START, [5.0]).final, rtol=0, atol=1e-4)


def test_a_changed_problem_is_not_met_with_the_old_history():
    """The flow is taken on with another constant: as exact as a run that starts there."""
    first = gf.solve(gf.HeavyBallFlow(quadratic, mu=0.3, s=0.05), START, [2.0], rtol=1e-7)
    other = gf.HeavyBallFlow(quadratic, mu=3.0, s=0.05)
    sol = gf.solve(other, first, [4.0], rtol=1e-7)
    r = np.sqrt(3.0 * 0.05)
    position, velocity = (np.asarray(part) for part in first.state[:2])
    for i, curvature in enumerate(np.asarray(CURVATURES)):
        matrix = np.array([[0.0, 1.0], [-(1 + r) * curvature, -2 * np.sqrt(3.0)]])
        values, vectors = np.linalg.eig(matrix)
        weights = np.linalg.solve(vectors, [position[i], velocity[i]])
        want = np.real(vectors[0] @ (weights * np.exp(2.0 * values)))
        assert abs(float(sol.final[i]) - want) <= 1e-5


def test_until_is_located_in_a_continued_run():
    flow = gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2))
    first = gf.solve(flow, gf.solve(flow, jnp.ones(1), [0.1]), [0.2])
    sol = gf.solve(flow, first, [5.0], until=gf.Until(lambda w: w[0], below=0.5), rtol=1e-8)
    assert sol.status == "stopped"
    assert abs(float(sol.t_final) - np.log(2)) <= 1e-5


@pytest.mark.slow
def test_a_jump_at_the_seam_is_seen():
    class Switched(gf.AbstractFlow):
        def init(self, trainable, frozen):
            return trainable

        def vector_field(self, t, state, frozen):
            return jnp.where(t < 1.0, -state, 1.0 - state)

        def params(self, state):
            return state

    flow, jumps = Switched(), {"jumps": [1.0], "rtol": 1e-8}
    sol = gf.solve(flow, gf.solve(flow, gf.solve(flow, jnp.ones(1), [0.5], **jumps), [1.0], **jumps), [2.0], **jumps)
    assert abs(float(sol.final[0]) - (1 - (1 - np.exp(-1)) * np.exp(-1))) <= 1e-6


@pytest.mark.slow
def test_a_batch_is_continued_member_by_member():
    flow, scales = gf.GradientFlow(quartic), jnp.array([0.1, 1.0])
    first = jax.vmap(lambda scale: gf.solve(flow, scale * START, [1.0]))(scales)
    second = jax.vmap(lambda sol: gf.solve(flow, sol, [2.0]))(first)
    for i, scale in enumerate(scales):
        alone = gf.solve(flow, gf.solve(flow, scale * START, [1.0]), [2.0])
        assert np.allclose(second.final[i], alone.final, rtol=1e-9)


def test_what_does_not_fit_is_refused():
    sol = gf.solve(gf.GradientFlow(quadratic), START, [1.0])
    with pytest.raises(ValueError, match="a Solution of HeavyBallFlow, but is one of GradientFlow"):
        gf.solve(gf.HeavyBallFlow(quadratic, mu=0.3, s=0.05), sol, [2.0])
    with pytest.raises(ValueError, match="a Solution of GradientDescent, but is one of GradientFlow"):
        gf.iterate(gf.GradientDescent(quadratic, 0.1), sol, 3)
    with pytest.raises(ValueError, match="not start before the flow does, at t = 1"):
        gf.solve(gf.GradientFlow(quadratic), sol, [0.5])
    with pytest.raises(ValueError, match="`trainable` must be None"):
        gf.solve(gf.GradientFlow(quadratic), sol, [2.0], trainable=lambda leaf: True)


def test_velocity_time_and_state_are_seen_along_a_run():
    flow = gf.NesterovFlow(quadratic, mu=0.3, s=0.05)
    see = {"velocity": gf.observables.Velocity(), "t": gf.observables.Time()}
    ts = np.linspace(0.5, 2.5, 401)
    sol = gf.solve(flow, START, ts, observe=see, rtol=1e-9)
    differences = (sol.params[2:] - sol.params[:-2]) / (ts[2:] - ts[:-2])[:, None]
    assert np.allclose(sol.observed["velocity"][1:-1], differences, rtol=0, atol=1e-3 * np.abs(differences).max())
    assert np.array_equal(sol.observed["t"], ts)
    rule = gf.OptaxRule(quadratic, optax.adam, learning_rate=0.05)
    count = gf.observables.State(lambda state: state[1][0].count)
    run = gf.iterate(rule, START, 10, save_every=5, observe={"count": count, "t": gf.observables.Time()})
    assert run.observed["count"].tolist() == [0, 5, 10]
    assert np.allclose(run.observed["t"], run.ts)
    with pytest.raises(ValueError, match="which has no velocity"):
        gf.iterate(rule, START, 3, observe={"velocity": gf.observables.Velocity()})


def test_any_initial_velocity():
    """`X'' = -X` from `(1, 2)`: `cos t + 2 sin t`; the Hessian damping changes nothing of what the velocity means."""
    flow = gf.SecondOrderFlow(lambda w: 0.5 * jnp.sum(w**2), damping=0.0, initial_velocity=jnp.array([2.0]))
    assert abs(float(gf.solve(flow, jnp.ones(1), [1.0], rtol=1e-9).final[0]) - np.cos(1) - 2 * np.sin(1)) <= 1e-6
    damped = gf.SecondOrderFlow(lambda w: 0.5 * jnp.sum(w**2), 0.1, 0.3, initial_velocity=jnp.array([2.0]))
    see = {"velocity": gf.observables.Velocity()}
    assert np.allclose(gf.solve(damped, jnp.ones(1), [0.0, 1.0], observe=see).observed["velocity"][0], 2.0)
    with pytest.raises(ValueError, match="`initial_velocity` must have the shapes of the parameters"):
        gf.solve(flow, jnp.ones(2), [1.0])
