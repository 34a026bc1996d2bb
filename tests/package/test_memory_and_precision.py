"""Checks that leave large data where they are, saved parameters that do not fit, and parameters of half precision."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow import _checks
from gradflow.problems import _labels
from gradflow.runs import _arguments

HALVES = [jnp.bfloat16, jnp.float16]

PEAK = """
import resource, sys
import jax, jax.numpy as jnp, numpy as np
from gradflow._checks import check_finite
from gradflow.problems._labels import check_inputs_of_length
from gradflow.runs._arguments import check_size

def check(data):
    check_finite("x", data)
    check_size(data, data.dtype)
    if sys.argv[1] == "sharded":
        check_inputs_of_length(data)

size = 2**26  # 256 megabytes of float32
if sys.argv[1] == "numpy":
    data = np.ones(size, np.float32)
else:
    from jax.sharding import NamedSharding, PartitionSpec
    mesh = jax.make_mesh((8,), ("data",))
    place = NamedSharding(mesh, PartitionSpec("data"))
    data = jax.block_until_ready(jax.jit(lambda: jnp.ones((size // 64, 64), jnp.float32), out_shardings=place)())
small = data[:8] if sys.argv[1] == "numpy" else jax.device_put(np.ones((8, 64), np.float32), place)
check(small)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
check(data)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("kind", ["numpy", "sharded"])
def test_checking_data_takes_no_memory(kind, monkeypatch):
    """256 MB are looked at; a copy, or a mask of one byte an entry (64 MB), would show."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    done = subprocess.run([sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 32


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16, np.complex64])
def test_what_is_not_finite_is_counted(dtype):
    array = np.ones((3, 2**20), dtype)
    array[1, 5] = np.nan
    array[2, -1] = np.inf
    for data in (array, jnp.asarray(array), np.asfortranarray(array)):
        with pytest.raises(ValueError, match=f"not finite in 2 of {array.size} entries"):
            _checks.check_finite("x", data)
    _checks.check_finite("x", (np.ones((0, 2)), jnp.arange(3), "a", 1.0))
    with pytest.raises(ValueError, match="1 of 1"):
        _checks.check_finite("x", float("nan"))


def test_labels_inputs_and_starts_of_other_values_are_refused():
    signs, rows = jnp.tile(jnp.array([1.0, -1.0]), 500), jnp.tile(jnp.eye(2), (500, 1))
    kinds = [_labels.label_kind(y) for y in (signs, signs.astype(int), (signs > 0).astype(int), rows)]
    assert kinds == ["signs", "signs", "indices", "onehot"]
    with pytest.raises(ValueError, match=r"labels \+1 and -1, or class indices, but is 0.5"):
        _labels.label_kind(signs.at[7].set(0.5))
    with pytest.raises(ValueError, match="one-hot rows"):
        _labels.label_kind(rows.at[7].set(0.5))
    x = jnp.ones((1000, 3))
    with pytest.raises(ValueError, match="zero in 2 of 1000 samples, the first at index 5"):
        _labels.check_inputs_of_length(x.at[jnp.array([5, 9])].set(0))
    for start in (1e-307 * x, np.full(3, 1e-307)):
        with pytest.warns(gf.PrecisionWarning, match="largest entry of `params` is 1e-307"):
            _arguments.check_size(start, x.dtype)


def test_known_values_are_checked_inside_a_trace():
    x, y = jnp.array([[jnp.nan]]), jnp.ones(1)

    def inside(w):
        return gf.EmpiricalRisk(x, y, gf.losses.square, lambda w, x: x @ w)(w)

    with pytest.raises(ValueError, match="`x` must be finite"):
        jax.jit(inside)(jnp.ones(1))


def test_saved_parameters_that_do_not_fit(monkeypatch):
    flow = gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2))
    monkeypatch.setattr(_arguments, "WORTH_A_LOOK", 1000)
    monkeypatch.setattr(_arguments, "free_memory", lambda: 10_000)
    with pytest.warns(UserWarning, match="at 200 save times take 16,000 bytes, and 10,000 are free.*save_params=False"):
        gf.solve(flow, jnp.ones(10), np.linspace(0, 1, 200))
    gf.solve(flow, jnp.ones(10), np.linspace(0, 1, 200), save_params=False)
    gf.solve(flow, jnp.ones(10), np.linspace(0, 1, 100))


@pytest.mark.parametrize("dtype", HALVES)
def test_eigenvalues_at_half_precision(dtype):
    h = jnp.array([4.0, 2.0, 0.01], dtype)
    x = jnp.diag(jnp.array([1.0, 2.0, 3.0], dtype))
    risk = gf.EmpiricalRisk(x, jnp.ones(3, dtype), gf.losses.square, lambda w, x: x @ w)
    w = jnp.ones(3, dtype)
    top = gf.observables.HessianEigenvalues(lambda w: 0.5 * jnp.sum(h * w**2), 3)(w)
    np.testing.assert_allclose(top, np.asarray(h, float), rtol=1e-4)
    assert float(gf.observables.Sharpness(risk)(w)) == pytest.approx(3.0, rel=1e-4)
    np.testing.assert_allclose(gf.observables.NTKEigenvalues(risk)(w), [9.0, 4.0, 1.0], rtol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_flows_refuse_half_precision_and_rules_take_it(dtype):
    risk = gf.EmpiricalRisk(jnp.eye(3, dtype=dtype), jnp.ones(3, dtype), gf.losses.square, lambda w, x: x @ w, "sum")
    with pytest.raises(ValueError, match=f"`params` must be of type float32 or float64.*{jnp.dtype(dtype).name}"):
        gf.solve(gf.GradientFlow(risk), jnp.zeros(3, dtype), [1.0])
    sol = gf.iterate(gf.GradientDescent(risk, 0.5), jnp.zeros(3, dtype), 4)
    assert sol.final.dtype == dtype
    # The error halves in a step; all these numbers are exact in either type.
    assert np.asarray(sol.final, float).tolist() == [1 - 0.5**4] * 3
