"""The results of a sweep on their way: in memory, and in a store where there is one."""

import functools
import os

import numpy as np
import xarray as xr

from gradflow.runs._variables import MISSING
from gradflow.stores._store import Store, provenance
from gradflow.sweeps._checkpoint import Checkpoint, unfinished_file
from gradflow.sweeps._dataset import put
from gradflow.sweeps._identity import differences, identity_of
from gradflow.sweeps._launch import Share
from gradflow.sweeps._prepare import Prepared
from gradflow.sweeps._scheduler import Finished


class Results:
    """A data set that is filled member by member, from what a store has of it.

    `mine`: the members that are to be run here, by number. `todo`: those of them that were missing at the beginning.
    `done`: how many are there by now.

    **Raises** `ValueError` for a store that cannot be written or holds another sweep.
    """

    def __init__(self, prepared: Prepared, store: str | os.PathLike[str] | None, share: Share, resume: bool):
        self._prepared, self._share, self._tag = prepared, share, ""
        self._store: Store | None = None
        members, empty = prepared.members, prepared.empty
        if store is not None:
            identity = identity_of(members, prepared.options, prepared.codes)
            differ = functools.partial(differences, new=identity, members=members, options=prepared.options)
            self._tag = identity.tag + empty.attrs["config"]
            self._store = Store(store, empty, identity, differ, resume=resume, alone=share.whole)
        stored = None if self._store is None else self._store.found
        self._ds = empty.copy(deep=True) if stored is None else stored
        self._arrays = {str(name): self._ds[name].values for name in self._ds.data_vars}
        self._record: dict[str, object] = {}
        status = self._arrays["status"]
        self.mine = {i for i, index in enumerate(members.grid_indices) if share.holds(index, members.shape)}
        self.todo = {i for i in self.mine if status[members.grid_indices[i]] == MISSING}
        self.done = len(self.mine) - len(self.todo)

    def checkpoint(self, group: int) -> Checkpoint | None:
        """Where unfinished members of a group are kept; `None` without a store."""
        if self._store is None:
            return None
        return Checkpoint(self._store.sidecar / unfinished_file(self._share, group), self._tag)

    def keep(self, finished: Finished) -> None:
        """Enters members that have finished."""
        members, rows = self._prepared.members, self._prepared.rows
        indices = [members.grid_indices[number] for number in finished.member_ids]
        groups_of = np.array([members.shape_group_of[number] for number in finished.member_ids])
        for i in np.unique(groups_of):
            which = np.flatnonzero(groups_of == i)
            put(self._arrays, [indices[j] for j in which], finished.results, which, rows[i])
        if self._store is not None and indices:
            self._store.write(sorted(indices), self._arrays)
        self.done += len(indices)

    def record(self, wall_seconds: float, evaluations: int | np.ndarray, programs: int) -> None:
        """Notes what this process took, whether it came to an end or not. `evaluations`: by device."""
        self._record = {
            "wall_seconds": round(wall_seconds, 3),
            "evaluations_spent": int(np.sum(evaluations)),
            "evaluations_by_device": np.ravel(evaluations).tolist(),
            "programs": programs,
        }
        if self._store is not None and self.todo:
            self._store.record(self._record, self._share)

    def dataset(self) -> xr.Dataset:
        """What there is so far."""
        return self._ds.copy(data=self._arrays)

    def finish(self) -> xr.Dataset:
        """All results, with what they took."""
        attributes = provenance([self._record]) if self._store is None else self._store.finish()
        return self.dataset().assign_attrs(attributes)
