"""A run that is kept on disk: its rows as they are reached, and all that it needs to go on to the same bits."""

import os
import pathlib
import time
import warnings
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, PyTree

from gradflow._checks import fail
from gradflow._solution import Solution, Status, moving
from gradflow._tree import held_paths
from gradflow.runs._record import Record
from gradflow.runs._run import AbstractRun, Position
from gradflow.runs._run_identity import differences, identity_of, machine_changes, start_differences, start_of
from gradflow.runs._variables import ATTRIBUTES, MISSING, OF_RUNS, PER_RUN, named_arrays, numbers_of
from gradflow.stores._changes import refuse
from gradflow.stores._installation import installation
from gradflow.stores._run_store import KIND, RunStore
from gradflow.stores._state_file import placed
from gradflow.stores._zarr_group import FORMAT

RUNNING = {
    "long_name": "how the run ended",
    "flag_values": list(range(MISSING, len(Status.labels()))),
    "flag_meanings": " ".join(("running", *Status.labels())),
}
SECONDS = "wall_seconds"
RESERVED = frozenset({"time", "params", "status", SECONDS, *PER_RUN})


class StoredRun:
    """What the driver of a run tells its store.

    **Raises** `ValueError` for a path that cannot be written, that another process writes to, or that holds another
    run; `OSError` where the disk is full.
    """

    def __init__(self, run: AbstractRun, path: str | os.PathLike[str], *, resume: bool):
        self._run = run
        self._store = RunStore(path, resume=resume)
        try:
            self._identity = identity_of(run)
            if self._store.identity is not None:
                self._refuse(differences(self._store.identity, self._identity, _eps(run)))
        except Exception:
            self.close()
            raise
        self._written, self._before, self._began = 0, 0.0, time.monotonic()

    def take_up(self, begun: PyTree) -> PyTree:
        """Where the run goes on, which has just begun: there, or where the store has it."""
        self._identity.record["start"] = start_of(begun)
        before = self._store.identity
        leaves = None if before is None else self._store.state.load(_arrays_of(begun))
        if before is None or leaves is None:  # a store without a state was left before there was one
            self._store.create(self._template(begun), self._identity)
            self._written = 0
            return begun
        self._refuse(start_differences(before.record["start"], self._identity.record["start"]))
        elsewhere = machine_changes(before, self._identity)
        if elsewhere:
            message = f"The run in {str(self._store.path)!r} goes on in another place ({elsewhere}): its numbers are"
            message += " those of a run without a break to rounding, not to the bit."
            warnings.warn(message, UserWarning, stacklevel=5)
        carry = self._restored(begun, leaves)
        self._before = self._store.number(SECONDS)
        return self._run.reopened(carry)

    @property
    def path(self) -> pathlib.Path:
        return self._store.path

    def due(self) -> bool:
        return self._store.state.due()

    def save(self, carry: PyTree, position: Position) -> None:
        """Writes the rows that were reached, then the state from which the run goes on."""
        began = time.monotonic()
        reached = int(position.rows)
        rows = {name: _plain(leaf, self._written, reached) for name, leaf in _rows_of(self._run, carry.record).items()}
        seconds = self._before + began - self._began
        numbers = {"t_final": position.t, "steps": position.steps, SECONDS: seconds, "status": MISSING}
        self._store.append(self._written, rows, numbers)
        self._store.state.save(_arrays_of(carry))
        self._written = reached
        self._store.state.spent(time.monotonic() - began)

    def finish(self, solution: Solution) -> None:
        """Writes how the run has ended, or been interrupted."""
        self._store.append(self._written, {}, numbers_of(solution))

    def close(self) -> None:
        """Lets other processes write to the store."""
        self._store.release()

    def _refuse(self, changes: list[str]) -> None:
        refuse(changes, self._store.path, "run")

    def _restored(self, begun: PyTree, leaves: list[Array]) -> PyTree:
        """The carry of the state that was kept, with its rows."""
        arrays, static = eqx.partition(_without_record(begun), eqx.is_array)
        carry = eqx.combine(jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(arrays), leaves), static)
        carry = eqx.tree_at(lambda c: c.record, carry, begun.record, is_leaf=lambda leaf: leaf is None)
        self._written = int(self._run.position(carry).rows)
        blank = _rows_of(self._run, begun.record)
        rows = self._store.rows(list(blank), self._written)
        filled = {name: _filled(rows[name], leaf) for name, leaf in blank.items()}
        return eqx.tree_at(lambda c: c.record, carry, _with_rows(self._run, begun.record, filled))

    def _template(self, begun: PyTree) -> xr.Dataset:
        """The data set with nothing in it yet."""
        run = self._run
        ts = np.asarray(run.save_times())
        rows = {name: _plain(leaf, 0, 0) for name, leaf in _rows_of(run, begun.record).items()}
        variables: dict[str, tuple] = {}
        for name, values in rows.items():
            dims = ("time", *(f"{name}_{i}" for i in range(values.ndim - 1)))
            empty = np.asarray(np.nan if values.dtype.kind in "fc" else 0, values.dtype)
            variables[name] = (dims, np.broadcast_to(empty, (ts.size, *values.shape[1:])))
        result = eqx.filter_eval_shape(run.summarise, begun)
        for name, shape in numbers_of(result).items():
            floating = np.dtype(shape.dtype).kind == "f"
            empty = np.asarray(np.nan if floating else 0, shape.dtype if floating else np.int64)
            variables[name] = ((), empty, ATTRIBUTES.get(name, {}))
        variables["status"] = ((), np.asarray(MISSING, np.int8), RUNNING)
        variables[SECONDS] = ((), np.asarray(0.0), {"long_name": "time that the run has taken", "units": "s"})
        about = {"format": FORMAT, KIND: run.title, "method": result.method, "dtype": str(_dtype(run))}
        rtol = self._identity.record["settings"].get("rtol")
        about |= ({} if rtol is None else {"rtol": rtol}) | installation()
        return xr.Dataset(variables, {"time": ("time", ts, {"long_name": "flow time", "units": "1"})}, about)


