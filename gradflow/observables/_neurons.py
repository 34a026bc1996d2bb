"""Norms and angles of single neurons."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from gradflow._checks import check_finite, fail, is_concrete
from gradflow._tree import in_single, scaled_norm
from gradflow.protocols import HasNeurons, HasNeuronWeights, offered


class NeuronNorms(eqx.Module):
    """Norm of the weights of every neuron, incoming and outgoing: `(width,)`.

    **Arguments**: `weights`: function `params -> (width, size)`; by default `params.neuron_weights()`, which
    `gradflow.models.TwoLayer` has.

    **Raises** `ValueError` for parameters without that method.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> norms = gf.observables.NeuronNorms(weights=lambda params: params["w"])
    >>> norms({"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}).tolist()
    [5.0, 1.0]
    """

    weights: Callable[[PyTree], Array] | None = None

    @in_single
    def __call__(self, params: PyTree) -> Float[Array, " width"]:
        return jax.vmap(scaled_norm)(self.weights(params) if self.weights is not None else _weights(params))


class NeuronAngles(eqx.Module):
    """Angle in radians of the incoming weights of every neuron.

    With a reference direction `(in_size,)` or several `(k, in_size)`: the angle to it, in `[0, pi]`, of shape
    `(width,)` or `(width, k)`. Without one, for inputs in the plane: the polar angle, in `(-pi, pi]`. Angles near zero
    are exact: they come from the arctangent of chords. A neuron of weight zero has the angle NaN.

    **Arguments**: `reference`; `neurons`: function `params -> (width, in_size)`, by default `params.neurons()`.

    **Raises** `ValueError` without a reference unless the inputs lie in the plane, for one of zeros, not finite or of
    another size than the inputs, and for parameters without neurons.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> angles = gf.observables.NeuronAngles(jnp.array([1.0, 0.0]), neurons=lambda w: w)
    >>> [round(float(a), 4) for a in angles(jnp.array([[1e-9, 1e-9], [0.0, -2.0]]))]
    [0.7854, 1.5708]
    """

    reference: Float[Array, "*k in_size"] | None
    neurons: Callable[[PyTree], Array] | None

    def __init__(
        self,
        reference: ArrayLike | Sequence[float] | Sequence[Sequence[float]] | None = None,
        neurons: Callable[[PyTree], Array] | None = None,
    ):
        self.reference = None if reference is None else jnp.asarray(reference, float)
        check_finite("reference", self.reference)
        if self.reference is not None and self.reference.ndim not in (1, 2):
            raise fail("reference", "be one direction or a matrix of them", f"of shape {self.reference.shape}")
        if self.reference is not None and is_concrete(self.reference):
            zeros = int(np.sum(~np.any(np.atleast_2d(self.reference), axis=1)))
            if zeros:
                raise fail("reference", "not be a vector of zeros", f"one in {zeros} rows")
        self.neurons = neurons

    @in_single
    def __call__(self, params: PyTree) -> Float[Array, "width *k"]:
        rows = self.neurons(params) if self.neurons is not None else neurons_of(params)
        if self.reference is None:
            if rows.shape[1] != 2:
                actual = f"None for inputs of size {rows.shape[1]}"
                raise fail("reference", "be a direction unless the inputs lie in the plane", actual)
            angle = jnp.arctan2(rows[:, 1], rows[:, 0])
            return jnp.where(jnp.any(rows != 0, axis=1), angle, jnp.nan)
        if self.reference.shape[-1] != rows.shape[1]:
            actual = f"of shape {self.reference.shape} against weights of shape {rows.shape}"
            raise fail("reference", "have as many entries as the neurons have inputs", actual)
        units = _unit(rows)
        targets = _unit(jnp.atleast_2d(self.reference)).astype(rows.dtype)
        chord = jnp.linalg.norm(units[:, None, :] - targets[None, :, :], axis=2)
        other = jnp.linalg.norm(units[:, None, :] + targets[None, :, :], axis=2)
        angle = 2 * jnp.arctan2(chord, other)
        return angle[:, 0] if self.reference.ndim == 1 else angle


def _unit(rows: Float[Array, "rows size"]) -> Float[Array, "rows size"]:
    """Rows of length one; rows of zeros become NaN."""
    largest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
    scaled = rows / largest
    return scaled / jnp.linalg.norm(scaled, axis=1, keepdims=True)


def neurons_of(params: PyTree) -> Float[Array, "width in_size"]:
    """The incoming weights of the neurons of a model; refuses one without."""
    model = offered(params, HasNeurons)
    if model is None:
        raise _without(params, "neurons", "neurons")
    return model.neurons()


def _weights(params: PyTree) -> Float[Array, "width size"]:
    model = offered(params, HasNeuronWeights)
    if model is None:
        raise _without(params, "neuron_weights", "weights")
    return model.neuron_weights()


def _without(params: PyTree, method: str, argument: str) -> ValueError:
    actual = f"None for parameters of type {type(params).__name__}, which have no method `{method}`"
    return fail(argument, "be a function of the parameters", actual, "It returns one row per neuron.")
