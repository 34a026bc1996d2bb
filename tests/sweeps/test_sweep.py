"""Sweeps: members against single runs, batching, failures, stores, resuming, and complaints."""

import json
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr

import gradflow as gf
from gradflow.stores import _state_file
from gradflow.sweeps import _scheduler
from gradflow.sweeps._groups import group_members, stack
from gradflow.sweeps._members import Members
from gradflow.sweeps._prepare import options_for
from gradflow.sweeps._settings import Settings

TS = np.array([0.0, 0.7, 2.0])
RTOL = 1e-6
CIRCLE = gf.EmpiricalRisk(*gf.data.circle(8), gf.losses.square)
COUNTS = ["steps", "accepted", "rejected", "gradient_evaluations", "hessian_vector_products"]
WATCHED = {"norm": gf.observables.ParameterNorm(), "neurons": gf.observables.NeuronNorms()}


def member(width, scale, seed):
    model = gf.models.TwoLayer(2, width, activation=jnp.tanh, init_scale=scale, key=jax.random.key(seed))
    return gf.GradientFlow(CIRCLE), model


class TraceCounter:
    """Shapes with which a problem was traced. Equal to itself alone, and named alike in every process."""

    def __init__(self):
        self.shapes = []

    def __repr__(self):
        return "TraceCounter()"


class Decay(eqx.Module):
    """`rate |w|^2 / 2`, or NaN once the first weight has fallen below `edge`; tells when it is traced."""

    rate: jax.Array
    edge: jax.Array
    counter: TraceCounter = eqx.field(static=True)

    def __call__(self, w):
        self.counter.shapes.append(w.shape)
        # Multiplied in, since a `where` around the loss would keep NaN from the gradient.
        return 0.5 * self.rate * jnp.sum(w**2) * jnp.where(w[0] < self.edge, jnp.nan, 1.0)


ONE_FOR_ALL = TraceCounter()


def decay(rate, size=3, edge=-jnp.inf, start=1.0, counter=ONE_FOR_ALL):
    """`w' = -rate w` from `start`; a module and functions of this file, so that tests share compiled programs."""
    problem = Decay(jnp.asarray(rate, float), jnp.asarray(edge, float), counter)
    return gf.GradientFlow(problem), jnp.full(size, start)


def weights(w):
    return w


def first(w):
    return w[0]


def quietly(build, axes, ts=TS, **options):
    return gf.sweep(build, axes, ts, **({"progress": False, "rtol": RTOL} | options))


def grouped(build, axes):
    """The groups of a sweep, and what all members of each have of their own."""
    members = Members(build, axes, lambda flow: {})
    settings = Settings(**(dict.fromkeys(Settings._fields) | {"rtol": RTOL, "save_params": False, "max_steps": 100}))
    options = options_for(members, TS, settings)
    groups = group_members(members, options, None)
    return groups, [stack(members, group, group.members, options) for group in groups]


def bitwise(a, b):
    """Whether two data sets hold the same bits, their records of time aside."""
    same = all(np.array_equal(a[n].values, b[n].values, equal_nan=a[n].dtype.kind == "f") for n in a.variables)
    return set(a.variables) == set(b.variables) and same


# Values


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_closed_form_over_batches_and_shapes(batch):
    """`w(t) = start exp(-rate t)`: ten members of each shape, so that the last batches are incomplete.

    No member can stand in the place of another. The error of a whole run is a few tolerances.
    """

    def build(size, start, rate):
        return decay(rate, size, start=start)

    axes = {"size": [2, 3], "start": [1.0, -2.0], "rate": [0.1, 0.3, 0.7, 1.0, 1.5]}
    ds = quietly(build, axes, observe={"w": weights}, save_params=True, batch=batch)
    assert ds.w.dims == ("size", "start", "rate", "time", "w_0")
    assert ds.params.dims == ("size", "start", "rate", "time", "params_0")
    exact = np.exp(-np.outer(axes["rate"], TS)) * np.array(axes["start"])[:, None, None]
    for computed in (ds.w, ds.params):
        for i, size in enumerate(axes["size"]):
            np.testing.assert_allclose(computed[i, ..., :size], np.stack([exact] * size, axis=-1), rtol=10 * RTOL)
            assert np.isnan(computed[i, ..., size:]).all()
    assert (ds.status == 0).all()
    assert (ds.t_final == 2.0).all()
    loss = 0.5 * ds["size"] * ds.start**2 * ds.rate
    np.testing.assert_allclose(ds.loss_first, loss.transpose(*ds.loss_first.dims), rtol=1e-14)
    np.testing.assert_allclose(ds.loss_last, ds.loss_first * np.exp(-4 * ds.rate), rtol=20 * RTOL)


