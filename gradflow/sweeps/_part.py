"""A part of a study that is cached on disk, and loaded from there by the same computation only."""

import json
import os
import pathlib
from collections.abc import Callable

import xarray as xr
from jaxtyping import PyTree

from gradflow.runs._identity import measured, measured_changes
from gradflow.stores._changes import changes, refuse, unknown
from gradflow.stores._zarr_group import check_writable, is_ours, open_store, refuse_foreign, write_dataset


def load_or_compute(
    path: str | os.PathLike[str] | None,
    config: dict[str, object],
    compute: Callable[[], xr.Dataset],
    starts: Callable[[], dict[str, PyTree]],
    *,
    resume: bool,
) -> xr.Dataset:
    """The part of a study that lies at `path`; computed and written where none does. `None` caches nothing.

    `starts`: quantities by name that the part starts from, such as a loss and a vector field. What lies there is taken
    only if they come out the same.

    **Raises** `ValueError` for a part that was computed with another `config` or from other numbers, for one of a
    version that does not tell, and where `write_dataset` does.
    """
    if path is None:
        return compute()
    target = pathlib.Path(path)
    if resume and is_ours(target):
        ds = open_store(target)
        refuse(changes(ds.attrs.get("part", "{}"), json.dumps(config)), path)
        if "part_starts" not in ds.attrs:
            raise unknown(target)
        refuse(measured_changes(json.loads(ds.attrs["part_starts"]), measured(starts())), path)
        return ds
    refuse_foreign(target)
    check_writable("store", target)
    ds = compute().assign_attrs(part=json.dumps(config), part_starts=json.dumps(measured(starts())))
    write_dataset(ds, target)
    return ds
