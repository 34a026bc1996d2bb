"""Per-sample losses `l(prediction, target)`; each returns a scalar.

Margin losses (logistic, exponential, hinge) take targets of +1 and -1 and a prediction of the same shape; entries of a
vector prediction are summed. `EmpiricalRisk` refuses other targets, with which the same formulas give a loss that
means something else: targets of 0 would be ignored. Nothing here averages over samples: that is `EmpiricalRisk`'s part.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from gradflow._checks import fail

PerSampleLoss = Float[Array, ""]


def _same_shape(prediction: Array, target: Array) -> None:
    if jnp.shape(prediction) != jnp.shape(target):
        actual = f"{jnp.shape(target)} against predictions of shape {jnp.shape(prediction)}"
        advice = (
            'A model with out_size=None ("scalar" in Equinox) predicts a scalar per sample, one with out_size=k a'
            " vector of k; class indices become such vectors as jax.nn.one_hot(y, k)."
        )
        raise fail("y", "have the shape of the predictions, per sample", actual, advice)


def square(prediction: Float[Array, "*out"], target: Num[Array, "*out"]) -> PerSampleLoss:
    """`|p - y|^2 / 2`, summed over outputs.

    **Raises** `ValueError` for a target of another shape than the prediction.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> float(gf.losses.square(jnp.array(3.0), jnp.array(1.0)))
    2.0
    """
    _same_shape(prediction, target)
    return 0.5 * jnp.sum((prediction - target) ** 2)


def logistic(prediction: Float[Array, "*out"], target: Num[Array, "*out"]) -> PerSampleLoss:
    """`log(1 + exp(-p y))` for `y = +-1`; its slope at `p = 0` is `-y / 2`.

    **Raises** `ValueError` as `square` does.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> round(float(gf.losses.logistic(jnp.array(0.0), jnp.array(1.0))), 4)
    0.6931
    """
    _same_shape(prediction, target)
    return jnp.sum(jax.nn.softplus(-prediction * target))


def exponential(prediction: Float[Array, "*out"], target: Num[Array, "*out"]) -> PerSampleLoss:
    """`exp(-p y)` for `y = +-1`.

    **Raises** `ValueError` as `square` does.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> float(gf.losses.exponential(jnp.array(0.0), jnp.array(-1.0)))
    1.0
    """
    _same_shape(prediction, target)
    return jnp.sum(jnp.exp(-prediction * target))


def hinge(prediction: Float[Array, "*out"], target: Num[Array, "*out"]) -> PerSampleLoss:
    """`max(0, 1 - p y)` for `y = +-1`.

    **Raises** `ValueError` as `square` does.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> float(gf.losses.hinge(jnp.array(0.25), jnp.array(1.0)))
    0.75
    """
    _same_shape(prediction, target)
    return jnp.sum(jax.nn.relu(1 - prediction * target))


def cross_entropy(prediction: Float[Array, " classes"], target: Num[Array, "*classes"]) -> PerSampleLoss:
    """`-sum_c y_c log softmax(p)_c`, for class indices or probabilities `y`.

    An index outside `0 ... classes - 1` gives NaN, for the gradient as well, rather than the loss of a neighbouring
    class.

    **Raises** `ValueError` for a scalar prediction, and for probabilities of another number.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> round(float(gf.losses.cross_entropy(jnp.zeros(10), jnp.array(3))), 4)
    2.3026
    """
    if jnp.ndim(prediction) != 1:
        actual = f"a prediction of shape {jnp.shape(prediction)}"
        raise fail("predict", "give one score per class", actual, "Build the model with out_size=classes.")
    log_probabilities = jax.nn.log_softmax(prediction)
    if jnp.ndim(target) == 0 and jnp.issubdtype(jnp.result_type(target), jnp.integer):
        return -_entry(log_probabilities, target)
    _same_shape(prediction, target)
    return -jnp.sum(target * log_probabilities)


def _entry(values: Float[Array, " classes"], index: Int[Array, ""]) -> PerSampleLoss:
    valid = (index >= 0) & (index < values.shape[0])
    return values[jnp.where(valid, index, 0)] * jnp.where(valid, 1.0, jnp.nan).astype(values.dtype)