@pytest.fixture(scope="module")
def singles():
    """Every member of the grid below by a run of its own."""
    grid = [(w, s, k) for w in (2, 4) for s in (1e-3, 0.5) for k in range(5)]
    return {p: gf.solve(*member(*p), TS, observe=WATCHED, rtol=RTOL) for p in grid}


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_member_equals_a_single_run(singles, batch):
    """Networks of two widths; observables and parameters of the narrow ones are padded."""
    axes = {"width": [2, 4], "scale": [1e-3, 0.5], "seed": range(5)}
    ds = quietly(member, axes, observe=WATCHED, save_params=True, batch=batch)
    assert ds.norm.dims == ("width", "scale", "seed", "time")
    assert (ds.neurons.shape[-2:], ds.params.shape[-2:]) == ((3, 4), (3, 12))
    for (width, scale, seed), sol in singles.items():
        computed = ds.sel(width=width, scale=scale, seed=seed)
        # The same steps up to rounding, which an error control passes on below its tolerance.
        np.testing.assert_allclose(computed.norm, sol.observed["norm"], rtol=RTOL)
        np.testing.assert_allclose(computed.neurons[:, :width], sol.observed["neurons"], rtol=RTOL)
        assert np.isnan(computed.neurons[:, width:]).all()
        flat = np.concatenate([np.asarray(sol.params.weight).reshape(3, -1), np.asarray(sol.params.output)], axis=1)
        np.testing.assert_allclose(computed.params[:, : flat.shape[1]], flat, rtol=0, atol=RTOL * np.max(np.abs(flat)))
        assert np.isnan(computed.params[:, flat.shape[1] :]).all()
        assert int(computed.status) == 0
        assert [int(computed[name]) for name in COUNTS] == [int(sol.stats[name]) for name in COUNTS]
        np.testing.assert_allclose([computed.loss_first, computed.loss_last], sol.loss, rtol=RTOL)
        assert float(computed.drift_energy) == pytest.approx(float(sol.drift["energy"]), rel=1e-3, abs=1e-12)


class Shifted(eqx.Module):
    """A quadratic with a minimum of its own, which the observable asks the flow for."""

    minimum: jax.Array

    def __call__(self, w):
        return 0.5 * jnp.sum((w - self.minimum) ** 2)


@pytest.mark.slow
def test_string_axis_and_observables_of_the_flow():
    """The observable sees the flow of its own member; coordinates reach `build` as plain Python values."""
    minima, seen = {"near": 0.5, "farther": -3.0}, []

    def build(label, start):
        seen.append((label, start))
        return gf.GradientFlow(Shifted(jnp.full(2, minima[label]))), jnp.full(2, float(start))

    ds = quietly(build, {"label": list(minima), "start": range(2)}, observe=lambda flow: {"risk": flow.problem})
    assert seen == [(label, start) for label in minima for start in range(2)]
    assert all(type(label) is str and type(start) is int for label, start in seen)
    for label, minimum in minima.items():
        for start in range(2):
            exact = (start - minimum) ** 2 * np.exp(-2 * TS)
            np.testing.assert_allclose(ds.risk.sel(label=label, start=start), exact, rtol=20 * RTOL)


