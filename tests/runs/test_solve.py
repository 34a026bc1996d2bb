"""Mechanics of `solve`: counts, traces, batching, statuses, events, precision, interruption."""

import re

import diffrax
import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.runs import _adaptive, _drive


class Counted(eqx.Module):
    """A stiff-ish quartic problem that counts, on the host, how often it is evaluated."""

    curvature: jax.Array
    counter: list = eqx.field(static=True)

    def __call__(self, w):
        def tick():
            self.counter.append(1)

        jax.debug.callback(tick)
        return 0.5 * jnp.sum(self.curvature * w**2) + 0.25 * jnp.sum(w**4)

    def __hash__(self):
        return id(self.counter)


SOLVERS = [
    None,
    gf.solvers.Tsit5(),
    gf.solvers.Dopri5(),
    gf.solvers.Bosh3(),
    gf.solvers.Heun(),
    gf.solvers.Dopri8(),
    gf.solvers.ROCK2(),
    gf.solvers.RKC2(),
    gf.solvers.Hybrid(),
    diffrax.Ralston(),
    diffrax.Midpoint(),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_reported_gradient_evaluations_equal_counted_ones(solver):
    """Rejected steps and the search for a first step included; the loss itself is evaluated twice at the ends."""
    counter = []
    problem = Counted(jnp.array([1.0, 40.0]), counter)
    rtol = 1e-2 if type(solver).__name__ in ("Heun", "Ralston", "Midpoint") else 1e-5
    # A first step far too large for the second stretch of the run makes some steps fail.
    sol = gf.solve(gf.GradientFlow(problem), jnp.array([30.0, 20.0]), [0.1, 3.0], solver=solver, rtol=rtol)
    jax.effects_barrier()
    ends = 4  # loss and conserved energy, at the first and at the last state
    assert int(sol.stats["gradient_evaluations"]) + ends == len(counter)
    assert int(sol.stats["steps"]) == int(sol.stats["accepted"] + sol.stats["rejected"])


def test_rejected_steps_are_counted():
    """A wall, at which the curvature jumps, makes steps fail; the count stays exact."""
    counter = []

    class Wall(Counted):
        def __call__(self, w):
            return super().__call__(w) + 1e3 * jax.nn.relu(w[0] - 0.3) ** 2 - w[0]

    problem = Wall(jnp.array([0.01, 0.01]), counter)
    sol = gf.solve(gf.GradientFlow(problem), jnp.array([-1.5, 0.1]), [4.0], rtol=1e-4)
    jax.effects_barrier()
    assert int(sol.stats["rejected"]) > 0
    assert int(sol.stats["gradient_evaluations"]) + 4 == len(counter)


@pytest.mark.slow
def test_implicit_solver_runs_and_says_that_it_does_not_count(quadratic):
    sol = gf.solve(gf.GradientFlow(quadratic), jnp.ones(4), [2.0], solver=gf.solvers.Kvaerno5(), rtol=1e-6)
    exact = gf.solve(gf.GradientFlow(quadratic), jnp.ones(4), [2.0], rtol=1e-9)
    np.testing.assert_allclose(sol.final, exact.final, rtol=0, atol=1e-5)
    assert int(sol.stats["gradient_evaluations"]) == -1
    assert "not reported" in repr(sol)


def test_second_call_with_new_numbers_traces_nothing(key):
    traces = []

    def predict(w, x):
        traces.append(1)
        return x @ w

    def run(seed, scale, rtol, end, value):
        rng = np.random.default_rng(seed)
        problem = gf.EmpiricalRisk(rng.normal(size=(10, 3)), rng.normal(size=10), gf.losses.square, predict)
        until = gf.Until(gf.observables.ParameterNorm(), above=value)
        start = jnp.asarray(scale * rng.normal(size=3))
        observe = {"loss": gf.observables.Loss(problem)}
        return gf.solve(gf.GradientFlow(problem), start, [0.0, end], rtol=rtol, until=until, observe=observe)

    run(0, 1.0, 1e-4, 2.0, 100.0)
    first = len(traces)
    assert first > 0
    before = _adaptive.advance._cached._cache_size()
    run(1, 0.1, 1e-5, 3.0, 50.0)
    assert len(traces) == first
    assert _adaptive.advance._cached._cache_size() == before


@pytest.mark.slow
def test_vmap_equals_a_loop(small_mlp):
    problem, _ = small_mlp
    keys = jax.random.split(jax.random.key(3), 4)
    scales = jnp.array([1e-6, 1e-2, 0.3, 1.0])

    def run(key, scale):
        model = gf.models.MLP(64, 8, 10, init_scale=scale, key=key)
        return gf.solve(gf.GradientFlow(problem), model, [1.0, 5.0], rtol=1e-6, observe={"loss": problem})

    together = jax.vmap(run)(keys, scales)
    for i in range(4):
        alone = run(keys[i], scales[i])
        np.testing.assert_allclose(together.observed["loss"][i], alone.observed["loss"], rtol=1e-5)
        assert together.status[i] == alone.status == "ok"
    assert "batch of shape (4,)" in repr(together)


def test_works_inside_jit_and_forward_mode_matches_differences(quadratic):
    """d(final loss) / d(initial scale), by forward mode and by central differences."""

    @jax.jit
    def final_loss(scale):
        sol = gf.solve(gf.GradientFlow(quadratic), scale * jnp.arange(1.0, 5.0), [0.7], rtol=1e-10)
        return quadratic(sol.final)

    h = 1e-4
    numeric = (final_loss(1.0 + h) - final_loss(1.0 - h)) / (2 * h)
    assert float(jax.jacfwd(final_loss)(1.0)) == pytest.approx(float(numeric), rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("rtol", [pytest.param(1e-3, marks=pytest.mark.slow), 1e-5])
def test_precision_follows_the_parameters(dtype, rtol):
    """Scalar Saxe mode from scale 1e-8, in both precisions."""
    s, scale = 2.0, 1e-8
    flow = gf.GradientFlow(lambda p: 0.5 * (s - p["a"] * p["w"]) ** 2)
    start = {"a": jnp.asarray(scale, dtype), "w": jnp.asarray(scale, dtype)}
    half = np.log(s / scale**2 - 1) / (2 * s)
    until = gf.Until(lambda p: p["a"] * p["w"], above=s / 2)
    sol = gf.solve(flow, start, [2 * half], rtol=rtol, until=until)
    assert sol.final["a"].dtype == dtype
    assert abs(float(sol.t_final) / half - 1) < 10 * rtol


def test_float32_at_the_edge_of_its_range():
    """Weights of 1e-30, whose squares underflow in float32, escape on time."""
    flow = gf.GradientFlow(lambda w: -0.5 * jnp.sum(w**2))
    until = gf.Until(gf.observables.ParameterNorm(), above=1.0)
    start = jnp.asarray([1e-30, 1e-30], jnp.float32)
    sol = gf.solve(flow, start, [100.0], rtol=1e-4, until=until)
    assert sol.status == "stopped"
    exact = np.log(1 / (np.sqrt(2) * np.float32(1e-30)))
    assert float(sol.t_final) == pytest.approx(exact, rel=1e-4)


def test_start_below_the_smallest_normal_number_does_not_hang():
    flow = gf.GradientFlow(lambda w: -0.5 * jnp.sum(w**2))
    sol = gf.solve(flow, jnp.array([1e-300]), [100.0], rtol=1e-6)
    assert sol.status == "ok"
    assert float(sol.final[0]) == pytest.approx(1e-300 * np.exp(100), rel=1e-4)


def test_start_too_small_for_its_type_gets_a_warning():
    flow = gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2))
    with pytest.warns(gf.PrecisionWarning, match="float32 resolves differences of parameters only from about 1e-32 on"):
        gf.solve(flow, jnp.full(2, 1e-34, jnp.float32), [1.0], rtol=1e-4)


