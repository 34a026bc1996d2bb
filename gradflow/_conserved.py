"""Quantities that gradient flow conserves, with the size that their drift is to be measured against."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Conserved(NamedTuple):
    """A conserved quantity and the magnitude of the terms whose difference it is."""

    value: Float[Array, "..."]
    magnitude: Float[Array, "..."]
