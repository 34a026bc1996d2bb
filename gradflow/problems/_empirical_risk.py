"""The empirical risk `L(theta) = mean_i l(f(x_i; theta), y_i)`, or the sum."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, PyTree, Shaped

from gradflow._checks import check_callable, check_choice, check_count, check_finite, fail, is_concrete
from gradflow._conserved import Conserved
from gradflow._tree import full_precision
from gradflow.problems._calling import Predict, call_model, call_predict
from gradflow.problems._chunks import in_chunks, one_each, size_that_fits
from gradflow.problems._devices import on_devices, spread
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

    - `x`: inputs `(n, ...)`, or a dictionary, named tuple or module of such arrays, which `predict` or the model is
      given as it is (two inputs, a mask); `y`: targets `(n, ...)`. Inputs keep their type: images of uint8 take a byte
      a pixel.
    - `loss`: per-sample loss `(prediction, target) -> scalar`, see `gradflow.losses`.
    - `predict`: `predict(params, x) -> predictions` with leading axis `n`, for plain functions or Flax models. With
      `None`, `params` itself is called on each sample, as Equinox models are.
    - `reduction`: `"mean"` or `"sum"`.
    - `chunk_size`: how many samples are predicted at once; derivatives keep one chunk alone, and predict twice. `None`
      for all, unless what they keep of all samples takes more than a quarter of the memory. Numbers differ from those
      without chunks by the rounding of sums. The samples must not know of one another: no batch norm in training mode.
    - `sharding`: how devices share the samples; see `gradflow.data.shard`.

    **Raises** `ValueError` for data that are empty, not numbers, not finite or of different lengths, for targets other
    than +1 and -1 of a margin loss, and other than class indices or probabilities of `cross_entropy` (traced ones
    cannot be looked at), for a `loss` or `predict` that cannot be called, an unknown reduction, and a `chunk_size`
    below one or above `n`. At the start of a run in chunks, for a `predict` whose predictions depend on the other
    samples. When first evaluated, for class indices beyond the outputs of the model, a loss that is not scalar per
    sample, a `predict` with its arguments swapped or for one sample, and for parameters that cannot be called without
    a `predict`.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), loss=gf.losses.square, predict=lambda w, x: x @ w)
    >>> float(problem(jnp.zeros(2)))
    0.5
    """

    x: PyTree[Shaped[Array, "n ..."]]
    y: Shaped[Array, "n ..."]
    loss: Loss
    predict: Predict | None = None
    reduction: Literal["mean", "sum"] = eqx.field(static=True, default="mean")
    chunk_size: int | None = eqx.field(static=True, default=None)
    sharding: NamedSharding | None = eqx.field(static=True, default=None)

    def __init__(
        self,
        x: PyTree,
        y: PyTree,
        loss: Loss,
        predict: Predict | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        *,
        chunk_size: int | None = None,
        sharding: NamedSharding | None = None,
    ):
        check_callable("loss", loss, "loss(prediction, target)", "See `gradflow.losses`.")
        if predict is not None:
            check_callable("predict", predict, "predict(params, x)")
        check_choice("reduction", reduction, ("mean", "sum"))
        x, y = _as_arrays(x), _as_array("y", y)
        for leaf in jax.tree_util.tree_leaves(x) or [jnp.zeros(())]:
            if leaf.ndim == 0 or y.ndim == 0 or leaf.shape[0] == 0:
                shapes = f"of shape {leaf.shape} (y: {y.shape})"
                raise fail("x", "hold at least one sample along its leading axis", shapes)
            if leaf.shape[0] != y.shape[0]:
                raise fail("y", "have as many entries as `x` has samples", f"{y.shape[0]} against {leaf.shape[0]}")
        advice = "Remove or impute the samples concerned."
        check_finite("x", x, advice)
        check_finite("y", y, advice)
        check_targets(loss, y)
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
            if chunk_size > y.shape[0]:
                raise fail("chunk_size", f"be at most {y.shape[0]}, the number of samples", str(chunk_size))
        self.x, self.y, self.loss, self.predict, self.reduction = x, y, loss, predict, reduction
        if sharding is not None:
            self.x, self.y = spread(x, y, sharding)
        self.chunk_size, self.sharding = chunk_size, sharding

    @property
    def num_samples(self) -> int:
        """`n`."""
        return self.y.shape[0]

    def predictions(self, params: PyTree, x: PyTree[Shaped[Array, "m ..."]] | None = None) -> Shaped[Array, "m ..."]:
        """Predictions at the data, or at other inputs `x`."""
        if x is None and self.sharding is not None:
            predictions = on_devices(self._call, params, self.x, self.chunk_size, self.sharding)
            return predictions[: self.num_samples]  # without the copies that fill the last device
        inputs = self.x if x is None else x
        size = size_that_fits(self._call, params, inputs) if self.chunk_size is None else self.chunk_size
        return in_chunks(self._call, params, inputs, size)

    def _call(self, params: PyTree, inputs: PyTree[Shaped[Array, "m ..."]]) -> Array:
        return call_model(params, inputs) if self.predict is None else call_predict(self.predict, params, inputs)

    def per_sample(self, params: PyTree) -> Float[Array, " n"]:
        """The loss of every sample."""
        predictions = one_each(self.predictions(params), self.num_samples)
        check_labels(self.loss, self.y, predictions.shape[1:])
        losses = jax.vmap(self.loss)(predictions, self.y)
        if jnp.shape(losses) != (self.num_samples,):
            actual = f"of shape {jnp.shape(losses)[1:]} per sample"
            raise fail("loss", "return a scalar per sample", actual, "Sum over outputs inside the loss.")
        return losses

    def residuals(self, predictions: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """The residuals `-dL/dp_i`, the negative derivatives of the loss, with the factor `1/n` of a mean.

        At predictions of zero they drive a network out of a small initialisation: see `gradflow.NeuralCorrelation`.
        """
        slopes = jax.vmap(jax.grad(self.loss))(predictions, self.y)
        return -slopes / self.num_samples if self.reduction == "mean" else -slopes

    def of_predictions(self, predictions: Float[Array, "n ..."]) -> Float[Array, ""]:
        """The risk of given predictions."""
        losses = jax.vmap(self.loss)(predictions, self.y)
        return jnp.mean(losses) if self.reduction == "mean" else jnp.sum(losses)

    @full_precision
    def __call__(self, params: PyTree) -> Float[Array, ""]:
        losses = self.per_sample(params)
        return jnp.mean(losses) if self.reduction == "mean" else jnp.sum(losses)

    def check_start(self, params: PyTree) -> None:
        """Raises `ValueError` for class indices beyond the outputs of the model, and for predictions in chunks that
        depend on the other samples of their chunk; looks only where these are known."""
        if not is_concrete((self.x, self.y, params)):
            return
        if self.loss is cross_entropy:
            predictions = eqx.filter_eval_shape(self.predictions, params)
            check_labels(self.loss, self.y, jnp.shape(predictions)[1:])
        if self.chunk_size is not None and self.predict is not None:
            self._check_independent(params)

    def _check_independent(self, params: PyTree) -> None:
        few = min(self.chunk_size or 1, self.num_samples)
        if few < 2:
            return
        inputs = jax.tree_util.tree_map(lambda leaf: leaf[:few], self.x)
        half = jax.tree_util.tree_map(lambda leaf: leaf[: few // 2], inputs)
        predict = eqx.filter_jit(self._call)
        among, alone = (np.asarray(predict(params, part), float) for part in (inputs, half))
        gap, size = np.max(np.abs(among[: few // 2] - alone)), np.max(np.abs(alone))
        if gap > 1e-2 * size:
            actual = f"one whose predictions change by {gap:.1e} of {size:.1e} with the other samples of their chunk"
            advice = "Put batch norm into inference mode, or do without chunk_size."
            raise fail("predict", "treat samples one by one", actual, advice)

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


def _as_arrays(x: PyTree) -> PyTree[Array]:
    """Inputs as JAX arrays. Dictionaries, named tuples and modules are pytrees of inputs, lists rows of one array."""
    if isinstance(x, dict | eqx.Module) or hasattr(x, "_fields"):
        return jax.tree_util.tree_map(lambda leaf: _as_array("x", leaf), x)
    return _as_array("x", x)


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
