"""Losses and their derivatives by hand; risks of every kind of model against finite differences; bad data."""

import subprocess
import sys

import equinox as eqx
import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf

LN2 = np.log(2)


def value_and_slope(loss, prediction, target):
    value, slope = jax.value_and_grad(loss)(jnp.asarray(prediction, float), jnp.asarray(target))
    return float(value), np.asarray(slope)


@pytest.mark.parametrize(
    ("loss", "prediction", "target", "value", "slope"),
    [
        ("square", 3.0, 1.0, 2.0, 2.0),
        ("square", [1.0, -2.0], [0.0, 2.0], 8.5, [1.0, -4.0]),
        ("square", [[1.0, 0.0], [0.0, 3.0]], np.zeros((2, 2)), 5.0, [[1.0, 0.0], [0.0, 3.0]]),
        ("square", 3.0, 1, 2.0, 2.0),
        ("square", 1e200, 1e200, 0.0, 0.0),
        ("logistic", 0.0, 1.0, LN2, -0.5),
        ("logistic", 0.0, -1.0, LN2, 0.5),
        ("logistic", np.log(3), 1.0, np.log(4 / 3), -0.25),
        ("logistic", [0.0, np.log(3)], [1.0, -1.0], LN2 + np.log(4), [-0.5, 0.75]),
        ("logistic", -1e4, 1.0, 1e4, -1.0),
        ("logistic", 1e4, -1.0, 1e4, 1.0),
        ("logistic", 1e4, 1.0, 0.0, 0.0),
        ("logistic", 40.0, 1.0, np.exp(-40.0), -np.exp(-40.0)),
        ("exponential", 0.0, -1.0, 1.0, 1.0),
        ("exponential", np.log(2), 1.0, 0.5, -0.5),
        ("exponential", [np.log(2), np.log(2)], [1.0, -1.0], 2.5, [-0.5, 2.0]),
        ("exponential", 1e4, 1.0, 0.0, 0.0),
        ("exponential", -1e4, 1.0, np.inf, -np.inf),
        ("hinge", 0.25, 1.0, 0.75, -1.0),
        ("hinge", 0.25, -1.0, 1.25, 1.0),
        ("hinge", 2.0, 1.0, 0.0, 0.0),
        ("hinge", [-1.0, 3.0], [1, 1], 2.0, [-1.0, 0.0]),
        ("hinge", -1e4, 1.0, 10001.0, -1.0),
        ("cross_entropy", [0.0, 0.0, 0.0, 0.0], 2, np.log(4), [0.25, 0.25, -0.75, 0.25]),
        ("cross_entropy", [0.0, np.log(3)], 0, np.log(4), [-0.75, 0.75]),
        ("cross_entropy", [0.0, np.log(3)], [1.0, 0.0], np.log(4), [-0.75, 0.75]),
        ("cross_entropy", [0.0, np.log(3)], [0, 1], np.log(4 / 3), [0.25, -0.25]),
        ("cross_entropy", [0.0, np.log(3)], [0.5, 0.5], 0.5 * np.log(16 / 3), [-0.25, 0.25]),
        ("cross_entropy", [1e4, 0.0], 1, 1e4, [1.0, -1.0]),
        ("cross_entropy", [-1e4, 0.0], [0.0, 1.0], 0.0, [0.0, 0.0]),
        ("cross_entropy", [1000.0, 1000.0], 0, LN2, [-0.5, 0.5]),
    ],
)
def test_values_and_derivatives_by_hand(loss, prediction, target, value, slope):
    computed, derivative = value_and_slope(getattr(gf.losses, loss), prediction, target)
    np.testing.assert_allclose(computed, value, rtol=4e-15, atol=1e-300)
    np.testing.assert_allclose(derivative, slope, rtol=4e-15, atol=1e-300)