def test_tolerance_below_the_precision_is_raised_with_a_warning():
    flow = gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2))
    with pytest.warns(gf.PrecisionWarning, match=r"rtol = 1e-09 is below what float32 can meet; using 7\.6e-06"):
        sol = gf.solve(flow, jnp.ones(2, jnp.float32), [1.0], rtol=1e-9)
    assert sol.status == "ok"
    assert float(sol.rtol) == pytest.approx(64 * np.finfo(np.float32).eps)
    assert np.max(np.abs(np.asarray(sol.final) - np.exp(-1))) < 10 * float(sol.rtol)


def test_leaves_that_do_not_flow_are_carried_along():
    start = {"w": jnp.ones(2), "steps": jnp.array(7), "name": "net", "act": jnp.tanh, "mask": jnp.array([True, False])}
    flow = gf.GradientFlow(lambda p: 0.5 * jnp.sum((p["act"](p["w"]) * p["mask"]) ** 2))
    sol = gf.solve(flow, start, [1.0, 2.0])
    assert sol.final["name"] == "net"
    assert int(sol.final["steps"]) == 7
    assert sol.params["w"].shape == (2, 2)
    assert float(sol.final["w"][1]) == 1.0
    assert float(sol.final["w"][0]) < 1.0


def test_save_times_at_the_start_and_between_steps():
    flow = gf.GradientFlow(lambda w: 0.5 * w**2)
    ts = np.concatenate([[0.0], np.linspace(0.001, 0.002, 50), [5.0]])
    sol = gf.solve(flow, jnp.array(1.0), ts, rtol=1e-8)
    np.testing.assert_allclose(sol.params, np.exp(-ts), rtol=1e-7)
    assert int(sol.saved) == ts.size
    only_start = gf.solve(flow, jnp.array(2.0), [0.0])
    assert only_start.status == "ok"
    assert float(only_start.final) == 2.0
    assert float(only_start.params[0]) == 2.0


