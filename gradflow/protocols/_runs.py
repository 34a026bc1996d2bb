"""What is asked of flows and rules by what is observed along them, and of observables by runs."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, PyTree, Scalar

from gradflow.protocols._edge import UpdateForm


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

    def of_state(self, flow: PyTree, t: Scalar, state: PyTree, frozen: PyTree) -> PyTree:
        """Its value at a time and a state of a flow or rule."""
        ...


@runtime_checkable
class HasAmplitude(Protocol):
    """A flow of a centre, about which iterates alternate."""

    def amplitude(self, state: PyTree) -> PyTree:
        """How far, in the structure of the parameters that flow."""
        ...


@runtime_checkable
class HasUpdateForm(Protocol):
    """A rule that tells how it steps, in numbers."""

    def form(self) -> UpdateForm | None:
        """Its form; `None` where it is another one, or not known."""
        ...

    def described(self) -> str:
        """What messages call it, with an article."""
        ...


@runtime_checkable
class PredictsAverages(Protocol):
    """A flow that stands for averages of iterates, and knows how these scatter."""

    def predicted_variance(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        """The variance of the iterates, summed over all parameters."""
        ...

    def predicted_loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        """The mean of the loss over the iterates."""
        ...


@runtime_checkable
class HasDeviations(Protocol):
    """A flow that knows the covariance of the iterates about it."""

    def deviations(self, state: PyTree) -> PyTree:
        """Directions, along a leading axis, whose outer products add up to the covariance."""
        ...

    def params(self, state: PyTree) -> PyTree:
        """The trainable parameters in a state."""
        ...


@runtime_checkable
class GoesOn(Protocol):
    """An observable that goes on from what it knew at the save time before."""

    def first_memory(self, params: PyTree) -> PyTree:
        """What it knows before the first save time."""
        ...

    def follow(self, memory: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        """What it knows after the next one, and its value there."""
        ...