@pytest.mark.slow
def test_integer_and_boolean_observables_keep_their_type():
    observe = {"positive": lambda w: w > 0.5, "count": lambda w: jnp.sum(w > 0.5)}
    ds = quietly(decay, {"rate": [0.1, 1.0]}, observe=observe)
    assert (ds.positive.dtype, ds["count"].dtype.kind) == (bool, "i")
    expected = np.exp(-ds.rate.values[:, None] * TS) > 0.5
    np.testing.assert_array_equal(ds["count"], 3 * expected)
    np.testing.assert_array_equal(ds.positive, np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.slow
def test_parameters_in_numpy_arrays_are_batched_like_any_other():
    rows = np.arange(12.0).reshape(4, 3)

    def build(i):
        return decay(0.5)[0], rows[i]

    _, per_member = grouped(build, {"i": range(4)})
    np.testing.assert_array_equal(per_member[0].member.params, rows)
    ds = quietly(build, {"i": range(4)}, observe={"w": weights})
    np.testing.assert_allclose(ds.w, rows[:, None] * np.exp(-0.5 * TS)[:, None], rtol=10 * RTOL, atol=0)


@pytest.mark.slow
def test_until():
    """`exp(-rate t)` falls to a half at `ln 2 / rate`; members that never do run on to the end."""
    until = gf.Until(first, below=0.5)
    ds = quietly(decay, {"rate": [0.1, 1.0, 4.0]}, observe={"w": first}, until=until)
    assert ds.status.values.tolist() == [0, 1, 1]
    np.testing.assert_allclose(ds.t_final, [2.0, np.log(2), np.log(2) / 4], rtol=10 * RTOL)
    assert np.isnan(ds.w.values).tolist() == [[False] * 3, [False, True, True], [False, True, True]]


@pytest.mark.slow
def test_step_budget():
    """A budget of just what the second needs is enough for the first two members, and too little for the third."""
    rates = {"rate": [0.1, 0.5, 20.0]}
    free = quietly(decay, rates, observe={"w": first})
    short = quietly(decay, rates, observe={"w": first}, max_steps=int(free.steps[1]))
    assert free.steps[0] <= free.steps[1] < free.steps[2]
    assert free.status.values.tolist() == [0, 0, 0]
    assert short.status.values.tolist() == [0, 0, 2]
    assert int(short.steps[2]) == int(free.steps[1])
    assert 0 < float(short.t_final[2]) < 2


class Late(gf.GradientFlow):
    @property
    def t0(self):
        return 1.0


def test_a_flow_that_starts_late_refuses_earlier_save_times():
    def build(rate):
        flow, start = decay(rate)
        return Late(flow.problem), start

    with pytest.raises(ValueError, match=r"not start before the flow does, at t = 1, but is 0.5 first"):
        quietly(build, {"rate": [1.0]}, [0.5, 2.0])
    ds = quietly(build, {"rate": [1.0]}, [1.0, 2.0], observe={"w": first})
    np.testing.assert_allclose(ds.w[0], [1.0, np.exp(-1)], rtol=10 * RTOL)


# Programs and memory


@pytest.mark.slow
def test_one_program_per_shape_and_none_for_a_second_sweep():
    """How often the problem is traced does not depend on the number of members, but for the check of each shape."""
    counter = TraceCounter()

    def run(sizes, rates):
        before = len(counter.shapes), _scheduler.run_segment._cached._cache_size()
        axes = {"size": sizes, "rate": rates}
        quietly(lambda size, rate: decay(rate, size, counter=counter), axes, batch=2, pad=False)
        return len(counter.shapes) - before[0], _scheduler.run_segment._cached._cache_size() - before[1]

    first_two, programs = run([2, 5], [0.1, 0.2])
    assert programs == 2
    again, programs = run([2, 5], [0.3, 0.4])
    assert programs == 0
    many, programs = run([2, 5], np.linspace(0.1, 1, 12))
    assert programs == 0
    assert again == many < first_two
    assert run([7], [0.1, 0.2])[1] == 1
    assert run([5, 2, 7], np.linspace(1, 2, 12)) == (1.5 * many, 0)


def test_arrays_that_members_share_are_held_once():
    groups, per_member = grouped(member, {"width": [2, 4], "scale": [0.1, 0.2], "seed": range(2)})
    assert [group.members for group in groups] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for group, mine, width in zip(groups, per_member, (2, 4), strict=True):
        flow, params = group.shared.what, group.shared.params
        assert flow.problem.x is CIRCLE.x
        assert flow.problem.y is CIRCLE.y
        assert params.weight is params.output is None
        flow, params = mine.member.what, mine.member.params
        assert flow.problem.x is flow.problem.y is None
        assert params.weight.shape == (4, width, 2)
        expected = [member(width, scale, seed)[1].output for scale in (0.1, 0.2) for seed in range(2)]
        np.testing.assert_array_equal(params.output, np.stack(expected))


def test_equal_arrays_made_anew_are_shared_and_different_ones_are_not():
    x, y = np.asarray(CIRCLE.x), np.asarray(CIRCLE.y)

    def build(noise, seed):
        problem = gf.EmpiricalRisk(x.copy(), y + noise, gf.losses.square)
        return gf.GradientFlow(problem), member(2, 0.1, 0)[1]

    (group,), (per_member,) = grouped(build, {"noise": [0.0, 1.0], "seed": range(2)})
    assert per_member.member.what.problem.x is None
    np.testing.assert_array_equal(per_member.member.what.problem.y, [y, y, y + 1, y + 1])
    assert group.shared.params.weight.shape == (2, 2)


def test_members_that_differ_in_nothing():
    ds = quietly(lambda copy: decay(1.0), {"copy": range(3)}, observe={"w": first}, batch=2)
    np.testing.assert_allclose(ds.w, np.tile(np.exp(-TS), (3, 1)), rtol=10 * RTOL)


# Members that fail


@pytest.fixture(scope="module")
def all_good():
    return run_with_bad({})


# What is changed, the status, how many save times are reached, and where the run ends if that is known.
WRONG = {
    "start": ({"start": jnp.nan}, "nonfinite", 0, 0.0),
    # The first weight, `exp(-1.5 t)`, meets the edge at ln(2) / 1.5.
    "field": ({"edge": 0.5}, "nonfinite", 1, np.log(2) / 1.5),
    "budget": ({"rate": 3000.0}, "max_steps", 1, None),
}


def run_with_bad(changes):
    def build(rate):
        return decay(**({"rate": rate} | (changes if rate == 1.5 else {})))

    axes = {"rate": [0.5, 1.0, 1.5, 2.0, 2.5]}
    return quietly(build, axes, observe={"w": weights}, batch=3, max_steps=120, save_params=True)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_bad_member_is_flagged_and_harms_no_other(all_good, wrong):
    """The same batches with a good member in its place give the same bits in all others."""
    changes, status, reached, end = WRONG[wrong]
    harmed = run_with_bad(changes)
    names = dict(zip(harmed.status.attrs["flag_values"], harmed.status.attrs["flag_meanings"].split(), strict=True))
    assert (all_good.status == 0).all()
    assert [names[int(code)] for code in harmed.status] == ["ok", "ok", status, "ok", "ok"]
    others = [0, 1, 3, 4]
    assert bitwise(harmed.isel(rate=others), all_good.isel(rate=others))
    assert np.isfinite(harmed.w[2, :reached]).all()
    assert np.isnan(harmed.w[2, reached:]).all()
    assert float(harmed.t_final[2]) < 2.0
    if end is not None:
        assert float(harmed.t_final[2]) == pytest.approx(end, rel=1e-6)


# Stores


@pytest.fixture
def counted(monkeypatch):
    """Counts the segments that are run, of a few evaluations each; `after` makes one raise `what`."""
    calls, real = [], _scheduler.run_segment

    class Counted:
        after, what = None, KeyboardInterrupt

        def __len__(self):
            return len(calls)

        def __call__(self, fixed, pending, state, budget, mesh):
            if self.after is not None and len(calls) == self.after:
                raise self.what
            calls.append(1)
            return real(fixed, pending, state, 0 * budget + 12, mesh)

    counter = Counted()
    monkeypatch.setattr(_scheduler, "run_segment", counter)
    return counter


AXES = {"kind": ["one", "three"], "rate": [0.3, 0.6, 0.9, 1.2, 1.5]}


def stored(kind, rate):
    return decay(rate, {"one": 1, "three": 3}[kind])


def run_stored(store, **options):
    fixed = {"observe": {"w": weights}, "batch": 3, "store": store, "save_params": True}
    return quietly(stored, AXES, **(fixed | options))


def test_round_trip_through_xarray(tmp_path):
    path = tmp_path / "deep" / "a.zarr"
    ds = run_stored(path)
    opened = xr.open_zarr(path)
    xr.testing.assert_identical(opened.load(), ds)
    xr.testing.assert_identical(gf.sweeps.open_store(path), ds)
    assert {name: opened[name].dtype for name in opened.variables} == {n: ds[n].dtype for n in ds.variables}
    assert opened.w.dims == ("kind", "rate", "time", "w_0")
    assert opened.params.dims == ("kind", "rate", "time", "params_0")
    assert opened.kind.values.tolist() == AXES["kind"]
    assert opened.rate.values.tolist() == AXES["rate"]
    assert opened.time.values.tolist() == TS.tolist()
    assert np.isnan(opened.w.sel(kind="one")[..., 1:]).all()
    np.testing.assert_allclose(opened.w.sel(kind="one")[..., 0], np.exp(-np.outer(AXES["rate"], TS)), rtol=10 * RTOL)
    attrs = opened.attrs
    assert (attrs["rtol"], attrs["atol"], attrs["solver"]) == (RTOL, "scaled to the state", "Automatic")
    assert (attrs["flow"], attrs["dtype"]) == ("GradientFlow", "float64")
    assert attrs["device"].startswith(jax.default_backend())
    assert json.loads(attrs["versions"])["jax"] == jax.__version__
    assert attrs["wall_seconds"] > 0
    assert opened.status.attrs["flag_meanings"].split()[:3] == ["missing", "ok", "stopped"]
    assert opened.status.attrs["flag_values"][:3] == [-1, 0, 1]
    assert [entry.name for entry in path.parent.iterdir()] == ["a.zarr"]


def test_single_axis_and_explicit_tolerances(tmp_path):
    path = tmp_path / "a.zarr"
    solver = gf.solvers.Bosh3()
    ds = quietly(decay, {"rate": [1.0, 2.0]}, store=path, atol=1e-9, solver=solver, rtol=1e-4)
    xr.testing.assert_identical(xr.open_zarr(path).load(), ds)
    assert (ds.attrs["rtol"], ds.attrs["atol"], ds.attrs["solver"]) == (1e-4, 1e-9, "Bosh3")


def test_resuming_a_finished_sweep_runs_nothing(tmp_path, counted):
    first = run_stored(tmp_path / "a.zarr")
    once = len(counted)
    again = run_stored(tmp_path / "a.zarr")
    assert len(counted) == once
    xr.testing.assert_identical(again, first)
    run_stored(tmp_path / "a.zarr", resume=False)
    assert len(counted) == 2 * once


class KilledError(BaseException):
    """The end of a process that has no time to save anything."""


@pytest.mark.parametrize("what", [KeyboardInterrupt, KilledError])
@pytest.mark.parametrize("share", [0.3, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.05, 0.6, 0.95))])
def test_resuming_an_interrupted_sweep_gives_the_same_bits(tmp_path, counted, share, what, monkeypatch):
    """Unfinished members are picked up where they were: all segments together are hardly more than without a break."""
    monkeypatch.setattr(_state_file, "COST", np.inf)
    path, counted.what = tmp_path / "a.zarr", what
    whole = run_stored(None)
    once = len(counted)
    counted.after = once + int(share * once)
    with pytest.raises(what):
        run_stored(path)
    part = gf.sweeps.open_store(path)
    done = part.status.values == 0
    assert 0 <= done.sum() < 10
    assert (part.status.values[~done] == -1).all()
    assert np.isnan(part.w.values[~done]).all()
    assert np.array_equal(part.w.values[done], whole.w.values[done], equal_nan=True)
    counted.after = None
    resumed = run_stored(path)
    assert len(counted) <= 2 * once + 3
    assert bitwise(resumed, whole)
    assert bitwise(gf.sweeps.open_store(path), whole)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.zarr"]


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_checkpoint_that_cannot_be_read_starts_over(tmp_path, counted, content):
    path = tmp_path / "a.zarr"
    whole = run_stored(None)
    counted.after = len(counted) + 5
    with pytest.raises(KeyboardInterrupt):
        run_stored(path)
    (left,) = tmp_path.glob(".a.zarr.progress/in-flight*")
    left.unlink() if content is None else left.write_bytes(content)
    counted.after = None
    assert bitwise(run_stored(path), whole)


