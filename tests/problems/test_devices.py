"""Samples that eight simulated devices share: the numbers of one device, and one sum over devices a gradient."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import gradflow as gf

SCRIPT = """
import sys, warnings
import equinox as eqx, jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
import gradflow as gf

size, samples = eval(sys.argv[1]), int(sys.argv[2])
x = np.random.default_rng(0).normal(size=(samples, 3))
one = gf.EmpiricalRisk(x, np.sin(x[:, 0]), gf.losses.square)
mesh = jax.make_mesh((8,), ("data",))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    shared = gf.data.shard(one, mesh, chunk_size=size)
assert len(said) == (samples % 8 > 0), said
model = gf.models.TwoLayer(3, 6, activation=jnp.tanh, key=jax.random.key(0))
trainable, frozen = eqx.partition(model, eqx.is_inexact_array)

def gradient(p, problem):
    return jax.grad(lambda q: problem(eqx.combine(q, frozen)))(p)

def product(p, problem):
    return jax.jvp(lambda q: gradient(q, problem), (p,), (p,))[1]

for function in (gradient, product):
    program = eqx.filter_jit(function).lower(trainable, shared).compile()
    text = program.compiled.as_text()
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1, text.count("all-reduce")
    for gathered in text.split(" all-gather(")[:-1]:  # predictions may be, inputs may not
        assert "3]" not in gathered.splitlines()[-1], gathered.splitlines()[-1]
    for ours, theirs in zip(jax.tree.leaves(program(trainable, shared)), jax.tree.leaves(function(trainable, one))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)
runs = []
for problem in (shared, one):
    observe = {"loss": problem, "sharpness": gf.observables.Sharpness(problem)}
    flow = gf.GradientFlow(problem)
    runs.append(gf.solve(flow, model, [0.0, 5.0], observe=observe, solver=gf.solvers.Tsit5(), rtol=1e-6))
ours, theirs = runs
assert int(ours.stats["gradient_evaluations"]) == int(theirs.stats["gradient_evaluations"])
for a, b in zip(jax.tree.leaves(eqx.filter(ours.final, eqx.is_array)), jax.tree.leaves(theirs.final)):
    np.testing.assert_allclose(a, b, atol=1e-12)
for name in observe:
    np.testing.assert_allclose(ours.observed[name], theirs.observed[name], rtol=1e-10)
assert len(shared.x.sharding.device_set) == 8
"""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "samples"), [("3", 61), ("None", 64)])
def test_eight_devices_give_the_numbers_of_one(size, samples, monkeypatch):
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    monkeypatch.setenv("XLA_FLAGS", flags)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, size, str(samples)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_bad_input():
    problem = gf.EmpiricalRisk(np.eye(2), np.ones(2), gf.losses.square, lambda w, x: x @ w)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    for kwargs, message in (({"axis": "model"}, "axis"), ({"chunk_size": 0}, "chunk_size")):
        with pytest.raises(ValueError, match=message):
            gf.data.shard(problem, mesh, **kwargs)
