"""Neuron partition: which neurons are of the right sign for a sample, and which are active on it."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Int, Int8, PyTree, Shaped

from gradflow._checks import check_finite, fail
from gradflow._tree import full_precision
from gradflow.problems._labels import LabelKind, check_inputs_of_length, label_kind, towards_label
from gradflow.protocols import OneHiddenLayer, missing

FALSE_DEAD, FALSE_LIVING, TRUE_DEAD, TRUE_LIVING = range(4)


class NeuronPartition(eqx.Module):
    """The part that neuron `k` belongs to on sample `i`, as a code `(n, neurons)`:

        0 false-dead      a_k y_i <= 0,  w_k . x_i <= 0          2 true-dead       a_k y_i > 0,  w_k . x_i <= 0
        1 false-living    a_k y_i <= 0,  w_k . x_i > 0           3 true-living     a_k y_i > 0,  w_k . x_i > 0

    of a two-layer network `f(x) = sum_k a_k s(w_k . x)`; with several outputs `a_k y_i` is the weight from neuron `k`
    to the output of the class of sample `i`.

    If `y_i y_j x_i . x_j >= 0` for all pairs (`gradflow.theory.partition_condition`) and the loss drives every
    prediction towards its label, then true-living and false-dead sets never lose a member, along gradient flow, and
    along gradient descent and SGD with steps of any size, as long as `a_k` keeps its sign.

    `switches` finds the events in a recorded history, and whether these sets lost any.

    **Arguments**: `x`: inputs `(n, in_size)`; `y`: labels, +1 and -1 `(n,)`, for vector outputs class indices `(n,)` or
    one-hot rows. The parameters need `preactivations` and `readout`, as `gradflow.models.TwoLayer` has them.

    **Raises** `ValueError` for inputs that are not finite or of norm zero, labels of another kind or number, and other
    parameters.

    Source: M. Wang and C. Ma (2022), *Early Stage Convergence and Global Convergence of Training Mildly Parameterized
    Neural Networks*, arXiv 2206.02139.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> model = gf.models.TwoLayer(2, 5, key=jax.random.key(0))
    >>> gf.observables.NeuronPartition(jnp.eye(2), jnp.array([1.0, -1.0]))(model).shape
    (2, 5)
    """

    x: Float[Array, "n in_size"]
    y: Shaped[Array, "n ..."]
    kind: LabelKind = eqx.field(static=True)

    def __init__(self, x: ArrayLike, y: ArrayLike):
        check_finite("x", x)
        check_inputs_of_length(x)
        self.x, self.y = jnp.asarray(x), jnp.asarray(y)
        if self.x.ndim != 2 or self.y.shape[:1] != self.x.shape[:1]:
            raise fail("y", "have one label per input (in_size,)", f"of shape {self.y.shape} against {self.x.shape}")
        self.kind = label_kind(self.y)

    @full_precision
    def __call__(self, params: PyTree) -> Int8[Array, "n neurons"]:
        lacking = missing(params, OneHiddenLayer)
        if lacking:
            actual = f"of type {type(params).__name__}, without `{lacking[0]}`"
            raise fail("params", "be a network with one hidden layer, as gradflow.models.TwoLayer is", actual)
        z = jax.vmap(params.preactivations)(self.x)
        a = output_weights(params, z.shape[1], z.dtype)
        n = self.x.shape[0]
        labelled = jax.vmap(lambda one: towards_label(jnp.broadcast_to(one, (n, *one.shape)), self.y, self.kind)[0])(a)
        return 2 * (labelled.T > 0).astype(jnp.int8) + (z > 0).astype(jnp.int8)


class PartitionCounts(eqx.Module):
    """Pairs of sample and neuron in each part of `NeuronPartition`: `(4,)`.

    **Arguments**, **Raises**: as for `NeuronPartition`.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> model = gf.models.TwoLayer(2, 5, key=jax.random.key(0))
    >>> int(gf.observables.PartitionCounts(jnp.eye(2), jnp.array([1.0, -1.0]))(model).sum())
    10
    """

    partition: NeuronPartition

    def __init__(self, x: ArrayLike, y: ArrayLike):
        self.partition = NeuronPartition(x, y)

    def __call__(self, params: PyTree) -> Int[Array, "4"]:
        codes = self.partition(params)
        return jnp.stack([jnp.sum(codes == code) for code in range(4)])


def output_weights(params: PyTree, width: int, dtype: DTypeLike) -> Float[Array, "neurons *classes"]:
    """What each neuron contributes to the outputs for an activation of one, multiplier included."""
    return jnp.moveaxis(jax.jacrev(params.readout)(jnp.zeros(width, dtype)), -1, 0)
