"""Observables against NumPy on dense matrices, and what they promise about memory, precision, solve and vmap."""

import subprocess
import sys

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.observables import (
    NTK,
    Accuracy,
    ActivationPattern,
    Balancedness,
    GradientNorm,
    HessianEigenvalues,
    Loss,
    LossRate,
    NeuronAngles,
    NeuronNorms,
    NTKEigenvalues,
    ParameterNorm,
    Sharpness,
)


def linear(w, x):
    return x @ w


def net(seed=0, loss=gf.losses.square, outputs=2, **kwargs):
    """A small tanh network on random data."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(6, 3))
    y = rng.integers(0, outputs, size=6) if loss is gf.losses.cross_entropy else rng.normal(size=(6, outputs))
    return gf.EmpiricalRisk(x, y, loss), gf.models.MLP(3, 4, outputs, key=jax.random.key(seed), **kwargs)


def dense_hessian(problem, params):
    flat, back = jax.flatten_util.ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda v: problem(back(v))))(flat))


class Quadratic(eqx.Module):
    """`w^T H w / 2`."""

    hessian: jax.Array

    def __call__(self, w):
        return 0.5 * w @ (self.hessian @ w)


def with_bounds(matrix, k, dtype=jnp.float64, **kwargs):
    observable = HessianEigenvalues(Quadratic(jnp.asarray(matrix, dtype)), k, **kwargs)
    return [np.asarray(part) for part in eqx.filter_jit(observable.with_bounds)(jnp.ones(len(matrix), dtype))]


def symmetric(eigenvalues, seed=0):
    """A dense matrix of these eigenvalues in random directions."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))[0]
    return (q * np.asarray(eigenvalues, float)) @ q.T


# Loss and accuracy


def test_loss_is_the_problem():
    problem, model = net()
    outputs = np.array([np.asarray(model(x)) for x in problem.x])
    targets = np.asarray(problem.y)
    assert float(Loss(problem)(model)) == pytest.approx(0.5 * np.mean(np.sum((outputs - targets) ** 2, 1)), rel=1e-14)
    assert float(Loss(lambda w: w**2)(jnp.array(3.0))) == 9.0


SCORES = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 5.0], [0.0, -1.0, -2.0], [0.0, 3.0, 1.0]])


@pytest.mark.parametrize(
    ("predictions", "targets", "expected"),
    [
        ([2.0, -1e-300, 0.5, -4.0], [1.0, -1.0, -1.0, -1.0], 0.75),
        ([2.0, 0.0, 0.0, -4.0], [1, 1, -1, -1], 0.5),  # a prediction of zero is wrong for either label
        ([[2.0], [-1.0], [0.5], [-4.0]], [[1.0], [-1.0], [-1.0], [-1.0]], 0.75),
        (SCORES, [0, 2, 1, 1], 0.75),
        (SCORES, [1, 1, 1, 0], 0.0),
        (SCORES, np.eye(3)[[0, 2, 1, 1]], 0.75),
        (SCORES, 2 * np.eye(3)[[0, 2, 0, 1]] - 1, 1.0),
    ],
)
def test_accuracy(predictions, targets, expected):
    problem = gf.EmpiricalRisk(np.zeros((4, 1)), targets, gf.losses.square, lambda w, x: w)
    assert float(Accuracy(problem)(jnp.asarray(predictions))) == expected


# Norms


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, float), (1e-200, float), (1e200, float), (1e-30, np.float32)])
def test_norms_neither_underflow_nor_overflow(scale, dtype):
    eps = float(np.finfo(dtype).eps)
    params = {
        "a": jnp.asarray(np.array([3.0]) * scale, dtype),
        "b": jnp.asarray(np.array([[4.0], [12.0]]) * scale, dtype),
    }
    norm = ParameterNorm()(params)
    assert norm.dtype == dtype
    assert float(norm) == pytest.approx(13 * scale, rel=4 * eps)
    gradient = GradientNorm(lambda p: 2 * p["a"].sum() * jnp.asarray(scale, dtype) + 0 * p["b"].sum())(params)
    assert float(gradient) == pytest.approx(2 * scale, rel=4 * eps)
    rows = jnp.asarray(np.array([[3.0, 4.0], [0.0, 0.0], [-5.0, 12.0]]) * scale, dtype)
    np.testing.assert_allclose(NeuronNorms(lambda w: w)(rows), np.array([5.0, 0.0, 13.0]) * scale, rtol=4 * eps)


