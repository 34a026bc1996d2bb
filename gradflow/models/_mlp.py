"""Multi-layer perceptron with any number of hidden layers of equal width."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Key

from gradflow._checks import check_callable, check_count
from gradflow.models import laws
from gradflow.models._parametrisation import (
    Multipliers,
    Parametrisation,
    check_scale,
    draw,
    resolve,
    resolve_dtype,
    standard,
)
from gradflow.models._smoothed import length, smooth


class MLP(eqx.Module):
    """`f(x) = W_L s(... s(W_1 x + b_1) ...) + b_L`, a multilayer perceptron.

    Every `W` carries the multiplier of the parametrisation.

    **Arguments**

    - `in_size`, `width`, `out_size` (`None` for a scalar output), `depth`: number of hidden layers, at least one.
    - `activation`, `init_scale`, `parametrisation`, `law`, `dtype`: as for `TwoLayer`.
    - `use_bias`: whether layers have biases, which start at zero.

    **Raises** `ValueError` as `TwoLayer` does, and for a depth below one.

    >>> import gradflow as gf, jax
    >>> model = gf.models.MLP(4, 16, 3, depth=2, activation=jax.nn.tanh, key=jax.random.key(0))
    >>> model(jax.numpy.ones(4)).shape
    (3,)
    """

    weights: tuple[Float[Array, "_ _"], ...]
    biases: tuple[Float[Array, " _"], ...] | None
    activation: Callable[[Array], Array] = eqx.field(static=True)
    multipliers: Multipliers
    scalar: bool = eqx.field(static=True)

    def __init__(
        self,
        in_size: int,
        width: int,
        out_size: int | None = None,
        *,
        depth: int = 1,
        activation: Callable[[Array], Array] = jax.nn.tanh,
        init_scale: ArrayLike = 1.0,
        parametrisation: Parametrisation | str = standard,
        law: Callable[..., Array] = laws.normal,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        key: Key[Array, ""],
    ):
        check_count("in_size", in_size)
        check_count("width", width)
        check_count("depth", depth, advice="It counts hidden layers.")
        if out_size is not None:
            check_count("out_size", out_size, advice="Use None for a scalar output.")
        check_callable("activation", activation, "activation(array)")
        dtype = resolve_dtype(dtype)
        check_scale(init_scale, dtype)
        scaling = resolve(parametrisation)
        names = ["input"] + ["hidden"] * (depth - 1) + ["output"]
        sizes = [in_size] + [width] * depth + [out_size or 1]
        of_layer = {"fan_in": width, "in_size": in_size}
        self.weights = tuple(
            draw(law, k, (sizes[i + 1], sizes[i]), init_scale * scaling.std(name, **of_layer), dtype)
            for i, (name, k) in enumerate(zip(names, jax.random.split(key, depth + 1), strict=True))
        )
        self.biases = tuple(jnp.zeros(size, dtype) for size in sizes[1:]) if use_bias else None
        self.activation = activation
        self.multipliers = scaling.multipliers(names, **of_layer)
        self.scalar = out_size is None

    def __call__(
        self, x: Float[Array, " in_size"], smoothing: Float[Array, ""] | float | None = None
    ) -> Float[Array, "*out_size"]:
        """The prediction; with `smoothing`, with rounded kinks, see `Smoothed`.

        A neuron with bias `b` counts as one with weights `(w, b)` on inputs `(h, 1)`, `h` the (smoothed) output of the
        layer below, through whose norm the gradient passes: the field remains a gradient, and every layer keeps its
        homogeneity.
        """
        y = self._affine(0, x)
        for layer in range(1, len(self.weights)):
            if smoothing is None:
                x = self.activation(y)
            else:
                x = smooth(self.activation, y, self._size(layer - 1, x), smoothing)
            y = self._affine(layer, x)
        return y[0] if self.scalar else y

    def preactivations(self, x: Float[Array, " in_size"]) -> Float[Array, " neurons"]:
        """Preactivations of all hidden neurons, layer after layer."""
        layers = [self._affine(0, x)]
        for layer in range(1, len(self.weights) - 1):
            layers.append(self._affine(layer, self.activation(layers[-1])))
        return jnp.concatenate(layers)

    def _size(self, layer: int, x: Float[Array, " fan_in"]) -> Float[Array, " fan_out"]:
        """The largest preactivation that weights of the size of each neuron's can give: `|(w, b)| |(x, 1)|`."""
        rows = self.multipliers.of(layer, x.dtype) * self.weights[layer]
        if self.biases is not None:
            rows = jnp.concatenate([rows, self.biases[layer][:, None]], axis=1)
            x = jnp.concatenate([x, jnp.ones(1, x.dtype)])
        return length(rows) * length(x)

    def _affine(self, layer: int, x: Float[Array, " fan_in"]) -> Float[Array, " fan_out"]:
        y = self.multipliers.of(layer, x.dtype) * (self.weights[layer] @ x)
        return y if self.biases is None else y + self.biases[layer]