def test_save_params_false_keeps_observables_and_the_end():
    flow = gf.GradientFlow(lambda w: 0.5 * w**2)
    sol = gf.solve(flow, jnp.array(1.0), [1.0, 2.0], save_params=False, observe={"w": lambda w: w})
    assert sol.params is None
    np.testing.assert_allclose(sol.observed["w"], np.exp([-1.0, -2.0]), rtol=1e-4)


@pytest.mark.parametrize(("side", "value", "when"), [("below", 0.25, np.log(4.0)), ("above", -0.5, np.log(2.0))])
def test_until_is_located_to_rounding(side, value, when):
    flow = gf.GradientFlow(lambda w: 0.5 * w**2)
    sign = 1.0 if side == "below" else -1.0
    until = gf.Until(lambda w: sign * w, **{side: value})
    sol = gf.solve(flow, jnp.array(1.0), [0.1, 5.0, 10.0], rtol=1e-10, until=until)
    assert sol.status == "stopped"
    assert float(sol.t_final) == pytest.approx(when, rel=1e-9)
    assert sol.reached.tolist() == [True, False, False]
    assert np.isnan(np.asarray(sol.params)[1:]).all()


def test_until_already_met_at_the_start():
    sol = gf.solve(gf.GradientFlow(lambda w: 0.5 * w**2), jnp.array(1.0), [1.0], until=gf.Until(lambda w: w, below=2.0))
    assert (sol.status, float(sol.t_final), int(sol.stats["steps"])) == ("stopped", 0.0, 0)


def test_until_at_a_late_time_keeps_its_digits():
    """Escape after 1e12 time units, found to rounding of the time, not to an absolute tolerance."""
    flow = gf.GradientFlow(lambda w: -0.5e-12 * w**2)
    sol = gf.solve(flow, jnp.array(1.0), [1e14], rtol=1e-10, until=gf.Until(lambda w: w, above=np.e))
    assert float(sol.t_final) == pytest.approx(1e12, rel=1e-8)


def test_step_budget_keeps_the_partial_result():
    flow = gf.GradientFlow(lambda w: 0.5 * jnp.sum(jnp.array([1.0, 1e4]) * w**2))
    with pytest.raises(gf.SolveError, match=r"max_steps: the step budget ran out: raise max_steps") as caught:
        gf.solve(flow, jnp.ones(2), [1e-5, 10.0], max_steps=50)
    partial = caught.value.solution
    assert partial.status == "max_steps"
    assert int(partial.saved) == 1
    assert 0 < float(partial.t_final) < 10
    assert np.isfinite(np.asarray(partial.final)).all()
    assert int(partial.stats["steps"]) == 50


