"""One run in a store: rows as they are reached, resumed to the same bits, refused where it is another's."""

import json
import os
import platform
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

import gradflow as gf
from gradflow.cli._info import describe_store
from gradflow.programs import numbers
from gradflow.runs import _drive
from gradflow.runs._callback import check_callback
from gradflow.stores import _state_file

CURVATURES = jnp.array([0.3, 1.0, 8.0])
START = {"w": jnp.array([1.0, -2.0, 0.5])}
TS = np.linspace(0, 8, 33)
OBSERVE = {
    "norm": gf.observables.ParameterNorm(),
    "parts": lambda p: {"first": p["w"][0], "largest": jnp.argmax(p["w"])},
}


def quartic(params, strength=0.25):
    return 0.5 * jnp.sum(CURVATURES * params["w"] ** 2) + strength * jnp.sum(params["w"] ** 4)


def linear(params, x):
    return x @ params["w"]


def least_squares():
    x = jax.random.normal(jax.random.key(3), (20, 3))
    y = x @ jnp.array([0.5, 1.0, -1.0]) + jnp.sin(jnp.arange(20.0))
    return gf.EmpiricalRisk(x, y, gf.losses.square, predict=linear)


def flow_run(**options):
    """A smooth flow by an explicit method."""
    given = {"observe": OBSERVE, "solver": gf.solvers.Tsit5(), "rtol": 1e-7} | options
    return gf.solve(gf.GradientFlow(quartic), START, TS, **given)


def stiff_run(**options):
    """By the default method, whose history is a part of its state."""
    return gf.solve(gf.GradientFlow(quartic), START, TS, **({"observe": OBSERVE, "rtol": 1e-6} | options))


def path_run(**options):
    flow = gf.SGDFlow(least_squares(), 0.05, batch_size=4)
    return gf.solve(flow, START, TS, **({"observe": OBSERVE, "key": jax.random.key(1)} | options))


def sgd_run(**options):
    rule = gf.SGD(least_squares(), 0.05, batch_size=4, key=jax.random.key(2))
    return gf.iterate(rule, START, 120, **({"observe": OBSERVE, "save_every": 10} | options))


def adam_run(**options):
    rule = gf.OptaxRule(quartic, optax.adam, learning_rate=0.01)
    return gf.iterate(rule, START, 120, **({"observe": OBSERVE, "save_every": 10} | options))


def half(params):
    return quartic({"w": params["w"].astype(jnp.float32)})


def half_run(**options):
    """A rule in half precision, of a type that neither zarr nor the files of NumPy know."""
    start = {"w": START["w"].astype(jnp.bfloat16)}
    return gf.iterate(gf.GradientDescent(half, 0.05), start, 60, **({"save_every": 2} | options))


RUNS = {run.__name__: run for run in (flow_run, stiff_run, path_run, sgd_run, adam_run, half_run)}


class StopError(Exception):
    """Raised by a callback."""


def stopping(after):
    """A callback that ends a run with its call number `after`."""
    calls = []

    def callback(snapshot):
        calls.append(snapshot)
        if len(calls) == after:
            raise StopError

    callback.calls = calls
    return callback