def test_norms_of_zero_nan_and_infinite_parameters():
    norm = ParameterNorm()
    assert float(norm(jnp.zeros(3))) == 0.0
    assert np.isnan(norm(jnp.array([1.0, np.nan])))
    assert float(norm(jnp.array([1.0, -np.inf]))) == np.inf
    np.testing.assert_array_equal(NeuronNorms(lambda w: w)(jnp.array([[np.nan, 1], [np.inf, 1]])), [np.nan, np.inf])
    # Leaves that do not flow have no say.
    assert float(norm({"w": jnp.array([3.0, 4.0]), "n": jnp.array([100]), "name": "net", "f": jnp.tanh})) == 5.0


def test_gradient_norm_against_numpy():
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(8, 3)), rng.normal(size=8), rng.normal(size=3)
    expected = np.linalg.norm(x.T @ (x @ w - y) / 8)
    computed = GradientNorm(gf.EmpiricalRisk(x, y, gf.losses.square, linear))(jnp.asarray(w))
    assert float(computed) == pytest.approx(expected, rel=1e-13)
    assert float(GradientNorm(lambda w: jnp.sum(w**3))(jnp.zeros(2))) == 0.0


# Neurons


def test_neuron_norms_of_a_model(key):
    model = gf.models.TwoLayer(3, 5, 2, key=key)
    w, a = np.asarray(model.weight), np.asarray(model.output)
    np.testing.assert_allclose(NeuronNorms()(model), np.sqrt((w**2).sum(1) + (a**2).sum(0)), rtol=1e-14)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-8, 1e-3, 1.0, np.pi / 2, 3.0, np.pi - 1e-8, np.pi])
@pytest.mark.parametrize("size", [1e-200, 1.0, 1e150])
def test_angles_to_a_direction(angle, size):
    """Absolute error of a few units of rounding, where the arccosine of 1 - 1e-16 is already 1e-8 off."""
    w = size * np.array([[np.cos(angle), np.sin(angle), 0.0]])
    computed = NeuronAngles([2.0, 0.0, 0.0], lambda w: w)(jnp.asarray(w))
    assert computed.shape == (1,)
    assert abs(float(computed[0]) - angle) <= 1e-15
    several = NeuronAngles([[2.0, 0.0, 0.0], [-1e-3, 0.0, 0.0], [0.0, 0.0, 7.0]], lambda w: w)(jnp.asarray(w))
    np.testing.assert_allclose(several, [[angle, np.pi - angle, np.pi / 2]], atol=1e-15)


def test_angles_in_the_plane_and_of_zero_neurons():
    degrees = np.array([0.0, 45.0, 90.0, 180.0, -135.0, -1e-7])
    radians = np.deg2rad(degrees)
    w = 1e-30 * np.stack([np.cos(radians), np.sin(radians)], axis=1)
    w[3] = [-1.0, 0.0]
    rows = jnp.asarray(np.concatenate([w, np.zeros((1, 2))]))
    computed = np.asarray(NeuronAngles(neurons=lambda w: w)(rows))
    np.testing.assert_allclose(computed[:-1], radians, rtol=1e-14, atol=1e-16)
    assert np.isnan(computed[-1])
    towards = np.asarray(NeuronAngles([0.0, 1.0], lambda w: w)(rows))
    np.testing.assert_allclose(towards[:4], np.deg2rad([90.0, 45.0, 0.0, 90.0]), atol=1e-15)
    assert np.isnan(towards[-1])


def test_angles_of_a_model_against_the_arccosine(key):
    model = gf.models.TwoLayer(4, 6, key=key, dtype=jnp.float32)
    reference = np.random.default_rng(0).normal(size=(3, 4))
    w = np.asarray(model.weight, float)
    cosines = (w / np.linalg.norm(w, axis=1, keepdims=True)) @ (
        reference / np.linalg.norm(reference, axis=1)[:, None]
    ).T
    computed = NeuronAngles(1e-60 * reference)(model)
    assert computed.dtype == jnp.float32
    np.testing.assert_allclose(computed, np.arccos(cosines), atol=1e-6)


