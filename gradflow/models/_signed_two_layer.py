"""Two-layer network with fixed output signs, `f(x) = m^(-1/2) sum_r a_r s(w_r . x)`, as theories of wide nets have
it."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Int8, Key

from gradflow._checks import check_callable, check_count
from gradflow.models._parametrisation import check_scale, resolve_dtype
from gradflow.models._smoothed import length, smooth


class SignedTwoLayer(eqx.Module):
    """`f(x) = m^(-1/2) sum_r a_r s(w_r . x)`, with fixed signs `a_r`.

    `a_r = +-1` at random, and `w_r ~ N(0, init_scale^2 I)` trained.

    The signs are integers, so no flow moves them. Started at `init_scale = 1`, single neurons move by `m^(-1/2)` in
    training and the tangent kernel hardly at all: the regime of S. S. Du et al. (2018), arXiv 1810.02054.

    **Arguments**: `in_size`: input size `d`; `width`: number of neurons `m`; `activation`: elementwise function;
    `init_scale`: may be traced; `dtype`: defaults to JAX's default float type.

    **Raises** `ValueError` as `TwoLayer` does.

    >>> import gradflow as gf, jax
    >>> model = gf.models.SignedTwoLayer(3, 8, key=jax.random.key(0))
    >>> model(jax.numpy.ones(3)).shape, model.weight.shape
    ((), (8, 3))
    """

    weight: Float[Array, "width in_size"]
    signs: Int8[Array, " width"]
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        in_size: int,
        width: int,
        *,
        activation: Callable[[Array], Array] = jax.nn.relu,
        init_scale: ArrayLike = 1.0,
        dtype: DTypeLike | None = None,
        key: Key[Array, ""],
    ):
        check_count("in_size", in_size)
        check_count("width", width)
        check_callable("activation", activation, "activation(array)")
        dtype = resolve_dtype(dtype)
        check_scale(init_scale, dtype)
        first, second = jax.random.split(key)
        self.weight = jnp.asarray(init_scale, dtype) * jax.random.normal(first, (width, in_size), dtype)
        self.signs = jax.random.rademacher(second, (width,), jnp.int8)
        self.activation = activation

    def __call__(
        self, x: Float[Array, " in_size"], smoothing: Float[Array, ""] | float | None = None
    ) -> Float[Array, ""]:
        """The prediction; with `smoothing`, with kinks rounded where `|w . x| < smoothing |w| |x|`, see `Smoothed`."""
        z = self.preactivations(x)
        if smoothing is None:
            return self.readout(self.activation(z))
        return self.readout(smooth(self.activation, z, self.preactivation_bounds(x), smoothing))

    def readout(self, hidden: Float[Array, " width"]) -> Float[Array, ""]:
        """The prediction from the activations of all neurons."""
        return self.signs.astype(hidden.dtype) @ hidden / self.signs.size**0.5

    def preactivations(self, x: Float[Array, " in_size"]) -> Float[Array, " width"]:
        """`w_r . x` of every neuron."""
        return self.weight @ x

    def preactivation_bounds(self, x: Float[Array, " in_size"]) -> Float[Array, " width"]:
        """`|w_r| |x|` of every neuron: the size that `smoothing` is relative to."""
        return length(self.weight) * length(x)

    def neurons(self) -> Float[Array, "width in_size"]:
        """Incoming weights of every neuron."""
        return self.weight
