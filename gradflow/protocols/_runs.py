"""What is asked of flows and rules by what is observed along them, and of observables by runs."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, PyTree, Scalar


@runtime_checkable
class HasVectorField(Protocol):
    """A flow, as opposed to a rule."""

    def vector_field(self, t: Scalar, state: PyTree, frozen: PyTree) -> PyTree:
        """The time derivative of the state."""
        ...

    def params(self, state: PyTree) -> PyTree:
        """The trainable parameters in a state."""
        ...


@runtime_checkable
class HasLyapunov(Protocol):
    """A flow with a Lyapunov function."""

    def lyapunov(
        self, t: Scalar, state: PyTree, frozen: PyTree, minimum: PyTree, least: Scalar, kind: str
    ) -> Float[Array, ""]:
        """Its value, for a minimum of value `least`."""
        ...


@runtime_checkable
class SeesState(Protocol):
    """An observable that is a function of time and state, not of the parameters alone."""

    def of_state(self, flow: Any, t: Scalar, state: PyTree, frozen: PyTree) -> Any:
        """Its value at a time and a state of a flow or rule."""
        ...
