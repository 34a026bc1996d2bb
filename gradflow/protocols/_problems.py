"""What problems and their predictions may offer beyond their value."""

from typing import Protocol, runtime_checkable

from jaxtyping import PyTree

from gradflow._conserved import Conserved


@runtime_checkable
class ConservesAlong(Protocol):
    """A problem, or a `predict`, that knows what gradient flow conserves."""

    def conserved(self, params: PyTree) -> dict[str, Conserved]:
        """The quantities at these parameters, by name."""
        ...


@runtime_checkable
class ChecksStart(Protocol):
    """A problem that looks at where a run starts."""

    def check_start(self, params: PyTree) -> None:
        """Raises `ValueError` for parameters that no run can start from."""
        ...


@runtime_checkable
class ExplainsFailure(Protocol):
    """A problem that can tell why its value is not finite."""

    def why_not_finite(self, params: PyTree) -> str:
        """The reason, in a sentence; nothing where there is none."""
        ...
