"""Observables of parameters in half precision are computed in float32, from what half precision holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf

HALF = (jnp.bfloat16, jnp.float16)
X = np.random.default_rng(0).normal(size=(40, 3))
NET = gf.models.TwoLayer(3, 8, init_scale=30.0, key=jax.random.key(0))
SINGLE = gf.models.TwoLayer(3, 1, key=jax.random.key(1))
LOG_DIAGONAL = gf.models.LogDiagonal(3, log_scale=-2.0)
NODES = gf.models.MeanFieldNet((jnp.array([[0.1], [0.4], [0.6], [2.0]]),), jnp.ones(4))
observables = gf.observables


def cast(tree, dtype):
    """What `dtype` holds of a pytree."""
    arrays = lambda leaf: leaf.astype(dtype) if hasattr(leaf, "dtype") and leaf.dtype.kind == "f" else leaf  # noqa: E731
    return jax.tree_util.tree_map(arrays, tree)


def risk(x, loss=gf.losses.square):
    y = jnp.sign(x[:, 0]).astype(x.dtype)
    return gf.EmpiricalRisk(x, y, loss)


CASES = {
    "Loss": lambda x, net: observables.Loss(risk(x))(net),
    "GradientNorm": lambda x, net: observables.GradientNorm(risk(x))(net),
    "GradientBound": lambda x, net: observables.GradientBound(risk(x, gf.losses.logistic))(net),
    "ParameterNorm": lambda x, net: observables.ParameterNorm()(net),
    "LogNorm": lambda x, net: observables.LogNorm()(net),
    "Margins": lambda x, net: observables.Margins(risk(x, gf.losses.logistic))(net),
    "NormalisedMargin": lambda x, net: observables.NormalisedMargin(risk(x, gf.losses.logistic))(net),
    "NeuronMovement": lambda x, net: observables.NeuronMovement(net)(
        jax.tree_util.tree_map(lambda leaf: 2 * leaf, net)
    ),
    "NeuronNorms": lambda x, net: observables.NeuronNorms()(net),
    "NeuronAngles": lambda x, net: observables.NeuronAngles(jnp.ones(3, x.dtype))(net),
    "Balancedness": lambda x, net: observables.Balancedness()(net),
    "Correlation": lambda x, net: observables.Correlation(risk(x))(net),
    "KKTResidual": lambda x, net: observables.KKTResidual(risk(x))(net),
    "HessianEigenvalues": lambda x, net: observables.HessianEigenvalues(risk(x), 2)(net),
    "Sharpness": lambda x, net: observables.Sharpness(risk(x))(net),
    "NTK": lambda x, net: observables.NTK(risk(x))(net),
    "NTKEigenvalues": lambda x, net: observables.NTKEigenvalues(risk(x))(net)[:3],
    "LossRate": lambda x, net: observables.LossRate(risk(x), scale=2.5)(cast(LOG_DIAGONAL, x.dtype)),
    "ParticleHistogram": lambda x, net: observables.ParticleHistogram([0.0, 0.5, 1.0])(cast(NODES, x.dtype)),
    "kkt_points": lambda x, net: gf.theory.kkt_points(gf.NeuralCorrelation(risk(x)), cast(SINGLE, x.dtype)).values,
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", [n if n != "kkt_points" else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_numbers_are_those_of_float32(name, dtype):
    """Of weights of size 100, whose gradients have squares that float16 does not hold."""
    x, net = jnp.asarray(X).astype(dtype), cast(NET, dtype)
    computed = CASES[name](x, net)
    wanted = CASES[name](x.astype(jnp.float32), cast(net, jnp.float32))
    assert np.all(np.isfinite(wanted))
    assert np.asarray(computed).dtype == np.asarray(wanted).dtype
    np.testing.assert_allclose(computed, wanted, rtol=1e-4, atol=1e-5 * np.max(np.abs(wanted)))


def test_data_may_be_numpy_arrays_of_bfloat16():
    x = np.asarray(jnp.asarray(X).astype(jnp.bfloat16))
    assert risk(x).x.dtype == jnp.bfloat16