@pytest.mark.slow
def test_members_missing_in_the_midst_are_run_again(tmp_path, counted):
    """As after a crash while results were being written. Alone in its slot, a member gives the same bits again."""
    path = tmp_path / "a.zarr"
    whole = run_stored(path, batch=1)
    once = len(counted)
    group = zarr.open_group(path, mode="r+")
    group["status"][1, 1] = -1
    group["w"][1, 1] = 7.0
    resumed = run_stored(path, batch=1)
    assert len(counted) < 1.5 * once
    assert bitwise(resumed, whole)
    assert bitwise(gf.sweeps.open_store(path), whole)


CHANGES = {
    "rtol": ({"rtol": 1e-5}, "rtol: 1e-06 -> 1e-05"),
    "atol": ({"atol": 1e-9}, "atol: null -> 1e-09"),
    "times": ({"ts": [0.0, 1.0, 2.0]}, "ts: "),
    "grid": ({"axes": {"rate": [0.5, 3.0]}}, r"axes\['rate'\]: \[0.5, 2.0\] -> \[0.5, 3.0\]"),
    "longer grid": ({"axes": {"rate": [0.5, 2.0, 4.0]}}, r"axes\['rate'\]: \[0.5, 2.0\] -> \[0.5, 2.0, 4.0\]"),
    "start": ({"size": 4}, "data, models or observables"),
    "data": ({"edge": -3.0}, "data, models or observables"),
    "observables": ({"observe": {"norm": WATCHED["norm"]}}, "observe: "),
    "until": ({"until": gf.Until(WATCHED["norm"], above=9.0)}, r"until: null -> \[1, 9.0\]"),
    "solver": ({"solver": gf.solvers.Heun()}, 'solver: "Automatic" -> "Heun"'),
    "budget": ({"max_steps": 77}, "max_steps: 100000 -> 77"),
    "params": ({"save_params": True}, "save_params: false -> true"),
}


