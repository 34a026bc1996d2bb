"""Fields that jump in time, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradflow as gf
from gradflow.flows._schedule import schedule_jumps


class Relaxation(gf.AbstractFlow):
    """`w' = rate(t) (target(t) - w)`, with rate and target constant before and after `at`."""

    rates: jax.Array
    targets: jax.Array
    at: jax.Array

    def __init__(self, rates, targets, at=50.0):
        self.rates, self.targets, self.at = jnp.array(rates), jnp.array(targets), jnp.array(at)

    def init(self, trainable, frozen):
        return trainable

    def vector_field(self, t, state, frozen):
        late = (t > self.at).astype(int)
        return self.rates[late] * (self.targets[late] - state)

    def params(self, state):
        return state

    def exact(self, start, t):
        """The solution at `t` beyond the jump."""
        first = self.targets[0] + (start - self.targets[0]) * jnp.exp(-self.rates[0] * self.at)
        return self.targets[1] + (first - self.targets[1]) * jnp.exp(-self.rates[1] * (t - self.at))


class Pulse(gf.AbstractFlow):
    """`w' = 1[first < t < last] - w / 1000`."""

    first: jax.Array
    last: jax.Array
    declared: bool

    def init(self, trainable, frozen):
        return trainable

    def vector_field(self, t, state, frozen):
        return jnp.where((t > self.first) & (t < self.last), 1.0, 0.0) - 1e-3 * state

    def params(self, state):
        return state

    @property
    def jumps(self):
        return jnp.stack([self.first, self.last]) if self.declared else None

    def exact(self, t):
        return 1e3 * (jnp.exp(-1e-3 * (t - self.last)) - jnp.exp(-1e-3 * (t - self.first)))


def pulse(declared=False):
    return Pulse(jnp.array(50.0), jnp.array(51.0), declared)


METHODS = (None, gf.solvers.NDF(), gf.solvers.Hybrid(), gf.solvers.ROCK2(), gf.solvers.RKC2(), gf.solvers.Tsit5())


@pytest.mark.parametrize("solver", METHODS)
def test_burst_between_steps(solver):
    """No save time lies near the burst, and the field is zero on either side of it."""
    given = gf.solve(pulse(), jnp.zeros(1), [100.0], jumps=[50.0, 51.0], solver=solver)
    declared = gf.solve(pulse(True), jnp.zeros(1), [100.0], solver=solver)
    np.testing.assert_allclose(given.final, pulse().exact(100.0), rtol=1e-4)
    np.testing.assert_array_equal(given.final, declared.final)


def test_longest_step_meets_a_burst():
    sol = gf.solve(pulse(), jnp.zeros(1), [100.0], longest_step=0.4)
    np.testing.assert_allclose(sol.final, pulse().exact(100.0), rtol=1e-3)
    assert sol.stats["accepted"] >= 250


@pytest.mark.parametrize("solver", [None, gf.solvers.NDF(), gf.solvers.Hybrid(), gf.solvers.Tsit5()])
@pytest.mark.parametrize("at", [50.0, 0.37])
def test_jump_from_zero_that_nothing_declares(solver, at):
    """The state is exactly zero, with no size to measure errors against, until the field jumps."""
    flow = Relaxation([1.0, 1.0], [0.0, 1.0], at)
    sol = gf.solve(flow, jnp.zeros(2), np.linspace(0, at + 10, 41), solver=solver)
    assert sol.status == "ok"
    np.testing.assert_allclose(sol.final, flow.exact(0.0, at + 10), rtol=1e-4)
    middle = np.searchsorted(sol.ts, at + 1)
    np.testing.assert_allclose(sol.params[middle], flow.exact(0.0, float(sol.ts[middle])), rtol=1e-3)


@pytest.mark.parametrize("solver", METHODS)
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_declared_jump_is_met_exactly(solver, start):
    """At an accuracy that no method has across a jump; the error of `RKC2` falls like `rtol^0.63` in any case."""
    flow = Relaxation([0.1, 0.3], [2.0, -1.0], 7.0)
    sol = gf.solve(flow, jnp.full(1, start), [5.0, 12.0], jumps=[7.0], solver=solver, rtol=1e-7)
    rtol = 2e-5 if isinstance(solver, gf.solvers.RKC2) else 3e-6
    np.testing.assert_allclose(sol.final, flow.exact(start, 12.0), rtol=rtol)


@pytest.mark.slow
def test_derivative_with_respect_to_the_time_of_a_jump():
    """`d w(T) / d at`, the step that ends there included."""

    def final(at):
        return gf.solve(Relaxation([0.1, 0.3], [2.0, -1.0], at), jnp.ones(1), [12.0], jumps=at[None], rtol=1e-8).final[
            0
        ]

    def exact(at):
        return Relaxation([0.1, 0.3], [2.0, -1.0], at).exact(1.0, 12.0)

    computed, expected = jax.jacfwd(final)(jnp.array(7.0)), jax.grad(exact)(jnp.array(7.0))
    np.testing.assert_allclose(computed, expected, rtol=1e-5)


def test_jumps_are_values_and_members_of_a_batch():
    """Other times compile nothing new, and under `vmap` every member meets its own."""
    times = jnp.array([[20.0, 21.0], [50.0, 51.0], [70.0, 70.5]])

    @jax.jit
    def final(pair):
        flow = Pulse(pair[0], pair[1], False)
        return gf.solve(flow, jnp.zeros(1), [100.0], jumps=pair, throw=False).final[0]

    expected = [Pulse(first, last, False).exact(100.0) for first, last in times]
    np.testing.assert_allclose(jax.vmap(final)(times), expected, rtol=1e-4)
    np.testing.assert_allclose([final(pair) for pair in times], expected, rtol=1e-4)
    assert final._cache_size() <= 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"jumps": [2.0, 1.0]}, "increase strictly"),
        ({"jumps": np.ones((1, 1))}, "one-dimensional"),
        ({"jumps": [np.nan]}, "finite"),
        ({"longest_step": 0.0}, "longest_step"),
        ({"longest_step": np.ones(1)}, "scalar"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        gf.solve(pulse(), jnp.zeros(1), [1.0], **options)


def test_jumps_of_optax_schedules():
    constant = optax.piecewise_constant_schedule(1.0, {5: 0.1, 9: 0.5})
    joined = optax.join_schedules([constant, constant], [7])
    linear = optax.linear_schedule(0.0, 1.0, 10)
    for schedule, expected in (
        (constant, [5, 9]),
        (optax.piecewise_interpolate_schedule("linear", 1.0, {3: 0.5, 8: 0.1}), [3, 8]),
        (joined, [5, 7, 12, 16]),
        (optax.join_schedules([linear, optax.constant_schedule(0.1)], [4]), [0, 4]),
        (optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 100), [0, 10, 100]),
        (gf.flows.InterpolatedSchedule([0.0, 2.0], [1.0, 0.5]), [0, 2]),
    ):
        assert schedule_jumps(schedule).tolist() == expected
    assert schedule_jumps(lambda t: 2 * constant(t)) is None
    assert schedule_jumps(optax.constant_schedule(1.0)) is None
    assert schedule_jumps(None) is None


@pytest.mark.slow
def test_flow_declares_the_jumps_of_its_schedule():
    """A burst of a thousandfold learning rate, shorter than any step, agrees with three runs of constant rate."""
    problem = gf.TeacherStudent.orthogonal(dim=100, units=1)
    start = problem.order_parameters(problem.informed(2, jax.random.key(1)))
    burst = optax.piecewise_constant_schedule(0.001, {50: 1000.0, 51: 0.001})
    whole = gf.solve(gf.OrderParameterFlow(problem, gamma_over_p=0.5, schedule=burst), start, [80.0], rtol=1e-7)
    params = start
    for factor, length in ((0.001, 50.0), (1.0, 1.0), (0.001, 29.0)):
        flow = gf.OrderParameterFlow(problem, gamma_over_p=0.5, schedule=lambda t, factor=factor: factor + 0 * t)
        params = gf.solve(flow, params, [length], rtol=1e-7).final
    np.testing.assert_allclose(whole.final.M, params.M, rtol=1e-5)
    np.testing.assert_allclose(whole.final.Q, params.Q, rtol=1e-5)


@pytest.mark.slow
def test_sweep_meets_jumps():
    """Through a sweep, with jumps that are given or declared: the numbers of single runs."""

    def build(last):
        return Pulse(jnp.array(50.0), jnp.array(last), False), jnp.zeros(1)

    ds = gf.sweep(
        build,
        {"last": [51.0, 53.0]},
        [0.0, 100.0],
        observe={"w": lambda w: w[0]},
        jumps=[50.0, 51.0, 53.0],
        longest_step=30.0,
        progress=False,
    )
    expected = [Pulse(jnp.array(50.0), jnp.array(last), False).exact(100.0) for last in (51.0, 53.0)]
    np.testing.assert_allclose(ds.w[:, -1], expected, rtol=1e-4)


@pytest.mark.slow
def test_first_step_knows_no_unit_of_time():
    """A loss a million million times smaller, run as much longer, takes the same steps; also from exactly zero."""
    for solver in (None, gf.solvers.Tsit5(), gf.solvers.NDF(), gf.solvers.Hybrid()):
        for start in (0.0, 1.0):
            counts = []
            for unit in (1.0, 1e-12):
                flow = gf.GradientFlow(lambda w, unit=unit: unit * 0.5 * jnp.sum((w - 2) ** 2))
                sol = gf.solve(flow, jnp.full(1, start), [10 / unit], solver=solver)
                np.testing.assert_allclose(sol.final, 2 + (start - 2) * np.exp(-10), rtol=1e-4)
                counts.append(int(sol.stats["gradient_evaluations"]))
            assert abs(counts[1] - counts[0]) <= 2
