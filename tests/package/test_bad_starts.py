"""Labels, models, observables, save times and keys that a run cannot do anything with are named before it begins."""

import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf

X = np.random.default_rng(0).normal(size=(20, 5))
FLOW = gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2))


def linear(w, x):
    return x @ w


@pytest.mark.parametrize(
    "run",
    [
        lambda risk, w: gf.solve(gf.GradientFlow(risk), w, [1.0]),
        lambda risk, w: gf.solve(gf.SGDFlow(risk, 0.1, batch_size=1), w, [1.0], key=jax.random.key(0)),
        lambda risk, w: gf.iterate(gf.GradientDescent(risk, 0.1), w, 3),
        lambda risk, w: gf.observables.Accuracy(risk)(w),
        lambda risk, w: risk(w),
    ],
)
def test_class_indices_beyond_the_outputs(run):
    risk = gf.EmpiricalRisk(X, np.arange(20) % 3 + 1, gf.losses.cross_entropy, linear)
    with pytest.raises(ValueError, match=r"`y` must hold labels 0 \.\.\. 2, as the model has 3 outputs.*first 3"):
        run(risk, jnp.zeros((5, 3)))


@pytest.mark.parametrize(
    ("loss", "y", "message"),
    [
        (
            "cross_entropy",
            np.where(np.arange(20) % 2, 1, -1),
            r"class indices.*first -1. Labels \+1 and -1 go",
        ),
        ("cross_entropy", np.arange(20.0) % 3, r"class indices as integers.*y\.astype\(int\)"),
        ("cross_entropy", np.arange(20) % 2 == 0, "class indices as integers.*but is bool"),
        ("cross_entropy", np.ones((20, 3)), "rows of probabilities that sum to one.*first 3"),
        ("cross_entropy", 2 * np.eye(4)[np.arange(20) % 4] - 1, "hold probabilities.*first -1"),
        ("cross_entropy", np.full((20, 2), np.nan), "be finite"),
        ("logistic", np.arange(20) % 2, r"hold \+1 and -1 for the loss `logistic`"),
        ("exponential", np.arange(20) % 2, r"hold \+1 and -1 for the loss `exponential`"),
        ("hinge", np.arange(20) % 3 + 1, r"hold \+1 and -1 for the loss `hinge`"),
        ("square", np.full(20, np.nan), "be finite"),
    ],
)
def test_targets_of_the_wrong_kind(loss, y, message):
    with pytest.raises(ValueError, match="Argument `y` must .*" + message):
        gf.EmpiricalRisk(X, y, getattr(gf.losses, loss), linear)


def test_targets_of_the_right_kind():
    for y in (
        np.arange(20) % 3,
        np.eye(3)[np.arange(20) % 3],
        np.full((20, 3), 1 / 3),
    ):
        risk = gf.EmpiricalRisk(X, y, gf.losses.cross_entropy, linear)
        assert float(risk(jnp.zeros((5, 3)))) == pytest.approx(np.log(3.0), rel=1e-12)


def test_probabilities_of_another_number_of_classes():
    risk = gf.EmpiricalRisk(X, np.full((20, 2), 0.5), gf.losses.cross_entropy, linear)
    with pytest.raises(ValueError, match=r"`y` must have the shape of the predictions.*jax\.nn\.one_hot"):
        risk(jnp.zeros((5, 3)))


def test_a_loss_of_ones_own_that_is_not_finite_at_the_start():
    risk = gf.EmpiricalRisk(X, np.arange(20.0) % 3, lambda p, y: jnp.log(y - 1) * p, linear)
    with pytest.raises(gf.SolveError, match="not finite in 14 of 20 samples, the first at index 0, where y = 0"):
        gf.solve(gf.GradientFlow(risk), jnp.ones(5), [1.0])


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        (lambda x, w: x @ w, r"take the parameters first, but is one that works as predict\(x, params\) alone"),
        (
            lambda w, x: w[0] + jnp.dot(w, x) * x[0],
            r"the whole batch, but is one that works on a single sample alone.*jax\.vmap",
        ),
    ],
)
def test_a_predict_that_is_called_otherwise(predict, message):
    with pytest.raises(ValueError, match=message):
        gf.EmpiricalRisk(X, np.ones(20), gf.losses.square, predict)(jnp.ones(5))


def test_a_predict_that_fails_either_way_says_so_itself():
    def predict(w, x):
        raise ValueError("my own words")

    with pytest.raises(ValueError, match="my own words"):
        gf.EmpiricalRisk(X, np.ones(20), gf.losses.square, predict)(jnp.ones(5))


