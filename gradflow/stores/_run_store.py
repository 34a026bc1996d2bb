"""The store of one run: rows that are appended as they are reached, and the state to go on from."""

import os
import pathlib
from collections.abc import Mapping

import numpy as np
import xarray as xr
import zarr

from gradflow._checks import fail
from gradflow.stores._identity import Identity
from gradflow.stores._lock import StoreLock
from gradflow.stores._state_file import StateFile
from gradflow.stores._zarr_group import array_in, check_writable, create, identity_in, is_ours, refuse_foreign, sidecar

KIND = "run"
"""Attribute that a store of one run has, with the name of what runs."""
ENTRIES = 2**14
"""Numbers of a variable in one chunk: the last one is written again whenever rows are added to it."""


class RunStore:
    """A store that this process alone writes. It can be opened at any moment, whatever ends the process.

    Rows are on disk before the state that counts them, and both are replaced as a whole.

    **Raises** `ValueError` for a path that cannot be written, that another process writes to, or that holds something
    else.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool):
        self.path = pathlib.Path(path)
        self.state = StateFile(self.path / ".state.npz")
        self._group: zarr.Group | None = None
        refuse_foreign(self.path)
        check_writable("store", path)
        self._lock = StoreLock(self.path, sidecar(self.path) / "lock")
        try:
            self.identity = self._found() if resume else None
        except Exception:
            self.release()
            raise

    def _found(self) -> Identity | None:
        """What the run is known by whose store lies there, if there is one."""
        if not is_ours(self.path):
            return None
        if KIND not in zarr.open_group(self.path, mode="r").attrs:
            actual = f"{str(self.path)!r}, which holds a sweep or a study"
            raise fail("store", "hold a run in order to be resumed", actual)
        for left in self.path.glob("*/*.partial"):  # by a process that was ended while it wrote
            left.unlink(missing_ok=True)
        return identity_in(self.path)

    def create(self, template: xr.Dataset, identity: Identity) -> None:
        """Begins a store, in place of one that there may be. Variables along `time` get chunks of a few rows."""
        encoding = {}
        for name, variable in template.data_vars.items():
            if "time" in variable.dims:
                rows = int(np.clip(ENTRIES // max(1, variable.size // variable.shape[0]), 1, variable.shape[0]))
                encoding[name] = {"chunks": (rows, *variable.shape[1:])}
        create(template, self.path, encoding, identity=identity)

    def append(self, first: int, rows: dict[str, np.ndarray], numbers: Mapping[str, object]) -> None:
        """Writes rows from number `first` on, and numbers of the whole run."""
        group = self._open()
        for name, values in rows.items():
            if len(values):
                array_in(group, name)[first : first + len(values)] = values
        for name, value in numbers.items():
            array_in(group, name)[...] = np.asarray(value)

    def rows(self, names: list[str], count: int) -> dict[str, np.ndarray]:
        """The first rows of variables."""
        group = self._open()
        return {name: np.asarray(array_in(group, name)[:count]) for name in names}

    def number(self, name: str) -> float:
        return float(np.asarray(array_in(self._open(), name)[...]))

    def release(self) -> None:
        self._lock.release()

    def _open(self) -> zarr.Group:
        if self._group is None:
            self._group = zarr.open_group(self.path, mode="r+")
        return self._group
