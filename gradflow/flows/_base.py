"""What `solve` asks of a flow: a start, a vector field, the parameters in a state, and declared traits."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import diffrax
import equinox as eqx
from jaxtyping import Array, Float, PyTree, Scalar

from gradflow._conserved import Conserved


class AbstractFlow(eqx.Module):
    """A training rule in continuous time, `y' = F(t, y)`, with parameters `theta = params(y)`.

    The state `y` is a pytree of floating-point arrays. Leaves of the user's parameters that do not flow (integers,
    functions, strings) are handed to every method as `frozen`; `gradflow.problems` see the two halves joined.

    A subclass declares what a choice of solver needs to know:

    - `symmetric_jacobian`: `dF/dy` of the controlled part of the state is symmetric, so its spectrum is real;
    - `oscillatory`: eigenvalues far from the real axis are to be expected;
    - `limited`: its `sizes` or its `stride` are its own, which explicit methods heed and the others do not;
    - `own_sizes`: its `sizes` are all that errors are measured against, and no floor is added to them;
    - `stochastic`: the terms contain a Brownian motion, and `solve` needs a key.
    """

    symmetric_jacobian: ClassVar[bool] = False
    oscillatory: ClassVar[bool] = False
    limited: ClassVar[bool] = False
    own_sizes: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False

    @property
    def t0(self) -> float | Scalar:
        """Time at which the flow starts."""
        return 0.0

    @property
    def start_cost(self) -> tuple[int, int]:
        """Gradients and Hessian-vector products that `init` takes."""
        return 0, 0

    @property
    def products_per_evaluation(self) -> int:
        """Hessian-vector products that an evaluation of the vector field takes, besides its gradient."""
        return 0

    @property
    def velocity_free(self) -> bool:
        """Whether the state is one of positions and velocities, `X'' = -damping X' + F(X)` with constant damping."""
        return False

    @property
    def jumps(self) -> Float[Array, " J"] | None:
        """Times at which the field is known to jump, or to change its form, in order; `None` where there are none."""
        return None

    def kinks(self, trainable: PyTree, frozen: PyTree) -> tuple[str, ...] | None:
        """The operations at which the field jumps, along surfaces that trajectories cross, as with ReLU; `None` where
        that is not known."""
        return None

    def kinked(self, trainable: PyTree, frozen: PyTree) -> bool:
        """Whether the field is known to jump."""
        return bool(self.kinks(trainable, frozen))

    @abc.abstractmethod
    def init(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        """State at `t0` for the given parameters."""

    @abc.abstractmethod
    def vector_field(self, t: Scalar, state: PyTree, frozen: PyTree) -> PyTree:
        """Time derivative of the state. Costs one gradient of the problem."""

    @abc.abstractmethod
    def params(self, state: PyTree) -> PyTree:
        """The trainable parameters in a state."""

    def controlled(self, state: PyTree) -> PyTree:
        """The part of the state that the error control watches; pure quadratures ride along unwatched."""
        return state

    def sizes(self, watched: PyTree) -> PyTree:
        """What the error of each entry of the watched part is measured against; by default that part itself."""
        return watched

    def stride(self, before: PyTree, after: PyTree) -> Scalar | None:
        """How far a step went, between two watched parts, over the farthest a step may go; `None` for no limit."""
        return None

    def derivative(self, rate: PyTree) -> PyTree | None:
        """The derivative of the whole state, given that of its controlled part; `None` if that takes an evaluation."""
        return None

    def terms(self) -> diffrax.AbstractTerm:
        """The flow as diffrax terms, with `args = frozen`."""
        field: Any = self.vector_field
        return diffrax.ODETerm(field)

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""] | None:
        """The loss at a state, if there is one; reported first and last."""
        return None

    def conserved(self, state: PyTree, frozen: PyTree) -> dict[str, Conserved]:
        """Quantities that the exact flow conserves; their drift tells what the integrator lost."""
        return {}

    def errors(self, state: PyTree, frozen: PyTree) -> dict[str, Scalar]:
        """Errors that the flow makes itself, whatever the steps, and can estimate at a state. The largest along a run
        are in `Solution.errors`."""
        return {}

    def complaint(self, errors: Mapping[str, Any]) -> str:
        """What to say of the largest errors along a run; nothing where they are as promised."""
        return ""

    @property
    def remedy(self) -> str:
        """What helps where a run of this flow fails, beyond what its status says; nothing by default."""
        return ""

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