def test_layers_that_ask_for_a_key_or_a_state(key):
    for layer in (eqx.nn.Dropout(0.5), eqx.nn.BatchNorm(5, "batch", mode="batch")):
        model = eqx.nn.Sequential([layer, eqx.nn.Linear(5, "scalar", key=key)])
        risk = gf.EmpiricalRisk(X, np.ones(20), gf.losses.square)
        with pytest.raises(ValueError, match=rf"a model with {type(layer).__name__}.*inference_mode.*predict="):
            gf.solve(gf.GradientFlow(risk), model, [1.0])
    model = eqx.nn.inference_mode(eqx.nn.Sequential([eqx.nn.Dropout(0.5), eqx.nn.Linear(5, "scalar", key=key)]))
    assert np.isfinite(risk(model))


def test_pytrees_of_arrays_are_recorded():
    """`w(t) = exp(-t)`, entry by entry."""
    observe = {"both": lambda w: {"sum": jnp.sum(w), "pair": (w, jnp.argmax(w))}}
    sol = gf.solve(FLOW, jnp.array([1.0, 2.0]), [0.5, 1.0], observe=observe, rtol=1e-8)
    np.testing.assert_allclose(sol.observed["both"]["sum"], 3 * np.exp([-0.5, -1.0]), rtol=1e-6)
    assert sol.observed["both"]["pair"][0].shape == (2, 2)
    assert sol.observed["both"]["pair"][1].tolist() == [1, 1]
    assert "both dict of" in repr(sol)
    sol = gf.iterate(
        gf.GradientDescent(lambda w: 0.5 * jnp.sum(w**2), 0.5), jnp.ones(2), 2, observe=observe, save_every=1
    )
    assert sol.observed["both"]["sum"].tolist() == [2.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("fn", "message"), [(lambda w: None, "None: is there"), (lambda w: "a", "type str"), (lambda w: {}, "empty dict")]
)
def test_observables_that_give_nothing_to_record(fn, message):
    with pytest.raises(ValueError, match=rf"`observe\['mine'\]` must return an array.*{message}"):
        gf.solve(FLOW, jnp.ones(2), [1.0], observe={"mine": fn})


def test_save_times_that_are_no_numbers():
    """In a process without run-time type checks, which would refuse them first."""
    script = """
import jax.numpy as jnp, numpy as np, gradflow as gf
flow = gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2))
dates = np.array(["2020-01-01", "2020-01-02"], "datetime64[D]")
for ts in (dates, list(dates.astype(object)), ["1", "2"], [False, True], [1 + 0j], "abc", jnp.array([True])):
    try:
        gf.solve(flow, jnp.ones(2), ts)
    except ValueError as error:
        assert "Argument `ts` must be an array of" in str(error), str(error)
    else:
        raise AssertionError(ts)
assert gf.solve(flow, jnp.ones(2), [jnp.asarray(1), 2]).status == "ok"
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done", done.stderr


def test_raw_keys_are_keys():
    """The same numbers as with the keys of today, in a process without run-time type checks."""
    script = """
import jax, jax.numpy as jnp, numpy as np, gradflow as gf
problem = gf.EmpiricalRisk(np.eye(2), np.ones(2), gf.losses.square, lambda w, x: x @ w)
flow = gf.SGDFlow(problem, 0.1, batch_size=1)
def runs(key):
    yield gf.solve(flow, jnp.ones(2), [0.3], key=key).final
    yield gf.iterate(gf.SGD(problem, 0.1, batch_size=1, key=key), jnp.zeros(2), 3).final
    yield gf.models.MLP(2, 3, key=key)(jnp.ones(2))
    yield gf.models.TwoLayer(2, 3, key=key)(jnp.ones(2))
for old, new in zip(runs(jax.random.PRNGKey(3)), runs(jax.random.key(3)), strict=True):
    assert np.array_equal(old, new)
try:
    gf.SGD(problem, 0.1, batch_size=1, key=jax.random.split(jax.random.key(0), 2))
except ValueError as error:
    assert "be one random key" in str(error)
    print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done", done.stderr


@pytest.mark.slow
def test_a_sliding_flow_names_smoothing(key):
    x, y = np.random.default_rng(1).normal(size=(8, 2)), np.ones(8)
    model = gf.models.TwoLayer(2, 4, key=key)
    flow = gf.GradientFlow(gf.EmpiricalRisk(x, y, gf.losses.square))
    with pytest.raises(gf.SolveError, match=r"models\.Smoothed.*gradflow\.filippov"):
        gf.solve(flow, model, [100.0], max_steps=2)
    smooth = gf.models.TwoLayer(2, 4, activation=jnp.tanh, key=key)
    with pytest.raises(gf.SolveError) as caught:
        gf.solve(flow, smooth, [100.0], max_steps=2)
    assert "Smoothed" not in str(caught.value)
