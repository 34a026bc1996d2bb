"""Single layer of trained neurons, `f(x) = sum_j s(w_j . x)`: of degree 2 for the squared ReLU."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Key

from gradflow._checks import check_callable, check_count
from gradflow.models import laws
from gradflow.models._parametrisation import check_scale, draw, resolve_dtype


def squared_relu(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """`max(0, z)^2`, homogeneous of degree 2 and once differentiable.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> gf.models.squared_relu(jnp.array([-1.0, 2.0])).tolist()
    [0.0, 4.0]
    """
    return jax.nn.relu(z) ** 2


class OneLayer(eqx.Module):
    """`f(x) = sum_j s(w_j . x)`, bias-free, with output weights fixed at one.

    **Arguments**: `in_size`; `width`; `activation`, squared ReLU by default; `init_scale`, standard deviation of the
    weights; `law`, see `gradflow.models.laws`; `dtype`; `key`.

    **Raises** `ValueError` as `TwoLayer` does.

    Source: A. Kumar and J. Haupt (2024), arXiv 2402.09226, Figure 1.

    >>> import gradflow as gf, jax
    >>> gf.models.OneLayer(2, 8, init_scale=1e-3, key=jax.random.key(0))(jax.numpy.ones(2)).shape
    ()
    """

    weight: Float[Array, "width in_size"]
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        in_size: int,
        width: int,
        *,
        activation: Callable[[Array], Array] = squared_relu,
        init_scale: ArrayLike = 1.0,
        law: Callable[..., Array] = laws.normal,
        dtype: DTypeLike | None = None,
        key: Key[Array, ""],
    ):
        check_count("in_size", in_size)
        check_count("width", width)
        check_callable("activation", activation, "activation(array)")
        dtype = resolve_dtype(dtype)
        check_scale(init_scale, dtype)
        self.weight = draw(law, key, (width, in_size), init_scale, dtype)
        self.activation = activation

    def __call__(self, x: Float[Array, " in_size"]) -> Float[Array, ""]:
        return jnp.sum(self.activation(self.weight @ x))

    def neurons(self) -> Float[Array, "width in_size"]:
        """Weights of every neuron."""
        return self.weight

    def neuron_weights(self) -> Float[Array, "width in_size"]:
        """All weights of every neuron."""
        return self.weight

    def with_neuron_weights(self, rows: Float[Array, "width in_size"]) -> "OneLayer":
        """The network with other weights, one row per neuron; any number of neurons."""
        return eqx.tree_at(lambda m: m.weight, self, rows)
