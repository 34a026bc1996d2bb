"""Kinks are seen in the program of a problem, and decide about the default solver."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import nn

import gradflow as gf
from gradflow._tree import split
from gradflow.problems._kinks import kinks_of

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
Y = jnp.asarray(np.random.default_rng(1).choice([0.0, 1.0], size=(5, 4)))
W = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4)))


def rectified(x):
    return jnp.maximum(x, 0)


custom = jax.custom_vjp(rectified)
custom.defvjp(lambda x: (rectified(x), x), lambda x, g: (g * (x > 0),))


def cross_entropy_by_hand(w):
    z = X @ w
    shift = jnp.max(z, axis=1, keepdims=True)
    return jnp.sum(jnp.log(jnp.sum(jnp.exp(z - shift), axis=1, keepdims=True)) + shift - z[:, :1])


def multiclass_hinge(w):
    z = X @ w
    return jnp.sum(jnp.max(z, axis=1) - z[:, 0])


def through_rounding(w):
    return jnp.sum(w + jax.lax.stop_gradient(jnp.round(w) - w))


def pooled(z, start, function):
    return jax.lax.reduce_window(z, start, function, (1, 2), (1, 2), "SAME")


def recurrent(activation, w):
    return jnp.sum(jax.lax.scan(lambda h, x: (activation(h @ w[:, :3] + x), h), jnp.ones(3), X)[0])


def normalised(w):
    z = X @ w
    variance = jnp.maximum(jnp.mean(z**2, axis=1) - jnp.mean(z, axis=1) ** 2, 0)
    return jnp.sum(z[:, 0] / jnp.sqrt(variance + 1e-5))


def on_features(activation):
    return lambda w: jnp.sum(activation(X @ w) ** 2 + activation(X @ w))


KINKED = {
    "relu": (on_features(nn.relu), ("max",)),
    "relu6": (on_features(nn.relu6), ("max", "min")),
    "leaky": (on_features(nn.leaky_relu), ("where",)),
    "selu": (on_features(nn.selu), ("where",)),
    "hard swish": (on_features(nn.hard_silu), ("max", "min")),
    "far away": (on_features(lambda z: nn.relu(z - 30.0)), ("max",)),
    "custom rule": (on_features(custom), ("max",)),
    "by a mask": (lambda w: jnp.sum((X @ w > 0) * (X @ w)), ("comparison",)),
    "by a choice": (lambda w: jnp.sum(jnp.where(w > 0, w, 2 * w)), ("where",)),
    "lasso": (lambda w: jnp.sum((X @ w) ** 2) + jnp.sum(jnp.abs(w)), ("abs",)),
    "root of a square": (lambda w: jnp.sum(jnp.sqrt(w**2)), ("sqrt",)),
    "maxout": (lambda w: jnp.sum(jnp.maximum((X @ w)[:, :2], (X @ w)[:, 2:])), ("max",)),
    "hinge": (lambda w: jnp.sum(nn.relu(1 - Y * (X @ w))), ("max",)),
    "multiclass hinge": (multiclass_hinge, ("max",)),
    "largest entry": (jnp.max, ("max",)),
    "clipped": (lambda w: jnp.sum(jnp.clip(X @ w, -1, 1)), ("max", "min")),
    "rounded": (through_rounding, ("round",)),
    "sorted": (lambda w: jnp.sum(jnp.sort(X @ w)[:, 0]), ("sort",)),
    "winner": (lambda w: jnp.sum((X @ w)[jnp.arange(5), jnp.argmax(X @ w, axis=1)]), ("argmax",)),
    "pooled": (
        lambda w: jnp.sum(jax.lax.reduce_window(X @ w, -jnp.inf, jax.lax.max, (1, 2), (1, 2), "SAME")),
        ("max",),
    ),
    "scan": (lambda w: recurrent(nn.relu, w), ("max",)),
    "loop": (lambda w: jnp.sum(jax.lax.fori_loop(0, 3, lambda i, h: nn.relu(h @ w[:, :3]), X)), ("max",)),
    "cond": (lambda w: jax.lax.cond(jnp.sum(w) > 0, lambda: jnp.sum(w), lambda: 2 * jnp.sum(w)), ("cond",)),
    "remat": (jax.checkpoint(on_features(nn.relu)), ("max",)),
    "vmap": (lambda w: jnp.sum(jax.vmap(lambda x: nn.relu(x @ w))(X)), ("max",)),
}

SMOOTH = {
    **{f.__name__: on_features(f) for f in (nn.elu, nn.celu, nn.gelu, nn.silu, nn.softplus, nn.mish, nn.squareplus)},
    **{f.__name__: on_features(f) for f in (nn.soft_sign, nn.softmax, nn.log_softmax, nn.standardize, jnp.sinc)},
    "leaky of slope one": on_features(lambda z: nn.leaky_relu(z, 1.0)),
    "squared ReLU": on_features(lambda z: nn.relu(z) ** 2),
    "relu(z) - relu(-z)": on_features(lambda z: nn.relu(z) - nn.relu(-z)),
    "huber": lambda w: jnp.sum(optax.huber_loss(X @ w, Y)),
    "log(1 + exp) by hand": on_features(lambda z: jnp.maximum(z, 0) - z * Y + jnp.log1p(jnp.exp(-jnp.abs(z)))),
    "cross entropy": lambda w: jnp.sum(optax.softmax_cross_entropy(X @ w, Y)),
    "cross entropy by hand": cross_entropy_by_hand,
    "binary cross entropy": lambda w: jnp.sum(optax.sigmoid_binary_cross_entropy(X @ w, Y)),
    "logsumexp": lambda w: jnp.sum(nn.logsumexp(X @ w, axis=1)),
    "attention": lambda w: jnp.sum(nn.dot_product_attention(*3 * [(X @ w)[None, :, None, :]], is_causal=True)),
    "norm": lambda w: jnp.sum(w / jnp.maximum(jnp.linalg.norm(w, axis=0, keepdims=True), 1e-12)),
    "norm by choice": lambda w: jnp.sum(w) / jnp.where(jnp.sum(w**2) > 0, jnp.sqrt(jnp.sum(w**2)), 1),
    "clipped probability": lambda w: jnp.sum(jnp.log(jnp.clip(nn.softmax(X @ w), 1e-7, 1 - 1e-7))),
    "variance": normalised,
    "mask of the data": lambda w: jnp.sum(jnp.where(X > 0, X, 0.0) @ w) + jnp.sum(jnp.where(Y > 0, X @ w, 0)),
    "ReLU of the data": lambda w: jnp.sum(jax.lax.scan(lambda h, x: (nn.relu(h + x), h), jnp.ones(3), X)[0] @ w),
    "cond on the data": lambda w: jax.lax.cond(jnp.sum(X) > 0, lambda: jnp.sum(w), lambda: 2 * jnp.sum(w)),
    "average pooling": lambda w: jnp.sum(pooled(X @ w, 0.0, jax.lax.add)),
    "unused": lambda w: (jnp.argmax(X @ w, axis=1), jnp.sum(w**2))[1],
    "times zero": lambda w: jnp.sum(w**2) + 0.0 * jnp.sum(jnp.abs(w)),
    "scan": lambda w: recurrent(jnp.tanh, w),
}


@pytest.mark.parametrize("name", list(KINKED))
def test_kinks_are_seen_and_named(name):
    problem, names = KINKED[name]
    assert kinks_of(problem, W, None) == names


@pytest.mark.parametrize("name", list(SMOOTH))
def test_what_is_smooth_is_not_taken_for_kinked(name):
    assert kinks_of(SMOOTH[name], W, None) == ()


def test_only_what_depends_on_what_flows_counts():
    net = {"features": W, "readout": jnp.ones(4)}

    def problem(p):
        return jnp.sum((nn.relu(X @ p["features"]) @ p["readout"]) ** 2)

    assert kinks_of(problem, net, jax.tree_util.tree_map(lambda _: None, net)) == ("max",)
    assert kinks_of(problem, {"features": None, "readout": jnp.ones(4)}, {"features": W, "readout": None}) == ()


def test_a_problem_that_cannot_be_traced_is_not_called_smooth():
    assert kinks_of(lambda w: jnp.sum(w @ w), W, None) is None
    with pytest.raises(TypeError, match="dot_general"):
        gf.solve(gf.GradientFlow(lambda w: jnp.sum(w @ w)), W, [1.0])


def net_of(activation):
    return gf.EmpiricalRisk(X, Y[:, 0], gf.losses.square, predict=lambda w, x: jnp.sum(activation(x @ w), axis=1))


FLOWS = {
    "gradient": gf.GradientFlow,
    "modified": lambda problem: gf.ModifiedFlow(problem, 0.01, order=2),
    "principal": lambda problem: gf.PrincipalFlow(problem, 0.01, iterations=3),
}


@pytest.mark.parametrize("name", list(FLOWS))
def test_a_network_of_ones_own_gets_the_solver_for_kinks(name):
    sol = gf.solve(FLOWS[name](net_of(nn.relu)), W, [0.05], rtol=1e-3)
    assert (sol.method, sol.choice) == ("Hybrid", "kinks: max")
    assert "method   Hybrid (kinks: max), rtol = 0.001" in repr(sol)


@pytest.mark.slow
def test_the_choice_is_said_for_all_kinds_of_flows():
    smooth, relu = net_of(jnp.tanh), net_of(nn.relu)
    assert "Automatic(Tsit5, NDF) (smooth)" in repr(gf.solve(gf.GradientFlow(smooth), W, [0.1]))
    tight = gf.solve(gf.GradientFlow(relu), W, [0.01], rtol=1e-7)
    assert (tight.method, tight.choice) == ("Automatic(Tsit5, NDF)", "kinks: max; rtol below 1e-06")
    momentum = [gf.solve(gf.HeavyBallFlow(p, 1.0, 0.01), W, [0.1]) for p in (smooth, relu)]
    assert [(sol.method, sol.choice) for sol in momentum] == [
        ("Nystrom", "oscillates"),
        ("Tsit5", "oscillates; kinks: max"),
    ]
    asked = gf.solve(gf.GradientFlow(relu), W, [0.01], solver=gf.solvers.Tsit5())
    assert asked.choice == ""
    assert "method   Tsit5, rtol" in repr(asked)


def test_kinks_of_networks_in_the_mean_field_limit():
    uniform = gf.models.nodes.Uniform(-1, 1)
    for activation, names in ((nn.relu, ("max",)), (jnp.tanh, ())):
        start = gf.models.MeanFieldStart(3, first=uniform, output=uniform, activation=activation)
        net, weights = start.draw(6, jax.random.key(0))
        flow = gf.MeanFieldFlow(gf.EmpiricalRisk(X, Y[:, 0], gf.losses.square), weights)
        assert flow.kinks(*split(net)) == names


@pytest.mark.slow
def test_the_choice_saves_most_of_the_gradients():
    """Measured: 474 gradients against 1,896."""
    data = gf.data.digits(n=60, centre=True, unit_norm=True, labels="onehot")
    shapes = [(64, 32), (32, 32), (32, 10)]
    keys = jax.random.split(jax.random.key(0), 3)
    start = [jax.random.normal(key, shape) / shape[0] ** 0.5 for key, shape in zip(keys, shapes, strict=True)]

    def predict(p, x):
        return nn.relu(nn.relu(x @ p[0]) @ p[1]) @ p[2]

    flow = gf.GradientFlow(gf.EmpiricalRisk(data.x, data.y, gf.losses.cross_entropy, predict=predict))
    chosen, smooth = (gf.solve(flow, start, [30.0], solver=s, rtol=1e-4) for s in (None, gf.solvers.Automatic()))
    assert chosen.method == "Hybrid"
    assert 2 * chosen.stats["gradient_evaluations"] < smooth.stats["gradient_evaluations"]


class Traces:
    """Hashable, for a static field."""

    def __init__(self):
        self.count = 0


class Counted(eqx.Module):
    x: jax.Array
    traces: Traces = eqx.field(static=True)

    def __call__(self, w):
        self.traces.count += 1
        return jnp.sum(nn.relu(self.x @ w))


def test_one_trace_and_none_for_the_second_call():
    traces = Traces()
    problem = Counted(X, traces)
    assert gf.GradientFlow(problem).kinks(W, None) == ("max",)
    assert traces.count == 1
    gf.solve(gf.GradientFlow(problem), W, [0.1])
    before = traces.count
    sol = gf.solve(gf.GradientFlow(Counted(2 * X, traces)), 2 * W, [0.2])
    assert sol.choice == "kinks: max"
    assert traces.count == before


def test_under_transformations():
    flow = gf.GradientFlow(net_of(nn.relu))
    batch = jax.vmap(lambda scale: gf.solve(flow, scale * W, [0.05], rtol=1e-3))(jnp.array([1.0, 0.5]))
    assert (batch.choice, batch.method) == ("kinks: max", "Hybrid")
    inside = eqx.filter_jit(lambda w: gf.solve(gf.GradientFlow(lambda v: jnp.sum(nn.relu(v * w))), w, [0.05]))
    assert inside(W).choice == "kinks: max"
