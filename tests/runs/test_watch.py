"""What a run tells while it goes on: callbacks, and a bar or lines on standard error."""

import io
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.runs import _drive, _progress, _watch

FLOW = gf.GradientFlow(gf.observables.Loss(lambda w: 0.5 * jnp.sum(w**2)).problem)
START, TS = jnp.ones(3), np.linspace(0.0, 4.0, 9)
OBSERVE = {"first": lambda w: w[0], "both": lambda w: {"a": w[:2], "b": w[2]}}


def run(**options):
    return gf.solve(FLOW, START, TS, observe=OBSERVE, solver=gf.solvers.Tsit5(), rtol=1e-8, **options)


def descent(**options):
    return gf.iterate(gf.GradientDescent(FLOW.problem, 0.1), START, 60, observe=OBSERVE, save_every=7, **options)


@pytest.fixture
def short_segments(monkeypatch):
    monkeypatch.setattr(_drive, "SEGMENT", 1e-9)
    monkeypatch.setattr(_drive, "COST_OF_STEP", 1e9)


class Terminal(io.StringIO):
    """Standard error of a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("what", [run, descent])
def test_a_callback_gets_every_row_once_and_the_loss(short_segments, what):
    seen = []
    sol = what(callback=seen.append)
    np.testing.assert_array_equal(np.concatenate([record.ts for record in seen]), sol.ts)
    np.testing.assert_array_equal(np.concatenate([record.observed["first"] for record in seen]), sol.observed["first"])
    both = np.concatenate([record.observed["both"]["a"] for record in seen])
    np.testing.assert_array_equal(both, sol.observed["both"]["a"])
    assert [record.steps for record in seen] == list(range(1, int(sol.stats["steps"]) + 1))
    assert [record.t for record in seen] == sorted(record.t for record in seen)
    assert seen[-1].gradient_evaluations == int(sol.stats["gradient_evaluations"])
    assert seen[-1].loss == float(sol.loss[1])
    assert seen[-1].share == 1.0
    assert {record.title for record in seen} == {sol.title}
    # The exact flow is exp(-t), iterates are 0.9^k: the loss belongs to the time beside it.
    state = np.exp(-seen[20].t) if what is run else 0.9 ** seen[20].steps
    assert seen[20].loss == pytest.approx(1.5 * state**2, rel=1e-6)


def test_a_callback_may_stop_a_run(short_segments):
    def enough(record):
        if record.steps == 12:
            raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough") as stopped:
        run(callback=enough)
    partial = stopped.value.solution
    assert partial.status == "interrupted"
    assert int(partial.stats["steps"]) == 12
    assert "attribute `solution`" in stopped.value.__notes__[0]
    continued = gf.solve(FLOW, partial, TS[~partial.reached], solver=gf.solvers.Tsit5(), rtol=1e-8)
    assert float(jnp.max(jnp.abs(continued.final - jnp.exp(-4.0)))) < 1e-8


def test_an_interruption_within_a_callback_is_one(short_segments):
    def interrupt(record):
        raise KeyboardInterrupt

    with pytest.raises(gf.SolveInterrupted) as stopped:
        run(callback=interrupt)
    assert int(stopped.value.solution.stats["steps"]) == 1


def test_a_flow_without_a_loss(short_segments):
    seen = []
    flow = gf.SecondOrderFlow(lambda w: 0.5 * jnp.sum(w**2), 0.1)
    gf.solve(flow, START, [0.1], callback=seen.append)
    assert all(record.loss is None or np.isfinite(record.loss) for record in seen)


# Bars


def test_a_terminal_gets_a_bar_with_the_loss_and_without_colours(short_segments, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(_watch, "COST", np.inf)
    sol = run(progress=True)
    shown = terminal.getvalue()
    assert re.search(r"GradientFlow 100 % \|.*t = 4, \d+ gradients, loss = ", shown)
    assert f"loss = {float(sol.loss[1]):.4g}" in shown
    assert not re.search(r"\x1b\[[\d;]*m", shown)


def test_a_log_gets_a_line_now_and_then(short_segments, monkeypatch, capsys):
    run(progress=True)
    assert capsys.readouterr().err == ""  # it was quick
    monkeypatch.setattr(_progress, "EVERY", 0.0)
    sol = run(progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == int(sol.stats["steps"])
    assert re.fullmatch(r"GradientFlow: 100 %, t = 4, \d+ gradients, loss = \S+, \d+ s", lines[-1])
    monkeypatch.setattr(_progress, "EVERY", 3600.0)
    run(progress=True)
    assert capsys.readouterr().err == ""


def test_the_loss_of_a_bar_costs_little(short_segments, monkeypatch):
    """One evaluation, where it would take longer than its share of the run."""
    calls = []
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(_watch, "loss_of", lambda run, carry: calls.append(1))
    monkeypatch.setattr(_watch, "COST", 1e-9)
    run(progress=True)
    assert len(calls) == 1


def test_a_bar_whose_total_is_found_late(capsys, monkeypatch):
    monkeypatch.setattr(_progress, "EVERY", 0.0)
    with _progress.Bar("jobs", None, unit="members") as bar:
        bar.advance()
        bar.reach(3, total=4)
        bar.write("a word")
    first, second, word = capsys.readouterr().err.splitlines()
    assert first == "jobs: 1 members, 0 s"
    assert second == "jobs: 3 of 4 members, 75 %, 0 s"
    assert word == "a word"


# Sweeps


def build(rate):
    return gf.GradientDescent(FLOW.problem, rate), START


def test_a_sweep_tells_which_members_have_finished(capsys):
    seen = []
    ds = gf.sweep(build, {"rate": [0.1, 0.2, 3.0]}, [0.0, 1e3], progress=True, callback=seen.append, batch=1)
    assert capsys.readouterr().err == ""
    rates = [member["rate"] for record in seen for member in record.members]
    assert sorted(rates) == [0.1, 0.2, 3.0]
    ends = dict(zip(rates, (status for record in seen for status in record.statuses), strict=True))
    assert ends == {0.1: "ok", 0.2: "ok", 3.0: "diverged"}
    losses = dict(zip(rates, (loss for record in seen for loss in record.losses), strict=True))
    assert losses[0.1] == float(ds.loss_last.sel(rate=0.1))
    assert (seen[-1].finished, seen[-1].total) == (3, 3)


def test_a_callback_may_stop_a_sweep(tmp_path):
    axes, ts = {"rate": [0.1, 0.2, 0.3, 0.4]}, [0.0, 1e3]

    def enough(record):
        if record.finished >= 2:
            raise TimeoutError

    options = {"progress": False, "batch": 1, "store": tmp_path / "a.zarr"}
    whole = gf.sweep(build, axes, ts, progress=False, batch=1)
    with pytest.raises(TimeoutError) as stopped:
        gf.sweep(build, axes, ts, callback=enough, **options)
    done = stopped.value.dataset.status.values == 0
    assert done.sum() >= 2
    np.testing.assert_array_equal(gf.sweeps.open_store(tmp_path / "a.zarr").status.values == 0, done)
    resumed = gf.sweep(build, axes, ts, **options)
    np.testing.assert_array_equal(resumed.loss_last, whole.loss_last)
    with pytest.raises(ValueError, match="Argument `callback` must be None where jobs are launched"):
        gf.sweep(build, axes, ts, callback=enough, launch=object(), **options)
