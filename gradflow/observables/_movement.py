"""How far neurons have moved."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from gradflow._checks import fail
from gradflow._tree import in_single, scaled_norm
from gradflow.protocols import HasNeurons, offered


class NeuronMovement(eqx.Module):
    """Distance of every neuron's incoming weights from their start: `(width,)`.

    In networks wide enough for the tangent kernel to stay put, the largest falls like `width^(-1/2)`, and the norm of
    them all together does not depend on the width.

    **Arguments**: `start`: the parameters at the start; `neurons`: function `params -> (width, in_size)`, by default
    `params.neurons()`.

    **Raises** `ValueError` for parameters without neurons, and of another shape than those at the start.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> movement = gf.observables.NeuronMovement(jnp.zeros((2, 2)), neurons=lambda w: w)
    >>> movement(jnp.array([[3.0, 4.0], [0.0, 1.0]])).tolist()
    [5.0, 1.0]
    """

    start: Float[Array, "width in_size"]
    neurons: Callable[[PyTree], Array] | None

    def __init__(self, start: PyTree, neurons: Callable[[PyTree], Array] | None = None):
        self.neurons = neurons
        self.start = self._rows(start)

    @in_single
    def __call__(self, params: PyTree) -> Float[Array, " width"]:
        now = self._rows(params)
        if now.shape != self.start.shape:
            raise fail("start", f"hold neurons of shape {now.shape}, as the run does", f"of {self.start.shape}")
        return jax.vmap(scaled_norm)(now - self.start)

    def _rows(self, params: PyTree) -> Float[Array, "width in_size"]:
        if self.neurons is not None:
            return self.neurons(params)
        model = offered(params, HasNeurons)
        if model is None:
            actual = f"None for parameters of type {type(params).__name__}, which have no method `neurons`"
            raise fail("neurons", "be a function of the parameters", actual, "It returns one row per neuron.")
        return model.neurons()
