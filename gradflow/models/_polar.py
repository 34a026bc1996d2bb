"""Polar coordinates of parameters, `w = exp(log_norm) u` with `|u| = 1`: a start that no float could hold as `w`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from gradflow._checks import check_finite, fail, is_concrete
from gradflow._tree import join, scaled_norm, split, tree_norm
from gradflow.protocols import TakesNeuronWeights, offered


class Polar(eqx.Module):
    """Parameters as a direction of length one and the logarithm of their norm, as one, or neuron by neuron.

        w = exp(log_norm) u,  |u| = 1            log_norm ()
        w_j = exp(log_norm_j) u_j,  |u_j| = 1    log_norm (width,)

    A start from here may be of any size: `log_norm=-2302.6` is `|w| = 1e-1000`. Observables along a run see ordinary
    parameters, which are zero where they underflow; those that know of coordinates, such as
    `gradflow.observables.LogNorm`, see these.

    **Arguments**

    - `direction`: parameters of any length but zero; they are normalised. Neuron by neuron they need the methods
      `neuron_weights()` and `with_neuron_weights(rows)`, as `gradflow.models.TwoLayer` and `DiagonalLinear` have.
    - `log_norm`: natural logarithm of the norm, a scalar or one per neuron.
    - `clock`: time of a flow whose own time is another one; see `gradflow.PolarFlow(time="sundman")`.

    **Raises** `ValueError` for a direction of zeros, numbers that are not finite, and the wrong number of norms.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> start = gf.Polar(jnp.array([3.0, 4.0]), log_norm=-1000.0)
    >>> [round(float(u), 2) for u in start.direction], float(start.ordinary().max())
    ([0.6, 0.8], 0.0)
    """

    direction: PyTree
    log_norm: Float[Array, "*neurons"]
    clock: Float[Array, ""]

    def __init__(self, direction: PyTree, log_norm: ArrayLike, clock: ArrayLike = 0.0):
        trainable, frozen = split(direction)
        check_finite("direction", trainable)
        check_finite("log_norm", log_norm, "The limit of norm zero is that of `gradflow.theory`.")
        dtype = jnp.result_type(*jax.tree_util.tree_leaves(trainable))
        self.log_norm = jnp.asarray(log_norm, dtype)
        self.clock = jnp.asarray(clock, dtype)
        if self.log_norm.ndim == 0:
            self.direction = join(normalised(trainable)[0], frozen)
            return
        rows = neuron_rows(direction)
        if self.log_norm.shape != (rows.shape[0],):
            actual = f"of shape {self.log_norm.shape}"
            raise fail("log_norm", f"be a scalar or of shape ({rows.shape[0]},), one per neuron", actual)
        self.direction = with_rows(direction, unit_rows(rows)[0])

    @classmethod
    def of(cls, params: PyTree, *, neurons: bool = False) -> "Polar":
        """The polar coordinates of ordinary parameters, as one or neuron by neuron."""
        trainable, _ = split(params)
        if not neurons:
            return cls(params, jnp.log(normalised(trainable)[1]))
        return cls(params, jnp.log(unit_rows(neuron_rows(params))[1]))

    def ordinary(self) -> PyTree:
        """The parameters `w` themselves; zero where they underflow."""
        return self._scaled(self.log_norm)

    def ordinary_up_to_scale(self) -> PyTree:
        """The parameters divided by the norm of the largest neuron, or by their norm: they underflow nowhere."""
        return self._scaled(self.log_norm - jnp.max(self.log_norm))

    def _scaled(self, log_norm: Float[Array, "*neurons"]) -> PyTree:
        if log_norm.ndim:
            return with_rows(self.direction, jnp.exp(log_norm)[:, None] * neuron_rows(self.direction))
        size = jnp.exp(log_norm)
        flowing, static = eqx.partition(self.direction, eqx.is_inexact_array)
        return join(jax.tree_util.tree_map(lambda leaf: size * leaf, flowing), static)


def normalised(trainable: PyTree) -> tuple[PyTree, Float[Array, ""]]:
    """A pytree of arrays divided by its norm, and that norm; a start at zero has no direction and is refused."""
    size = tree_norm(trainable)
    if is_concrete(size) and not float(size) > 0:
        advice = "Zero is a saddle of the flow, where nothing moves. The limit of a vanishing start is followed by"
        advice += " gradflow.Polar(direction, log_norm) and by gradflow.theory."
        raise fail("params", "not be zero", "zero in all entries", advice)
    return jax.tree_util.tree_map(lambda leaf: leaf / size.astype(leaf.dtype), trainable), size


def neuron_rows(params: PyTree) -> Float[Array, "width size"]:
    """All weights of every neuron, as rows."""
    model = offered(params, TakesNeuronWeights)
    if model is None:
        actual = f"of type {type(params).__name__}, which lacks them"
        raise fail("params", "have the methods `neuron_weights` and `with_neuron_weights`", actual)
    return model.neuron_weights()


def with_rows(params: PyTree, rows: Float[Array, "width size"]) -> PyTree:
    """The same parameters with other weights of the neurons."""
    model: TakesNeuronWeights = params
    return model.with_neuron_weights(rows)


def unit_rows(rows: Float[Array, "width size"]) -> tuple[Float[Array, "width size"], Float[Array, " width"]]:
    """Rows divided by their norms, and these; a neuron of zeros has no direction and is refused."""
    sizes = jax.vmap(scaled_norm)(rows)
    if is_concrete(sizes) and not np.all(np.asarray(sizes) > 0):
        raise fail("params", "hold no neuron of zeros", f"zero in {int(np.sum(np.asarray(sizes) <= 0))} neurons")
    return rows / sizes[:, None], sizes
