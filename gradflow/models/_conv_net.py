"""Convolutional network for small images, smooth by default."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Key, Shaped

from gradflow._checks import check_callable, check_count, fail
from gradflow._conserved import Conserved
from gradflow._homogeneity import is_degree_one
from gradflow.models import laws
from gradflow.models._parametrisation import check_scale, draw, resolve_dtype


class ConvNet(eqx.Module):
    """Convolutions with an activation and average pooling, then a linear layer.

        h_0 = x,    h_l = pool(s(W_l * h_{l-1} + b_l)),    f(x) = W vec(h_L) + b

    Images keep their size in a convolution and lose half of it in a pooling, which averages over squares of two pixels;
    an odd last row or column is left out. With GELU, the default, and averages instead of maxima the network is smooth,
    which its flow needs for its order and for long steps. Weights have the variance `init_scale^2 / fan_in`.

    With an activation of degree one, such as ReLU, and without biases, gradient flow conserves the differences of
    `|W_l|^2` between consecutive layers (`conserved`); with others nothing but the energy.

    **Arguments**

    - `in_shape`: of an image, `(height, width)` or `(channels, height, width)`; those of `gradflow.data`, which are
      vectors, are reshaped to it. `channels`: of each convolution. `out_size`: `None` for a scalar output.
    - `kernel`: odd number of pixels in each direction. `activation`, `init_scale`, `law`, `dtype`: as for `TwoLayer`.
    - `use_bias`: whether layers have biases, which start at zero.

    **Raises** `ValueError` as `TwoLayer` does, for an even `kernel`, no channels, and images that the poolings use up.

    >>> import gradflow as gf, jax
    >>> model = gf.models.ConvNet((8, 8), (4, 8), 10, key=jax.random.key(0))
    >>> model(jax.numpy.ones(64)).shape
    (10,)
    """

    kernels: tuple[Float[Array, "_ _ _ _"], ...]
    output: Float[Array, "out_size features"]
    biases: tuple[Float[Array, " _"], ...] | None
    activation: Callable[[Array], Array] = eqx.field(static=True)
    in_shape: tuple[int, int, int] = eqx.field(static=True)
    scalar: bool = eqx.field(static=True)

    def __init__(
        self,
        in_shape: tuple[int, ...],
        channels: tuple[int, ...],
        out_size: int | None = None,
        *,
        kernel: int = 3,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        init_scale: ArrayLike = 1.0,
        law: Callable[..., Array] = laws.normal,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        key: Key[Array, ""],
    ):
        if len(in_shape) not in (2, 3) or min(in_shape) < 1:
            raise fail("in_shape", "be (height, width) or (channels, height, width)", repr(tuple(in_shape)))
        if not len(channels):
            raise fail("channels", "hold at least one number of channels", "empty")
        for number in channels:
            check_count("channels", number)
        check_count("kernel", kernel)
        if kernel % 2 == 0:
            raise fail("kernel", "be odd", str(kernel), "So an image keeps its size.")
        if out_size is not None:
            check_count("out_size", out_size, advice="Use None for a scalar output.")
        check_callable("activation", activation, "activation(array)")
        dtype = resolve_dtype(dtype)
        check_scale(init_scale, dtype)
        depth, height, width = (1, *in_shape)[-3:]
        left = height // 2 ** len(channels), width // 2 ** len(channels)
        if min(left) < 1:
            raise fail(
                "channels", f"be fewer for images of {height} x {width}", f"{len(channels)}, one for each halving"
            )
        *keys, last = jax.random.split(key, len(channels) + 1)
        sizes = (depth, *channels)
        self.kernels = tuple(
            draw(law, k, (new, old * kernel**2), init_scale / jnp.sqrt(old * kernel**2), dtype).reshape(
                new, old, kernel, kernel
            )
            for k, old, new in zip(keys, sizes[:-1], sizes[1:], strict=True)
        )
        features, outputs = channels[-1] * math.prod(left), out_size or 1
        self.output = draw(law, last, (outputs, features), init_scale / jnp.sqrt(features), dtype)
        self.biases = tuple(jnp.zeros(size, dtype) for size in (*channels, outputs)) if use_bias else None
        self.activation = activation
        self.in_shape, self.scalar = (depth, height, width), out_size is None

    def __call__(self, x: Shaped[Array, "*pixels"]) -> Float[Array, "*out_size"]:
        h = x.reshape(self.in_shape).astype(self.output.dtype)
        for layer, kernel in enumerate(self.kernels):
            h = jax.lax.conv_general_dilated(h[None], kernel, window_strides=(1, 1), padding="SAME")[0]
            if self.biases is not None:
                h = h + self.biases[layer][:, None, None]
            h = _averaged(self.activation(h))
        y = self.output @ h.reshape(-1)
        y = y if self.biases is None else y + self.biases[-1]
        return y[0] if self.scalar else y

    def conserved(self) -> dict[str, Conserved]:
        """Differences of the squared norms of consecutive layers, where the activation is of degree one."""
        if self.biases is not None or not is_degree_one(self.activation):
            return {}
        squares = jnp.stack([jnp.sum(weights**2) for weights in (*self.kernels, self.output)])
        return {"balancedness": Conserved(squares[1:] - squares[:-1], squares[1:] + squares[:-1])}


def _averaged(h: Float[Array, "channels height width"]) -> Float[Array, "channels half_height half_width"]:
    """Averages over squares of two pixels."""
    channels, height, width = h.shape
    h = h[:, : height // 2 * 2, : width // 2 * 2]
    return h.reshape(channels, height // 2, 2, width // 2, 2).mean((2, 4))