def test_logistic_and_cross_entropy_of_two_scores_agree():
    """`softmax` of the scores `(p, 0)` is the logistic function of `p`."""
    for p in (-30.0, -1.0, 0.5, 7.0):
        one = gf.losses.logistic(jnp.array(p), jnp.array(1.0))
        two = gf.losses.cross_entropy(jnp.array([p, 0.0]), jnp.array(0))
        assert float(one) == pytest.approx(float(two), rel=1e-14)


@pytest.mark.parametrize("index", [-1, 3, 100])
def test_class_index_out_of_range_is_nan_in_value_and_gradient(index):
    value, slope = value_and_slope(gf.losses.cross_entropy, [1.0, 2.0, 3.0], index)
    assert np.isnan(value)
    assert np.all(np.isnan(slope))

    # One wrong label in a batch: the risk and its gradient both say so, instead of learning from the other samples.
    # Labels that are known are refused by name; these are traced.
    def risk(w, y):
        return gf.EmpiricalRisk(jnp.eye(3), y, gf.losses.cross_entropy, lambda w, x: x @ w)(w)

    y = jnp.array([0, index, 2])
    assert np.isnan(jax.jit(risk)(jnp.zeros((3, 3)), y))
    assert np.any(np.isnan(jax.jit(jax.grad(risk))(jnp.zeros((3, 3)), y)))
    run = jax.jit(lambda y: gf.solve(gf.GradientFlow(lambda w: risk(w, y)), jnp.zeros((3, 3)), [1.0], throw=False))(y)
    assert run.status == "nonfinite"


def test_curvature_of_the_losses():
    """Second derivatives: 1, `s (1 - s)` of the logistic function, `exp(-p y)`, 0."""
    p, y = jnp.array(0.7), jnp.array(-1.0)
    s = 1 / (1 + np.exp(0.7))
    expected = {"square": 1.0, "logistic": s * (1 - s), "exponential": np.exp(0.7), "hinge": 0.0}
    for name, value in expected.items():
        computed = float(jax.grad(jax.grad(getattr(gf.losses, name)))(p, y))
        assert computed == pytest.approx(value, rel=1e-14), name


def linear(params, x):
    return x @ params["w"] + params["b"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mean_and_sum(reduction):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=7)
    params = {"w": jnp.asarray(rng.normal(size=3)), "b": jnp.array([0.3])}
    residual = x @ np.asarray(params["w"]) + 0.3 - y
    problem = gf.EmpiricalRisk(x, y, gf.losses.square, linear, reduction)
    weight = 1 / 7 if reduction == "mean" else 1.0
    assert float(problem(params)) == pytest.approx(0.5 * weight * residual @ residual, rel=1e-14)
    np.testing.assert_allclose(problem.per_sample(params), 0.5 * residual**2, rtol=1e-13)
    gradient = jax.grad(problem)(params)
    np.testing.assert_allclose(gradient["w"], weight * x.T @ residual, rtol=1e-13)
    np.testing.assert_allclose(gradient["b"], [weight * residual.sum()], rtol=1e-13)
    other = rng.normal(size=(4, 3))
    np.testing.assert_allclose(
        problem.predictions(params, jnp.asarray(other)), other @ np.asarray(params["w"]) + 0.3, rtol=1e-13
    )


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.tanh(nn.Dense(4, param_dtype=float)(x))
        return nn.Dense(2, param_dtype=float)(hidden)


def two_layers(params, x):
    return jnp.tanh(x @ params[0]) @ params[1]


