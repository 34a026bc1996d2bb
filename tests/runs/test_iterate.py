"""Discrete rules: against hand-written loops and optax, on their clock, with divergence reported."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradflow as gf
from gradflow.runs import _drive
from gradflow.runs._progress import Bar


def quartic(w):
    return jnp.sum(0.25 * w**4 - 0.5 * w**2)


def descend_by_hand(w, learning_rate, steps):
    history = [w]
    for _ in range(steps):
        w = w - learning_rate * (w**3 - w)
        history.append(w)
    return np.array(history)


def test_gradient_descent_equals_a_loop():
    start = np.array([0.3, -1.7])
    sol = gf.iterate(gf.GradientDescent(quartic, 0.1), jnp.asarray(start), 25, save_every=1)
    np.testing.assert_allclose(sol.params, descend_by_hand(start, 0.1, 25), rtol=1e-13)
    np.testing.assert_allclose(sol.ts, 0.1 * np.arange(26), rtol=1e-15)
    assert sol.status == "ok"


@pytest.mark.parametrize(("steps", "save_every", "saved"), [(10, 4, [0, 4, 8, 10]), (8, 4, [0, 4, 8]), (3, 5, [0, 3])])
def test_saved_iterates(steps, save_every, saved):
    rule = gf.GradientDescent(quartic, 0.1)
    sol = gf.iterate(rule, jnp.array([0.3]), steps, save_every=save_every, observe={"w": lambda w: w[0]})
    history = descend_by_hand(np.array([0.3]), 0.1, steps)[:, 0]
    np.testing.assert_allclose(sol.ts, rule.time(np.array(saved)))
    np.testing.assert_allclose(sol.observed["w"], history[saved], rtol=1e-13)
    assert float(sol.final[0]) == pytest.approx(history[-1], rel=1e-13)


@pytest.mark.parametrize(
    "transform",
    [
        optax.sgd,
        functools.partial(optax.sgd, momentum=0.9, nesterov=True),
        optax.adam,
        pytest.param(optax.lbfgs, marks=pytest.mark.slow),
    ],
    ids=["sgd", "nesterov", "adam", "lbfgs"],
)
def test_optax_rule_equals_optax_by_hand(transform):
    rate, start = 0.05, jnp.array([0.3, -1.7])
    ready = transform(rate)
    w, state = start, ready.init(start)
    for _ in range(20):
        loss, gradient = jax.value_and_grad(quartic)(w)
        extra = {"value": loss, "grad": gradient, "value_fn": quartic}
        updates, state = optax.with_extra_args_support(ready).update(gradient, state, w, **extra)
        w = optax.apply_updates(w, updates)
    for form in (transform, ready):
        sol = gf.iterate(gf.OptaxRule(quartic, form, rate), start, 20)
        np.testing.assert_allclose(sol.final, w, rtol=1e-10)
        assert float(sol.t_final) == pytest.approx(20 * rate)


def test_optax_rule_with_frozen_leaves_and_float32():
    params = {"w": jnp.ones(2, jnp.float32), "depth": 3, "act": jnp.tanh}
    rule = gf.OptaxRule(lambda p: jnp.sum(p["act"](p["w"]) ** 2), optax.adam, 0.1)
    sol = gf.iterate(rule, params, 10)
    assert sol.final["w"].dtype == jnp.float32
    assert sol.final["depth"] == 3
    assert float(sol.loss[1]) < float(sol.loss[0])


def test_gradient_counts_equal_calls():
    calls = []

    def counted(w):
        jax.debug.callback(lambda: calls.append(1))
        return quartic(w)

    sol = gf.iterate(gf.GradientDescent(counted, 0.1), jnp.array([0.5]), 17, save_every=5, observe={})
    jax.effects_barrier()
    rows = sol.ts.size
    # Besides one gradient a step: the loss at the start, at every saved iterate, and at the end.
    assert len(calls) == int(sol.stats["gradient_evaluations"]) + rows + 2
    assert int(sol.stats["gradient_evaluations"]) == 17


def test_divergence_is_reported_and_not_returned_as_numbers():
    rule = gf.GradientDescent(lambda w: 0.5 * jnp.sum(w**2), 2.5)
    sol = gf.iterate(rule, jnp.array([1.0]), 100, save_every=1, throw=False)
    assert sol.status == "diverged"
    k = int(sol.saved)
    assert np.isfinite(np.asarray(sol.params)[:k]).all()
    assert np.isnan(np.asarray(sol.params)[k:]).all()
    # |w| grows by 1.5 a step and the loss by 2.25; it passes a million at step 18.
    assert k - 1 == int(np.ceil(np.log(2e6) / np.log(2.25))) - 1
    assert int(sol.stats["gradient_evaluations"]) < 25
    with pytest.raises(gf.SolveError, match=r"diverged.*lower the learning rate"):
        gf.iterate(rule, jnp.array([1.0]), 100)


def test_overflow_is_nonfinite():
    rule = gf.GradientDescent(lambda w: jnp.sum(w**4), 1e200)
    sol = gf.iterate(rule, jnp.array([1.0]), 10, save_every=1, throw=False)
    assert sol.status == "nonfinite"
    assert np.isfinite(np.asarray(sol.final)).all()
    at_once = gf.iterate(gf.GradientDescent(lambda w: jnp.log(-w), 0.1), jnp.array(1.0), 5, throw=False)
    assert (at_once.status, int(at_once.stats["steps"])) == ("nonfinite", 0)


def test_vmap_over_learning_rates_equals_a_loop_and_compiles_once():
    traces = []

    def problem(w):
        traces.append(1)
        return quartic(w)

    rates = jnp.array([0.05, 0.1, 3.5])

    def run(rate):
        return gf.iterate(gf.GradientDescent(problem, rate), jnp.array([0.3]), 40, throw=False)

    batch = jax.vmap(run)(rates)
    assert batch.status.tolist()[:2] == ["ok", "ok"]
    first = run(0.05)
    before = len(traces)
    second = run(0.1)
    assert len(traces) == before
    np.testing.assert_allclose(batch.final[:2, 0], [first.final[0], second.final[0]], rtol=1e-12)


@pytest.mark.parametrize("save_every", [3, 50])
def test_until_stops_at_the_iterate_that_meets_it(save_every):
    """Saved or not: `0.9^k` falls to a half at step seven."""
    rule, until = gf.GradientDescent(lambda w: 0.5 * w**2, 0.1), gf.Until(lambda w: w, below=0.5)
    sol = gf.iterate(rule, jnp.array(1.0), 100, save_every=save_every, until=until)
    assert sol.status == "stopped"
    assert int(sol.stats["steps"]) == 7
    assert float(sol.final) == pytest.approx(0.9**7, rel=1e-13)
    assert float(sol.t_final) == pytest.approx(0.7)
    assert int(sol.saved) == 7 // save_every + 1
    assert np.isnan(np.asarray(sol.params)[int(sol.saved) :]).all()


def test_until_that_holds_at_the_start_takes_no_step():
    rule, until = gf.GradientDescent(lambda w: 0.5 * w**2, 0.1), gf.Until(lambda w: w, below=2.0)
    sol = gf.iterate(rule, jnp.array(1.0), 100, save_every=50, until=until)
    assert (sol.status, int(sol.stats["steps"]), int(sol.saved)) == ("stopped", 0, 1)
    assert float(sol.params[0]) == 1.0


def test_until_stops_at_a_saved_iterate():
    rule = gf.GradientDescent(lambda w: 0.5 * w**2, 0.1)
    sol = gf.iterate(rule, jnp.array(1.0), 100, save_every=1, until=gf.Until(lambda w: w, below=0.5))
    steps = int(np.ceil(np.log(0.5) / np.log(0.9)))
    assert sol.status == "stopped"
    assert int(sol.stats["steps"]) == steps
    assert float(sol.t_final) == pytest.approx(0.1 * steps)


def test_progress_gives_the_same_numbers(capsys, monkeypatch):
    monkeypatch.setattr("gradflow.runs._progress._is_watched", lambda: True)
    rule = gf.GradientDescent(quartic, 0.01)
    plain = gf.iterate(rule, jnp.array([0.3]), 333)
    shown = gf.iterate(rule, jnp.array([0.3]), 333, progress=True)
    assert np.array_equal(plain.params, shown.params)
    assert "GradientDescent" in capsys.readouterr().err


def test_progress_is_told_between_saved_iterates(monkeypatch):
    """In segments of a step, whose end is no saved iterate; a run that goes on from another counts from there."""
    reported = []
    monkeypatch.setattr(_drive, "SEGMENT", 1e-9)
    monkeypatch.setattr(Bar, "reach", lambda bar, done, remark: reported.append((done, remark.split(",")[0])))
    rule = gf.GradientDescent(quartic, 0.01)
    half = gf.iterate(rule, jnp.array([0.3]), 4, save_every=4, progress=True)
    assert reported == [(100 * k / 4, f"step {k}") for k in range(1, 5)]
    reported.clear()
    gf.iterate(rule, half, 4, save_every=4, progress=True)
    assert reported == [(100 * k / 4, f"step {4 + k}") for k in range(1, 5)]


def test_flows_of_rules():
    rule = gf.GradientDescent(quartic, 0.1)
    assert isinstance(rule.flow(), gf.GradientFlow)
    assert rule.flow().problem is quartic
    with pytest.raises(ValueError, match=r"Argument `order` must be one of \(1, 2, 3\) for GradientDescent, but is 4"):
        rule.flow(order=4)
    with pytest.raises(ValueError, match="known continuous limit"):
        gf.OptaxRule(quartic, optax.adam, 0.1).flow()
    assert isinstance(gf.OptaxRule(quartic, optax.sgd, 0.1, limit=gf.GradientFlow).flow(), gf.GradientFlow)
    assert float(rule.with_learning_rate(0.2).learning_rate) == 0.2
    with pytest.raises(ValueError, match="fixed"):
        gf.OptaxRule(quartic, optax.sgd(0.1), 0.1).with_learning_rate(0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gf.GradientDescent(quartic, 0.0), "Argument `learning_rate` must be positive, but is 0"),
        (lambda: gf.GradientDescent(quartic, np.nan), "Argument `learning_rate` must be positive, but is nan"),
        (lambda: gf.OptaxRule(quartic, optax.sgd, -1.0), "Argument `learning_rate` must be positive"),
        (lambda: gf.OptaxRule(quartic, 3, 0.1), "Argument `transform` must be an optax transform"),
        (lambda: gf.iterate(gf.GradientDescent(quartic, 0.1), jnp.ones(1), 0), "Argument `steps` must be an integer"),
        (
            lambda: gf.iterate(gf.GradientDescent(quartic, 0.1), jnp.ones(1), 5, save_every=0),
            "Argument `save_every` must be an integer of at least 1, but is 0",
        ),
        (
            lambda: gf.iterate(gf.GradientDescent(quartic, 0.1), jnp.array([np.inf]), 5),
            "Argument `params` must be finite",
        ),
        (
            lambda: gf.iterate(gf.GradientDescent(lambda w: w, 0.1), jnp.ones(2), 5),
            r"Argument `problem` must return a real floating-point scalar, but is returning shape \(2,\)",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