# Hessian


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "k"), [("square", 4), ("cross_entropy", 2)])
def test_eigenvalues_of_a_network_against_the_dense_hessian(loss, k):
    for seed in range(2):
        problem, model = net(seed, getattr(gf.losses, loss))
        exact = np.linalg.eigvalsh(dense_hessian(problem, model))[::-1]
        values, bounds, products = (np.asarray(p) for p in HessianEigenvalues(problem, k, rtol=1e-6).with_bounds(model))
        assert np.all(bounds <= 1e-6 * np.max(np.abs(exact)))
        assert np.all(np.abs(values - exact[:k]) <= bounds + 1e-13 * exact[0])
        assert k <= products <= exact.size
    sharpness = Sharpness(problem, rtol=1e-6)(model)
    assert sharpness.shape == ()
    assert float(sharpness) == pytest.approx(exact[0], rel=1e-6)


@pytest.mark.parametrize(
    "case",
    {
        "few distinct ones": [5, 5, 4, 3, *[1] * 20],
        "the identity": [3] * 24,
        "a triple one": [7, 7, 7, *np.linspace(-2, 2, 21)],
        "zero": [0] * 24,
        "rank one": [2, *[0] * 23],
        "negative": -np.arange(1.0, 25.0),
        "a triple negative one": [-1, -1, -1, *np.linspace(-90, -2, 21)],
        "a large negative one": [1, 0.5, *np.linspace(0.1, 0.3, 21), -100],
        "a close pair": [1, 1 - 1e-7, *np.linspace(-1, 0.1, 22)],
        "many sizes": np.geomspace(1, 1e-12, 24),
    }.items(),
    ids=lambda case: case[0],
)
@pytest.mark.parametrize("k", [1, 3])
def test_multiple_zero_and_negative_eigenvalues(case, k):
    """Every eigenvalue as often as it occurs, of either sign, within the bound and the rounding of the products."""
    exact = np.sort(np.asarray(case[1], float))[::-1]
    largest = np.max(np.abs(exact))
    values, bounds, products = with_bounds(symmetric(exact), k, rtol=1e-9, iterations=50)
    assert values.shape == bounds.shape == (k,)
    assert np.all(np.abs(values - exact[:k]) <= bounds + 1e-13 * largest)
    assert np.all(bounds <= 1e-9 * largest + 1e-300)
    assert products <= len(exact)


