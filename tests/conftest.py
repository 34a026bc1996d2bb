"""Strict settings for every test: float64, no silent broadcasting, run-time shape checks, warnings as errors."""

import os
import subprocess
import sys

QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
"""Compilation is most of the time that tests take, and takes a third of it this way. Set XLA_FLAGS, be it to nothing,
for the programs that users get; the commands, the notebooks and the benchmarks run those."""


def understood(flags: str) -> bool:
    """Whether this version of XLA knows all flags; it ends the process over one that it does not know."""
    program = [sys.executable, "-c", "import jax; jax.devices()"]
    return (
        subprocess.run(program, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, check=False).returncode == 0
    )


if "XLA_FLAGS" not in os.environ:  # the workers of pytest-xdist inherit what the first process sets
    os.environ["XLA_FLAGS"] = QUICK_TO_COMPILE if understood(QUICK_TO_COMPILE) else ""

import jax  # noqa: E402
import jaxtyping  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

with jaxtyping.install_import_hook("gradflow", "beartype.beartype"):
    import gradflow  # noqa: F401

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import gradflow as gf  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """A process that holds the programs of all tests at once runs out of memory maps, and crashes."""
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked():
    """No run-time checks of types, as users run the package: what it says by itself of a value of the wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def quadratic():
    """A quadratic loss with a known flow: the matrix, the minimum, and the loss as a problem with data leaves."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(12, 4)))
    y = jnp.asarray(rng.normal(size=12))
    return gf.EmpiricalRisk(x, y, gf.losses.square, predict=predict_linear)


def predict_linear(w, x):
    return x @ w


@pytest.fixture
def small_mlp(key):
    """A tanh MLP on 60 digits, and its problem."""
    dataset = gf.data.digits(n=60, centre=True, labels="onehot")
    problem = gf.EmpiricalRisk(*dataset, gf.losses.square)
    return problem, gf.models.MLP(64, 8, 10, activation=jax.nn.tanh, key=key)
