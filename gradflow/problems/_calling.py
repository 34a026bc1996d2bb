"""Calling a model on a batch, and saying why it could not be called."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, PyTree, Shaped

from gradflow._checks import fail

Predict = Callable[[PyTree, PyTree[Array]], Array]
"""Predictions on a batch: `predict(params, x)`."""


def call_model(params: PyTree, inputs: PyTree[Shaped[Array, "m ..."]]) -> Array:
    """Predictions of parameters that are called on one sample, as Equinox models are.

    **Raises** `ValueError` for parameters that cannot be called, and for layers that ask for a key or a state.
    """
    _check_called(params)
    try:
        return jax.vmap(params)(inputs)
    except Exception as error:
        layers = _layers_that_ask_for_more(params)
        if not layers:
            raise
        actual = f"a model with {' and '.join(layers)}, which cannot ({error})"
        advice = (
            "A gradient flow is deterministic: put such layers into inference mode with"
            " equinox.nn.inference_mode(model), or pass predict=..., a function (params, x) -> predictions that hands"
            " them their key or state."
        )
        raise fail("params", "be callable on one sample alone when predict=None", actual, advice) from error


def call_predict(predict: Predict, params: PyTree, inputs: PyTree[Shaped[Array, "m ..."]]) -> Array:
    """`predict(params, inputs)`.

    **Raises** `ValueError` where it fails, but would not with its arguments swapped, or on one sample at a time.
    """
    try:
        return predict(params, inputs)
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        if _works(lambda p, x: predict(x, p), params, inputs):
            actual = "one that works as predict(x, params) alone"
            raise fail("predict", "take the parameters first", actual, "Swap its arguments.") from error
        if _works(lambda p, x: jax.vmap(lambda one: predict(p, one))(x), params, inputs):
            actual = "one that works on a single sample alone"
            advice = "Pass jax.vmap(predict, in_axes=(None, 0))."
            raise fail("predict", "take the parameters and the whole batch", actual, advice) from error
        raise


def _check_called(params: PyTree) -> None:
    if not callable(params):
        advice = "Pass predict=..., a function (params, x) -> predictions."
        raise fail("params", "be callable when predict=None", f"of type {type(params).__name__}", advice)


def _batch(predictions: object, inputs: PyTree[Array]) -> bool:
    shape = getattr(predictions, "shape", ())
    return bool(shape) and shape[0] == jax.tree_util.tree_leaves(inputs)[0].shape[0]


def _works(predict: Predict, params: PyTree, inputs: PyTree[Array]) -> bool:
    """Whether this gives an array with an entry for every input; found out without computing anything."""
    try:
        return _batch(eqx.filter_eval_shape(predict, params, inputs), inputs)
    except Exception:  # any exception of the user's function means no
        return False


def _layers_that_ask_for_more(params: PyTree) -> list[str]:
    """Names of layers that cannot be called on a sample alone: those that draw random numbers, or hold a state."""
    types = (eqx.nn.Dropout, eqx.nn.BatchNorm, eqx.nn.SpectralNorm)
    nodes = jax.tree_util.tree_leaves(params, is_leaf=lambda node: isinstance(node, types))
    layers = [node for node in nodes if isinstance(node, types)]
    return sorted({type(node).__name__ for node in layers if not (isinstance(node, eqx.nn.Dropout) and node.inference)})