def bitwise(one, other):
    assert jax.tree_util.tree_structure(one) == jax.tree_util.tree_structure(other)
    for a, b in zip(jax.tree_util.tree_leaves(one), jax.tree_util.tree_leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(numbers(a), numbers(b), equal_nan=jnp.issubdtype(a.dtype, jnp.inexact))
    return True


@pytest.fixture
def short_segments(monkeypatch):
    """Of a step or a few, each of them kept."""
    monkeypatch.setattr(_drive, "SEGMENT", 1e-9)
    monkeypatch.setattr(_drive, "COST_OF_STEP", 1e9)
    monkeypatch.setattr(_state_file, "COST", np.inf)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "run.zarr"
    return path, flow_run(store=path)


def test_a_store_holds_what_the_run_returns(stored):
    path, sol = stored
    assert bitwise(sol, flow_run())
    ds = xr.open_zarr(path)
    np.testing.assert_array_equal(ds.time, TS)
    np.testing.assert_array_equal(ds.params_w, sol.params["w"])
    np.testing.assert_array_equal(ds.norm, sol.observed["norm"])
    np.testing.assert_array_equal(ds.parts_largest, sol.observed["parts"]["largest"])
    for name, value in sol.stats.items():
        assert int(ds[name]) == int(value), name
    assert float(ds.loss_last) == float(sol.loss[1])
    assert float(ds.drift_energy) == float(sol.drift["energy"])
    description = describe_store(path)
    assert "runs: 1 ok" in description
    assert "run: GradientFlow" in description
    axes = gf.plot.draw(gf.sweeps.open_store(path)).axes
    assert [ax.get_title() for ax in axes] == ["norm", "parts_first", "parts_largest"]
    np.testing.assert_array_equal(axes[0].lines[0].get_ydata(), sol.observed["norm"])
    assert sorted(file.name for file in path.parent.iterdir()) == ["run.zarr"]


def test_a_run_that_is_finished_is_returned_without_running(stored):
    path, sol = stored
    calls = []
    assert bitwise(flow_run(store=path, callback=calls.append), sol)
    assert not calls


@pytest.mark.parametrize(
    "name", [name if name == "flow_run" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_a_run_in_pieces_has_the_same_bits(name, tmp_path, short_segments, capsys):
    """Stopped again and again, after one segment, two, three and so on; readable each time."""
    run, path, reached = RUNS[name], tmp_path / "run.zarr", []
    whole = run()
    for after in (1, 2, 5, 9, 20):
        with pytest.raises(StopError) as stopped:
            run(store=path, callback=stopping(after))
        partial = stopped.value.solution
        assert partial.status == "interrupted"
        ds, saved = gf.sweeps.open_store(path), int(partial.saved)
        reached.append(int(partial.stats["steps"]))
        assert int(ds.status) == 6
        assert int(ds.steps) == reached[-1]
        np.testing.assert_array_equal(np.isfinite(ds.params_w.values).all(axis=1), np.arange(ds.time.size) < saved)
    assert reached == sorted(set(reached))  # each piece goes on where the one before was stopped
    assert reached[-1] < int(whole.stats["steps"])
    assert bitwise(run(store=path), whole)
    assert bitwise(run(store=path), whole)


RUNS_OF_A_CHILD = 4
CHILD = """
import sys, threading, time
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
from gradflow.runs import _drive
from gradflow.stores import _state_file
sys.path.insert(0, sys.argv[1])
import test_run_store as tests

tests.stiff_run()  # compiles
_drive.SEGMENT, _drive.COST_OF_STEP, _state_file.COST = 1e-9, 1e9, np.inf
for path in sys.argv[2:]:
    slowly = {"store": path, "callback": lambda snapshot: time.sleep(0.02)}
    threading.Thread(target=tests.stiff_run, kwargs=slowly).start()
time.sleep(600)  # until the process is killed
"""


@pytest.mark.slow
def test_a_run_killed_at_twenty_moments_ends_in_the_same_bits(tmp_path):
    """SIGKILL at random moments of processes that do one run several times, one begun after the other."""
    whole, rng, reached = stiff_run(), np.random.default_rng(0), []
    for child in range(20 // RUNS_OF_A_CHILD):
        paths = [tmp_path / f"{child}-{i}.zarr" for i in range(RUNS_OF_A_CHILD)]
        command = [sys.executable, "-c", CHILD, os.path.dirname(__file__), *map(str, paths)]
        process = subprocess.Popen(command)
        while not all((path / ".state.npz").exists() for path in paths):
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 1.0))
        process.kill()
        process.wait()
        for path in paths:
            stored_steps = int(gf.sweeps.open_store(path).steps) if path.exists() else 0
            seen = []
            assert bitwise(stiff_run(store=path, callback=seen.append), whole)
            assert stored_steps == int(whole.stats["steps"]) or seen[0].steps > stored_steps
            reached.append(stored_steps)
    midst = [steps for steps in reached if 0 < steps < int(whole.stats["steps"])]
    # How many fall between beginning and end, and at how many stored states, is a matter of the machine's speed.
    assert len(midst) >= 5
    assert len(set(midst)) >= 3


@pytest.mark.slow
def test_a_continued_run_is_stored_as_well(tmp_path, short_segments):
    first = gf.iterate(gf.GradientDescent(quartic, 0.02), START, 30)
    go = lambda **options: gf.iterate(gf.GradientDescent(quartic, 0.02), first, 60, **options)  # noqa: E731
    with pytest.raises(StopError):
        go(store=tmp_path / "a.zarr", callback=stopping(7))
    assert bitwise(go(store=tmp_path / "a.zarr"), go())
    other = gf.iterate(gf.GradientDescent(quartic, 0.02), START, 31)
    with pytest.raises(ValueError, match=r"params\.checkpoint\.k: 30 -> 31"):
        gf.iterate(gf.GradientDescent(quartic, 0.02), other, 60, store=tmp_path / "a.zarr")


def test_more_steps_may_be_taken_by_the_same_run(tmp_path):
    with pytest.raises(gf.SolveError, match="max_steps"):
        flow_run(store=tmp_path / "a.zarr", max_steps=40)
    with pytest.raises(gf.SolveError, match="max_steps") as again:
        flow_run(store=tmp_path / "a.zarr", max_steps=40)
    assert int(again.value.solution.stats["steps"]) == 40
    assert bitwise(flow_run(store=tmp_path / "a.zarr"), flow_run())


def test_starting_over(stored, tmp_path, short_segments):
    with pytest.raises(StopError):
        flow_run(store=tmp_path / "a.zarr", callback=stopping(5))
    callback = stopping(1000)
    assert bitwise(flow_run(store=tmp_path / "a.zarr", resume=False, callback=callback), stored[1])
    assert len(callback.calls[0].ts) >= 1
    assert callback.calls[0].ts[0] == 0.0


# Other runs


def scaled(params):
    return 1.5 * quartic(params)


FLOW = gf.GradientFlow(quartic)
OTHERS = {
    "tolerance": (lambda **o: flow_run(rtol=1e-6, **o), "rtol: 1e-07 -> 1e-06"),
    "times": (lambda **o: gf.solve(FLOW, START, TS + 1, observe=OBSERVE, **o), "ts: "),
    "observables": (lambda **o: flow_run(observe={"norm": OBSERVE["norm"]}, **o), "observe: "),
    "code of an observable": (
        lambda **o: flow_run(observe=OBSERVE | {"norm": lambda p: jnp.sum(p["w"])}, **o),
        "code of observe['norm']",
    ),
    "method": (lambda **o: flow_run(solver=gf.solvers.ROCK2(), **o), "code of method"),
    "start": (lambda **o: _elsewhere({"w": START["w"] + 1e-9}, **o), "numbers of params.w"),
    "many numbers": (lambda **o: _elsewhere({"w": jnp.ones(5)}, **o), "params.w: "),
    "code of the loss": (lambda **o: _another(scaled, **o), "code of flow"),
    "until": (lambda **o: flow_run(until=gf.Until(quartic, below=1e-3), **o), "until.value: null -> "),
    "rule": (adam_run, "steps: "),
}


def _elsewhere(start, **options):
    return gf.solve(FLOW, start, TS, observe=OBSERVE, solver=gf.solvers.Tsit5(), rtol=1e-7, **options)


def _another(loss, **options):
    flow = gf.GradientFlow(loss)
    return gf.solve(flow, START, TS, observe=OBSERVE, solver=gf.solvers.Tsit5(), rtol=1e-7, **options)


@pytest.mark.parametrize("change", OTHERS)
def test_the_store_of_another_run_is_refused_by_what_differs(stored, change):
    run, message = OTHERS[change]
    before = {file: file.stat().st_mtime_ns for file in stored[0].rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="must hold the same run in order to be resumed") as error:
        run(store=stored[0])
    assert message in str(error.value)
    assert {file: file.stat().st_mtime_ns for file in stored[0].rglob("*") if file.is_file()} == before


def test_data_of_another_run(tmp_path):
    def run(x):
        problem = gf.EmpiricalRisk(x, jnp.ones(4), gf.losses.square, predict=linear)
        return gf.iterate(gf.GradientDescent(problem, 0.1), START, 5, store=tmp_path / "a.zarr")

    x = jnp.arange(12.0).reshape(4, 3) / 12
    run(x)
    with pytest.raises(ValueError, match=r"changes \(numbers of rule.problem.x\)"):
        run(x.at[2, 1].add(1e-12))


def test_stores_of_sweeps_and_of_runs_are_no_substitutes(stored, tmp_path):
    options = {"progress": False, "solver": gf.solvers.Tsit5()}
    build = lambda seed: (FLOW, START)  # noqa: E731
    with pytest.raises(ValueError, match="must hold a sweep"):
        gf.sweep(build, {"seed": [0]}, TS[:2], store=stored[0], **options)
    gf.sweeps.write_dataset(xr.Dataset({"a": ("x", [1.0])}), tmp_path / "a.zarr")
    with pytest.raises(ValueError, match=r"must hold a run .* a sweep or a study"):
        flow_run(store=tmp_path / "a.zarr")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds something else"):
        flow_run(store=tmp_path / "b")


def test_another_machine_is_told_of(stored, tmp_path, monkeypatch):
    path, sol = stored
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_fast_math=false")
    with pytest.warns(UserWarning, match=r"goes on in another place \(flags: .*to rounding, not to the bit"):
        assert bitwise(flow_run(store=path), sol)


# One process at a time


def test_a_second_process_is_refused_by_the_name_of_the_first(tmp_path, short_segments):
    messages = []

    def meanwhile(snapshot):
        with pytest.raises(ValueError, match="must be written by one process at a time") as error:
            flow_run(store=tmp_path / "a.zarr")
        messages.append(str(error.value))
        raise StopError

    with pytest.raises(StopError):
        flow_run(store=tmp_path / "a.zarr", callback=meanwhile)
    assert f"process {os.getpid()} on {platform.node()} has been writing since 2" in messages[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.zarr"]


def test_the_lock_of_a_process_that_has_died_is_taken_over(tmp_path, stored):
    held = tmp_path / ".a.zarr.progress"
    held.mkdir()
    (held / "lock").write_text(json.dumps({"host": platform.node(), "process": 1, "since": "2020"}))
    assert bitwise(flow_run(store=tmp_path / "a.zarr"), stored[1])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.zarr"]


# Trouble


def test_a_full_disk_keeps_what_there_is(tmp_path, short_segments, stored):
    """No file can grow beyond the limit, as on a disk without room."""
    path, before = tmp_path / "a.zarr", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(snapshot):
        if snapshot.steps >= 20:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))

    try:
        with pytest.raises(gf.SolveError, match=r"cannot be written \(File too large\)\. Make room") as full:
            flow_run(store=path, callback=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    partial = full.value.solution
    saved = int(partial.saved)
    assert partial.status == "interrupted"
    np.testing.assert_array_equal(partial.params["w"][:saved], stored[1].params["w"][:saved])
    assert int(gf.sweeps.open_store(path).steps) >= 15
    assert not list(path.glob("*.unfinished"))
    assert bitwise(flow_run(store=path), stored[1])


@pytest.mark.parametrize("left", [b"", b"garbage", None])
def test_a_state_that_cannot_be_read_starts_over(tmp_path, short_segments, left, stored):
    path = tmp_path / "a.zarr"
    with pytest.raises(StopError):
        flow_run(store=path, callback=stopping(5))
    state = path / ".state.npz"
    state.unlink() if left is None else state.write_bytes(left)
    assert bitwise(flow_run(store=path), stored[1])


def test_nothing_is_stored_or_called_under_a_trace(tmp_path):
    for name, value in (("store", tmp_path / "a.zarr"), ("callback", print)):
        with pytest.raises(ValueError, match=f"Argument `{name}` must be None under a trace"):
            jax.jit(lambda w, name=name, value=value: gf.solve(FLOW, {"w": w}, TS, **{name: value}).final)(START["w"])
    assert not list(tmp_path.iterdir())


def test_names_that_every_run_has_are_taken(tmp_path):
    with pytest.raises(ValueError, match=r"Argument `observe` must have names of its own.*'t_final'"):
        flow_run(observe={"t_final": lambda p: p["w"][0]}, store=tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="Argument `callback` must be callable"):
        check_callback(3)
    assert not list(tmp_path.iterdir())
