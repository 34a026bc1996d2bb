"""Two-layer network without biases, `f(x) = sum_j a_j s(w_j . x)`: homogeneous of degree 2 for (leaky) ReLU."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Key

from gradflow._checks import check_callable, check_count
from gradflow._conserved import Conserved
from gradflow._homogeneity import is_degree_one
from gradflow._tree import scaled_norm
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


class TwoLayer(eqx.Module):
    """`f(x) = a s(W x)`, bias-free, both layers trained.

    `W` and `a` carry the multipliers of the parametrisation, if it has any.

    **Arguments**

    - `in_size`: input size `d`; `width`: number of neurons `m`.
    - `out_size`: number of outputs `k`; `None` for a scalar output.
    - `activation`: elementwise function; ReLU, leaky ReLU and the identity make the network 2-homogeneous.
    - `init_scale`: factor on all initial weights, the `delta` of small-initialisation theory. May be traced.
    - `parametrisation`: `"standard"`, `"ntk"`, `"mean_field"`, `"mup"` or a `gradflow.models.Parametrisation`.
    - `law`: initial law, see `gradflow.models.laws`.
    - `balanced`: rescale each `a_j` so that `|a_j| = |w_j|` (with the multipliers, see `imbalance`).
    - `dtype`: defaults to JAX's default float type.

    **Raises** `ValueError` for sizes below one, a scale that is not positive or too small for the `dtype`, an unknown
    parametrisation, a `dtype` of other than real floats, and an `activation` or `law` that cannot be called.

    >>> import gradflow as gf, jax
    >>> model = gf.models.TwoLayer(3, 8, activation=jax.nn.relu, init_scale=1e-3, key=jax.random.key(0))
    >>> model(jax.numpy.ones(3)).shape
    ()
    """

    weight: Float[Array, "width in_size"]
    output: Float[Array, "*out_size width"]
    activation: Callable[[Array], Array] = eqx.field(static=True)
    multipliers: Multipliers

    def __init__(
        self,
        in_size: int,
        width: int,
        out_size: int | None = None,
        *,
        activation: Callable[[Array], Array] = jax.nn.relu,
        init_scale: ArrayLike = 1.0,
        parametrisation: Parametrisation | str = standard,
        law: Callable[..., Array] = laws.normal,
        balanced: bool = False,
        dtype: DTypeLike | None = None,
        key: Key[Array, ""],
    ):
        check_count("in_size", in_size)
        check_count("width", width)
        if out_size is not None:
            check_count("out_size", out_size, advice="Use None for a scalar output.")
        check_callable("activation", activation, "activation(array)")
        dtype = resolve_dtype(dtype)
        check_scale(init_scale, dtype)
        scaling, sizes = resolve(parametrisation), {"fan_in": width, "in_size": in_size}
        first, second = jax.random.split(key)
        weight = draw(law, first, (width, in_size), init_scale * scaling.std("input", **sizes), dtype)
        output = draw(law, second, (out_size or 1, width), init_scale * scaling.std("output", **sizes), dtype)
        if balanced:
            output = output * (jax.vmap(scaled_norm)(weight) / jax.vmap(scaled_norm)(output.T))[None]
        self.weight = weight
        self.output = output[0] if out_size is None else output
        self.activation = activation
        self.multipliers = scaling.multipliers(("input", "output"), **sizes)

    def __call__(
        self, x: Float[Array, " in_size"], smoothing: Float[Array, ""] | float | None = None
    ) -> Float[Array, "*out_size"]:
        """The prediction; with `smoothing`, with kinks rounded where `|w . x| < smoothing |w| |x|`, see `Smoothed`."""
        z = self.preactivations(x)
        if smoothing is None:
            hidden = self.activation(z)
        else:
            hidden = smooth(self.activation, z, self.preactivation_bounds(x), smoothing)
        return self.readout(hidden)

    def readout(self, hidden: Float[Array, " width"]) -> Float[Array, "*out_size"]:
        """The prediction from the activations of all neurons, multiplier included."""
        return self.multipliers.of(1, hidden.dtype) * (self.output @ hidden)

    def preactivations(self, x: Float[Array, " in_size"]) -> Float[Array, " width"]:
        """`w_j . x` of every neuron, multiplier included."""
        return self.multipliers.of(0, self.weight.dtype) * (self.weight @ x)

    def preactivation_bounds(self, x: Float[Array, " in_size"]) -> Float[Array, " width"]:
        """`|w_j| |x|` of every neuron, multiplier included: the size that `smoothing` is relative to."""
        return self.multipliers.of(0, self.weight.dtype) * length(self.weight) * length(x)

    def neurons(self) -> Float[Array, "width in_size"]:
        """Incoming weights of every neuron."""
        return self.weight

    def neuron_weights(self) -> Float[Array, "width total"]:
        """All weights of every neuron: incoming, then outgoing."""
        return jnp.concatenate([self.weight, jnp.atleast_2d(self.output).T], axis=1)

    def with_neuron_weights(self, rows: Float[Array, "width total"]) -> "TwoLayer":
        """The network with other weights, one row per neuron as in `neuron_weights`; any number of neurons."""
        weight, output = rows[:, : self.weight.shape[1]], rows[:, self.weight.shape[1] :].T
        return eqx.tree_at(lambda m: (m.weight, m.output), self, (weight, output.reshape(*self.output.shape[:-1], -1)))

    def imbalance(self) -> Float[Array, " width"]:
        """`|a_j|^2 - |w_j|^2` of every neuron."""
        return jnp.sum(jnp.atleast_2d(self.output) ** 2, axis=0) - jnp.sum(self.weight**2, axis=1)

    def conserved(self) -> dict[str, Conserved]:
        """The imbalances, if the activation is homogeneous of degree one; they are constant along gradient flow."""
        if not is_degree_one(self.activation):
            return {}
        return {"balancedness": Conserved(self.imbalance(), jnp.sum(self.neuron_weights() ** 2, axis=1))}