def test_outputs_of_a_linear_model_repeat_every_eigenvalue():
    """The Hessian is `I_5 (x) X^T X / n`: each eigenvalue comes five times, and none is passed over."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(50, 5))
    problem = gf.EmpiricalRisk(x, y, gf.losses.square, linear)
    exact = np.repeat(np.linalg.eigvalsh(x.T @ x / 50)[::-1], 5)
    computed = HessianEigenvalues(problem, 7, rtol=1e-8)(jnp.zeros((6, 5)))
    # The bounds are relative to the largest one.
    np.testing.assert_allclose(computed, exact[:7], atol=1e-8 * exact[0], rtol=0)


@pytest.mark.parametrize(("iterations", "k"), [(1, 1), (8, 3), (15, 2)])
def test_bounds_hold_when_the_iterations_run_out(iterations, k):
    """Every value has an eigenvalue within its bound, and none exceeds the eigenvalue of its rank."""
    exact = np.linspace(-3, 5, 60)
    for seed in range(5):
        values, bounds, products = with_bounds(symmetric(exact, seed), k, rtol=1e-12, iterations=iterations)
        assert products == iterations
        assert np.all(np.min(np.abs(values[:, None] - exact), axis=1) <= bounds + 1e-13)
        assert np.all(values <= exact[::-1][:k] + 1e-13)
        assert np.all(np.diff(values) <= 0)
        assert np.all(bounds > 1e-12 * 5)


@pytest.mark.parametrize("k", [1, 3])
def test_bounds_are_residuals(k):
    """For `H^2 = I` each `H q` has length one; squared Ritz values and residuals of `k` products add up to `k`."""
    values, bounds, _ = with_bounds(symmetric([1] * 12 + [-1] * 12), k, rtol=1e-9, iterations=k)
    assert np.sum(values**2) + np.sum(bounds**2) == pytest.approx(k, rel=1e-13)


def test_loose_tolerances_spend_fewer_products():
    matrix = symmetric(np.linspace(0, 1, 60))
    evaluations = [int(with_bounds(matrix, 1, rtol=rtol, iterations=60)[2]) for rtol in (1e-1, 1e-6)]
    assert evaluations[0] < evaluations[1] < 60


def test_one_parameter():
    values, bounds, products = with_bounds([[3.0]], 1)
    np.testing.assert_allclose(values, [3.0], rtol=1e-15)
    assert bounds[0] <= 1e-15
    assert products == 1
    assert float(Sharpness(lambda w: -2 * w**2)(jnp.array(1.0))) == pytest.approx(-4.0, rel=1e-15)


@pytest.mark.parametrize(
    ("size", "dtype"), [(1.0, np.float32), (1e-30, np.float32), (1e25, np.float32), (1e-200, float)]
)
def test_precision_and_size_of_the_hessian(size, dtype):
    """Relative accuracy in float32, and for Hessians whose squares under- or overflow."""
    exact = np.array([3.0, 3.0, 1.5, *np.linspace(-1, 1, 30)])
    values, bounds, _ = with_bounds(symmetric(exact) * size, 3, dtype, rtol=1e-5)
    assert values.dtype == dtype
    error = np.abs(values.astype(float) / size - exact[:3])
    assert np.all(error <= bounds.astype(float) / size + 3 * 10 * np.finfo(dtype).eps)
    assert np.all(bounds.astype(float) / size <= 3.1 * 1e-5)


def test_a_hessian_that_is_not_finite_is_nan():
    values, bounds, products = with_bounds(np.full((4, 4), np.nan), 2)
    assert np.all(np.isnan(values))
    assert np.all(np.isnan(bounds))
    assert products == 1


def test_seeds_change_the_start_but_not_the_result():
    matrix = symmetric(np.linspace(-3, 5, 60))
    one, two = (with_bounds(matrix, 2, seed=seed, rtol=1e-3) for seed in (0, 1))
    assert np.all(one[0] != two[0])
    assert np.all(np.abs(one[0] - two[0]) <= one[1] + two[1])


# Tangent kernel


def jacobian(problem, params, x):
    flat, back = jax.flatten_util.ravel_pytree(params)
    return np.asarray(jax.jit(jax.jacrev(lambda v: jnp.ravel(problem.predictions(back(v), x))))(flat))


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_kernel_is_the_product_of_jacobians(outputs, chunk):
    problem, model = net(outputs=outputs)
    j = jacobian(problem, model, problem.x)
    computed = np.asarray(NTK(problem, chunk=chunk)(model))
    assert computed.shape == (6 * outputs, 6 * outputs)
    np.testing.assert_allclose(computed, j @ j.T, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(computed, computed.T)
    spectrum = np.asarray(NTKEigenvalues(problem, chunk=chunk)(model))
    np.testing.assert_allclose(spectrum, np.linalg.svd(j, compute_uv=False) ** 2, rtol=1e-10, atol=1e-12)


def test_kernel_at_other_inputs_and_its_order_of_outputs():
    problem, model = net(outputs=2)
    other = np.random.default_rng(5).normal(size=(4, 3))
    j = jacobian(problem, model, jnp.asarray(other))
    np.testing.assert_allclose(NTK(problem, other)(model), j @ j.T, rtol=1e-12, atol=1e-13)
    # Samples outermost: row 2 * i + c belongs to output c at sample i; of its gradient the bias of c has the entry one.
    last = jax.grad(lambda m: m(jnp.asarray(other[1]))[1])(model).biases[1]
    np.testing.assert_array_equal(last, [0.0, 1.0])
    gradients = [jax.grad(lambda m, i=i, c=c: m(jnp.asarray(other[i]))[c])(model) for i, c in ((1, 0), (3, 1))]
    one, two = (jax.flatten_util.ravel_pytree(g)[0] for g in gradients)
    assert float(NTK(problem, other)(model)[2 * 1 + 0, 2 * 3 + 1]) == pytest.approx(float(one @ two), rel=1e-12)


@pytest.mark.slow
def test_kernel_drives_the_predictions():
    """`f' = -K grad_f L` along gradient flow, against a difference quotient of the flow."""
    problem, model = net()
    h = 1e-4
    later = gf.solve(gf.GradientFlow(problem), model, [h], rtol=1e-10).final
    before, after = (np.asarray(problem.predictions(m)).ravel() for m in (model, later))
    residual = (before - np.asarray(problem.y).ravel()) / 6
    expected = -np.asarray(NTK(problem)(model)) @ residual
    # The quotient is off by h f'' / 2; f'' is of the size of K^2 times the residual.
    largest = np.linalg.norm(np.asarray(NTK(problem)(model)), 2) / 6
    assert np.max(np.abs((after - before) / h - expected)) <= h * largest**2 * np.linalg.norm(6 * residual)


def test_kernel_of_frozen_leaves(key):
    """Only the leaves that flow count: an integer leaf has no derivative."""
    problem = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), gf.losses.square, lambda p, x: p["k"] * (x @ p["w"]))
    np.testing.assert_allclose(NTK(problem)({"w": jnp.ones(2), "k": jnp.array(3)}), 9 * np.eye(2), rtol=1e-15)
    assert float(Sharpness(problem)({"w": jnp.ones(2), "k": jnp.array(3)})) == pytest.approx(4.5, rel=1e-12)


# Balancedness and activation patterns


def homogeneous(name):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=8)
    key = jax.random.key(2)
    if name == "TwoLayer":
        model = gf.models.TwoLayer(3, 4, parametrisation="ntk", activation=lambda z: z, init_scale=0.5, key=key)
    elif name == "DeepLinear":
        model = gf.models.DeepLinear(3, 4, depth=3, parametrisation="ntk", init_scale=0.7, key=key)
    else:
        model = gf.models.DiagonalLinear(3, init_scale=0.7)
    return gf.EmpiricalRisk(x, y, gf.losses.square), model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TwoLayer", "DeepLinear", "DiagonalLinear"])
def test_balancedness_stays_along_the_flow_and_drifts_with_the_learning_rate(name):
    problem, model = homogeneous(name)
    observe = {"b": Balancedness()}
    start = np.asarray(Balancedness()(model))
    sol = gf.solve(gf.GradientFlow(problem), model, [0.5, 2.0], rtol=1e-9, observe=observe)
    assert np.max(np.abs(np.asarray(sol.observed["b"]) - start)) <= 100 * 1e-9 * np.max(np.abs(start))
    drift = []
    for learning_rate in (0.02, 0.01, 0.005, 0.0025):
        rule = gf.GradientDescent(problem, learning_rate=learning_rate)
        run = gf.iterate(rule, model, round(2 / learning_rate), observe=observe)
        drift.append(np.linalg.norm(np.asarray(run.observed["b"][-1]) - start))
    slopes = np.log2(np.array(drift[:-1]) / np.array(drift[1:]))
    assert np.all(np.abs(slopes[-2:] - 1) <= 0.15), slopes


def test_activation_pattern_against_signs(key):
    x = np.random.default_rng(0).normal(size=(7, 3))
    two = gf.models.TwoLayer(3, 5, key=key)
    pattern = np.asarray(ActivationPattern(x)(two))
    assert pattern.dtype == bool
    np.testing.assert_array_equal(pattern, x @ np.asarray(two.weight).T > 0)
    deep = gf.models.MLP(3, 4, depth=2, key=key)
    first = x @ np.asarray(deep.weights[0]).T
    second = np.tanh(first) @ np.asarray(deep.weights[1]).T
    np.testing.assert_array_equal(ActivationPattern(x)(deep), np.concatenate([first, second], axis=1) > 0)
    custom = ActivationPattern(x, lambda w, x_i: x_i - w)
    np.testing.assert_array_equal(custom(jnp.array([0.0, 1.0, -1.0])), x > np.array([0.0, 1.0, -1.0]))
    # A preactivation of exactly zero is not active.
    assert not np.any(ActivationPattern(np.zeros((2, 3)))(two))


# What holds for all of them


def shapes_in(jaxpr):
    """Shapes of all values of a program, those of loops and calls inside it included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield tuple(getattr(variable.aval, "shape", ()))
        for parameter in equation.params.values():
            for inner in jax.tree_util.tree_leaves(parameter, is_leaf=lambda v: hasattr(v, "eqns")):
                program = getattr(inner, "jaxpr", inner)
                if hasattr(program, "eqns"):
                    yield from shapes_in(program)


