"""What looks at a run from outside, segment by segment: its store, the callback of the caller, a bar."""

import time
from typing import TYPE_CHECKING

from jaxtyping import PyTree

from gradflow._solution import Solution, SolveError
from gradflow.runs._callback import Callback, loss_of, position_of, snapshot
from gradflow.runs._progress import Bar
from gradflow.runs._run import AbstractRun

if TYPE_CHECKING:
    from gradflow.runs._stored_run import StoredRun

COST = 0.05
"""Share of the time that the loss may take which a bar shows."""


class Watch:
    """A context, so that the bar is closed whatever happens."""

    def __init__(self, run: AbstractRun, show: bool, stored: "StoredRun | None", callback: Callback | None):
        self._run, self._stored, self._callback = run, stored, callback
        self._bar = Bar(run.title, 100.0, unit="%", show=show)
        self._show, self._seen, self._advanced = show, 0, stored is not None
        self._loss: float | None = None
        self._loss_due = time.monotonic()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, begun: PyTree) -> PyTree:
        """Where the run goes on that has just begun."""
        if self._stored is None:
            return begun
        try:
            carry = self._stored.take_up(begun)
        except OSError as error:
            raise self._unwritable(begun, error) from error
        self._seen = 0 if carry is begun else int(position_of(self._run, carry).rows)
        self._advanced = carry is begun
        return carry

    def segment(self, carry: PyTree) -> None:
        """After each segment. **Raises** what the callback does, and `SolveError` where nothing can be written."""
        self._advanced = True
        if self._stored is not None and self._stored.due():
            self._save(carry)
        if self._callback is not None:
            self._tell(carry)
        if self._show:
            share, remark = self._run.progress(carry)
            self._bar.reach(min(100.0, 100.0 * share), remark + self._with_loss(carry))

    def end(self, carry: PyTree) -> Solution:
        """The result of a run that goes no further, which its store gets as well."""
        solution = self._run.finish(carry)
        if self._stored is not None and self._advanced:
            self._save(carry)
            self._write(solution)
        return solution

    def _save(self, carry: PyTree) -> None:
        assert self._stored is not None
        try:
            self._stored.save(carry, position_of(self._run, carry))
        except OSError as error:
            raise self._unwritable(carry, error) from error

    def _write(self, solution: Solution) -> None:
        assert self._stored is not None
        try:
            self._stored.finish(solution)
        except OSError as error:
            raise self._unwritable(solution, error) from error

    def _unwritable(self, reached: PyTree | Solution, error: OSError) -> SolveError:
        """What is raised where the disk is full."""
        assert self._stored is not None
        solution = reached if isinstance(reached, Solution) else self._run.finish(reached)
        why = error.strerror or str(error)
        message = f"{self._run.title} was stopped at t = {float(solution.t_final):.6g}, since its store"
        message += (
            f" {str(self._stored.path)!r} cannot be written ({why}). Make room; the same call then goes on from what"
        )
        return SolveError(f"{message} was stored last. The part computed is in `error.solution`.", solution)

    def _tell(self, carry: PyTree) -> None:
        """Calls the callback. What it raises stops the run, and gets what there is as its attribute `solution`."""
        assert self._callback is not None
        position = position_of(self._run, carry)
        loss = loss_of(self._run, carry)
        record = snapshot(self._run, carry, position, None if loss is None else float(loss), self._seen)
        self._seen = int(position.rows)
        try:
            self._callback(record)
        except Exception as error:
            error.solution = self.end(carry)  # pyright: ignore[reportAttributeAccessIssue]
            error.add_note("gradflow: the part that was computed is in the attribute `solution` of this error.")
            raise

    def _with_loss(self, carry: PyTree) -> str:
        """The loss, for the bar; one of a while ago where it takes long."""
        began = time.monotonic()
        if began >= self._loss_due:
            loss = loss_of(self._run, carry)
            self._loss = None if loss is None else float(loss)
            now = time.monotonic()
            self._loss_due = now + (now - began) / COST
        return "" if self._loss is None else f", loss = {self._loss:.4g}"
