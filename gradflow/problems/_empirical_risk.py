"""The empirical risk `L(theta) = mean_i l(f(x_i; theta), y_i)`, or the sum."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from gradflow._checks import check_callable, check_choice, check_finite, fail, is_concrete
from gradflow._conserved import Conserved
from gradflow._tree import full_precision
from gradflow.problems._calling import Predict, call_model, call_predict
from gradflow.problems._labels import Loss, check_labels, check_targets
from gradflow.problems.losses import cross_entropy
from gradflow.protocols import Conserves, ConservesAlong, offered


class EmpiricalRisk(eqx.Module):
    """Loss of a model on a data set, as a function of the parameters.

        L(theta) = (1/n) sum_i l(f(x_i; theta), y_i)        reduction="mean"
        L(theta) =       sum_i l(f(x_i; theta), y_i)        reduction="sum"

    The data are leaves of the pytree: a second problem of the same shapes compiles nothing anew. A sum runs `n` times
    as fast in flow time as a mean.

    **Arguments**

    - `x`: inputs `(n, ...)`; `y`: targets `(n, ...)`.
    - `loss`: per-sample loss `(prediction, target) -> scalar`, see `gradflow.losses`.
    - `predict`: `predict(params, x) -> predictions` with leading axis `n`, for plain functions or Flax models. With
      `None`, `params` itself is called on each sample, as Equinox models are.
    - `reduction`: `"mean"` or `"sum"`.

    **Raises** `ValueError` for data that are empty, not numbers, not finite or of different lengths, for targets other
    than +1 and -1 of a margin loss, and other than class indices or probabilities of `cross_entropy` (traced ones
    cannot be looked at), for a `loss` or `predict` that cannot be called, and an unknown reduction; and, when first
    evaluated, for class indices beyond the outputs of the model, a loss that is not scalar per sample, a `predict` with
    its arguments swapped or for one sample, and for parameters that cannot be called without a `predict`.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), loss=gf.losses.square, predict=lambda w, x: x @ w)
    >>> float(problem(jnp.zeros(2)))
    0.5
    """

    x: Shaped[Array, "n ..."]
    y: Shaped[Array, "n ..."]
    loss: Loss
    predict: Predict | None = None
    reduction: Literal["mean", "sum"] = eqx.field(static=True, default="mean")

    def __init__(
        self,
        x: PyTree,
        y: PyTree,
        loss: Loss,
        predict: Predict | None = None,
        reduction: Literal["mean", "sum"] = "mean",
    ):
        check_callable("loss", loss, "loss(prediction, target)", "See `gradflow.losses`.")
        if predict is not None:
            check_callable("predict", predict, "predict(params, x)")
        check_choice("reduction", reduction, ("mean", "sum"))
        x, y = _as_array("x", x), _as_array("y", y)
        if x.ndim == 0 or y.ndim == 0 or x.shape[0] == 0:
            raise fail("x", "hold at least one sample along its leading axis", f"of shape {x.shape} (y: {y.shape})")
        if x.shape[0] != y.shape[0]:
            raise fail("y", "have as many entries as `x` has samples", f"{y.shape[0]} against {x.shape[0]}")
        advice = "Remove or impute the samples concerned."
        check_finite("x", x, advice)
        check_finite("y", y, advice)
        check_targets(loss, y)
        self.x, self.y, self.loss, self.predict, self.reduction = x, y, loss, predict, reduction

    def predictions(self, params: PyTree, x: Shaped[Array, "m ..."] | None = None) -> Shaped[Array, "m ..."]:
        """Predictions at the data, or at other inputs `x`."""
        inputs = self.x if x is None else x
        return call_model(params, inputs) if self.predict is None else call_predict(self.predict, params, inputs)

    def per_sample(self, params: PyTree) -> Float[Array, " n"]:
        """The loss of every sample."""
        predictions = self.predictions(params)
        shape = jnp.shape(predictions)
        if not shape or shape[0] != self.x.shape[0]:
            advice = "`predict` takes the whole batch, not one sample. Its first argument are the parameters."
            raise fail("predict", f"return {self.x.shape[0]} predictions", f"returning shape {shape}", advice)
        check_labels(self.loss, self.y, shape[1:])
        losses = jax.vmap(self.loss)(predictions, self.y)
        if jnp.shape(losses) != (self.x.shape[0],):
            actual = f"of shape {jnp.shape(losses)[1:]} per sample"
            raise fail("loss", "return a scalar per sample", actual, "Sum over outputs inside the loss.")
        return losses

    def residuals(self, predictions: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """The residuals `-dL/dp_i`, the negative derivatives of the loss, with the factor `1/n` of a mean.

        At predictions of zero they drive a network out of a small initialisation: see `gradflow.NeuralCorrelation`.
        """
        slopes = jax.vmap(jax.grad(self.loss))(predictions, self.y)
        return -slopes / self.x.shape[0] if self.reduction == "mean" else -slopes

    def of_predictions(self, predictions: Float[Array, "n ..."]) -> Float[Array, ""]:
        """The risk of given predictions."""
        losses = jax.vmap(self.loss)(predictions, self.y)
        return jnp.mean(losses) if self.reduction == "mean" else jnp.sum(losses)

    @full_precision
    def __call__(self, params: PyTree) -> Float[Array, ""]:
        losses = self.per_sample(params)
        return jnp.mean(losses) if self.reduction == "mean" else jnp.sum(losses)

    def check_start(self, params: PyTree) -> None:
        """Raises `ValueError` for class indices beyond the outputs of the model; looks only where these are known."""
        if self.loss is cross_entropy and is_concrete((self.y, params)):
            predictions = eqx.filter_eval_shape(self.predictions, params)
            check_labels(self.loss, self.y, jnp.shape(predictions)[1:])

    def why_not_finite(self, params: PyTree) -> str:
        """What is known about a loss that is not finite, in words; empty where it is finite."""
        bad = ~np.isfinite(np.asarray(self.per_sample(params), float))
        if not np.any(bad):
            return ""
        first = int(np.argmax(bad))
        target = np.array2string(np.asarray(self.y[first]), threshold=4)
        return (
            f"The loss is not finite in {int(bad.sum())} of {bad.size} samples, the first at index {first}, where"
            f" y = {target}: look for labels that the loss does not take."
        )

    def conserved(self, params: PyTree) -> dict[str, Conserved]:
        """What gradient flow of this risk conserves, as far as the model knows (`params.conserved()`).

        A `predict` may know as well (`predict.conserved(params)`).
        """
        if self.predict is not None:
            predict = offered(self.predict, ConservesAlong)
            return {} if predict is None else predict.conserved(params)
        model = offered(params, Conserves)
        return {} if model is None else model.conserved()


def _as_array(name: str, value: PyTree) -> Array:
    """A JAX array, or a complaint about lists of unequal rows, strings and the like."""
    if isinstance(value, jax.Array):
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise fail(name, "be an array", f"not convertible to one ({error})") from error
    if array.dtype.kind not in "fiub" and not jnp.issubdtype(array.dtype, jnp.floating):  # bfloat16 is of no kind
        raise fail(name, "be a numeric array", f"of type {array.dtype}", "Encode labels as numbers.")
    return jnp.asarray(array)
