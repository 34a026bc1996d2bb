"""Activation pattern: which neuron is active on which sample."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from gradflow._checks import check_finite, fail
from gradflow._tree import full_precision
from gradflow.protocols import HasPreactivations, offered


class ActivationPattern(eqx.Module):
    """Which hidden neurons are active on each sample: Boolean `(n, neurons)`.

    A neuron is active where its preactivation is positive.

    **Arguments**: `x`: inputs `(n, in_size)`; `preactivations`: function `(params, x_i) -> (neurons,)`, by default
    `params.preactivations(x_i)`, which `TwoLayer` and `MLP` have.

    **Raises** `ValueError` for inputs that are not finite, and for parameters without that method.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> model = gf.models.TwoLayer(2, 5, key=jax.random.key(0))
    >>> gf.observables.ActivationPattern(jnp.eye(2))(model).shape
    (2, 5)
    """

    x: Float[Array, "n in_size"]
    preactivations: Callable[[PyTree, Array], Array] | None

    def __init__(
        self, x: ArrayLike | Sequence[Sequence[float]], preactivations: Callable[[PyTree, Array], Array] | None = None
    ):
        check_finite("x", x)
        self.x = jnp.asarray(x)
        self.preactivations = preactivations

    @full_precision
    def __call__(self, params: PyTree) -> Bool[Array, "n neurons"]:
        if self.preactivations is not None:
            fn = self.preactivations
            return jax.vmap(lambda x: fn(params, x) > 0)(self.x)
        model = offered(params, HasPreactivations)
        if model is None:
            actual = f"None for parameters of type {type(params).__name__}, which have no method of that name"
            raise fail("preactivations", "be a function of parameters and one input", actual)
        return jax.vmap(lambda x: model.preactivations(x) > 0)(self.x)
