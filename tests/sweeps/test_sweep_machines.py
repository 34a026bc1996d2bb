"""Sweeps over devices, processes and jobs: several at once, killed in the midst, and within the memory there is."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import gradflow as gf
from gradflow.sweeps import _members, _memory, _scheduler

PREAMBLE = """
import json, sys, time
import jax
jax.config.update("jax_enable_x64", True)
FIRST
import jax.numpy as jnp
import numpy as np
import gradflow as gf

CIRCLE = gf.EmpiricalRisk(*gf.data.circle(8), gf.losses.square)
AXES = {"scale": [1e-3, 1e-2, 0.1, 1.0], "seed": list(range(SEEDS))}
TS = np.linspace(0.0, HORIZON, 4)

def build(scale, seed):
    model = gf.models.TwoLayer(2, 4, activation=jnp.tanh, init_scale=scale, key=jax.random.key(seed))
    return gf.GradientFlow(CIRCLE), model

def run(**options):
    fixed = {"observe": {"risk": CIRCLE}, "solver": gf.solvers.Tsit5(), "progress": False, "batch": 1}
    return gf.sweep(build, AXES, TS, **(fixed | options))
"""


def script(body, *arguments, seeds=4, horizon=3.0, wait=True, first="", **environment):
    """Runs a program in a process of its own; returns what it printed, or the process."""
    text = PREAMBLE.replace("SEEDS", str(seeds)).replace("HORIZON", str(horizon)).replace("FIRST", first) + body
    command = [sys.executable, "-W", "error::UserWarning:gradflow", "-c", text, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=os.environ | environment, **pipes)
    if not wait:
        return process
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def bitwise(a, b):
    """Whether two data sets hold the same bits."""
    same = all(np.array_equal(a[n].values, b[n].values, equal_nan=a[n].dtype.kind == "f") for n in a.variables)
    return set(a.variables) == set(b.variables) and same


class Decay(eqx.Module):
    """`rate |w|^2 / 2`, or NaN once the first weight has fallen below `edge`."""

    rate: jax.Array
    edge: jax.Array

    def __call__(self, w):
        return 0.5 * self.rate * jnp.sum(w**2) * jnp.where(w[0] < self.edge, jnp.nan, 1.0)


def decay(rate, start=1.0, edge=-jnp.inf):
    return gf.GradientFlow(Decay(jnp.asarray(rate, float), jnp.asarray(edge, float))), jnp.full(3, start)


def slow_or_fast(i):
    """Rates that differ a hundredfold."""
    return decay(10.0 ** (i % 3 - 1), start=1.0 + i)


def weights(w):
    return w


TSIT5 = {"solver": gf.solvers.Tsit5(), "progress": False, "observe": {"w": weights}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The sweep of the scripts in one piece, from a process of its own."""
    path = tmp_path_factory.mktemp("whole") / "a.zarr"
    script("run(store=sys.argv[1])", path)
    return gf.sweeps.open_store(path)


DEVICES = """
from gradflow.sweeps import _scheduler
seen, real = [], _scheduler.run_segment

def watched(*arguments):
    if not seen:
        seen.append(real.lower(*arguments).lowered.compile().as_text())
    return real(*arguments)

_scheduler.run_segment = watched
ds = run(store=sys.argv[1])
words = ("all-reduce", "all-gather", "all-to-all", "collective", "reduce-scatter", "send(", "recv(")
found = {word: seen[0].count(word) for word in words}
print(json.dumps([len(jax.devices()), found, json.loads(ds.attrs["runs"])[0]["evaluations_by_device"]]))
"""


