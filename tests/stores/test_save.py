"""Solutions on disk: what is read is what was written, in another process too, without pickle."""

import functools
import json
import pickle
import subprocess
import sys
import zipfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradflow as gf


def smooth(z):
    return jnp.tanh(z)


class Net(eqx.Module):
    weight: jax.Array
    scale: float
    activation: object
    name: str = eqx.field(static=True)
    slope: object = eqx.field(static=True, default=None)

    def __call__(self, x):
        return jnp.sum(self.activation(self.weight @ x)) * self.scale


def square(w):
    return 0.5 * jnp.sum(w**2)


def numbers(leaf):
    """A leaf, of a random key its numbers."""
    keyed = eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if keyed else leaf


def same(a, b):
    """Whether two pytrees are of one structure and equal to the last bit; NaN equals NaN."""
    leaves, others = jax.tree_util.tree_leaves(a), jax.tree_util.tree_leaves(b)
    assert jax.tree_util.tree_structure(a) == jax.tree_util.tree_structure(b)
    for x, y in zip(map(numbers, leaves), map(numbers, others), strict=True):
        assert np.array_equal(x, y, equal_nan=np.asarray(x).dtype.kind == "f") if eqx.is_array(x) else x == y


@pytest.mark.filterwarnings("ignore:The Python float")
def test_a_solution_comes_back_to_the_last_bit(tmp_path, key):
    model = Net(jax.random.normal(key, (3, 2)), 0.1, jax.nn.relu, "net")
    problem = gf.EmpiricalRisk(np.eye(2), np.ones(2), gf.losses.square)
    flow, see = gf.GradientFlow(problem), {"loss": problem, "count": lambda p: jnp.arange(3)}
    sol = gf.solve(flow, model, [0.5, 1.0, 9.0], observe=see, max_steps=5, throw=False)
    sol.save(tmp_path / "a.gf")
    again = gf.load(tmp_path / "a.gf")
    same(again, sol)
    assert again.final.activation is jax.nn.relu
    assert repr(again) == repr(sol)
    same(gf.solve(flow, again, [9.0]).final, gf.solve(flow, sol, [9.0]).final)
    with zipfile.ZipFile(tmp_path / "a.gf") as archive:
        assert not any(b"pickle" in archive.read(name)[:200] for name in archive.namelist())


@pytest.mark.parametrize(
    "activation", [jax.nn.gelu, jnp.tanh, smooth, functools.partial(jax.nn.leaky_relu, negative_slope=0.2)]
)
def test_activations_are_kept_by_name(tmp_path, activation):
    model = gf.models.TwoLayer(2, 3, activation=activation, key=jax.random.key(0))
    problem = gf.EmpiricalRisk(np.eye(2), np.ones(2), gf.losses.square)
    sol = gf.iterate(gf.GradientDescent(problem, 0.1), model, 3)
    sol.save(tmp_path / "a.gf")
    x = jnp.array([0.3, -2.0])
    assert float(gf.load(tmp_path / "a.gf").final(x)) == float(sol.final(x))


def test_an_activation_without_a_name_is_named(tmp_path):
    model = gf.models.TwoLayer(2, 3, activation=lambda z: z**2, key=jax.random.key(0))
    problem = gf.EmpiricalRisk(np.eye(2), np.ones(2), gf.losses.square)
    sol = gf.iterate(gf.GradientDescent(problem, 0.1), model, 3)
    with pytest.raises(ValueError, match=r"activation` must be importable by name, but is <function .*Define it in"):
        sol.save(tmp_path / "a.gf")
    assert list(tmp_path.iterdir()) == []


def test_an_optimiser_goes_on_from_a_file(tmp_path):
    rule = gf.OptaxRule(square, optax.adam, learning_rate=0.05)
    gf.iterate(rule, jnp.ones(3), 20).save(tmp_path / "a.gf")
    assert np.array_equal(
        gf.iterate(rule, gf.load(tmp_path / "a.gf"), 20).final, gf.iterate(rule, jnp.ones(3), 40).final
    )