def test_blow_up_in_finite_time_is_a_step_underflow():
    """`w' = w^2` reaches infinity at t = 1."""
    sol = gf.solve(gf.GradientFlow(lambda w: -(w**3) / 3), jnp.array(1.0), [0.5, 2.0], throw=False)
    assert sol.status == "step_underflow"
    assert float(sol.t_final) == pytest.approx(1.0, abs=10 * 1e-5)
    assert float(sol.params[0]) == pytest.approx(2.0, rel=10 * 1e-5)
    assert int(sol.stats["steps"]) < 1000


def test_non_finite_field_ends_the_run_at_once():
    """The square root has no gradient at negative arguments, which the flow reaches at t = 1."""
    flow = gf.GradientFlow(lambda w: w + 0 * jnp.sqrt(w))
    sol = gf.solve(flow, jnp.array(1.0), [0.5, 3.0], throw=False)
    assert sol.status == "nonfinite"
    assert float(sol.t_final) == pytest.approx(1.0, abs=1e-3)
    assert int(sol.stats["steps"]) < 200
    at_once = gf.solve(gf.GradientFlow(lambda w: jnp.log(-w)), jnp.array(1.0), [1.0], throw=False)
    assert (at_once.status, int(at_once.stats["steps"])) == ("nonfinite", 0)
    with pytest.raises(gf.SolveError, match="stopped being finite"):
        gf.solve(gf.GradientFlow(lambda w: jnp.log(-w)), jnp.array(1.0), [1.0])


def test_failing_member_of_a_batch_leaves_the_others_alone():
    def run(start):
        return gf.solve(gf.GradientFlow(lambda w: -(w**3) / 3), start, [0.5, 2.0], throw=False)

    starts = jnp.array([-1.0, 1.0, -2.0])
    batch = jax.vmap(run)(starts)
    assert batch.status.tolist() == ["ok", "step_underflow", "ok"]
    np.testing.assert_allclose(batch.final[jnp.array([0, 2])], [-1 / 3, -2 / 5], rtol=1e-4)


@pytest.mark.slow
def test_progress_gives_the_same_numbers(quadratic, capsys, monkeypatch):
    monkeypatch.setattr("gradflow.runs._progress._is_watched", lambda: True)
    plain = gf.solve(gf.GradientFlow(quadratic), jnp.ones(4), [1.0, 30.0])
    shown = gf.solve(gf.GradientFlow(quadratic), jnp.ones(4), [1.0, 30.0], progress=True)
    assert np.array_equal(plain.params, shown.params)
    assert "GradientFlow" in capsys.readouterr().err


@pytest.mark.parametrize("show", [True, False])
def test_interruption_keeps_what_was_computed(quadratic, monkeypatch, show):
    genuine, calls = _adaptive.advance, []
    monkeypatch.setattr(_drive, "SEGMENT", 1e-9)  # one step each

    def interrupted(setup, carry, budget):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(setup, carry, budget)

    monkeypatch.setattr(_adaptive, "advance", interrupted)
    with pytest.raises(gf.SolveInterrupted) as caught:
        gf.solve(gf.GradientFlow(quadratic), jnp.ones(4), [1e-9, 30.0], progress=show)
    partial = caught.value.solution
    assert partial.status == "interrupted"
    assert int(partial.stats["steps"]) >= 2
    assert np.isfinite(np.asarray(partial.params[0])).all()


def test_summary_says_what_matters(quadratic):
    text = str(gf.solve(gf.GradientFlow(quadratic), jnp.ones(4), [0.0, 1.0], observe={"n": lambda w: w[:2]}))
    for part in (
        "GradientFlow, 4 parameters, float64",
        "Automatic(Tsit5, NDF) (smooth), rtol = 1e-05",
        "ok",
        "2 of 2 save times",
    ):
        assert part in text
    assert re.search(r"steps +\d+ \(\d+ accepted, \d+ rejected\), \d+ gradient evaluations", text)
    assert re.search(r"loss +\S+ -> \S+", text)
    assert re.search(r"drift +energy \d\.\de-\d\d", text)
    assert "n (2, 2)" in text