@pytest.fixture(scope="module")
def small_store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    return path, run_small(path)


def run_small(path, size=2, edge=-9.0, axes=None, **options):
    def build(rate):
        return decay(rate, size, edge)

    return quietly(build, {"rate": [0.5, 2.0]} if axes is None else axes, store=path, **options)


@pytest.mark.parametrize("name", CHANGES)
def test_resuming_another_sweep_is_refused_and_says_what_changed(small_store, name):
    path, first = small_store
    changes, message = CHANGES[name]
    with pytest.raises(ValueError, match=message) as error:
        run_small(path, **changes)
    assert "must hold the same sweep in order to be resumed" in str(error.value)
    assert "resume=False" in str(error.value)
    xr.testing.assert_identical(gf.sweeps.open_store(path), first)


def test_resuming_with_another_function_in_until_is_refused(tmp_path):
    """Equal values of different quantities are different conditions."""
    run_small(tmp_path / "a.zarr", until=gf.Until(WATCHED["norm"], below=0.5))
    with pytest.raises(ValueError, match="function of until"):
        run_small(tmp_path / "a.zarr", until=gf.Until(first, below=0.5))


def test_large_numpy_data_decide_about_resuming(tmp_path):
    """Arrays of more than a thousand entries are printed with dots in their midst."""
    start = np.linspace(0.5, 1, 2000)
    other = start.copy()
    other[1000] = 0.0

    def run(params):
        return quietly(lambda i: (decay(1.0)[0], params), {"i": [0]}, store=tmp_path / "a.zarr")

    xr.testing.assert_identical(run(start), run(jnp.asarray(start)))
    with pytest.raises(ValueError, match="data, models or observables"):
        run(other)


