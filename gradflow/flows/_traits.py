"""What a flow may declare beyond its equations, with what holds unless it does."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import equinox as eqx
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import PrecisionWarning


class ErrorWeights(NamedTuple):
    """What errors are measured against: the tolerance on an entry is `rtol` times its weight.

    With `plus_scale` the absolute scale of the step control is added to the weights, as for entries that pass through
    zero; without it they stand alone.
    """

    weights: PyTree
    plus_scale: bool = True


class DeclaresSpectrum(eqx.Module):
    """What the choice of a solver goes by.

    - `symmetric_jacobian`: `dF/dy` of the controlled part of the state is symmetric, so its spectrum is real;
    - `real_spectrum`: its spectrum is real where it is not symmetric, and stabilised methods are safe;
    - `oscillatory`: eigenvalues far from the real axis are to be expected;
    - `constrained`: the method `CatchingUp` alone integrates it, which asks more of it than a vector field.
    """

    symmetric_jacobian: ClassVar[bool] = False
    real_spectrum: ClassVar[bool] = False
    oscillatory: ClassVar[bool] = False
    constrained: ClassVar[bool] = False

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


class ControlsErrors(eqx.Module):
    """What the error control sees, and what it measures errors against.

    `step_limited`: the `error_weights` or the `step_length_ratio` are the flow's own, which explicit methods heed and
    the others do not.
    """

    step_limited: ClassVar[bool] = False

    def controlled(self, state: PyTree) -> PyTree:
        """The part of the state whose error is controlled; pure quadratures are integrated along, without control."""
        return state

    def error_weights(self, controlled: PyTree) -> ErrorWeights:
        """What the error of each entry of the controlled part is measured against; by default that part itself."""
        return ErrorWeights(controlled)

    def step_length_ratio(self, before: PyTree, after: PyTree) -> Scalar | None:
        """The length of a step, between two controlled parts, over the longest that is allowed; `None`: no limit."""
        return None

    def derivative(self, slope: PyTree) -> PyTree | None:
        """The derivative of the whole state, given that of its controlled part; `None` if that takes an evaluation."""
        return None


class DeclaresCost(eqx.Module):
    """What the time of a run counts, and what its counts add to the evaluations of the field."""

    @property
    def time_unit(self) -> str:
        """How its time counts the iterations of what it idealises, for the axes of figures; empty if it counts none."""
        return ""

    @property
    def start_cost(self) -> tuple[int, int]:
        """Gradients and Hessian-vector products that `init` takes."""
        return 0, 0

    @property
    def gradients_per_evaluation(self) -> int:
        """Gradients that an evaluation of the vector field takes."""
        return 1

    @property
    def products_per_evaluation(self) -> int:
        """Hessian-vector products that an evaluation of the vector field takes, besides its gradients."""
        return 0


class ReportsErrors(eqx.Module):
    """What is said of a run at its end, beyond its status."""

    complaint_category: ClassVar[type[Warning]] = PrecisionWarning

    def errors(self, state: PyTree, frozen: PyTree) -> dict[str, Scalar]:
        """Errors that the flow makes itself, however short the steps, and can estimate at a state. The largest along a
        run are in `Solution.errors`."""
        return {}

    def complaint(self, errors: Mapping[str, ArrayLike]) -> str:
        """What to say of the largest errors along a run; nothing where they are as promised."""
        return ""

    @property
    def remedy(self) -> str:
        """What helps where a run of this flow fails, beyond what its status says; nothing by default."""
        return ""