def of_kind(kind):
    """A model of each kind with its `predict`, and the same function of the flat parameters in plain NumPy."""
    rng = np.random.default_rng(1)
    if kind == "equinox":
        params = eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
        arrays = [params.layers[0].weight, params.layers[0].bias, params.layers[1].weight, params.layers[1].bias]
        reference = lambda w, x: np.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3]  # noqa: E731
        return params, None, arrays, reference
    if kind == "flax":
        model = Dense()
        params = model.init(jax.random.key(0), jnp.ones((1, 3)))
        layers = [params["params"]["Dense_0"], params["params"]["Dense_1"]]
        arrays = [layer[name] for layer in layers for name in ("bias", "kernel")]
        reference = lambda w, x: np.tanh(x @ w[1] + w[0]) @ w[3] + w[2]  # noqa: E731
        return params, model.apply, arrays, reference
    params = (jnp.asarray(rng.normal(size=(3, 4))), jnp.asarray(rng.normal(size=(4, 2))))
    return params, two_layers, list(params), lambda w, x: np.tanh(x @ w[0]) @ w[1]


def softmax_loss(prediction, labels):
    top = prediction.max(axis=1, keepdims=True)
    scores = prediction - top - np.log(np.exp(prediction - top).sum(axis=1, keepdims=True))
    return -scores[np.arange(len(labels)), labels]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["equinox", "flax", "plain"])
