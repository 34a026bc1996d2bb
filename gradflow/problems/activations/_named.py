"""Activations by name."""

from collections.abc import Callable

from jaxtyping import Array

from gradflow._checks import check_choice
from gradflow.problems.activations._base import AbstractActivation
from gradflow.problems.activations._erf import Erf
from gradflow.problems.activations._quadrature import Quadrature
from gradflow.problems.activations._relu import ReLU
from gradflow.problems.activations._square import Square

NAMES: dict[str, type[AbstractActivation]] = {"erf": Erf, "relu": ReLU, "square": Square}


def named(activation: str | Callable[[Array], Array]) -> AbstractActivation:
    """The activation of that name.

    A function becomes a `Quadrature`, an activation stays what it is.

    **Raises** `ValueError` for names other than `"erf"`, `"relu"` and `"square"`.

    >>> import gradflow as gf
    >>> type(gf.problems.activations.named("erf")).__name__
    'Erf'
    """
    if isinstance(activation, AbstractActivation):
        return activation
    if callable(activation):
        return Quadrature(activation)
    check_choice(
        "activation", activation, NAMES, "Or an elementwise function, or one of gradflow.problems.activations."
    )
    return NAMES[activation]()
