"""What methods in steps of fixed size ask of stochastic flows."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import diffrax
from jaxtyping import Array, Float, PyTree, Scalar


@runtime_checkable
class HasNoise(Protocol):
    """A stochastic flow `dy = F(t, y) dt + G(t, y) dW`."""

    @property
    def products_per_evaluation(self) -> int:
        """Hessian-vector products that an evaluation of `F` takes."""
        ...

    @property
    def terms(self) -> Callable[..., diffrax.AbstractTerm]:
        """`F` and `G` as terms of diffrax, from the increments of `W`; methods of diffrax alone ask for these."""
        ...

    def vector_field(self, t: Scalar, state: PyTree, frozen: PyTree) -> PyTree:
        """`F(t, y)`."""
        ...

    def noise(self, t: Scalar, state: PyTree, frozen: PyTree, increments: Float[Array, " n"]) -> PyTree:
        """`G(t, y) increments`."""
        ...

    def moved(self, t: Scalar, dt: Scalar, state: PyTree, frozen: PyTree, increments: Float[Array, " n"]) -> PyTree:
        """`y + F(t, y) dt + G(t, y) increments`."""
        ...