@pytest.mark.parametrize("loss", ["square", "cross_entropy"])
def test_every_kind_of_model_has_the_right_gradient(kind, loss):
    """Central differences of a NumPy copy; their error at step `h` is `h^2 f''' / 6 + eps / h`, below 1e-9 here."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(6, 3))
    y = rng.integers(0, 2, size=6) if loss == "cross_entropy" else rng.normal(size=(6, 2))
    params, predict, arrays, reference = of_kind(kind)
    problem = gf.EmpiricalRisk(x, y, getattr(gf.losses, loss), predict)
    weights = [np.array(a) for a in arrays]

    def risk():
        prediction = reference(weights, x)
        per_sample = softmax_loss(prediction, y) if loss == "cross_entropy" else 0.5 * ((prediction - y) ** 2).sum(1)
        return per_sample.mean()

    assert float(problem(params)) == pytest.approx(risk(), rel=1e-13)
    gradient = eqx.filter_grad(problem)(params)
    computed = [np.asarray(g) for g in jax.tree_util.tree_leaves(gradient) if eqx.is_array(g)]
    assert [g.shape for g in computed] == [w.shape for w in weights]
    h = 1e-5
    for g, w in zip(computed, weights, strict=True):
        for index in np.ndindex(w.shape):
            unperturbed = w[index]
            w[index] = unperturbed + h
            up = risk()
            w[index] = unperturbed - h
            down = risk()
            w[index] = unperturbed
            assert abs(g[index] - (up - down) / (2 * h)) <= 1e-9
    sol = gf.solve(gf.GradientFlow(problem), params, [0.5], observe={"loss": gf.observables.Loss(problem)})
    assert sol.observed["loss"].shape == (1,)
    assert float(sol.observed["loss"][0]) < risk()


def test_data_are_leaves_and_shapes_share_one_program():
    traces = []

    def predict(w, x):
        traces.append(None)
        return x @ w

    @eqx.filter_jit
    def evaluate(problem, w):
        return problem(w)

    rng = np.random.default_rng(0)
    for _ in range(3):
        x, y = rng.normal(size=(5, 2)), rng.normal(size=5)
        problem = gf.EmpiricalRisk(x, y, gf.losses.square, predict)
        assert float(evaluate(problem, jnp.ones(2))) == pytest.approx(0.5 * np.mean((x.sum(1) - y) ** 2), rel=1e-13)
    assert len(traces) == 1


def test_problem_may_be_built_inside_a_transformation():
    """Targets of shape `(batch, n)`, a problem per member: values cannot be looked at there and are let pass."""
    targets = jnp.arange(6.0).reshape(3, 2)
    risk = jax.vmap(lambda y: gf.EmpiricalRisk(jnp.eye(2), y, gf.losses.square, lambda w, x: x @ w)(jnp.zeros(2)))
    np.testing.assert_allclose(risk(targets), [0.25, (4 + 9) / 4, (16 + 25) / 4])


def test_what_is_conserved_comes_from_the_model(key):
    model = gf.models.TwoLayer(2, 3, key=key)
    problem = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), gf.losses.square)
    assert list(problem.conserved(model)) == ["balancedness"]
    assert problem.conserved({"w": jnp.ones(2)}) == {}
    # With a `predict` of the user's own nothing is known about symmetries.
    custom = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), gf.losses.square, lambda m, x: jax.vmap(m)(x) + 1)
    assert custom.conserved(model) == {}


GOOD = np.eye(3)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (
            np.where(GOOD > 0, np.nan, 1.0),
            np.ones(3),
            "`x` must be finite, but is not finite in 3 of 9 entries. Remove",
        ),
        (GOOD, [1.0, np.inf, 0.0], "`y` must be finite, but is not finite in 1 of 3 entries"),
        (GOOD, np.ones(4), "`y` must have as many entries as `x` has samples, but is 4 against 3"),
        (np.zeros((0, 3)), np.zeros(0), r"`x` must hold at least one sample .* but is of shape \(0, 3\)"),
        (1.0, 1.0, r"`x` must hold at least one sample .* of shape \(\)"),
        (GOOD, 1.0, r"at least one sample along its leading axis, but is of shape \(3, 3\) \(y: \(\)\)"),
        ([[1.0, 2.0], [3.0]], [1.0, 2.0], "`x` must be an array, but is not convertible to one"),
        (GOOD, ["cat", "dog", "cat"], "`y` must be a numeric array, but is of type <U3. Encode labels as numbers"),
        (GOOD, np.array([None, 1, 2]), "`y` must be a numeric array, but is of type object"),
        (GOOD, 1j * np.ones(3), "`y` must be a numeric array, but is of type complex128"),
    ],
)
def test_bad_data(x, y, message):
    with pytest.raises(ValueError, match=message):
        gf.EmpiricalRisk(x, y, gf.losses.square)


@pytest.mark.parametrize("loss", ["logistic", "exponential", "hinge"])
def test_margin_losses_ask_for_signs(loss):
    fn, linear = getattr(gf.losses, loss), lambda w, x: x @ w
    for y, first in (([1, 0, 0], "2 of 3 entries, first 0"), ([1.0, -1.0, 0.9], "1 of 3 entries, first 0.9")):
        message = f"`y` must hold [+]1 and -1 for the loss `{loss}`, but is something else in {first}. Labels 0 and 1"
        with pytest.raises(ValueError, match=message):
            gf.EmpiricalRisk(GOOD, y, fn, linear)
    with pytest.raises(ValueError, match="something else in 2 of 3"):
        gf.EmpiricalRisk(GOOD, np.array([True, False, False]), fn, linear)
    for dtype in ("int8", "float32"):
        assert gf.EmpiricalRisk(GOOD, np.array([1, -1, 1], dtype), fn, linear).y.dtype == dtype
    # Traced targets cannot be looked at, a loss of the user's own is left alone, and so are probabilities.
    risk = jax.vmap(lambda y: gf.EmpiricalRisk(GOOD, y, fn, linear)(jnp.zeros(3)))(jnp.array([[1.0, 0, 0], [1, -1, 1]]))
    assert risk[0] == risk[1]
    gf.EmpiricalRisk(GOOD, [1.0, 0.5, 0.0], lambda p, y: fn(p, 2 * y - 1), linear)
    gf.EmpiricalRisk(GOOD, np.full((3, 2), 0.5), gf.losses.cross_entropy)


def test_lists_and_integers_become_arrays():
    problem = gf.EmpiricalRisk([[1, 2], [3, 4]], [1, 0], gf.losses.square, lambda w, x: x @ w)
    assert float(problem(jnp.ones(2))) == 0.25 * (2**2 + 7**2)


@pytest.mark.parametrize(
    ("loss", "predict", "message"),
    [
        (lambda p, y: p - y, lambda w, x: x @ w[:, None], "`loss` must return a scalar per sample, but is of shape"),
        (
            gf.losses.square,
            lambda w, x: (x @ w)[:2],
            r"`predict` must return 3 predictions, but is returning shape \(2",
        ),
        (gf.losses.square, lambda w, x: w, r"returning shape \(5,\). `predict` takes the whole batch, not one sample"),
    ],
)
def test_bad_models_and_losses(loss, predict, message):
    problem = gf.EmpiricalRisk(jnp.ones((3, 5)), jnp.ones((3,)), loss, predict)
    if "scalar" in message:
        problem = gf.EmpiricalRisk(jnp.ones((3, 5)), jnp.ones((3, 1)), loss, predict)
    with pytest.raises(ValueError, match=message):
        problem(jnp.ones(5))
    with pytest.raises(ValueError, match=message):
        gf.solve(gf.GradientFlow(problem), jnp.ones(5), [1.0])


def test_params_that_cannot_be_called():
    problem = gf.EmpiricalRisk(GOOD, np.ones(3), gf.losses.square)
    with pytest.raises(
        ValueError, match=r"`params` must be callable when predict=None, but is of type dict\. Pass predict"
    ):
        problem({"w": jnp.ones(3)})


@pytest.mark.slow
def test_messages_without_the_shape_checker():
    script = """