def case(dtype=float):
    """A model whose number of parameters, 7 * 13 + 7 = 98, shares no factor with another size, and a risk."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 13)), np.sign(rng.normal(size=5))
    model = gf.models.TwoLayer(13, 7, activation=jax.nn.tanh, key=jax.random.key(0), dtype=dtype)
    return gf.EmpiricalRisk(jnp.asarray(x, dtype), jnp.asarray(y, dtype), gf.losses.logistic), model


def every(problem):
    return {
        "loss": Loss(problem),
        "loss_rate": LossRate(problem),
        "accuracy": Accuracy(problem),
        "parameter_norm": ParameterNorm(),
        "gradient_norm": GradientNorm(problem),
        "neuron_norms": NeuronNorms(),
        "neuron_angles": NeuronAngles(jnp.ones((2, 13))),
        "eigenvalues": HessianEigenvalues(problem, 3, iterations=20),
        "sharpness": Sharpness(problem, iterations=20),
        "ntk": NTK(problem, chunk=2),
        "ntk_eigenvalues": NTKEigenvalues(problem, chunk=2),
        "balancedness": Balancedness(),
        "activation_pattern": ActivationPattern(problem.x),
    }


SHAPES = {
    "neuron_norms": (7,),
    "neuron_angles": (7, 2),
    "eigenvalues": (3,),
    "ntk": (5, 5),
    "ntk_eigenvalues": (5,),
    "balancedness": (7,),
    "activation_pattern": (5, 7),
}


def test_the_cases_are_all_observables():
    # ReLU, whose runs differ from batch to batch, coordinates of small starts, states with a momentum, classes, and
    # particles: see the tests of these.
    elsewhere = {"SlidingNeurons", "Aligned", "Correlation", "KKTResidual", "LogNorm", "Lyapunov", "NeuronMovement"}
    # What flows at the edge of stability predict, and a record of arrays.
    elsewhere |= {"Amplitude", "HessianEigenpairs", "IterateMean", "MeanLoss", "Variance"}
    elsewhere |= {"GradientBound", "NeuronPartition", "PartitionCounts", "Switches"}
    elsewhere |= {"State", "Time", "Velocity", "Margins", "MaxMarginResidual", "NormalisedMargin", "ParticleHistogram"}
    assert {type(fn).__name__ for fn in every(case()[0]).values()} == {
        name for name in vars(gf.observables) if name[0].isupper() and name not in elsewhere
    }


def test_the_walk_finds_a_dense_hessian():
    problem, model = case()
    program = jax.make_jaxpr(lambda m: jax.lax.map(lambda _: dense(problem, m), jnp.arange(2)))(model)
    assert any(shape.count(98) == 2 for shape in shapes_in(program.jaxpr))


def dense(problem, model):
    flat, back = jax.flatten_util.ravel_pytree(model)
    return jax.hessian(lambda v: problem(back(v)))(flat)


@pytest.mark.parametrize("name", ["sharpness", "eigenvalues", "ntk", "ntk_eigenvalues", "gradient_norm", "loss"])
def test_memory(name):
    """No value as large as the parameters squared; for the kernel, none as large as its rows times the parameters."""
    problem, model = case()
    program = jax.make_jaxpr(every(problem)[name])(model)
    shapes = list(shapes_in(program.jaxpr))
    assert len(shapes) > 1
    assert all(shape.count(98) < 2 for shape in shapes)
    max_rows = {"sharpness": (20 + 1) * 98, "eigenvalues": (20 + 3) * 98}.get(name, 4 * 98)
    assert max(int(np.prod(shape)) for shape in shapes) <= max_rows


@pytest.mark.slow
def test_all_work_in_solve_and_under_vmap():
    """The same values one by one, as a batch, during a run, and during a batch of runs."""
    problem, _ = case()
    observe = every(problem)

    def build(key):
        return gf.models.TwoLayer(13, 7, activation=jax.nn.tanh, key=key)

    evaluate = eqx.filter_jit(lambda fn, params: fn(params))
    evaluate_all = eqx.filter_jit(lambda fn, params: eqx.filter_vmap(fn)(params))
    models = jax.vmap(build)(jax.random.split(jax.random.key(1), 3))
    members = [jax.tree_util.tree_map(lambda leaf, i=i: leaf[i], models) for i in range(3)]
    for name, fn in observe.items():
        batch = evaluate_all(fn, models)
        assert batch.shape == (3, *SHAPES.get(name, ())), name
        for i, member in enumerate(members):
            np.testing.assert_allclose(batch[i], evaluate(fn, member), rtol=1e-10, atol=1e-12, err_msg=name)

    flow, ts = gf.GradientFlow(problem), [0.0, 0.5, 1.0]
    together = jax.jit(jax.vmap(lambda m: gf.solve(flow, m, ts, observe=observe).observed))(models)
    alone = gf.solve(flow, members[1], ts, observe=observe).observed
    ends = gf.solve(flow, members[1], ts).params
    for name, fn in observe.items():
        assert alone[name].shape == (3, *SHAPES.get(name, ())), name
        for row in range(3):
            expected = evaluate(fn, jax.tree_util.tree_map(lambda leaf, row=row: leaf[row], ends))
            np.testing.assert_allclose(alone[name][row], expected, rtol=1e-8, atol=1e-10, err_msg=name)
        np.testing.assert_allclose(together[name][1], alone[name], rtol=1e-6, atol=1e-8, err_msg=name)


def test_precision_follows_the_parameters():
    problem, model = case(np.float32)
    for name, fn in every(problem).items():
        expected = bool if name == "activation_pattern" else np.float32
        assert jax.eval_shape(fn, model).dtype == expected, name


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: HessianEigenvalues(p, 0), "`k` must be an integer of at least 1, but is 0"),
        (lambda p: HessianEigenvalues(p, 5, iterations=4), "`iterations` must be an integer of at least 5, but is 4"),
        (lambda p: HessianEigenvalues(p, 4)(jnp.ones(3)), "`k` must be at most the number of parameters, 3, but is 4"),
        (lambda p: Sharpness(p, rtol=0.0), "`rtol` must be positive, but is 0"),
        (lambda p: Sharpness(p)({"n": jnp.arange(3)}), "`params` must have at least one floating-point array leaf"),
        (lambda p: Sharpness(p)(jnp.ones(3) + 1j), "`params` must hold real numbers"),
        (lambda p: NTK(p, chunk=0), "`chunk` must be an integer of at least 1, but is 0"),
        (lambda p: NTK(p, [[np.nan, 1.0]]), "`x` must be finite"),
        (
            lambda p: NeuronNorms()({"w": jnp.ones((2, 2))}),
            "`weights` must be a function of the parameters, but is None for",
        ),
        (lambda p: NeuronAngles()({"w": 1}), "type dict, which have no method `neurons`"),
        (
            lambda p: NeuronAngles(np.ones((1, 1, 2))),
            r"must be one direction or a matrix of them, but is of shape \(1, 1, 2",
        ),
        (lambda p: NeuronAngles([np.nan, 1.0]), "`reference` must be finite"),
        (
            lambda p: NeuronAngles([[1.0, 0.0], [0.0, 0.0]]),
            "`reference` must not be a vector of zeros, but is one in 1 rows",
        ),
        (
            lambda p: NeuronAngles(neurons=lambda w: w)(jnp.ones((2, 3))),
            "must be a direction unless the inputs lie in the",
        ),
        (
            lambda p: NeuronAngles([1.0], lambda w: w)(jnp.ones((2, 3))),
            "must have as many entries as the neurons have inp",
        ),
        (lambda p: Balancedness()(jnp.ones(2)), "`params` must have a method `imbalance`, but is of type"),
        (lambda p: ActivationPattern(np.eye(2))({"w": 1}), "`preactivations` must be a function of parameters and one"),
        (lambda p: ActivationPattern([[np.inf]]), "`x` must be finite"),
    ],
)
def test_bad_input(call, message):
    problem = gf.EmpiricalRisk(np.eye(3), np.ones(3), gf.losses.square, linear)
    with pytest.raises(ValueError, match=message):
        call(problem)


def test_messages_without_the_shape_checker():
    script = """
import gradflow as gf
o = gf.observables
needs = "Argument `problem` must be a gradflow.EmpiricalRisk, which holds the data, but is of type function"
calls = "Argument `problem` must be callable as problem(params) -> scalar, but is of type int"
plain = lambda w: w
cases = [(lambda name=name: getattr(o, name)(plain), needs) for name in ("Accuracy", "NTK", "NTKEigenvalues")]
cases += [(lambda name=name: getattr(o, name)(3), calls) for name in ("Loss", "GradientNorm", "Sharpness")]
cases += [
    (lambda: o.HessianEigenvalues(plain, 2.0), "Argument `k` must be an integer of at least 1, but is the float 2.0."),
    (lambda: o.Sharpness(plain, iterations=0.5), "`iterations` must be an integer of at least 1, but is the float 0.5"),
]
for build, message in cases:
    try:
        build()
    except ValueError as error:
        assert message in str(error), (message, str(error))
    else:
        raise AssertionError(message)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done", done.stderr
