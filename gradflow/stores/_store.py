"""A store being filled by a sweep: written member by member and valid at any moment."""

import datetime
import itertools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xarray as xr
import zarr

from gradflow._checks import fail
from gradflow.stores._changes import changes, refuse
from gradflow.stores._identity import Identity
from gradflow.stores._zarr_group import (
    array_in,
    check_writable,
    create,
    identity_in,
    is_ours,
    open_store,
    refuse_foreign,
    sidecar,
)

CHUNK = 64
"""Members along the last axis in one chunk, at most."""


class Store:
    """A store being filled. Numbers are on disk as soon as `write` returns. One without results is started over.

    Several processes may fill one store, each its own chunks. Every run leaves a record of what it took.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        template: xr.Dataset,
        identity: Identity,
        differences: Callable[[Identity], list[str]],
        *,
        resume: bool,
        alone: bool = True,
    ):
        self.path, self._differences = pathlib.Path(path), differences
        self.found: xr.Dataset | None = None
        self.sidecar = sidecar(self.path)
        self._names = [str(name) for name in template.data_vars]
        refuse_foreign(self.path)
        check_writable("store", path)
        if resume and self._find(template, alone):
            return
        if alone:
            shutil.rmtree(self.sidecar, ignore_errors=True)
        # Chunks hold a part of a row along the last axis of the grid, which is the one that runs fastest.
        axes = json.loads(template.attrs["config"])["axes"]
        inner = list(axes)[-1]
        encoding = {}
        for name, variable in template.data_vars.items():
            length = {inner: min(CHUNK, len(axes[inner]))} | dict.fromkeys(list(axes)[:-1], 1)
            sizes = [length.get(str(dim), size) for dim, size in variable.sizes.items()]
            encoding[name] = {"chunks": tuple(sizes)} if sizes else {}
        try:
            create(template, self.path, encoding, replace=alone, identity=identity)
        except OSError:
            # Another process was faster.
            if alone or not self._find(template, alone):
                raise

    def _find(self, template: xr.Dataset, alone: bool) -> bool:
        """Whether there is a store to go on with."""
        if not is_ours(self.path):
            return False
        stored = open_store(self.path)
        if "config" not in stored.attrs:
            actual = f"{str(self.path)!r}, which holds another study"
            raise fail("store", "hold a sweep in order to be resumed", actual)
        if alone and not np.any(stored["status"].values != stored["status"].attrs["flag_values"][0]):
            return False
        identity = identity_in(self.path)
        old, new = stored.attrs["config"], template.attrs["config"]
        # Members of other grids are not the same ones.
        comparable = json.loads(old)["axes"] == json.loads(new)["axes"]
        refuse(changes(old, new) + (self._differences(identity) if comparable else []), self.path)
        self.found = stored
        return True

    def write(self, indices: list[tuple[int, ...]], arrays: dict[str, np.ndarray]) -> None:
        """Writes the members at `indices` from arrays over the whole grid.

        The status goes last, so that a member counts as done only when it is all there. What lies between the members
        within a chunk is written as well; on disk it is what it is in memory.
        """
        group = zarr.open_group(self.path, mode="r+")
        rows = []
        for (outer, _), members in itertools.groupby(sorted(indices), key=lambda i: (i[:-1], i[-1] // CHUNK)):
            inner = [index[-1] for index in members]
            rows.append((*outer, slice(inner[0], inner[-1] + 1)))
        for name in sorted(self._names, key=lambda n: n == "status"):
            stored = array_in(group, name)
            for row in rows:
                stored[row] = arrays[name][row]

    def record(self, costs: Mapping[str, object], share: object) -> None:
        """Keeps what a run of this process took, whether it came to an end or not."""
        self.sidecar.mkdir(exist_ok=True)
        about = {"chunk": str(share), "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        (self.sidecar / f"run-{share}-{time.time_ns()}.json").write_text(json.dumps({**costs, **about}))

    def finish(self) -> dict[str, float | str]:
        """The provenance of all runs together. Once nothing is missing it goes into the attributes of the store."""
        records = [json.loads(file.read_text()) for file in sorted(self.sidecar.glob("run-*.json"))]
        if not records:
            return {}
        total = provenance(records)
        group = zarr.open_group(self.path, mode="r+")
        if np.all(np.asarray(array_in(group, "status")[...]) != -1):
            group.attrs.update(total)
            zarr.consolidate_metadata(str(self.path))
            shutil.rmtree(self.sidecar, ignore_errors=True)
        return total


def provenance(records: list[dict[str, Any]]) -> dict[str, float | str]:
    """The attributes that tell how one run, or several, were computed."""
    return {
        "wall_seconds": round(sum(record["wall_seconds"] for record in records), 3),
        "evaluations_spent": sum(record["evaluations_spent"] for record in records),
        "runs": json.dumps(records),
    }
