"""The neuron partition: codes by hand, sets that never lose a member, events, and the gradient bound."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow.observables import ActivationPattern, GradientBound, GradientNorm, NeuronPartition, PartitionCounts


def by_hand(model, x, toward):
    """The codes from NumPy; `toward (n, neurons)`: weight of each neuron towards the label of each sample."""
    living = np.asarray(x) @ np.asarray(model.weight).T > 0
    return 2 * (np.asarray(toward) > 0) + living


@pytest.mark.parametrize("kind", ["signs", "indices", pytest.param("onehot", marks=pytest.mark.slow)])
def test_codes_agree_with_numpy(kind, key):
    x = np.random.default_rng(0).normal(size=(5, 3))
    model = gf.models.TwoLayer(3, 7, None if kind == "signs" else 4, parametrisation="ntk", key=key)
    label = np.array([0, 3, 1, 1, 2])
    y = {"signs": np.array([1.0, -1, -1, 1, 1]), "indices": label, "onehot": np.eye(4)[label]}[kind]
    a = np.asarray(model.output)
    toward = y[:, None] * a[None] if kind == "signs" else a[label]
    codes = NeuronPartition(x, y)(model)
    np.testing.assert_array_equal(codes, by_hand(model, x, toward))
    np.testing.assert_array_equal(PartitionCounts(x, y)(model), np.bincount(np.ravel(codes), minlength=4))
    np.testing.assert_array_equal(np.asarray(codes) % 2 == 1, ActivationPattern(x)(model))


@pytest.mark.slow
def test_signed_networks_have_a_partition_too(key):
    model, x = gf.models.SignedTwoLayer(3, 6, key=key), np.eye(3)
    y = np.array([1.0, -1.0, 1.0])
    toward = y[:, None] * np.asarray(model.signs)[None]
    np.testing.assert_array_equal(NeuronPartition(x, y)(model), by_hand(model, x, toward))


@functools.cache
def run(data, method):
    """Descent, SGD or flow, from one start, on data that keep the condition, or on others that do not."""
    x, y = gf.data.correlated(20, 8, dtype="float64") if data == "kept" else random_data()
    start = gf.models.mildly_parametrised(8, 16, key=jax.random.key(1))
    problem = gf.EmpiricalRisk(x, y, gf.losses.exponential)
    see = {"codes": NeuronPartition(x, y), "bound": GradientBound(problem), "norm": GradientNorm(problem)}
    if method == "flow":
        flow, ts = gf.GradientFlow(problem), np.linspace(0, 20, 201)
        return gf.solve(flow, start, ts, rtol=1e-4, solver=gf.solvers.Bosh3(), observe=see, save_params=False)
    rule = gf.GradientDescent(problem, 0.05)
    if method == "sgd":
        rule = gf.SGD(problem, 0.05, batch_size=2, key=jax.random.key(2))
    return gf.iterate(rule, start, 400, save_every=1, observe=see, save_params=False)


METHODS = ["descent", "sgd", pytest.param("flow", marks=pytest.mark.slow)]


def random_data():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(20, 8))
    return x / np.linalg.norm(x, axis=1, keepdims=True), np.where(rng.random(20) < 0.5, -1.0, 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_monotone_sets_lose_no_member_where_the_condition_holds(method):
    assert gf.theory.partition_condition(*gf.data.correlated(20, 8)).holds
    sol = run("kept", method)
    events = gf.observables.switches(sol.ts, sol.observed["codes"])
    assert events.violations == events.flips == 0
    # Something happened: true-dead neurons came to life, or false-living ones died.
    assert len(events.time) > 20
    assert np.all(np.isin(events.before, [1, 2]))
    remaining = gf.observables.survivors(sol.observed["codes"])
    np.testing.assert_array_equal(remaining, np.asarray(sol.observed["codes"][0]) == 3)


@pytest.mark.parametrize("method", METHODS)
def test_violations_are_found_where_it_does_not(method):
    condition = gf.theory.partition_condition(*random_data())
    assert not condition.holds
    assert condition.violations > 0.3 * condition.pairs
    sol = run("broken", method)
    events = gf.observables.switches(sol.ts, sol.observed["codes"])
    print(f"{method}: {events.violations} violations among {len(events.time)} events")
    assert events.violations > 20
    # A second count, pair by pair.
    codes, seen = np.asarray(sol.observed["codes"]), 0
    for then, now in itertools.pairwise(codes):
        seen += np.sum((then == 3) & (now == 2)) + np.sum((then == 0) & (now == 1))
    assert events.violations == seen


@pytest.mark.parametrize("method", METHODS)
def test_gradient_bound_holds_and_says_something(method):
    for data in ("kept", "broken"):
        bound, norm = (np.asarray(run(data, method).observed[name]) for name in ("bound", "norm"))
        assert np.all(bound <= norm * (1 + 1e-9))
        ratio = bound / norm
        print(f"{data}: bound over norm {ratio.min():.2f} ... {ratio.max():.2f}")
        assert ratio.min() > (0.7 if data == "kept" else 0.2)


def test_gradient_bound_is_exact_for_two_samples_seen_by_all(key):
    """With two samples `mu` is their own product; then only the gradient in the output weights is missing."""
    x, y = np.array([[1.0, 0.2], [0.8, 0.6]]), np.array([1.0, 1.0])
    problem = gf.EmpiricalRisk(x, y, gf.losses.logistic)
    model = gf.models.TwoLayer(2, 3, parametrisation="ntk", key=key)
    model = jax.tree_util.tree_map(lambda leaf: jnp.abs(leaf) if jnp.ndim(leaf) else leaf, model)
    gradient = jax.jit(jax.grad(lambda w: problem(eqx.tree_at(lambda m: m.weight, model, w))))(model.weight)
    bound = eqx.filter_jit(GradientBound(problem))(model)
    np.testing.assert_allclose(bound, jnp.linalg.norm(gradient), rtol=1e-12)


def test_events_and_lifetimes_by_hand():
    history = np.array([[[3, 0]], [[2, 0]], [[2, 1]], [[3, 1]]])
    events = gf.observables.switches([0.0, 1.0, 2.0, 4.0], history)
    assert events.time.tolist() == [1.0, 2.0, 4.0]
    assert events.earlier.tolist() == [0.0, 1.0, 2.0]
    assert events.neuron.tolist() == [0, 1, 0]
    assert (events.before.tolist(), events.after.tolist()) == ([3, 0, 2], [2, 1, 3])
    assert (events.violations, events.flips) == (2, 0)
    assert events.lifetimes(3).tolist() == [1.0, np.inf]
    assert events.lifetimes(2).tolist() == [3.0]
    assert events.lifetimes(1).tolist() == [np.inf]
    assert gf.observables.survivors(history).tolist() == [[False, False]]
    flipped = gf.observables.switches([0.0, 1.0], np.array([[[3]], [[1]]]))
    assert (flipped.violations, flipped.flips) == (0, 1)


@pytest.mark.slow
def test_hidden_layers_of_deep_networks_have_events(key):
    """Activation patterns of a network with two hidden layers, both of which switch."""
    x, y = gf.data.correlated(10, 4, dtype="float64")
    model = gf.models.MLP(4, 6, depth=2, activation=jax.nn.relu, key=key)
    problem = gf.EmpiricalRisk(x, y, gf.losses.square)
    see = {"alive": ActivationPattern(x)}
    sol = gf.iterate(gf.GradientDescent(problem, 0.2), model, 200, save_every=1, observe=see, save_params=False)
    events = gf.observables.switches(sol.ts, sol.observed["alive"])
    assert sol.observed["alive"].shape == (201, 10, 12)
    assert {bool(neuron < 6) for neuron in events.neuron} == {True, False}
    assert set(np.unique(events.after)) <= {0, 1}


def test_bad_input_is_refused(key):
    x = np.eye(2)
    with pytest.raises(ValueError, match=r"`y` must hold labels \+1 and -1, or class indices, but is 0.5"):
        NeuronPartition(x, np.array([0.5, 1.0]))
    with pytest.raises(ValueError, match="one-hot rows"):
        NeuronPartition(x, np.ones((2, 2)))
    with pytest.raises(ValueError, match="`x` must hold samples other than zero, but is zero in 1 of 2"):
        NeuronPartition(np.array([[1.0, 0.0], [0.0, 0.0]]), np.ones(2))
    with pytest.raises(ValueError, match="`x` must be finite"):
        NeuronPartition(np.array([[1.0, np.nan]]), np.ones(1))
    signs = NeuronPartition(x, np.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="signs for scalar outputs"):
        signs(gf.models.TwoLayer(2, 3, 4, key=key))
    with pytest.raises(ValueError, match="one hidden layer"):
        signs(gf.models.MLP(2, 3, key=key))
    with pytest.raises(ValueError, match=r"of shape \(T, n, neurons\)"):
        gf.observables.switches([0.0], np.zeros((2, 1, 1)))
    with pytest.raises(ValueError, match=r"of shape \(T, n, neurons\), but is of shape \(2, 1\)"):
        gf.observables.survivors(np.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"one label per input \(in_size,\), but is of shape \(3,\) against \(2, 2\)"):
        NeuronPartition(x, np.ones(3))
    with pytest.raises(ValueError, match="scalar targets"):
        GradientBound(gf.EmpiricalRisk(x, x, gf.losses.square))
    problem = gf.EmpiricalRisk(x, np.ones(2), gf.losses.square)
    with pytest.raises(ValueError, match="ReLU"):
        GradientBound(problem)(gf.models.TwoLayer(2, 3, activation=jnp.tanh, key=key))
    with pytest.raises(ValueError, match=r"labels \+1 and -1"):
        gf.theory.partition_condition(x, np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="other than zero"):
        gf.theory.partition_condition(np.zeros((1, 2)), np.ones(1))
    with pytest.raises(ValueError, match="`kappa` must be positive"):
        gf.models.mildly_parametrised(2, 3, kappa=0.0, key=key)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "width"), [(1, 1), (1, 3), (3, 1)])
def test_smallest_sizes_and_float32(n, width, key):
    x, y = gf.data.correlated(n, 2, dtype="float32")
    model = gf.models.mildly_parametrised(2, width, dtype=jnp.float32, key=key)
    problem = gf.EmpiricalRisk(x, y, gf.losses.exponential)
    assert NeuronPartition(x, y)(model).shape == (n, width)
    bound = eqx.filter_jit(GradientBound(problem))(model)
    assert bound.dtype == jnp.float32
    assert 0 <= float(bound) <= float(eqx.filter_jit(GradientNorm(problem))(model)) * (1 + 1e-5)