@pytest.mark.slow
def test_eight_devices_run_loops_of_their_own(tmp_path, whole):
    """No collective in the program; what the devices spend differs by less than a quarter of the mean."""
    out = script(DEVICES, tmp_path / "a.zarr", seeds=16, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    devices, collectives, evaluations = json.loads(out)
    assert devices == len(evaluations) == 8
    assert not any(collectives.values()), collectives
    assert max(evaluations) <= 1.25 * np.mean(evaluations)
    assert min(evaluations) >= 0.75 * np.mean(evaluations)
    ds = gf.sweeps.open_store(tmp_path / "a.zarr")
    assert (ds.status == 0).all()
    # The same program, on one device and on eight.
    part = ds.isel(seed=slice(4))
    np.testing.assert_array_equal(part.gradient_evaluations, whole.gradient_evaluations)
    np.testing.assert_allclose(part.risk, whole.risk, rtol=1e-12)


JOIN = 'jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[1]))'
HOSTS = """
assert jax.process_count() == 2
ds = run(store=sys.argv[3])
print(int((ds.status.values >= 0).sum()))
"""


@pytest.mark.slow
def test_two_processes_fill_the_same_store_as_one(tmp_path, whole):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "a.zarr"
    pair = [script(HOSTS, k, port, path, wait=False, first=JOIN) for k in range(2)]
    ends = [process.communicate(timeout=600) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], ends
    both = gf.sweeps.open_store(path)
    assert bitwise(both, whole)
    assert sorted(run["chunk"] for run in json.loads(both.attrs["runs"])) == ["0-of-2", "1-of-2"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.zarr"]


@pytest.mark.slow
def test_a_chunk_killed_in_the_midst_is_completed(tmp_path):
    """Killed for good while members are unfinished, with other chunks done and not begun."""
    path, seeds, horizon = tmp_path / "a.zarr", 40, 1.5e3
    body = "run(store=sys.argv[1], chunk=(int(sys.argv[2]), 3), rtol=1e-9)"
    script(body, path, 0, seeds=seeds, horizon=horizon)
    before = gf.sweeps.open_store(path)
    process = script(body, path, 1, seeds=seeds, horizon=horizon, wait=False)
    while True:
        done = int(np.sum(gf.sweeps.open_store(path).status.values >= 0)) - int(np.sum(before.status.values >= 0))
        if done > 2 or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = gf.sweeps.open_store(path)
    finished = killed.status.values >= 0
    assert np.isfinite(killed.risk.values[finished]).all()
    for k in (1, 2):
        script(body, path, k, seeds=seeds, horizon=horizon)
    completed = gf.sweeps.open_store(path)
    assert (completed.status == 0).all()
    script("run(store=sys.argv[1], rtol=1e-9)", tmp_path / "b.zarr", seeds=seeds, horizon=horizon)
    assert bitwise(completed, gf.sweeps.open_store(tmp_path / "b.zarr"))


CACHED = """
import logging, os
logging.getLogger("jax._src.compiler").setLevel(logging.DEBUG)
message = []

class Keep(logging.Handler):
    def emit(self, record):
        message.append(record.getMessage())

logging.getLogger("jax._src.compiler").addHandler(Keep())
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
run()
hits = [line for line in message if "cache hit" in line.lower() and "jit_run_segment" in line]
misses = [line for line in message if "cache miss" in line.lower() and "jit_run_segment" in line]
print(json.dumps([len(hits), len(misses)]))
"""


@pytest.mark.slow
def test_the_persistent_compilation_cache_serves_a_second_process(tmp_path):
    """No host callback enters the program, so that it can be kept."""
    first, second = (json.loads(script(CACHED, tmp_path)) for _ in range(2))
    assert first == [0, 1]
    assert second == [1, 0]


# Jobs


@pytest.mark.slow
def test_jobs_share_a_store(tmp_path):
    """Any executor with `submit` will do."""
    axes = {"i": range(200)}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ds = gf.sweep(slow_or_fast, axes, [0.0, 1.0], store=tmp_path / "a.zarr", launch=pool, jobs=3, **TSIT5)
    assert (ds.status == 0).all()
    assert sorted(run["chunk"] for run in json.loads(ds.attrs["runs"])) == ["0-of-3", "1-of-3", "2-of-3"]
    alone = gf.sweep(slow_or_fast, axes, [0.0, 1.0], **TSIT5)
    np.testing.assert_allclose(ds.w, alone.w, rtol=1e-12)


def broken(i):
    if i == 150:
        raise ValueError("no such data")
    return slow_or_fast(i)


def test_a_job_that_fails_is_named_and_the_others_are_kept(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        options = {"store": tmp_path / "a.zarr", "launch": pool, "jobs": 2}
        with pytest.raises(RuntimeError, match=r"2 of 2 jobs failed, .* chunk \(0, 2\): At i=150: no such data"):
            gf.sweep(broken, {"i": range(200)}, [0.0, 1.0], **options, **TSIT5)


@pytest.mark.slow
def test_submitit_runs_the_jobs(tmp_path):
    submitit = pytest.importorskip("submitit")
    executor = submitit.AutoExecutor(folder=tmp_path / "logs", cluster="local")
    executor.update_parameters(timeout_min=10)
    rates = [0.5, 1.0]

    def build(rate, seed):  # a closure, of a module that the job cannot import
        return gf.GradientFlow(lambda w: 0.5 * rates[int(rate)] * jnp.sum(w**2)), jnp.full(2, 1.0 + seed)

    axes = {"rate": [0, 1], "seed": range(3)}
    options = {"solver": gf.solvers.Tsit5(), "progress": False}
    ds = gf.sweep(build, axes, [0.0, 1.0], store=tmp_path / "a.zarr", launch=executor, jobs=2, **options)
    expected = (1 + np.arange(3)) ** 2 * np.array(rates)[:, None] * np.exp(-2 * np.array(rates))[:, None]
    np.testing.assert_allclose(ds.loss_last, expected, rtol=1e-4)
    assert ds.attrs["dtype"] == "float64"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": (2, 2), "store": "a.zarr"}, r"`chunk` must be a pair \(k, n\) with 0 <= k < n, but is \(2, 2\)"),
        ({"chunk": 3, "store": "a.zarr"}, "`chunk` must be a pair"),
        ({"chunk": (0, 2)}, "`store` must be a path when several processes share a sweep, but is None"),
        ({"chunk": (0, 2), "store": "a.zarr", "resume": False}, "`resume` must be True when several processes"),
        ({"launch": object(), "store": "a.zarr"}, "`launch` must be an executor with `submit`"),
        ({"launch": concurrent.futures.ThreadPoolExecutor(1)}, "`store` must be a path when jobs share a sweep"),
    ],
    ids=["end", "number", "no store", "fresh", "no executor", "jobs without store"],
)
def test_bad_ways_to_share_are_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        gf.sweep(slow_or_fast, {"i": range(3)}, [0.0, 1.0], **options, **TSIT5)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_chunks_fill_a_store_in_any_order(tmp_path):
    axes = {"group": range(3), "i": range(2)}

    def build(group, i):
        return decay(0.5 + group, start=1.0 + i)

    counts = []
    for k in (1, 0):
        ds = gf.sweep(build, axes, [0.0, 1.0], store=tmp_path / "a.zarr", chunk=(k, 2), **TSIT5)
        counts.append(int((ds.status >= 0).sum()))
    assert counts == [2, 6]
    assert bitwise(gf.sweeps.open_store(tmp_path / "a.zarr"), gf.sweep(build, axes, [0.0, 1.0], batch=8, **TSIT5))
    with pytest.raises(ValueError, match="rtol: "):
        gf.sweep(build, axes, [0.0, 1.0], store=tmp_path / "a.zarr", chunk=(0, 2), rtol=1e-3, **TSIT5)


# Members that fail, among many


@pytest.mark.parametrize("slots", [1, 8])
def test_members_that_fail_among_many_change_no_bit_of_the_others(slots, monkeypatch):
    """One that starts at NaN, one that runs into it, and one so stiff that its budget ends.

    With several slots the others come to lie in other lanes, which programs may round differently.
    """
    wrong = {7: {"start": jnp.nan}, 20: {"edge": 0.7}, 41: {"rate": 1e7}}
    order = []
    real = _scheduler.run_queue

    def build(i, bad):
        good = {"rate": 0.3 + 0.01 * i, "start": 1.0}
        return decay(**(good | (wrong.get(i, {}) if bad else {})))

    def counting(*arguments, **named):
        for finished in real(*arguments, **named):
            order.extend(finished.member_ids.tolist())
            yield finished

    monkeypatch.setattr("gradflow.sweeps._sweep.run_queue", counting)
    options = {"batch": slots, "max_steps": 300, **TSIT5}
    harmed = gf.sweep(build, {"bad": [1], "i": range(64)}, [0.0, 0.5, 1.0], **options).isel(bad=0, drop=True)
    good = gf.sweep(build, {"bad": [0], "i": range(64)}, [0.0, 0.5, 1.0], **options).isel(bad=0, drop=True)
    names = harmed.status.attrs["flag_meanings"].split()
    assert [names[int(harmed.status[i]) + 1] for i in wrong] == ["nonfinite", "nonfinite", "max_steps"]
    others = [i for i in range(64) if i not in wrong]
    same = ["w", "steps", "loss_first", "loss_last", "t_final", "gradient_evaluations"]
    harmed_others, good_others = harmed.isel(i=others)[same], good.isel(i=others)[same]
    if slots == 1:
        assert bitwise(harmed_others, good_others)
    xr.testing.assert_allclose(harmed_others, good_others, rtol=1e-14)
    # Those that are not finite end at once, not when a budget ends; the stiff one when its own does.
    assert int(harmed.steps[7]) == 0
    assert int(harmed.steps[20]) < 100
    if slots == 1:
        assert order == 2 * list(range(64))


# Memory


@pytest.mark.parametrize("budget", [0, 500, 2**20])
def test_members_that_are_not_kept_are_built_again(budget, monkeypatch):
    calls = []

    def build(i):
        calls.append(i)
        return slow_or_fast(i)

    axes = {"i": range(40)}
    plain = gf.sweep(slow_or_fast, axes, [0.0, 1.0], batch=2, **TSIT5)
    monkeypatch.setattr(_members, "KEPT", budget)
    ds = gf.sweep(build, axes, [0.0, 1.0], batch=2, **TSIT5)
    assert bitwise(ds, plain)
    assert (len(calls) == 40) == (budget == 2**20)


def test_a_build_that_returns_something_else_later_is_refused(monkeypatch):
    calls = []

    def build(i):
        calls.append(i)
        return gf.GradientFlow(Decay(jnp.asarray(1.0), jnp.asarray(-1.0))), jnp.ones(3 if len(calls) <= 20 else 4)

    monkeypatch.setattr(_members, "KEPT", 0)
    with pytest.raises(ValueError, match=r"`build` must return the same at i=\d+ every time"):
        gf.sweep(lambda i: (build(i)[0], (1.0 + i) * build(i)[1]), {"i": range(10)}, [0.0, 1.0], **TSIT5)


def test_slots_are_as_many_as_fit_and_what_does_not_fit_is_refused(monkeypatch):
    def build(i):
        return decay(1.0, start=1.0 + i)[0], jnp.full(1000, 1.0 + i)

    def run(free, **options):
        monkeypatch.setattr(_memory, "free_memory", lambda: (free, free))
        fixed = {"solver": gf.solvers.Tsit5(), "progress": False}
        return gf.sweep(build, {"i": range(20)}, [0.0, 1.0], **(fixed | options))

    seen, real = [], _scheduler.empty_slots
    monkeypatch.setattr(
        _scheduler, "empty_slots", lambda one, shapes, slots, room: seen.append(slots) or real(one, shapes, slots, room)
    )
    monkeypatch.setattr(_memory, "LIGHT", 1e9)
    run(10**9)
    run(1_100_000)
    assert seen[0] == 8
    assert 1 <= seen[1] < 8
    with pytest.raises(ValueError, match=r"`batch` must be a number of members that fit into memory, but is 1, .* kB"):
        run(50_000)
    with pytest.raises(ValueError, match=r"`batch` must be a number of members that fit .* but is 20, .*or lower it"):
        run(1_100_000, batch=20)
    with pytest.raises(ValueError, match=r"`ts` must leave results that fit into memory, but is 3\d\d kB, with"):
        run(100_000, save_params=True)


def test_a_large_sweep_says_what_it_takes(monkeypatch, capsys):
    monkeypatch.setattr(_memory, "LARGE", 1)
    gf.sweep(slow_or_fast, {"i": range(3)}, [0.0, 1.0], **(TSIT5 | {"progress": True}))
    message = capsys.readouterr()
    assert "estimated memory: " in message.out + message.err
    assert "in slots" in message.out + message.err


# Rules


def test_rules_and_flows_in_one_sweep():
    """Each saves on its own clock; the flow's variables stay empty for the rule."""

    def build(how, i):
        flow, start = decay(1.0, start=1.0 + i)
        return (flow if how == "flow" else gf.GradientDescent(flow.problem, 0.3)), start

    ds = gf.sweep(build, {"how": ["flow", "descent"], "i": range(3)}, [0.0, 1.0, 2.0], **TSIT5)
    assert (ds.status == 0).all()
    np.testing.assert_allclose(ds.saved_time.sel(how="descent"), np.tile([0.0, 0.9, 2.1], (3, 1)))
    exact = (1 + np.arange(3))[:, None] * 0.7 ** np.array([0, 3, 7])
    np.testing.assert_allclose(ds.w.sel(how="descent")[..., 0], exact, rtol=1e-13)
    np.testing.assert_allclose(
        ds.w.sel(how="flow")[..., 0], (1 + np.arange(3))[:, None] * np.exp(-np.arange(3)), rtol=1e-4
    )
    assert ds.gradient_evaluations.sel(how="descent").values.tolist() == [7, 7, 7]
    assert np.isnan(ds.drift_energy.sel(how="descent")).all()


def test_rules_that_diverge_or_run_out_of_steps():
    def build(rate):
        return gf.GradientDescent(Decay(jnp.asarray(1.0), jnp.asarray(-jnp.inf)), rate), jnp.full(3, 1.0)

    ds = gf.sweep(build, {"rate": [0.1, 0.01, 3.0]}, [0.0, 1.0, 40.0], max_steps=500, **TSIT5)
    names = ds.status.attrs["flag_meanings"].split()
    assert [names[int(code) + 1] for code in ds.status] == ["ok", "max_steps", "diverged"]
    assert np.isnan(ds.w[1, :, 0]).values.tolist() == [False, False, True]
    assert ds.steps.values.tolist()[:2] == [400, 500]


# netCDF


def test_netcdf_round_trip(tmp_path):
    axes = {"kind": ["a", "b"], "i": range(2)}
    ds = gf.sweep(lambda kind, i: slow_or_fast(i), axes, [0.0, 1.0], store=tmp_path / "a.zarr", **TSIT5)
    path = gf.sweeps.to_netcdf(tmp_path / "a.zarr", tmp_path / "a.nc")
    computed = xr.load_dataset(path)
    assert bitwise(computed, ds)
    assert computed.attrs["config"] == ds.attrs["config"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.nc", "a.zarr"]
