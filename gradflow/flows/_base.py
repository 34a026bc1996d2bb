"""What `solve` asks of a flow: a start, a vector field, the parameters in a state."""

import abc
from collections.abc import Callable

import diffrax
from jaxtyping import Array, Float, PyTree, Scalar

from gradflow._checks import fail
from gradflow._conserved import Conserved
from gradflow.flows._traits import ControlsErrors, DeclaresCost, DeclaresSpectrum, ReportsErrors

FORMER = {
    "sizes": "error_weights",
    "own_sizes": "error_weights, which returns ErrorWeights(weights, plus_scale=False)",
    "stride": "step_length_ratio",
    "limited": "step_limited",
    "stochastic": "the base class AbstractStochasticFlow",
}
"""Declarations of flows that have changed their names; under the former ones they would be ignored."""


class AbstractFlow(DeclaresSpectrum, ControlsErrors, DeclaresCost, ReportsErrors):
    """A training rule in continuous time, `y' = F(t, y)`, with parameters `theta = params(y)`.

    The state `y` is a pytree of floating-point arrays. Leaves of the user's parameters that do not flow (integers,
    functions, strings) are handed to every method as `frozen`; `gradflow.problems` see the two halves joined.

    A flow gives `init`, `vector_field` and `params`. What it may declare besides comes from four classes, each with
    defaults: for the choice of a solver (`symmetric_jacobian`, `oscillatory`, `constrained`, `jumps`, `kinks`), for the
    error control (`controlled`, `error_weights`, `step_length_ratio`, `step_limited`, `derivative`), for the counts
    (`time_unit`, `start_cost`, `gradients_per_evaluation`, `products_per_evaluation`), and for the end of a run
    (`errors`, `complaint`, `remedy`). A flow with noise derives from `AbstractStochasticFlow`.
    """

    def __init_subclass__(cls, **keywords: object) -> None:
        super().__init_subclass__(**keywords)
        for name in FORMER.keys() & vars(cls).keys():
            raise fail(name, f"be called {FORMER[name]}", f"declared by {cls.__name__} under its former name")

    @property
    def t0(self) -> float | Scalar:
        """Time at which the flow starts."""
        return 0.0

    @abc.abstractmethod
    def init(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        """State at `t0` for the given parameters."""

    @abc.abstractmethod
    def vector_field(self, t: Scalar, state: PyTree, frozen: PyTree) -> PyTree:
        """Time derivative of the state. Costs one gradient of the problem, unless the flow says otherwise."""

    @abc.abstractmethod
    def params(self, state: PyTree) -> PyTree:
        """The trainable parameters in a state."""

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""] | None:
        """The loss at a state, if there is one; reported first and last."""
        return None

    def conserved(self, state: PyTree, frozen: PyTree) -> dict[str, Conserved]:
        """Quantities that the exact flow conserves; their drift tells what the integrator lost."""
        return {}

    def terms(self) -> diffrax.AbstractTerm:
        """The flow as diffrax terms, with `args = frozen`."""
        field: Callable[..., PyTree] = self.vector_field
        return diffrax.ODETerm(field)

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        """Raises `ValueError` for parameters of a shape or type that the flow cannot start from.

        Runs once per compilation, before anything else is traced, so it cannot look at values.
        """

    def check_values(self, trainable: PyTree, frozen: PyTree) -> None:
        """Raises `ValueError` for values that the flow cannot start from; runs where these are known."""


class AbstractStochasticFlow(AbstractFlow):
    """A stochastic differential equation `dy = F(t, y) dt + G(t, y) dW` in Ito's sense, with independent `W_i`."""

    @property
    @abc.abstractmethod
    def noise_size(self) -> int:
        """Number of Brownian motions."""

    @property
    @abc.abstractmethod
    def weak_order(self) -> int:
        """Order to which means agree with those of what the flow stands for; the default method has to keep it."""

    @property
    @abc.abstractmethod
    def time_step(self) -> Scalar:
        """The step in time that suits, unless a solver says otherwise."""

    @abc.abstractmethod
    def noise(self, t: Scalar, state: PyTree, frozen: PyTree, increments: Float[Array, " n"]) -> PyTree:
        """`G(t, y) increments`."""

    @abc.abstractmethod
    def moved(self, t: Scalar, dt: Scalar, state: PyTree, frozen: PyTree, increments: Float[Array, " n"]) -> PyTree:
        """`y + F(t, y) dt + G(t, y) increments`, as cheaply as the two can be had together."""
