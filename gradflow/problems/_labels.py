"""Labels of classification as signs, class indices or rows of one-hot vectors, and what speaks for a label."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Scalar, Shaped

from gradflow._checks import fail, is_concrete
from gradflow.problems.losses import cross_entropy, exponential, hinge, logistic

LabelKind = Literal["signs", "indices", "onehot"]
Loss = Callable[[Array, Array], Scalar]
"""Of one sample: `loss(prediction, target)`."""


def label_kind(y: Shaped[Array, "n ..."]) -> LabelKind:
    """How targets name classes: +1 and -1, indices from zero, or one-hot rows.

    Targets that are traced are taken for signs if they are floats, and for indices if they are integers.

    **Raises** `ValueError` for targets that are none of these.
    """
    advice = 'For instance `gf.data.digits(classes=(0, 1), labels="pm1")`.'
    if jnp.ndim(y) == 2:
        if is_concrete(y):
            with jax.ensure_compile_time_eval():
                rows = jnp.asarray(y)
                single = jnp.all((rows == 0) | (rows == 1)) & jnp.all(jnp.count_nonzero(rows, axis=1) == 1)
            if not bool(single):
                raise fail("y", "hold one-hot rows", "a matrix of other numbers", advice)
        return "onehot"
    if jnp.ndim(y) != 1:
        raise fail("y", "be of shape (n,) or (n, classes)", f"of shape {jnp.shape(y)}", advice)
    if not is_concrete(y):
        return "signs" if jnp.issubdtype(y.dtype, jnp.floating) else "indices"
    # Data that are known stay where they are, on one device or many, under any trace.
    with jax.ensure_compile_time_eval():
        values = jnp.asarray(y)
        other = jnp.abs(values) != 1
        if not bool(jnp.any(other)):
            return "signs"
        if jnp.issubdtype(values.dtype, jnp.integer) and bool(jnp.all(values >= 0)):
            return "indices"
        first = float(np.asarray(values)[np.argmax(np.asarray(other))])
    raise fail("y", "hold labels +1 and -1, or class indices", f"{first:g}", advice)


def towards_label(
    values: Float[Array, "n *classes"], y: Shaped[Array, "n ..."], kind: LabelKind
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """For every sample the value of its own class, and the largest of the other classes.

    For signs the value is `y_i v_i`, and the other class has its opposite.

    **Raises** `ValueError` unless scalars go with signs, and vectors with indices or one-hot rows.
    """
    if (kind == "signs") != (values.ndim == 1):
        actual = f"{kind} for outputs of shape {values.shape[1:]}"
        raise fail("y", "hold signs for scalar outputs, else indices or one-hot rows", actual)
    if kind == "signs":
        labelled = values * y.astype(values.dtype)
        return labelled, -labelled
    classes = jnp.arange(values.shape[1])
    mine = y.astype(bool) if kind == "onehot" else y[:, None] == classes[None, :]
    labelled = jnp.sum(jnp.where(mine, values, 0), axis=1)
    return labelled, jnp.max(jnp.where(mine, -jnp.inf, values), axis=1)


def check_inputs_of_length(x: ArrayLike) -> None:
    """Refuses a sample of norm zero: no neuron is ever active on it."""
    if is_concrete(x):
        with jax.ensure_compile_time_eval():
            zeros = np.asarray(_zero_samples(jnp.asarray(x)))
        if np.any(zeros):
            actual = f"zero in {int(zeros.sum())} of {zeros.size} samples, the first at index {int(np.argmax(zeros))}"
            raise fail("x", "hold samples other than zero", actual, "Remove them: they say nothing about any neuron.")


@jax.jit
def _zero_samples(x: Shaped[Array, "n ..."]) -> Bool[Array, " n"]:
    # The largest entry of each: unlike a mask it takes no memory.
    return jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), initial=0) == 0


def check_targets(loss: Loss, y: Shaped[Array, "n ..."]) -> None:
    """Refuses targets that the loss has no meaning for, as far as this shows without a model, where they are known."""
    if not is_concrete(y):
        return
    # A trace around this call is none of the business of targets that are known, which stay on their devices.
    with jax.ensure_compile_time_eval():
        if any(loss is margin_loss for margin_loss in (logistic, exponential, hinge)):
            advice = "Labels 0 and 1 become such as 2 * y - 1; class indices go with cross_entropy."
            _refuse(loss, y, "+1 and -1", jnp.abs(jnp.asarray(y, float)) != 1, advice)
        elif loss is cross_entropy:
            _check_classes(y)


def _check_classes(y: Shaped[Array, "n ..."]) -> None:
    """Refuses what is neither class indices nor rows of probabilities."""
    signs = "Labels +1 and -1 go with logistic; as indices they are (y + 1) // 2."
    if y.ndim == 1 and jnp.issubdtype(y.dtype, jnp.integer):
        _refuse(cross_entropy, y, "class indices 0 ... classes - 1", y < 0, signs)
    elif y.ndim == 1:
        must = "hold class indices as integers, or a row of probabilities for each sample, for the loss `cross_entropy`"
        raise fail("y", must, f"{y.dtype} of shape {y.shape}", f"Convert indices with y.astype(int). {signs}")
    else:
        advice = "Class indices are integers of shape (n,)."
        _refuse(cross_entropy, y, "probabilities", jnp.asarray(y, float) < 0, advice)
        total = jnp.sum(jnp.asarray(y, float), axis=-1)
        _refuse(cross_entropy, total, "rows of probabilities that sum to one", jnp.abs(total - 1) > ROUGHLY, advice)


ROUGHLY = 0.01
"""By how much the sum of the probabilities of a sample may miss one: bfloat16 resolves 0.008."""


def check_labels(loss: Loss, y: Shaped[Array, "n ..."], outputs: tuple[int, ...]) -> None:
    """Refuses class indices beyond the number of outputs, where they are known; `outputs` is that of one sample."""
    integers = jnp.issubdtype(jnp.result_type(y), jnp.integer)
    if loss is not cross_entropy or not is_concrete(y) or len(outputs) != 1 or not integers or jnp.ndim(y) != 1:
        return
    with jax.ensure_compile_time_eval():
        y = jnp.asarray(y)
        advice = "Labels 1 ... classes become indices as y - 1; or build the model with more outputs."
        must = f"labels 0 ... {outputs[0] - 1}, as the model has {outputs[0]} outputs,"
        _refuse(loss, y, must, (y < 0) | (y >= outputs[0]), advice)


def _refuse(
    loss: Loss,
    y: Shaped[Array, "n ..."],
    what: str,
    wrong: Bool[Array, "n ..."],
    advice: str,
) -> None:
    if bool(jnp.any(wrong)):
        first = jnp.ravel(y)[jnp.argmax(jnp.ravel(wrong))]
        actual = f"something else in {int(jnp.sum(wrong))} of {wrong.size} entries, first {float(first):g}"
        raise fail("y", f"hold {what} for the loss `{loss.__name__}`", actual, advice)
