"""Whether an object offers what a protocol asks for."""

import inspect
from typing import TypeVar, cast

P = TypeVar("P")


def missing(value: object, protocol: type) -> list[str]:
    """The methods and functions of a protocol that an object does not offer, by name, in the order of the protocol.

    A field that can be called counts as a method; one of the same name that cannot, such as an array, does not, where
    `isinstance` would take it.

    >>> from gradflow.protocols import HasNeuronWeights, TakesNeuronWeights, missing
    >>> import gradflow as gf
    >>> missing(gf.models.DiagonalLinear(2), HasNeuronWeights), missing([1.0], TakesNeuronWeights)
    ([], ['neuron_weights', 'with_neuron_weights'])
    """
    return [name for name in _methods(protocol) if not callable(getattr(value, name, None))]


def offered(value: object, protocol: type[P]) -> P | None:
    """The object, if it offers all methods of a protocol; `None` otherwise."""
    return None if missing(value, protocol) else cast(P, value)


def _methods(protocol: type) -> list[str]:
    names: list[str] = []
    for base in reversed(protocol.__mro__):
        if getattr(base, "_is_protocol", False):
            names += inspect.get_annotations(base)
            names += [name for name, value in vars(base).items() if inspect.isfunction(value)]
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]
