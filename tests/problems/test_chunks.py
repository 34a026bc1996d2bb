"""Predictions in chunks: the same numbers, from memory that does not grow with the number of samples."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import gradflow as gf
from gradflow.problems import _chunks

N = 23
X = np.random.default_rng(0).normal(size=(N, 3))
Y = np.sin(X[:, 0])
SIZES = [1, 5, 11, 22, 23]


def network(activation=jnp.tanh, dtype=float):
    return gf.models.TwoLayer(3, 6, activation=activation, key=jax.random.key(0), dtype=dtype)


def gradient_and_product(problem, model):
    trainable, frozen = eqx.partition(model, eqx.is_inexact_array)
    gradient = jax.grad(lambda p: problem(eqx.combine(p, frozen)))
    return jax.tree_util.tree_leaves(jax.jvp(gradient, (trainable,), (trainable,)))


@pytest.mark.parametrize("size", SIZES)
def test_loss_gradient_and_hessian_product_are_those_of_all_samples_at_once(size):
    whole = gf.EmpiricalRisk(X, Y, gf.losses.square)
    parts = gf.EmpiricalRisk(X, Y, gf.losses.square, chunk_size=size)
    model = network()
    np.testing.assert_allclose(parts.predictions(model), whole.predictions(model), rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(parts.per_sample(model), whole.per_sample(model), rtol=1e-13, atol=1e-15)
    for ours, theirs in zip(gradient_and_product(parts, model), gradient_and_product(whole, model), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def leaves(model):
    return jax.tree_util.tree_leaves(eqx.filter(model, eqx.is_array))


def end(model, chunk_size, **options):
    problem = gf.EmpiricalRisk(X, Y, gf.losses.square, chunk_size=chunk_size)
    observe = {"loss": problem, "sharpness": gf.observables.Sharpness(problem), "kernel": gf.observables.NTK(problem)}
    return gf.solve(gf.GradientFlow(problem), model, [0.0, 30.0], observe=observe, **options)


@pytest.mark.slow
def test_a_trajectory_is_that_of_all_samples_at_once():
    """The field differs by its rounding, of 1e-16, which the flow of a network may amplify."""
    whole, parts = (end(network(), size, rtol=1e-6) for size in (None, 5))
    for ours, theirs in zip(
        jax.tree_util.tree_leaves(parts.final), jax.tree_util.tree_leaves(whole.final), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)
    for name in whole.observed:
        np.testing.assert_allclose(parts.observed[name], whole.observed[name], rtol=1e-9, atol=1e-12)
    assert int(parts.stats["gradient_evaluations"]) == int(whole.stats["gradient_evaluations"])


@pytest.mark.slow
def test_a_trajectory_in_single_precision_is_within_the_tolerance():
    whole, parts = (end(network(dtype=jnp.float32), size, rtol=1e-4) for size in (None, 5))
    for ours, theirs in zip(
        jax.tree_util.tree_leaves(parts.final), jax.tree_util.tree_leaves(whole.final), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_kinks_are_seen_and_members_of_a_batch_are_single_runs():
    problem = gf.EmpiricalRisk(X, Y, gf.losses.square, chunk_size=5)
    sol = gf.solve(gf.GradientFlow(problem), network(jax.nn.relu), [1.0])
    assert "kinks: max" in repr(sol)

    def loss(scale):
        model = jax.tree_util.tree_map(lambda leaf: scale * leaf if eqx.is_inexact_array(leaf) else leaf, network())
        return problem(model)

    scales = jnp.array([0.5, 1.0])
    np.testing.assert_allclose(jax.vmap(loss)(scales), [loss(scale) for scale in scales], rtol=1e-13)


def memory(samples, chunk_size):
    """Bytes that a gradient, and a product with the Hessian, take beside their arguments and results."""
    x, y = jax.ShapeDtypeStruct((samples, 3), float), jax.ShapeDtypeStruct((samples,), float)
    model = gf.models.TwoLayer(3, 400, activation=jnp.tanh, key=jax.random.key(0))
    trainable, frozen = eqx.partition(model, eqx.is_inexact_array)

    def gradient(p, x, y):
        problem = gf.EmpiricalRisk(x, y, gf.losses.square, chunk_size=chunk_size)
        return jax.grad(lambda q: problem(eqx.combine(q, frozen)))(p)

    def product(p, x, y):
        return jax.jvp(lambda q: gradient(q, x, y), (p,), (p,))[1]

    compiled = [jax.jit(fn).lower(trainable, x, y).compile() for fn in (gradient, product)]
    return np.array([program.memory_analysis().temp_size_in_bytes for program in compiled])


def test_memory_does_not_grow_with_the_number_of_samples():
    few, many = memory(2_000, 500), memory(50_000, 500)
    # The predictions and losses of all samples, a number each, are arrays of their own.
    assert np.all(many - few <= 0.1 * few + 4 * 8 * 48_000)
    assert np.all(memory(50_000, None) > 15 * many)


def test_chunks_are_chosen_where_all_samples_would_not_fit(monkeypatch):
    monkeypatch.setattr(_chunks, "SMALLEST", 1_000)
    whole = memory(2_000, None)
    hidden = 2_000 * 400 * 8
    monkeypatch.setattr(_chunks, "available_memory", lambda: hidden)
    assert np.all(memory(2_000, None) < 0.5 * whole)
    problem = gf.EmpiricalRisk(np.zeros((2_000, 3)), np.zeros(2_000), gf.losses.square)
    model = gf.models.TwoLayer(3, 400, activation=jnp.tanh, key=jax.random.key(0))
    assert 200 <= _chunks.size_that_fits(problem._call, model, problem.x) <= 500
    monkeypatch.setattr(_chunks, "available_memory", lambda: 100 * hidden)
    assert _chunks.size_that_fits(problem._call, model, problem.x) == 2_000


class Pair(NamedTuple):
    left: Array
    right: Array


@pytest.mark.parametrize("inputs", [{"left": X[:, :1], "right": X[:, 1:]}, Pair(X[:, :1], X[:, 1:])])
def test_inputs_may_be_several_arrays(inputs):
    def predict(w, x):
        left, right = (x["left"], x["right"]) if isinstance(x, dict) else x
        return left @ w[:1] + right @ w[1:]

    start = jnp.zeros(3)
    one = gf.EmpiricalRisk(X, Y, gf.losses.square, lambda w, x: x @ w, chunk_size=5)
    several = gf.EmpiricalRisk(inputs, Y, gf.losses.square, predict, chunk_size=5)
    ours, theirs = (gf.solve(gf.GradientFlow(problem), start, [5.0]) for problem in (several, one))
    np.testing.assert_allclose(ours.final, theirs.final, rtol=1e-10)
    rules = [gf.SGD(problem, 0.1, batch_size=4, key=jax.random.key(1)) for problem in (several, one)]
    ours, theirs = (gf.iterate(rule, start, 20) for rule in rules)
    np.testing.assert_allclose(ours.final, theirs.final, rtol=1e-12)


def test_bytes_stay_bytes():
    images = np.random.default_rng(1).integers(0, 256, (N, 3), dtype=np.uint8)
    problem = gf.EmpiricalRisk(images, Y, gf.losses.square, lambda w, x: (x / 255.0) @ w, chunk_size=5)
    assert problem.x.dtype == jnp.uint8
    exact = np.linalg.lstsq(images / 255.0, Y)[0]
    sol = gf.solve(gf.GradientFlow(problem), jnp.zeros(3), [2e3])
    np.testing.assert_allclose(sol.final, exact, rtol=1e-3)


def test_bad_input():
    for size, message in ((0, "chunk_size"), (24, "at most 23")):
        with pytest.raises(ValueError, match=message):
            gf.EmpiricalRisk(X, Y, gf.losses.square, chunk_size=size)
    with pytest.raises(ValueError, match="as many entries"):
        gf.EmpiricalRisk({"a": X, "b": X[:5]}, Y, gf.losses.square, lambda w, x: x["a"] @ w)
    with pytest.raises(ValueError, match="at least one sample"):
        gf.EmpiricalRisk({}, Y, gf.losses.square, lambda w, x: w)

    for predict in (lambda w, x: jnp.sum(w), lambda w, x: w):
        problem = gf.EmpiricalRisk(X, Y, gf.losses.square, predict, chunk_size=6)
        with pytest.raises(ValueError, match="return 6 predictions"):
            problem(jnp.ones(3))

    def in_training_mode(w, x):
        return (x - jnp.mean(x, axis=0, keepdims=True)) / jnp.std(x, axis=0, keepdims=True) @ w

    problem = gf.EmpiricalRisk(X, Y, gf.losses.square, in_training_mode, chunk_size=6)
    with pytest.raises(ValueError, match="batch norm into inference mode"):
        gf.solve(gf.GradientFlow(problem), jnp.ones(3), [1.0])
