"""Balancedness: what neighbouring layers of a homogeneous network keep in common along gradient flow."""

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from gradflow._checks import fail
from gradflow._tree import in_single
from gradflow.protocols import Balances, offered


class Balancedness(eqx.Module):
    """The imbalance of layers, which gradient flow conserves.

    Discrete rules do not conserve it, and drift at first order in their step.

    For `TwoLayer`, `|a_j|^2 - |w_j|^2` of every neuron; for `DeepLinear`, the Frobenius norm of
    `W_l W_l^T - W_{l+1}^T W_{l+1}` of every pair of layers; for `DiagonalLinear`, `u^2 - v^2`. Any model with a method
    `imbalance()` will do.

    **Raises** `ValueError` for parameters without that method.

    >>> import gradflow as gf
    >>> gf.observables.Balancedness()(gf.models.DiagonalLinear(2, init_scale=0.5)).round(3).tolist()
    [0.5, 0.5]
    """

    @in_single
    def __call__(self, params: PyTree) -> Float[Array, "..."]:
        model = offered(params, Balances)
        if model is None:
            raise fail("params", "have a method `imbalance`", f"of type {type(params).__name__}")
        return model.imbalance()
