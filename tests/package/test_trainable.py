"""What flows: filters, buffers of other libraries, keys, Python floats, shared arrays."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradflow as gf
from gradflow._tree import choose, join, split

RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.normal(size=(12, 3))), jnp.asarray(RNG.normal(size=12))
LORA = {
    "base": jnp.asarray(RNG.normal(size=(3, 4))),
    "a": jnp.asarray(RNG.normal(size=(3, 1))),
    "b": jnp.asarray(RNG.normal(size=(1, 4))) * 0.1,
    "readout": jnp.ones(4),
}
ADAPTER = {"base": False, "a": True, "b": True, "readout": False}


def adapted(p, x):
    return jnp.tanh(x @ (p["base"] + p["a"] @ p["b"])) @ p["readout"]


RISK = gf.EmpiricalRisk(X, Y, gf.losses.square, predict=adapted)


def alone(problem, params, chosen):
    """The same problem with all that does not flow closed over."""
    flowing = {name: params[name] for name in chosen}
    return (lambda p: problem({**params, **p})), flowing


def test_only_what_is_chosen_flows_as_if_the_rest_were_data():
    sol = gf.solve(gf.GradientFlow(RISK), LORA, [0.5, 1.0], trainable=ADAPTER)
    problem, flowing = alone(RISK, LORA, "ab")
    reduced = gf.solve(gf.GradientFlow(problem), flowing, [0.5, 1.0])
    for name in "ab":
        np.testing.assert_allclose(sol.params[name], reduced.params[name], rtol=1e-12)
    assert sol.stats["gradient_evaluations"] == reduced.stats["gradient_evaluations"]
    assert sol.held == ("['base']", "['readout']")
    assert "held fixed: ['base'], ['readout']" in repr(sol)
    assert "GradientFlow, 7 parameters" in repr(sol)
    assert jnp.array_equal(sol.final["base"], LORA["base"])
    assert sol.params["base"].shape == (3, 4)  # kept once
    assert sol.drift["energy"] < 1e-4


FILTERS = {
    "function": lambda leaf: leaf.shape in ((3, 1), (1, 4)),
    "functions in a pytree": {**ADAPTER, "a": eqx.is_array, "b": lambda leaf: leaf.ndim == 2},
    "numpy Booleans": {name: np.bool_(value) for name, value in ADAPTER.items()},
}


@pytest.mark.parametrize("name", list(FILTERS))
def test_filters_come_in_several_forms(name):
    flowing, frozen = split(LORA, FILTERS[name])
    assert [key for key in LORA if flowing[key] is not None] == ["a", "b"]
    assert [key for key in LORA if frozen[key] is not None] == ["base", "readout"]


def test_a_model_of_booleans_is_a_pytree_even_though_it_can_be_called():
    net = eqx.nn.MLP(3, "scalar", 4, 1, key=jax.random.key(0))
    spec = jax.tree_util.tree_map(lambda _: False, net)
    spec = eqx.tree_at(lambda n: n.layers[-1].weight, spec, True)
    sol = gf.iterate(gf.GradientDescent(gf.EmpiricalRisk(X, Y, gf.losses.square), 0.1), net, 3, trainable=spec)
    assert sol.held == (".layers[0].weight", ".layers[0].bias", ".layers[1].bias")
    assert jnp.array_equal(sol.final.layers[0].weight, net.layers[0].weight)
    assert not jnp.array_equal(sol.final.layers[1].weight, net.layers[1].weight)


def test_a_filter_may_end_above_the_leaves_and_never_takes_what_cannot_flow():
    params = {"old": {"w": jnp.ones(2)}, "new": {"w": jnp.ones(2), "n": jnp.arange(2), "f": jnp.tanh}}
    flowing, frozen = split(params, {"old": False, "new": True})
    assert [leaf.shape for leaf in jax.tree_util.tree_leaves(flowing)] == [(2,)]
    assert [leaf.shape for leaf in (frozen["old"]["w"], frozen["new"]["n"])] == [(2,), (2,)]
    assert frozen["new"]["f"] is jnp.tanh
    assert jax.tree_util.tree_structure(join(flowing, frozen)) == jax.tree_util.tree_structure(params)


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ({"a": True}, "`trainable` must have the structure of `params`, or of a part from the top"),
        (
            {**ADAPTER, "a": "yes"},
            "`trainable` must be a function of a leaf or a pytree of Booleans, but is one with a",
        ),
        (1, "`trainable` must be a function of a leaf or a pytree of Booleans, but is one with a leaf of type int"),
        (False, "`trainable` must choose at least one floating-point array leaf, but is choosing none of"),
    ],
    ids=["structure", "string", "number", "nothing"],
)
def test_bad_filters_are_refused(trainable, message):
    for run in (
        lambda: gf.solve(gf.GradientFlow(RISK), LORA, [1.0], trainable=trainable),
        lambda: gf.iterate(gf.GradientDescent(RISK, 0.1), LORA, 3, trainable=trainable),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def test_rules_hold_what_is_not_chosen_even_with_weight_decay():
    rule = gf.OptaxRule(RISK, lambda eta: optax.adamw(eta, weight_decay=0.1), learning_rate=0.01)
    sol = gf.iterate(rule, LORA, 20, trainable=ADAPTER)
    assert jnp.array_equal(sol.final["base"], LORA["base"])
    assert not jnp.array_equal(sol.final["a"], LORA["a"])
    problem, flowing = alone(RISK, LORA, "ab")
    reduced = gf.iterate(gf.OptaxRule(problem, rule.transform, learning_rate=0.01), flowing, 20)
    np.testing.assert_allclose(sol.final["b"], reduced.final["b"], rtol=1e-12)
    assert "held fixed: ['base'], ['readout']" in repr(sol)


def test_momentum_and_noise_leave_what_is_held_alone():
    momentum = gf.solve(gf.HeavyBallFlow(RISK, 1.0, 0.01), LORA, [1.0], trainable=ADAPTER)
    noisy = gf.SGDFlow(RISK, learning_rate=0.1, batch_size=2)
    random = gf.solve(noisy, LORA, [0.5], key=jax.random.key(0), trainable=ADAPTER)
    for sol in (momentum, random):
        assert jnp.array_equal(sol.final["base"], LORA["base"])
        assert not jnp.array_equal(sol.final["a"], LORA["a"])


def test_derivatives_with_respect_to_what_flows_and_what_does_not():
    solver = gf.solvers.Tsit5()

    def end(base, a):
        start = {**LORA, "base": base, "a": a}
        sol = gf.solve(gf.GradientFlow(RISK), start, [0.5], solver=solver, rtol=1e-9, trainable=ADAPTER)
        return sol.final["b"]

    args = LORA["base"], LORA["a"]
    tangents = tuple(jnp.asarray(RNG.normal(size=leaf.shape)) for leaf in args)
    _, slope = jax.jvp(end, args, tangents)
    step = 1e-5
    ahead, behind = (end(*(p + s * step * v for p, v in zip(args, tangents, strict=True))) for s in (1, -1))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_batches_of_runs():
    scales = jnp.array([1.0, 0.5])

    def run(scale):
        return gf.solve(gf.GradientFlow(RISK), {**LORA, "a": scale * LORA["a"]}, [0.5], trainable=ADAPTER)

    batch = jax.vmap(run)(scales)
    for i, scale in enumerate(scales):
        np.testing.assert_allclose(batch.final["b"][i], run(scale).final["b"], rtol=1e-6)
    assert batch.held == ("['base']", "['readout']")
    assert "held fixed: ['base'], ['readout']" in repr(batch)


def test_the_second_call_traces_nothing():
    traces = []

    def problem(p):
        traces.append(1)
        return RISK(p)

    flow = gf.GradientFlow(problem)
    gf.solve(flow, LORA, [0.5], trainable=ADAPTER)
    before = len(traces)
    gf.solve(flow, {**LORA, "base": 2 * LORA["base"]}, [0.7], trainable=dict(ADAPTER))
    gf.solve(flow, LORA, [0.5], trainable=lambda leaf: leaf.shape in ((3, 1), (1, 4)))
    assert len(traces) == before


@pytest.mark.slow
def test_comparison_of_a_rule_with_its_flow():
    rule = gf.GradientDescent(RISK, learning_rate=0.1)
    ds = gf.compare(rule, LORA, [0.1, 0.05], 1.0, trainable=ADAPTER)
    problem, flowing = alone(RISK, LORA, "ab")
    reduced = gf.compare(gf.GradientDescent(problem, 0.1), flowing, [0.1, 0.05], 1.0)
    np.testing.assert_allclose(ds.gap, reduced.gap, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [False, True], ids=["flow", "rule"])
def test_sweeps(rule, tmp_path):
    def build(scale):
        what = gf.GradientDescent(RISK, learning_rate=0.05) if rule else gf.GradientFlow(RISK)
        return what, {**LORA, "base": scale * LORA["base"], "a": scale * LORA["a"]}

    observe = {"b": lambda p: p["b"], "base": lambda p: p["base"]}
    options = {"observe": observe, "save_params": True, "trainable": ADAPTER, "progress": False}
    options["store"] = tmp_path / "sweep.zarr"
    ds = gf.sweep(build, {"scale": [1.0, 0.5]}, [0.0, 0.5], **options)
    assert ds.params.shape == (2, 2, 7)
    for i, scale in enumerate((1.0, 0.5)):
        what, start = build(scale)
        run = (gf.iterate if rule else gf.solve)(what, start, 10 if rule else [0.5], trainable=ADAPTER)
        np.testing.assert_allclose(ds.b[i, -1], run.final["b"], rtol=1e-6)
        np.testing.assert_array_equal(ds.base[i, -1], scale * LORA["base"])
    with pytest.raises(ValueError, match="must hold the same sweep"):
        gf.sweep(build, {"scale": [1.0, 0.5]}, [0.0, 0.5], **(options | {"trainable": None}))


def test_a_choice_goes_along_with_parameters():
    chosen = choose(LORA, ADAPTER)
    assert chosen.held == ("['base']", "['readout']")
    flowing, frozen = split(chosen)
    assert [key for key in LORA if flowing[key] is not None] == ["a", "b"]
    assert choose({"w": jnp.ones(2)}) == {"w": pytest.approx(jnp.ones(2))}
    assert jax.tree_util.tree_structure(join(flowing, frozen)) == jax.tree_util.tree_structure(LORA)


# Buffers of other libraries


@pytest.mark.slow
def test_flax_modules_flow_in_their_parameters_alone():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)  # holds a random key
            self.last = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))

    net = Net(nnx.Rngs(0))
    net.norm.mean[...] = jnp.asarray([0.1, -0.2, 0.3, 0.0], net.norm.mean[...].dtype)
    structure, params, static = nnx.split(net, nnx.Param, ...)
    x, y = X.astype(jnp.float32), Y[:, None].astype(jnp.float32)
    risk = gf.EmpiricalRisk(x, y, gf.losses.square, predict=lambda m, x: m(x))
    sol = gf.solve(gf.GradientFlow(risk), net, [1.0], rtol=1e-4)
    assert sol.held == (".norm.mean.value", ".norm.var.value")
    np.testing.assert_array_equal(sol.final.norm.mean[...], net.norm.mean[...])
    split_risk = gf.EmpiricalRisk(x, y, gf.losses.square, predict=lambda p, x: nnx.merge(structure, p, static)(x))
    alone = gf.solve(gf.GradientFlow(split_risk), params, [1.0], rtol=1e-4)
    np.testing.assert_allclose(sol.final.first.kernel[...], alone.final["first"]["kernel"][...], rtol=1e-3, atol=1e-5)
    # A whole state, and a choice of one's own.
    whole = gf.EmpiricalRisk(x, y, gf.losses.square, predict=lambda s, x: nnx.merge(structure, s)(x))
    state = nnx.state(net)
    assert gf.solve(gf.GradientFlow(whole), state, [0.1], rtol=1e-4).held == (
        "['norm']['mean'].value",
        "['norm']['var'].value",
    )
    everything = gf.solve(gf.GradientFlow(risk), net, [0.1], rtol=1e-4, trainable=eqx.is_inexact_array)
    assert everything.held == ()
    assert not jnp.array_equal(everything.final.norm.mean[...], net.norm.mean[...])
    last = gf.iterate(gf.GradientDescent(risk, 0.1), net, 3, trainable=lambda leaf: leaf.shape == (4, 1))
    assert len(last.held) == 7


@pytest.mark.slow
def test_the_state_of_equinox_layers_is_held():
    class Net(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        last: eqx.nn.Linear

        def __init__(self, key):
            self.first = eqx.nn.Linear(3, 4, key=key)
            self.norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
            self.last = eqx.nn.Linear(4, "scalar", key=key)

        def __call__(self, x, state):
            z, state = self.norm(self.first(x), state)
            return self.last(jnp.tanh(z)), state

    net, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    inference = eqx.nn.inference_mode(net)

    def predict(both, x):
        model, memory = both
        return jax.vmap(lambda one: model(one, memory)[0], axis_name="batch")(x)

    risk = gf.EmpiricalRisk(X, Y, gf.losses.square, predict=predict)
    sol = gf.solve(gf.GradientFlow(risk), (inference, state), [0.5], rtol=1e-4)
    assert len(sol.held) == 2
    for before, after in zip(*(jax.tree_util.tree_leaves(s) for s in (state, sol.final[1])), strict=True):
        np.testing.assert_array_equal(before, after)
    assert sol.loss[1] < sol.loss[0]


def test_running_statistics_beside_parameters_are_held():
    variables = {"params": {"w": jnp.ones(3)}, "batch_stats": {"mean": jnp.full(3, 0.5)}}
    risk = gf.EmpiricalRisk(
        X, Y, gf.losses.square, predict=lambda v, x: (x - v["batch_stats"]["mean"][None]) @ v["params"]["w"]
    )
    sol = gf.solve(gf.GradientFlow(risk), variables, [1.0])
    assert sol.held == ("['batch_stats']['mean']",)
    nested = {"linear": {"w": jnp.ones(3), "b": jnp.zeros(())}, "params": jnp.ones(3)}  # names alone mean nothing
    assert len(jax.tree_util.tree_leaves(split(nested)[0])) == 3


def test_random_keys_are_carried_along():
    for key in (jax.random.key(0), jax.random.PRNGKey(0), jax.random.split(jax.random.key(0), 3)):
        params = {"w": jnp.ones(2), "key": key}
        sol = gf.solve(gf.GradientFlow(lambda p: 0.5 * jnp.sum(p["w"] ** 2)), params, [0.5, 1.0])
        np.testing.assert_allclose(sol.final["w"], np.exp(-1.0), rtol=1e-4)
        assert sol.final["key"].dtype == key.dtype
        assert jnp.array_equal(sol.final["key"], key)
        assert (sol.params["w"].shape, sol.held) == ((2, 2), ())
        rule = gf.iterate(gf.GradientDescent(lambda p: 0.5 * jnp.sum(p["w"] ** 2), 0.1), params, 5)
        assert jnp.array_equal(rule.final["key"], key)


class Scaled(eqx.Module):
    weight: jax.Array
    scale: float

    def __call__(self, x):
        return self.scale * (self.weight @ x)


class Fixed(eqx.Module):
    weight: jax.Array
    scale: float = eqx.field(static=True)

    def __call__(self, x):
        return self.scale * (self.weight @ x)


def test_a_python_float_is_named():
    risk = gf.EmpiricalRisk(X, Y, gf.losses.square)
    with pytest.warns(UserWarning, match=r"Python float at \.scale in `params` does not flow"):
        gf.solve(gf.GradientFlow(risk), Scaled(jnp.ones(3), 2.0), [0.1])
    with pytest.warns(UserWarning, match=r"Python float at \.scale in `params` does not flow"):
        gf.iterate(gf.GradientDescent(risk, 0.1), Scaled(jnp.ones(3), 2.0), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gf.solve(gf.GradientFlow(risk), Fixed(jnp.ones(3), 2.0), [0.1])
        gf.solve(gf.GradientFlow(risk), Scaled(jnp.ones(3), 2.0), [0.1], trainable=eqx.is_inexact_array)
        flowing = gf.solve(gf.GradientFlow(risk), Scaled(jnp.ones(3), np.float64(2.0)), [0.1])
    assert float(flowing.final.scale) != 2.0


def test_settings_of_layers_are_not_taken_for_parameters():
    layers = [eqx.nn.Linear(3, 4, key=jax.random.key(0)), eqx.nn.Dropout(0.5, inference=True)]
    layers += [
        eqx.nn.Lambda(lambda z: eqx.nn.MaxPool1d(2)(z[None])[0]),
        eqx.nn.Linear(3, "scalar", key=jax.random.key(1)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = eqx.nn.Sequential(layers)
        gf.iterate(gf.GradientDescent(gf.EmpiricalRisk(X, Y, gf.losses.square), 0.1), net, 2)
    with pytest.warns(UserWarning, match="Python float at"):
        gf.iterate(gf.GradientDescent(lambda p: jnp.sum(p[0].weight ** 2) * p[1]["c"], 0.1), (layers[0], {"c": 0.5}), 2)


def test_one_array_in_two_places_is_named():
    shared = jnp.ones(3)
    params = {"in": shared, "out": shared, "other": jnp.ones(3)}
    flow = gf.GradientFlow(lambda p: jnp.sum(p["in"] ** 2) + jnp.sum(p["out"]) + jnp.sum(p["other"] ** 2))
    with pytest.warns(UserWarning, match=r"The same array stands at \['in'\] and \['out'\] in `params`"):
        gf.solve(flow, params, [0.1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gf.solve(flow, {**params, "out": jnp.ones(3)}, [0.1])
