"""Loss and accuracy."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gradflow._checks import check_callable, fail
from gradflow._tree import full_precision, in_single
from gradflow.problems import EmpiricalRisk
from gradflow.problems._labels import check_labels


class Loss(eqx.Module):
    """The loss `L(theta)`.

    For another data set than the one trained on, build a second problem.

    **Arguments**: `problem`: `params -> scalar`.

    **Raises** `ValueError` for a problem that cannot be called.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> float(gf.observables.Loss(lambda w: 0.5 * w**2)(jnp.array(2.0)))
    2.0
    """

    problem: Callable[[PyTree], Array]

    def __init__(self, problem: Callable[[PyTree], Array]):
        self.problem = check_callable("problem", problem, "problem(params) -> scalar")

    @in_single
    @full_precision
    def __call__(self, params: PyTree) -> Float[Array, ""]:
        return self.problem(params)


class Accuracy(eqx.Module):
    """Fraction of samples classified rightly.

    By sign for targets of +1 and -1, by the largest score otherwise.

    Predictions of several outputs are compared with class indices or one-hot targets, those of one with signs.

    **Raises** `ValueError` for a problem without data (a plain function).

    >>> import gradflow as gf, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([1.0, -1.0]), gf.losses.logistic, lambda w, x: x @ w)
    >>> float(gf.observables.Accuracy(problem)(jnp.array([2.0, 3.0])))
    0.5
    """

    problem: EmpiricalRisk

    def __init__(self, problem: EmpiricalRisk):
        self.problem = needs_data(problem)

    @full_precision
    def __call__(self, params: PyTree) -> Float[Array, ""]:
        predictions, targets = self.problem.predictions(params), self.problem.y
        check_labels(self.problem.loss, targets, predictions.shape[1:])
        if predictions.ndim == 1 or predictions.shape[1:] == targets.shape[1:] == (1,):
            right = predictions * targets > 0
        else:
            chosen = jnp.argmax(predictions, axis=-1)
            right = chosen == (targets if targets.ndim == 1 else jnp.argmax(targets, axis=-1))
        return jnp.mean(right.astype(predictions.dtype))


def needs_data(problem: object) -> EmpiricalRisk:
    """The problem, if it holds data; a complaint otherwise."""
    if not isinstance(problem, EmpiricalRisk):
        actual = f"of type {type(problem).__name__}"
        raise fail("problem", "be a gradflow.EmpiricalRisk, which holds the data", actual)
    return problem