@pytest.mark.slow
def test_the_order_of_the_axes_counts(tmp_path):
    def build(a, b):
        return decay(1.0)

    quietly(build, {"a": [1], "b": [1, 2]}, store=tmp_path / "a.zarr")
    with pytest.raises(ValueError, match=r'order of axes: \["a", "b"\] -> \["b", "a"\]'):
        quietly(build, {"b": [1, 2], "a": [1]}, store=tmp_path / "a.zarr")


def test_resume_false_starts_over(tmp_path):
    path = tmp_path / "a.zarr"
    run_small(path)
    ds = run_small(path, rtol=1e-3, resume=False)
    assert gf.sweeps.open_store(path).attrs["rtol"] == 1e-3
    xr.testing.assert_identical(gf.sweeps.open_store(path), ds)


def test_a_store_without_results_is_started_over(tmp_path, counted):
    """Nothing is lost when the first attempt failed before its first batch."""
    path = tmp_path / "a.zarr"
    counted.after = 0
    with pytest.raises(KeyboardInterrupt):
        run_small(path)
    assert (gf.sweeps.open_store(path).status == -1).all()
    counted.after = None
    assert (run_small(path, rtol=1e-3).status == 0).all()


@pytest.mark.parametrize("resume", [True, False])
def test_foreign_folders_and_files_are_left_alone(tmp_path, counted, resume):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    zarr.create_group(tmp_path / "other.zarr").attrs["format"] = "theirs"
    for name in ("notes", "file", "other.zarr"):
        with pytest.raises(ValueError, match=r"which holds something else. Nothing was overwritten"):
            run_small(tmp_path / name, resume=resume)
        with pytest.raises(ValueError, match=r"which holds something else"):
            gf.sweeps.write_dataset(xr.Dataset({"a": ("x", [1.0])}), tmp_path / name)
        with pytest.raises(ValueError, match="which holds something else"):
            gf.sweeps.open_store(tmp_path / name)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert zarr.open_group(tmp_path / "other.zarr").attrs["format"] == "theirs"
    assert len(counted) == 0
    (tmp_path / "empty").mkdir()
    assert (run_small(tmp_path / "empty").status == 0).all()


def test_a_store_of_another_study_is_not_resumed(tmp_path, counted):
    ds = xr.Dataset({"a": ("x", [1.0])}, attrs={"study": "compare"})
    gf.sweeps.write_dataset(ds, tmp_path / "a.zarr")
    with pytest.raises(ValueError, match=r"must hold a sweep in order to be resumed, but is .* another study"):
        run_small(tmp_path / "a.zarr")
    assert len(counted) == 0
    assert gf.sweeps.open_store(tmp_path / "a.zarr").attrs["study"] == "compare"


def test_an_unwritable_path_is_refused_before_anything_runs(tmp_path, counted):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.zarr", tmp_path / "file" / "b" / "a.zarr"):
        with pytest.raises(ValueError, match="Argument `store` must be a path that can be written"):
            run_small(path)
        with pytest.raises(ValueError, match="must be a path that can be written"):
            gf.sweeps.write_dataset(xr.Dataset({"a": ("x", [1.0])}), path)
    assert len(counted) == 0
    with pytest.raises(ValueError, match="which does not exist"):
        gf.sweeps.open_store(tmp_path / "nowhere.zarr")


