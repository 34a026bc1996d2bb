"""Strict settings for every test: float64, no silent broadcasting, run-time shape checks, warnings as errors."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

with install_import_hook("gradflow", "beartype.beartype"):
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