def test_keys_half_precision_and_integers(tmp_path, key):
    params = {"w": jnp.ones(2), "key": key, "n": np.arange(3), "flag": True, "half": jnp.ones(2, jnp.bfloat16)}
    flow = gf.GradientFlow(lambda p: square(p["w"]))
    sol = gf.solve(flow, params, [1.0], trainable=lambda leaf: eqx.is_array(leaf) and leaf.dtype == jnp.float64)
    sol.save(tmp_path / "a.gf")
    same(gf.load(tmp_path / "a.gf"), sol)


def test_a_module_of_flax_takes_its_structure_from_another(tmp_path):
    nnx = pytest.importorskip("flax.nnx")
    net = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    problem = gf.EmpiricalRisk(np.eye(2), np.ones((2, 1)), gf.losses.square, predict=lambda m, x: m(x))
    sol = gf.iterate(gf.GradientDescent(problem, 0.1), net, 3)
    sol.save(tmp_path / "a.gf")
    again = gf.load(tmp_path / "a.gf", like=nnx.Linear(2, 1, rngs=nnx.Rngs(1)))
    same(again.final, sol.final)
    with pytest.raises(ValueError, match=r"`like` must hold a Linear, .* Pass parameters of the same model"):
        gf.load(tmp_path / "a.gf")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match=r"must name a file that `Solution.save` wrote"):
        gf.load(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        gf.load(tmp_path / "b")


@pytest.mark.slow
def test_another_process_reads_it(tmp_path):
    sol = gf.solve(gf.GradientFlow(square), jnp.ones(3), [1.0])
    sol.save(tmp_path / "a.gf")
    script = f"""
import jax
jax.config.update("jax_enable_x64", True)
import gradflow as gf
print(float(gf.load({str(tmp_path / "a.gf")!r}).final[0]).hex())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == float(sol.final[0]).hex()
    single = script.replace("True)", "False)")
    failed = subprocess.run([sys.executable, "-c", single], capture_output=True, text=True, check=False)
    assert "Enable float64" in failed.stderr


@pytest.mark.parametrize("flow", ["descent", "momentum"])
def test_files_with_former_names_of_fields(tmp_path, flow):
    """A file as an earlier version wrote it is read, and its run continued."""
    flows = {"descent": gf.GradientFlow(bowl), "momentum": gf.MomentumFlow(bowl, 0.1, 0.9)}
    sol = gf.solve(flows[flow], jnp.ones(2), [1.0, 2.0], solver=gf.solvers.NDF() if flow == "descent" else None)
    sol.save(tmp_path / "now.npz")
    with zipfile.ZipFile(tmp_path / "now.npz") as now, zipfile.ZipFile(tmp_path / "then.npz", "w") as then:
        for name in now.namelist():
            content = now.read(name)
            then.writestr(name, json.dumps(with_former_names(json.loads(content))) if name == "tree.json" else content)
    again = gf.load(tmp_path / "then.npz")
    assert eqx.tree_equal(again.checkpoint, sol.checkpoint)
    assert eqx.tree_equal(again.state, sol.state)
    np.testing.assert_array_equal(gf.solve(flows[flow], again, [3.0]).final, gf.solve(flows[flow], sol, [3.0]).final)


def bowl(w):
    return 0.5 * jnp.sum(w**2)


def with_former_names(described):
    """A description of a pytree in which fields have the names that version 0.1 gave them."""
    if isinstance(described, list):
        return [with_former_names(part) for part in described]
    if not isinstance(described, dict):
        return described
    former = {
        "gradflow.flows._second_order:MomentumState": {"dissipated": "lost"},
        "gradflow.runs._continue:Checkpoint": {"rounding_error": "lost", "scale": "floor"},
        "gradflow.solvers._ndf_step:History": {"contraction": "rate"},
    }
    names = former.get(described.get("dataclass", described.get("namedtuple", "")), {})
    parts = {key: with_former_names(part) for key, part in described.items()}
    if names:
        parts["fields"] = {names.get(name, name): part for name, part in parts["fields"].items()}
        if "dataclass" in parts:  # whose module had another name, too
            parts["dataclass"] = parts["dataclass"].replace("_ndf_step", "_ndf")
    return parts