def test_a_store_can_be_opened_at_any_moment(tmp_path, monkeypatch, counted):
    """Opened after every single write: what has a status has its numbers, too."""
    path = tmp_path / "a.zarr"
    whole = run_stored(None)
    real, seen = zarr.Array.__setitem__, []

    def recording(self, *arguments):
        real(self, *arguments)
        # The rest is the store being made, which happens beside its place.
        if str(path) in str(self.store_path):
            now = xr.open_zarr(path).load()
            done = now.status.values == 0
            seen.append(int(done.sum()))
            assert np.array_equal(now.w.values[done], whole.w.values[done], equal_nan=True)
            assert np.array_equal(now.steps.values[done], whole.steps.values[done])

    monkeypatch.setattr(zarr.Array, "__setitem__", recording)
    run_stored(path)
    assert (seen[0], seen[-1]) == (0, 10)
    assert len(set(seen)) > 4
    assert seen == sorted(seen)


# Complaints


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "`axes` must be a dictionary name -> values with at least one axis, but is empty"),
        ({"rate": []}, r"`axes\['rate'\]` must be a non-empty sequence of values"),
        ({"rate": [1.0, 2.0, 1.0]}, r"`axes\['rate'\]` must hold each value once, but is \[1.0, 2.0, 1.0\]"),
        ({"rate": ["a", "a"]}, "must hold each value once"),
        ({"time": [1.0]}, "names that are Python identifiers of their own, but is 'time'"),
        ({"status": [1.0]}, "of their own, but is 'status', which every sweep has"),
        ({"learning rate": [1.0]}, "Python identifiers of their own, but is 'learning rate'"),
        ({"rate": [[1.0, 2.0], [3.0, 4.0]]}, "all numbers or all strings"),
        ({"rate": [[1.0, 2.0], [3.0]]}, "all numbers or all strings"),
        ({"rate": ["a", 1.0]}, "all numbers or all strings"),
        ({"rate": [None]}, "all numbers or all strings"),
        ({"rate": "abc"}, r"A single value goes into a list: \['abc'\]"),
        ({"rate": [1.0, np.nan]}, r"`axes\['rate'\]` must hold no NaN"),
    ],
    ids=str,
)
def test_bad_axes(axes, message, counted):
    with pytest.raises(ValueError, match=message):
        quietly(decay, axes)
    assert len(counted) == 0


@pytest.mark.slow
@pytest.mark.parametrize("values", [np.array([0.5, 1.0]), jnp.array([0.5, 1.0]), (0.5, 1.0), {0.5: "", 1.0: ""}.keys()])
def test_axes_may_be_any_collection(values):
    ds = quietly(decay, {"rate": values}, observe={"w": first})
    np.testing.assert_allclose(ds.w, np.exp(-np.outer([0.5, 1.0], TS)), rtol=10 * RTOL)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda rate: decay(rate)[0], r"At rate=2.0: .*`build` must return a pair .* but is returning GradientFlow"),
        (lambda rate: decay(rate)[::-1], r"At rate=2.0: .* returning \(\w+, GradientFlow\)"),
        (lambda rate: (decay(rate)[0], np.arange(3)), "At rate=2.0: .*at least one floating-point array leaf"),
        (
            lambda rate: (gf.GradientFlow(lambda w: w), jnp.ones(2)),
            "At rate=2.0: .*return a real floating-point scalar",
        ),
        (lambda rate: gf.models.TwoLayer(2, -1, key=jax.random.key(0)), "At rate=2.0: Argument `width`"),
    ],
    ids=["no pair", "swapped", "integers", "no scalar", "raises"],
)
def test_bad_builds_say_where(build, message, counted):
    """Only the second member is wrong."""

    def second(rate):
        return build(rate) if rate == 2.0 else decay(rate)

    with pytest.raises(ValueError, match=message):
        quietly(second, {"rate": [1.0, 2.0]})
    assert len(counted) == 0


def test_a_build_that_does_not_take_the_axes():
    with pytest.raises(
        ValueError, match=r"`build` must be callable as build\(width=...\), but is one that takes \(rate"
    ):
        quietly(lambda rate, more=1: decay(rate), {"width": [1, 2]})


def test_coordinates_in_messages_are_those_of_all_axes():
    def build(kind, rate):
        if (kind, rate) == ("b", 3):
            raise ValueError("too much")
        return decay(rate)

    with pytest.raises(ValueError, match=r"^At kind=b, rate=3: too much$"):
        quietly(build, {"kind": ["a", "b"], "rate": [1, 3]})


