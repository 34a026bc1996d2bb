"""The population risk `L(theta) = sum_i w_i l(f(x_i; theta), y_i)`, with quadrature nodes for data."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Shaped

from gradflow._checks import check_finite, check_not_negative, fail
from gradflow._tree import full_precision
from gradflow.problems._calling import Predict
from gradflow.problems._empirical_risk import EmpiricalRisk
from gradflow.problems._labels import Loss


class PopulationRisk(eqx.Module):
    """Expected loss over a distribution of inputs, which weighted nodes stand for:

        L(theta) = sum_i w_i l(f(x_i; theta), y_i)

    With the nodes of a quadrature rule it is the risk on the whole distribution, to the accuracy of that rule.

    **Arguments**: `x`, `y`, `loss`, `predict`: as for `gradflow.EmpiricalRisk`. `weights`: `(n,)`, not negative, of sum
    one for an expectation.

    **Raises** `ValueError` for what `EmpiricalRisk` refuses, and for weights of another number, negative or not finite.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> from gradflow.models.nodes import GaussLegendre, Uniform
    >>> x, w = GaussLegendre(8)([Uniform(-1, 1)])
    >>> risk = gf.PopulationRisk(x, x[:, 0] ** 2, w, gf.losses.square, predict=lambda c, x: c * x[:, 0])
    >>> round(float(risk(jnp.array(0.0))), 12)  # E x^4 / 2
    0.1
    """

    data: EmpiricalRisk
    weights: Float[Array, " n"]

    def __init__(
        self,
        x: PyTree,
        y: PyTree,
        weights: ArrayLike,
        loss: Loss,
        predict: Predict | None = None,
    ):
        self.data = EmpiricalRisk(x, y, loss, predict, reduction="sum")
        n = self.data.num_samples
        if np.shape(weights) != (n,):
            raise fail("weights", f"have shape ({n},)", f"of shape {np.shape(weights)}")
        check_finite("weights", weights)
        check_not_negative("weights", weights)
        self.weights = jnp.asarray(weights, float)

    @property
    def x(self) -> Shaped[Array, "n ..."]:
        """Inputs of the nodes."""
        return self.data.x

    @property
    def y(self) -> Shaped[Array, "n ..."]:
        """Targets of the nodes."""
        return self.data.y

    @property
    def loss(self) -> Loss:
        """The loss of one sample."""
        return self.data.loss

    def predictions(self, params: PyTree, x: Shaped[Array, "m ..."] | None = None) -> Shaped[Array, "m ..."]:
        """Predictions at the nodes, or at other inputs `x`."""
        return self.data.predictions(params, x)

    def residuals(self, predictions: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """The residuals `-dL/dp_i`, the negative derivatives of the loss, with the weight of each node."""
        residuals = self.data.residuals(predictions)
        return residuals * self.weights.astype(residuals.dtype).reshape(-1, *[1] * (residuals.ndim - 1))

    def of_predictions(self, predictions: Float[Array, "n ..."]) -> Float[Array, ""]:
        """The risk of given predictions."""
        losses = jax.vmap(self.loss)(predictions, self.y)
        return jnp.sum(self.weights.astype(losses.dtype) * losses)

    @full_precision
    def __call__(self, params: PyTree) -> Float[Array, ""]:
        losses = self.data.per_sample(params)
        return jnp.sum(self.weights.astype(losses.dtype) * losses)