def _eps(run: AbstractRun) -> float:
    return float(jnp.finfo(_dtype(run)).eps)


def _dtype(run: AbstractRun) -> np.dtype:
    return jnp.result_type(*jax.tree_util.tree_leaves(run.start))


def _without_record(carry: PyTree) -> PyTree:
    return eqx.tree_at(lambda c: c.record, carry, None)


def _arrays_of(carry: PyTree) -> list[Array]:
    """All that changes on the way, but for the rows, which are appended to the store by themselves."""
    return jax.tree_util.tree_leaves(eqx.filter(_without_record(carry), eqx.is_array))


def _rows_of(run: AbstractRun, record: Record) -> dict[str, Array | np.ndarray]:
    """The buffers of a record as variables; parameters leaf by leaf, by their places."""
    observed = named_arrays(record.observed)
    for name in observed:
        if name in RESERVED or name.startswith(OF_RUNS) or name.startswith("params"):
            advice = "Names of the variables that every run has are taken."
            raise fail("observe", "have names of its own", f"with the name {name!r}", advice)
    return observed | named_arrays({"params": _flowing(run, record)})


def _flowing(run: AbstractRun, record: Record) -> PyTree:
    return moving(record.params, held_paths(run.frozen))


def _with_rows(run: AbstractRun, record: Record, rows: Mapping[str, Array | np.ndarray]) -> Record:
    """The record with other buffers, by the names of variables."""
    ordered = iter(rows.values())
    take = lambda _: next(ordered)  # noqa: E731
    observed = {name: jax.tree_util.tree_map(take, value) for name, value in record.observed.items()}
    params = jax.tree_util.tree_map(take, _flowing(run, record))
    return Record(eqx.combine(params, record.params), observed, record.memories)


def _plain(buffer: Array | np.ndarray, first: int, last: int) -> np.ndarray:
    """Rows as the store takes them: types of half precision that it does not know become single, which holds them."""
    rows = np.asarray(buffer)[first:last]
    return rows.astype(np.float32) if rows.dtype.kind == "V" else rows


def _filled(rows: np.ndarray, blank: Array | np.ndarray) -> Array:
    """A buffer whose first rows are these."""
    buffer = np.zeros(blank.shape, blank.dtype)
    buffer[: len(rows)] = rows.astype(blank.dtype)
    return placed(buffer, jnp.asarray(blank))
