"""A convolutional network: against sums by hand and Equinox, what its flow conserves, and bad input."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf

KEY = jax.random.key(0)


def test_predictions_are_those_of_equinox_layers():
    model = gf.models.ConvNet((2, 7, 6), (3, 4), 5, activation=jnp.tanh, key=KEY)
    bias = tuple(0.1 * (layer + 1) * jnp.arange(b.size) for layer, b in enumerate(model.biases))
    model = eqx.tree_at(lambda m: m.biases, model, bias)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 6)))
    h, pool = x, eqx.nn.AvgPool2d(2, 2)
    for kernel, b in zip(model.kernels, bias[:-1], strict=True):
        layer = eqx.nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1, key=KEY)
        layer = eqx.tree_at(lambda m: (m.weight, m.bias), layer, (kernel, b[:, None, None]))
        h = pool(jnp.tanh(layer(h)))
    np.testing.assert_allclose(model(x), model.output @ h.reshape(-1) + bias[-1], rtol=1e-12)
    np.testing.assert_array_equal(model(x.reshape(-1)), model(x))


def test_variance_of_the_weights():
    model = gf.models.ConvNet((3, 8, 8), (64, 64), 10, init_scale=0.5, key=KEY)
    for weights, fan_in in ((model.kernels[0], 27), (model.kernels[1], 576), (model.output, 256)):
        assert float(jnp.std(weights)) == pytest.approx(0.5 / np.sqrt(fan_in), rel=0.05)


@pytest.mark.slow
def test_flow_of_relu_conserves_differences_of_squared_norms():
    data = gf.data.digits(n=12, centre=True, labels="onehot")
    problem = gf.EmpiricalRisk(data.x, data.y, gf.losses.square)
    model = gf.models.ConvNet((8, 8), (2, 3), 10, activation=jax.nn.relu, use_bias=False, key=KEY)
    sol = gf.solve(gf.GradientFlow(problem), model, [5.0], rtol=1e-6, solver=gf.solvers.Tsit5())
    assert sol.drift["balancedness"] < 1e-5
    squares = [float(jnp.sum(m.kernels[0] ** 2)) for m in (model, jax.tree.map(lambda leaf: leaf[-1], sol.params))]
    assert abs(squares[1] - squares[0]) > 1e-3
    assert gf.models.ConvNet((8, 8), (2,), key=KEY).conserved() == {}


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (((8,), (2,)), {}, "`in_shape` must be"),
        (((8, 8), ()), {}, "`channels` must hold"),
        (((8, 8), (2, 2, 2, 2)), {}, "be fewer for images of 8 x 8"),
        (((8, 8), (2,)), {"kernel": 2}, "`kernel` must be odd"),
        (((8, 8), (2,), 0), {}, "`out_size`"),
    ],
)
def test_bad_input(args, options, message):
    with pytest.raises(ValueError, match=message):
        gf.models.ConvNet(*args, **options, key=KEY)