@pytest.mark.parametrize("name", ["rate", "status", "steps", "params", "time", "t_final", "loss_last", "drift_energy"])
def test_observables_do_not_take_the_names_of_others(name, counted):
    with pytest.raises(ValueError, match=f"`observe` must have names of its own, but is with the name '{name}'"):
        quietly(decay, {"rate": [1.0]}, observe={name: WATCHED["norm"]})
    assert len(counted) == 0


def test_observables_of_different_rank_are_refused():
    def observe(flow):
        return {"w": (lambda w: w[0]) if float(flow.problem.rate) < 1 else (lambda w: w)}

    with pytest.raises(ValueError, match="with 'w' of 1 and of 2 axes"):
        quietly(decay, {"rate": [0.5, 2.0]}, observe=observe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1.0}, "`rtol` must be positive, but is -1"),
        ({"rtol": 2.0}, "`rtol` must be below 1"),
        ({"batch": 0}, "`batch` must be an integer of at least 1"),
        ({"max_steps": 0}, "`max_steps` must be an integer of at least 1"),
        ({"ts": [1.0, 0.5]}, "`ts` must increase strictly"),
        ({"ts": [-1.0, 0.5]}, "`ts` must not start before the flow does"),
    ],
    ids=str,
)
def test_bad_options(options, message, counted):
    with pytest.raises(ValueError, match=message):
        quietly(decay, {"rate": [1.0]}, **options)
    assert len(counted) == 0


WRONG_TYPES = """
import jax.numpy as jnp
import gradflow as gf

def build(rate):
    return gf.GradientFlow(lambda w: jnp.sum(w**2)), jnp.ones(2)

axes = {"rate": [1.0]}
for axes, options in [({"rate": 1.0}, {}), ([1.0], {}), (axes, {"until": 3}), (axes, {"observe": 3})]:
    try:
        gf.sweep(build, axes, [1.0], **options)
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_wrong_types_are_refused_in_words():
    """In a process of its own, without the run-time checker of these tests."""
    done = subprocess.run([sys.executable, "-c", WRONG_TYPES], capture_output=True, text=True, check=True)
    message = done.stdout.splitlines()
    assert message[0].endswith("A single value goes into a list: [1.0].")
    assert "`axes` must be a dictionary" in message[1]
    assert "`until` must be a gradflow.Until" in message[2]
    assert "`observe` must be a dictionary" in message[3]


# Observables that are pytrees


def layers(model):
    """Arrays of a shape that depends on the width, and one that does not."""
    rows = jnp.sqrt(jnp.sum(model.weight**2, axis=1))
    return {"norms": rows, "pair": (jnp.sum(model.output), jnp.argmax(rows))}


@pytest.mark.slow
def test_arrays_of_a_pytree_are_variables(tmp_path):
    """Of every member as of its own run, padded to the largest width, and the same from a store."""
    axes, ts, observe = {"width": [2, 3], "seed": [0, 1]}, [0.0, 1.0], {"net": layers}
    build = lambda width, seed: member(width, 1.0, seed)  # noqa: E731
    options = {"observe": observe, "solver": gf.solvers.Tsit5(), "progress": False, "store": tmp_path / "a.zarr"}
    ds = gf.sweep(build, axes, ts, **options)
    assert ds.net_norms.dims == ("width", "seed", "time", "net_norms_0")
    assert "net" not in ds
    for width, seed in ((2, 0), (3, 1)):
        sol = gf.solve(*build(width, seed), ts, observe=observe, solver=gf.solvers.Tsit5())
        here = ds.sel(width=width, seed=seed)
        np.testing.assert_allclose(here.net_norms[:, :width], sol.observed["net"]["norms"], rtol=1e-9)
        assert np.all(np.isnan(here.net_norms[:, width:]))
        np.testing.assert_allclose(here.net_pair_0, sol.observed["net"]["pair"][0], rtol=1e-9)
        np.testing.assert_array_equal(here.net_pair_1, sol.observed["net"]["pair"][1])
    xr.testing.assert_identical(gf.sweep(build, axes, ts, **options), ds)


@pytest.mark.parametrize(
    ("observe", "message"),
    [
        ({"net": layers, "net_norms": lambda model: model.output}, "two arrays called 'net_norms'"),
        ({"drift": lambda model: {"energy": jnp.sum(model.output)}}, "the name 'drift_energy'"),
        ({"net": lambda model: None}, r"`observe\['net'\]` must return an array or a pytree of arrays.*None"),
    ],
)
def test_variables_have_names_of_their_own(observe, message):
    with pytest.raises(ValueError, match=message):
        gf.sweep(lambda seed: member(2, 1.0, seed), {"seed": [0]}, [1.0], observe=observe, progress=False)
