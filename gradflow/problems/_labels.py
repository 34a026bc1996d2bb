"""Labels of classification as signs, class indices or rows of one-hot vectors, and what speaks for a label."""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from gradflow._checks import fail, is_concrete
from gradflow.problems.losses import exponential, hinge, logistic

LabelKind = Literal["signs", "indices", "onehot"]


def label_kind(y: Shaped[Array, "n ..."]) -> LabelKind:
    """How targets name classes: +1 and -1, indices from zero, or one-hot rows.

    Targets that are traced are taken for signs if they are floats, and for indices if they are integers.

    **Raises** `ValueError` for targets that are none of these.
    """
    advice = 'For instance `gf.data.digits(classes=(0, 1), labels="pm1")`.'
    if jnp.ndim(y) == 2:
        if is_concrete(y):
            rows = np.asarray(y)
            if not (np.all((rows == 0) | (rows == 1)) and np.all(rows.sum(axis=1) == 1)):
                raise fail("y", "hold one-hot rows", "a matrix of other numbers", advice)
        return "onehot"
    if jnp.ndim(y) != 1:
        raise fail("y", "be of shape (n,) or (n, classes)", f"of shape {jnp.shape(y)}", advice)
    if not is_concrete(y):
        return "signs" if jnp.issubdtype(y.dtype, jnp.floating) else "indices"
    values = np.asarray(y)
    if np.all(np.abs(values) == 1):
        return "signs"
    if values.dtype.kind in "iu" and np.all(values >= 0):
        return "indices"
    raise fail("y", "hold labels +1 and -1, or class indices", f"{values.ravel()[np.abs(values) != 1][0]:g}", advice)


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
        own = values * y.astype(values.dtype)
        return own, -own
    classes = jnp.arange(values.shape[1])
    mine = y.astype(bool) if kind == "onehot" else y[:, None] == classes[None, :]
    own = jnp.sum(jnp.where(mine, values, 0), axis=1)
    return own, jnp.max(jnp.where(mine, -jnp.inf, values), axis=1)


def check_inputs_of_length(x: Any) -> None:
    """Refuses a sample of norm zero: no neuron is ever active on it."""
    if is_concrete(x):
        zeros = ~np.any(np.asarray(x).reshape(np.shape(x)[0], -1) != 0, axis=1)
        if np.any(zeros):
            actual = f"zero in {int(zeros.sum())} of {zeros.size} samples, the first at index {int(np.argmax(zeros))}"
            raise fail("x", "hold samples other than zero", actual, "Remove them: they say nothing about any neuron.")


def check_targets(loss: Any, y: Any) -> None:
    """Refuses targets of a margin loss that are not +1 or -1, where they are known."""
    if not any(loss is known for known in (logistic, exponential, hinge)) or not is_concrete(y):
        return
    values = np.asarray(y).astype(float)
    wrong = np.abs(values) != 1
    if np.any(wrong):
        actual = f"something else in {np.sum(wrong)} of {wrong.size} entries, first {values[wrong][0]:g}"
        advice = "Labels 0 and 1 become such as 2 * y - 1; class indices go with cross_entropy."
        raise fail("y", f"hold +1 and -1 for the loss `{loss.__name__}`", actual, advice)
