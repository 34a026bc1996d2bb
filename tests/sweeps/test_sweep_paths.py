"""Sweeps over stochastic flows: members against single runs, resuming, padding, and complaints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.stores import _state_file
from gradflow.sweeps import _scheduler

X = np.random.default_rng(0).normal(size=(6, 3))
TS = [0.0, 0.33, 1.0]
COUNTS = ["steps", "accepted", "rejected", "gradient_evaluations", "hessian_vector_products"]


def linear(w, x):
    return x @ w


PROBLEM = gf.EmpiricalRisk(X, np.sin(X.sum(axis=1)), gf.losses.square, predict=linear)
OBSERVED = {"risk": PROBLEM, "w": lambda w: w, "t": gf.observables.Time()}


def path(rate, seed, order=1):
    return gf.SGDFlow(PROBLEM, rate, 2, order=order), jnp.array([0.3, -1.0, 2.0]), jax.random.key(seed)


def quietly(build, axes, ts=TS, **options):
    return gf.sweep(build, axes, ts, **({"progress": False, "observe": OBSERVED, "save_params": True} | options))


def bitwise(a, b):
    same = all(np.array_equal(a[n].values, b[n].values, equal_nan=a[n].dtype.kind == "f") for n in a.variables)
    return set(a.variables) == set(b.variables) and same


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("order", "solver", "name"),
    [
        (1, None, "EulerMaruyama"),
        (2, None, "SmallNoise"),
        pytest.param(1, gf.solvers.EulerMaruyama(dt=0.03), "EulerMaruyama", marks=pytest.mark.slow),
        pytest.param(1, gf.solvers.SKROCK(0.2, stages=3), "SKROCK", marks=pytest.mark.slow),
    ],
)
def test_every_path_equals_a_single_run(batch, order, solver, name):
    """Five paths, so that the last batch is incomplete; without a solver, each takes the one that `solve` takes."""
    axes = {"rate": [0.05, 0.2], "seed": range(3)}
    ds = quietly(lambda rate, seed: path(rate, seed, order), axes, solver=solver, batch=batch)
    assert ds.attrs["solver"] == name
    assert "saved_time" not in ds
    assert (ds.status == 0).all()
    assert len(np.unique(ds.w[..., -1, 0])) == 6, "each path draws numbers of its own"
    for rate in axes["rate"]:
        for seed in axes["seed"]:
            flow, start, key = path(rate, seed, order)
            sol = gf.solve(flow, start, TS, key=key, solver=solver, observe=OBSERVED)
            computed = ds.sel(rate=rate, seed=seed)
            np.testing.assert_allclose(computed.w, sol.params, rtol=1e-12)
            np.testing.assert_allclose(computed.params, sol.params, rtol=1e-12)
            np.testing.assert_allclose(computed.risk, sol.observed["risk"], rtol=1e-12)
            np.testing.assert_allclose(computed.t, TS, rtol=1e-12)
            np.testing.assert_allclose([computed.loss_first, computed.loss_last], sol.loss, rtol=1e-12)
            assert [int(computed[count]) for count in COUNTS] == [int(sol.stats[count]) for count in COUNTS]
            assert float(computed.t_final) == 1.0


class KilledError(BaseException):
    """The end of a process that has no time to save anything."""


@pytest.fixture
def segments(monkeypatch):
    """Counts segments of a few steps each; `after` makes one raise `what`."""
    real, calls = _scheduler.run_segment, []

    class Segments:
        after, what = None, KeyboardInterrupt

        def __call__(self, fixed, pending, state, budget, mesh):
            if self.after is not None and len(calls) == self.after:
                raise self.what
            calls.append(1)
            return real(fixed, pending, state, 0 * budget + 12, mesh)

        def __len__(self):
            return len(calls)

    counter = Segments()
    monkeypatch.setattr(_scheduler, "run_segment", counter)
    return counter


@pytest.mark.parametrize("what", [KeyboardInterrupt, KilledError])
def test_resuming_an_interrupted_sweep_gives_the_same_bits(tmp_path, segments, what, monkeypatch):
    monkeypatch.setattr(_state_file, "COST", np.inf)
    axes = {"rate": [0.05, 0.1], "seed": range(4)}
    whole = quietly(path, axes, batch=3)
    once = len(segments)
    assert once > 6
    segments.after, segments.what = once + 4 * once // 5, what
    with pytest.raises(what):
        quietly(path, axes, batch=3, store=tmp_path / "a.zarr")
    done = gf.sweeps.open_store(tmp_path / "a.zarr").status == 0
    assert 0 < done.sum() < 8
    segments.after = None
    resumed = quietly(path, axes, batch=3, store=tmp_path / "a.zarr")
    assert len(segments) <= 2 * once + 3, "unfinished paths go on where they were"
    assert bitwise(resumed, whole)
    assert bitwise(gf.sweeps.open_store(tmp_path / "a.zarr"), whole)


@pytest.mark.slow
def test_a_store_of_other_paths_is_refused(tmp_path):
    def run(shift=0, dt=0.05, solver_class=gf.solvers.EulerMaruyama):
        build = lambda seed: path(0.1, seed + shift)  # noqa: E731
        return quietly(build, {"seed": [0, 1]}, solver=solver_class(dt), store=tmp_path / "a.zarr")

    first = run()
    assert bitwise(run(), first)
    with pytest.raises(ValueError, match=r"numbers of the flow or rule"):
        run(shift=1)
    with pytest.raises(ValueError, match=r"solver_numbers: \[0.05\] -> \[0.025\]"):
        run(dt=0.025)
    with pytest.raises(ValueError, match=r'solver: "EulerMaruyama" -> "SmallNoise"'):
        run(solver_class=gf.solvers.SmallNoise)


@pytest.mark.slow
def test_paths_that_stop_break_down_or_run_out_of_steps():
    """As single ones do, but that a budget of steps is a status: it spoils no other member."""
    until, ts, budget = gf.Until(lambda w: w[2], below=1.5), [0.1, 50.0], 400
    ds = quietly(lambda rate: path(rate, 0), {"rate": [0.05, 0.1]}, ts, until=until)
    names = ds.status.attrs["flag_meanings"].split()
    for computed, rate in zip((ds.sel(rate=rate) for rate in (0.05, 0.1)), (0.05, 0.1), strict=True):
        flow, start, key = path(rate, 0)
        alone = gf.solve(flow, start, ts, key=key, until=until)
        assert (names[int(computed.status) + 1], alone.status) == ("stopped", "stopped")
        assert int(computed.steps) == int(alone.stats["steps"]) < budget
        assert float(computed.t_final) == pytest.approx(float(alone.t_final), rel=1e-12)
    ds = quietly(lambda rate: path(rate, 0), {"rate": [0.2, 0.05]}, [0.1, 60.0], max_steps=budget)
    assert [names[int(code) + 1] for code in ds.status] == ["ok", "max_steps"]
    assert int(ds.steps[1]) == budget
    assert np.isnan(ds.risk[1]).values.tolist() == [False, True]
    ds = quietly(lambda rate: path(rate, 0), {"rate": [0.2, 40.0]}, [0.1, 8e4], max_steps=budget)
    assert [names[int(code) + 1] for code in ds.status] == ["max_steps", "nonfinite"]


@pytest.mark.slow
def test_paths_flows_and_rules_in_one_sweep():
    def build(how, seed):
        flow, start, key = path(0.1, seed)
        if how == "path":
            return flow, start, key
        if how == "flow":
            return gf.GradientFlow(PROBLEM), start
        return gf.SGD(PROBLEM, 0.1, batch_size=2, key=key), start

    ds = quietly(build, {"how": ["path", "flow", "rule"], "seed": range(2)})
    assert (ds.status == 0).all()
    assert ds.attrs["solver"] == "Automatic/EulerMaruyama"
    assert np.isnan(ds.drift_energy.sel(how="path")).all()
    np.testing.assert_allclose(ds.saved_time.sel(how="rule"), [[0.0, 0.3, 1.0]] * 2)
    flow, start, key = path(0.1, 1)
    np.testing.assert_allclose(ds.w.sel(how="path", seed=1), gf.solve(flow, start, TS, key=key).params, rtol=1e-12)
    exact = gf.solve(gf.GradientFlow(PROBLEM), start, TS).params
    np.testing.assert_allclose(ds.w.sel(how="flow", seed=1), exact, rtol=1e-8)


@pytest.mark.slow
def test_widths_of_networks_in_one_program():
    """The noise is that of the samples, so padding changes nothing but rounding."""
    problem = gf.EmpiricalRisk(*gf.data.circle(8), gf.losses.square)

    def build(width, seed):
        model = gf.models.TwoLayer(2, width, activation=jnp.tanh, key=jax.random.key(seed))
        return gf.SGDFlow(problem, 0.05, 2), model, jax.random.key(10 + seed)

    axes = {"width": [3, 4], "seed": range(2)}
    together, apart = (quietly(build, axes, observe={"risk": problem}, pad=pad) for pad in (True, False))
    np.testing.assert_allclose(together.risk, apart.risk, rtol=1e-10)
    np.testing.assert_allclose(together.params, apart.params, rtol=1e-9, equal_nan=True)
    assert '"programs": 1' in together.attrs["runs"]


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            lambda seed: path(0.1, seed)[:2],
            {},
            r"At seed=0: Argument `key` must be a random key .*, but is None.*build",
        ),
        (
            lambda seed: (*path(0.1, seed)[:2], 3),
            {},
            "At seed=0: Argument `key` must be a random key, but is of type int",
        ),
        (
            lambda seed: (gf.GradientFlow(PROBLEM), *path(0.1, seed)[1:]),
            {},
            "At seed=0: Argument `key` must be None for a deterministic flow, but is a key",
        ),
        (
            lambda seed: (gf.GradientDescent(PROBLEM, 0.1), *path(0.1, seed)[1:]),
            {},
            "At seed=0: Argument `key` must be None for a rule, but is a key",
        ),
        (
            lambda seed: path(0.1, seed)[1:],
            {},
            r"`build` must return a pair .*\(flow, params, key\) for a stochastic flow, but is returning",
        ),
        (
            lambda seed: path(0.1, seed),
            {"solver": gf.solvers.Tsit5()},
            "At seed=0: Argument `solver` must be a method for stochastic flows, but is of type Tsit5",
        ),
        (
            lambda seed: path(0.1, seed) if seed else (gf.GradientFlow(PROBLEM), path(0.1, 0)[1]),
            {"solver": gf.solvers.EulerMaruyama()},
            "At seed=0: Argument `solver` must be one for a flow without noise, but is of type EulerMaruyama",
        ),
        (lambda seed: path(0.1, seed), {"jumps": [0.5]}, "`jumps` must be None for a stochastic flow"),
        (lambda seed: path(0.1, seed), {"longest_step": 0.5}, "`longest_step` must be None for a stochastic flow"),
    ],
    ids=["no key", "no random key", "flow", "rule", "no flow", "adaptive", "mixed", "jumps", "longest step"],
)
def test_bad_input_is_refused_before_anything_runs(segments, build, options, message):
    with pytest.raises(ValueError, match=message):
        quietly(build, {"seed": [0, 1]}, **options)
    assert len(segments) == 0