import jax, numpy as np, gradflow as gf
import jax.numpy as jnp
scalar, vector = jnp.ones(()), jnp.ones(3)
linear = lambda w, x: x @ w
eye = np.eye(3)
shape = "Argument `y` must have the shape of the predictions, per sample, but is "
cases = [(lambda name=name: getattr(gf.losses, name)(vector, scalar), shape + "() against predictions of shape (3,).")
         for name in ("square", "logistic", "exponential", "hinge")]
cases += [
    (lambda: gf.EmpiricalRisk(eye, np.ones((3, 1)), gf.losses.square, linear)(vector), shape + "(1,) against"),
    (lambda: gf.losses.cross_entropy(vector, jnp.ones(2)), shape + "(2,) against predictions of shape (3,)"),
    (lambda: gf.losses.cross_entropy(scalar, 0), "Argument `predict` must give one score per class, but is"),
    (lambda: gf.losses.cross_entropy(jnp.ones((2, 2)), 0), "a prediction of shape (2, 2). Build the model"),
    (lambda: gf.EmpiricalRisk(eye, np.ones(3), "square"), "`loss` must be callable as loss(prediction, target)"),
    (lambda: gf.EmpiricalRisk(eye, np.ones(3), gf.losses.square, 3), "`predict` must be callable as predict(params"),
    (lambda: gf.EmpiricalRisk(eye, np.ones(3), gf.losses.square, None, "max"),
     "Argument `reduction` must be one of 'mean', 'sum', but is 'max'."),
    (lambda: gf.EmpiricalRisk(eye, np.ones(3), gf.losses.square, lambda w, x: w[0])(vector),
     "Argument `predict` must return 3 predictions, but is returning shape ()."),
]
for build, message in cases:
    try:
        build()
    except ValueError as error:
        assert message in str(error), (message, str(error))
    else:
        raise AssertionError(message)
# Plain Python numbers and integer targets are fine where nothing is checked.
assert float(gf.losses.square(3.0, 1)) == 2.0
assert float(gf.losses.cross_entropy(jnp.zeros(2), 1)) == float(jnp.log(2.0))
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done", done.stderr


def test_a_model_of_other_inputs_than_the_data_is_refused():
    problem = gf.EmpiricalRisk(np.ones((5, 3)), np.ones(5), gf.losses.square)
    model = gf.models.TwoLayer(4, 8, key=jax.random.key(0))
    message = r"Argument `params` must give predictions at inputs of shape \(3,\)"
    with pytest.raises(ValueError, match=message):
        gf.solve(gf.GradientFlow(problem), model, [1.0])
    with pytest.raises(ValueError, match=message):
        gf.iterate(gf.GradientDescent(problem, 0.1), model, 3)
