"""The form of second-order flows that Runge-Kutta-Nystrom methods ask for."""

from typing import Protocol, runtime_checkable

from jaxtyping import PyTree, Scalar

from gradflow.protocols._offered import missing


@runtime_checkable
class SecondOrderState(Protocol):
    """Positions `X`, velocities `X'`, and a quadrature that is integrated along."""

    @property
    def position(self) -> PyTree: ...

    @property
    def momentum(self) -> PyTree: ...

    @property
    def dissipated(self) -> Scalar: ...

    def _replace(self, **parts: PyTree) -> "SecondOrderState": ...


@runtime_checkable
class SecondOrderForm(Protocol):
    """A flow `X'' = -a(t) X' + F(X)`, whose state is a `SecondOrderState`.

    Its `vector_field` at momentum zero has the force `F` in the place of the momentum's derivative.
    """

    @property
    def velocity_free(self) -> bool:
        """Whether the damping is constant, and no velocity enters otherwise."""
        ...

    def damping(self, t: Scalar) -> Scalar:
        """The coefficient `a(t)`."""
        ...

    def dissipation(self, t: Scalar, squares: Scalar, works: Scalar) -> Scalar:
        """The derivative of `dissipated`, from `|X'|^2` and `X' . F`."""
        ...


def lacking_for_second_order(flow: PyTree) -> str:
    """What a flow lacks to be of the form of `SecondOrderForm`, in words; nothing if it is."""
    names = missing(flow, SecondOrderForm)
    names += [] if hasattr(flow, "velocity_free") else ["velocity_free"]
    if names:
        return f"has no {' and no '.join(f'`{name}`' for name in names)}"
    return "" if flow.velocity_free else "has velocities beyond a constant damping (`velocity_free` is false)"