@pytest.mark.slow
def test_requested_tolerance_is_what_one_gets(small_mlp):
    """Error of parameters and loss within a factor of ten of rtol, on a tanh network on digits."""
    problem, model = small_mlp
    flow = gf.GradientFlow(problem)
    start = np.concatenate([np.ravel(leaf) for leaf in jax.tree_util.tree_leaves(eqx.filter(model, eqx.is_array))])

    def end(rtol):
        sol = gf.solve(flow, model, [4.0], rtol=rtol, save_params=False)
        leaves = jax.tree_util.tree_leaves(eqx.filter(sol.final, eqx.is_array))
        return np.concatenate([np.ravel(leaf) for leaf in leaves]), float(sol.loss[1])

    reference, loss = end(1e-11)
    for rtol in (1e-3, 1e-5, 1e-7, 1e-9):
        computed, found_loss = end(rtol)
        assert np.linalg.norm(computed - reference) <= 10 * rtol * np.linalg.norm(reference - start)
        assert abs(found_loss / loss - 1) <= 10 * rtol


def test_a_flow_far_from_the_origin_of_time_keeps_its_digits():
    """A thousand units of time in float32 state, float64 time: the clock does not erode the step."""
    flow = gf.GradientFlow(lambda w: 0.5 * jnp.sum(jnp.array([50.0], jnp.float32) * (w - 1) ** 2))
    sol = gf.solve(flow, jnp.array([2.0], jnp.float32), np.linspace(0, 1000, 5), rtol=1e-4)
    assert sol.status == "ok"
    assert float(sol.final[0]) == pytest.approx(1.0, abs=1e-4)


def test_fresh_constraints_on_the_solver():
    flow = gf.GradientFlow(lambda w: 0.5 * w**2)
    with pytest.raises(
        ValueError, match=r"Argument `solver` must have an error estimate, but is Euler, which has none"
    ):
        gf.solve(flow, jnp.array(1.0), [1.0], solver=diffrax.Euler())


BAD = {
    "ts unsorted": ({"ts": [0.0, 2.0, 1.0]}, r"`ts` must increase strictly, but is 2 followed by 1 at index 1"),
    "ts repeated": ({"ts": [0.0, 1.0, 1.0]}, "`ts` must increase strictly"),
    "ts empty": ({"ts": []}, r"`ts` must be one-dimensional and not empty, but is of shape \(0,\)"),
    "ts a matrix": ({"ts": np.ones((2, 2))}, "one-dimensional"),
    "ts early": ({"ts": [-1.0, 1.0]}, r"`ts` must not start before the flow does, at t = 0, but is -1 first"),
    "ts nan": ({"ts": [0.0, np.nan]}, "`ts` must be finite"),
    "rtol negative": ({"rtol": -1e-3}, r"`rtol` must be positive, but is -0\.001"),
    "rtol large": ({"rtol": 2.0}, "`rtol` must be below 1, but is 2"),
    "atol negative": ({"atol": -1.0}, "`atol` must not be negative"),
    "max_steps": ({"max_steps": 0}, "`max_steps` must be an integer of at least 1, but is 0"),
    "key": ({"key": 1}, "`key` must be None for a deterministic flow"),
    "nan params": (
        {"params": jnp.array([1.0, np.nan])},
        r"`params` must be finite, but is not finite in 1 of 2 entries",
    ),
    "integers": ({"params": jnp.array([1, 2])}, r"`params` must have at least one floating-point array leaf.*int64"),
    "no arrays": ({"params": {"a": "b"}}, r"`params` must have at least one floating-point array leaf.*str"),
    "mixed": (
        {"params": (jnp.ones(2, jnp.float32), jnp.ones(2)), "flow": gf.GradientFlow(lambda p: jnp.sum(p[0] + p[1]))},
        "`params` must be of one floating-point type, but is float32 and float64",
    ),
    "complex": ({"params": jnp.array([1j])}, "`params` must hold real numbers"),
    "vector loss": (
        {"flow": gf.GradientFlow(lambda w: w)},
        r"`problem` must return a real .* shape \(2,\) of type float64",
    ),
    "complex loss": ({"flow": gf.GradientFlow(lambda w: jnp.sum(w) * 1j)}, "`problem` must return a real"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_runs(case):
    given, message = BAD[case]
    arguments = {"flow": gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2)), "params": jnp.ones(2), "ts": [1.0]} | given
    with pytest.raises(ValueError, match=message):
        gf.solve(**arguments)


