"""What models may offer: their neurons, what is conserved, the parts of one hidden layer."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, PyTree

from gradflow._conserved import Conserved


@runtime_checkable
class HasNeurons(Protocol):
    """A model with neurons that have incoming weights."""

    def neurons(self) -> Float[Array, "width in_size"]:
        """The incoming weights of every neuron, as rows."""
        ...


@runtime_checkable
class HasNeuronWeights(Protocol):
    """A model that is a sum of neurons."""

    def neuron_weights(self) -> Float[Array, "width size"]:
        """All weights of every neuron, as rows."""
        ...


@runtime_checkable
class TakesNeuronWeights(HasNeuronWeights, Protocol):
    """One whose neurons can be given other weights."""

    def with_neuron_weights(self, rows: Float[Array, "width size"]) -> PyTree:
        """The same model with these weights of its neurons."""
        ...


@runtime_checkable
class HasPreactivations(Protocol):
    """A model with hidden layers."""

    def preactivations(self, x: Float[Array, " in_size"]) -> Float[Array, " neurons"]:
        """What enters the activations at one input."""
        ...


@runtime_checkable
class OneHiddenLayer(HasPreactivations, Protocol):
    """A network with one hidden layer, as `gradflow.models.TwoLayer` is."""

    def readout(self, hidden: Float[Array, " width"]) -> Float[Array, "..."]:
        """The output, from what the activations give."""
        ...


@runtime_checkable
class PiecewiseLinearLayer(OneHiddenLayer, Protocol):
    """One that names its activation, and tells how large what enters it can be."""

    activation: Callable[[Array], Array]

    def preactivation_bounds(self, x: Float[Array, " in_size"]) -> Float[Array, " width"]:
        """The sizes against which preactivations at one input are small or large."""
        ...


@runtime_checkable
class Balances(Protocol):
    """A model whose layers balance one another."""

    def imbalance(self) -> Float[Array, "..."]:
        """What gradient flow conserves of the weights of neighbouring layers."""
        ...


@runtime_checkable
class Conserves(Protocol):
    """A model that knows what gradient flow of its risk conserves."""

    def conserved(self) -> dict[str, Conserved]:
        """The quantities, by name."""
        ...


@runtime_checkable
class KnowsOrdinary(Protocol):
    """Coordinates of parameters other than the parameters themselves, such as `gradflow.Polar`."""

    def ordinary(self) -> PyTree:
        """The parameters in their ordinary coordinates."""
        ...