def test_times_are_checked_under_a_trace_in_single_precision():
    with jax.enable_x64(False):
        flow = gf.GradientFlow(lambda w: 0.5 * w**2)
        ends = jax.jit(lambda start: gf.solve(flow, start, [0.0, 1.0], rtol=1e-4).final)(jnp.array(1.0))
        assert ends.dtype == jnp.float32
        assert float(ends) == pytest.approx(np.exp(-1), rel=1e-3)
        with pytest.raises(ValueError, match="not distinct in float32 between 1 and 1"):
            gf.solve(flow, jnp.array(1.0), [1.0, 1.0 + 1e-12])


def test_until_wants_exactly_one_side():
    with pytest.raises(ValueError, match="Exactly one of the arguments `above` and `below` must be given, but neither"):
        gf.Until(lambda w: w)
    with pytest.raises(ValueError, match="but both"):
        gf.Until(lambda w: w, above=1.0, below=0.0)
    with pytest.raises(ValueError, match="`below` must be a number, but is NaN"):
        gf.Until(lambda w: w, below=np.nan)
    with pytest.raises(ValueError, match=r"`above` must be a scalar, but is of shape \(2,\)"):
        gf.Until(lambda w: w, above=jnp.ones(2))


def dot_precisions(jaxpr):
    """The precision of every matrix product in a program, inner programs included."""
    computed = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            computed.append(str(equation.params["precision"]))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            computed += dot_precisions(inner)
    return computed


def test_matrix_products_run_at_full_precision(small_mlp):
    """At any default of the device: in `solve`, in `iterate` and in observables called by themselves."""
    problem, model = small_mlp
    arrays, static = eqx.partition(model, eqx.is_array)
    observe = {"ntk": gf.observables.NTK(problem), "top": gf.observables.Sharpness(problem, iterations=3)}

    def solved(arrays):
        return gf.solve(gf.GradientFlow(problem), eqx.combine(arrays, static), [1.0], observe=observe).final.weights

    def iterated(arrays):
        return gf.iterate(gf.GradientDescent(problem, 0.1), eqx.combine(arrays, static), 3).final.weights

    runs = [solved, iterated, *(lambda a, fn=fn: fn(eqx.combine(a, static)) for fn in observe.values())]
    for run in runs:
        with jax.default_matmul_precision("bfloat16"):
            computed = dot_precisions(jax.make_jaxpr(run)(arrays).jaxpr)
        assert computed
        assert all("HIGHEST" in precision for precision in computed), set(computed)


def test_what_functions_take_from_elsewhere_is_seen_when_it_changes():
    """Closures, arrays changed in place, globals of helpers, observables and rules: no call returns stale numbers, and
    none compiles anew where nothing has changed."""
    reference, traces = {"strength": 1.0, "data": np.ones(2)}, []

    def make(strength):
        def loss(w):
            traces.append(0)
            return 0.5 * strength * jnp.sum((w - jnp.asarray(reference["data"])) ** 2)

        return loss, lambda w: strength * w

    loss, seen = make(1.0)
    flow, rule = gf.GradientFlow(loss), gf.GradientDescent(loss, 0.5)

    def numbers():
        sol = gf.solve(flow, jnp.zeros(2), [1.0], rtol=1e-6, observe={"seen": seen})
        return [sol.final, sol.observed["seen"][0], gf.iterate(rule, jnp.zeros(2), 1).final]

    numbers()
    before = len(traces)
    first = numbers()
    concrete = len(traces) - before  # the loss at the start is looked at before anything is compiled
    np.testing.assert_allclose(first[0], 1 - np.exp(-1), rtol=1e-5)
    for cell in (loss.__closure__[loss.__code__.co_freevars.index("strength")], seen.__closure__[0]):
        cell.cell_contents = 2.0
    doubled = numbers()
    np.testing.assert_allclose(doubled[0], 1 - np.exp(-2), rtol=1e-5)
    np.testing.assert_allclose(doubled[1], 2 * doubled[0], rtol=1e-12)
    np.testing.assert_allclose(doubled[2], 1.0)
    reference["data"][:] = 3.0
    np.testing.assert_allclose(numbers()[0], 3 * doubled[0], rtol=1e-9)
    before = len(traces)
    numbers()
    assert len(traces) - before == concrete <= 2
