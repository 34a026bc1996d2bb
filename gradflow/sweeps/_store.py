"""Stores of sweeps: a zarr group that xarray opens, written member by member and valid at any moment."""

import datetime
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
import zarr

from gradflow._checks import fail
from gradflow.sweeps._identity import VERSION, Identity, measured, measured_changes

FORMAT = "gradflow-1"
IDENTITY = "identity"
"""Group within a store that holds what tells its sweep from others."""
AFRESH = "Use another path, or start this one over with resume=False (--fresh on the command line)."
CHUNK = 64
"""Members along the last axis in one chunk, at most."""


def open_store(path: str | os.PathLike[str]) -> xr.Dataset:
    """Opens a store written by `sweep` or by a study, as an `xarray.Dataset` in memory.

    **Raises** `ValueError` if there is no such store.

    >>> import gradflow as gf
    >>> gf.sweeps.open_store("no-such-store.zarr")
    Traceback (most recent call last):
    ...
    ValueError: Argument `store` must be a zarr store written by gradflow, but is 'no-such-store.zarr', which does ...
    """
    if not _is_ours(pathlib.Path(path)):
        state = "holds something else" if pathlib.Path(path).exists() else "does not exist"
        raise fail("store", "be a zarr store written by gradflow", f"{str(path)!r}, which {state}")
    return xr.open_zarr(path).load()


def write_dataset(ds: xr.Dataset, path: str | os.PathLike[str]) -> pathlib.Path:
    """Writes a finished data set as a store, replacing a gradflow store at the same path.

    **Raises** `ValueError` if the path cannot be written or holds something else.

    >>> import gradflow as gf, pathlib, tempfile, xarray as xr
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = gf.sweeps.write_dataset(xr.Dataset({"a": ("x", [1.0])}), pathlib.Path(folder) / "a.zarr")
    ...     float(gf.sweeps.open_store(path).a[0])
    1.0
    """
    target = pathlib.Path(path)
    _refuse_foreign(target)
    check_writable("store", target)
    _create(ds.assign_attrs(format=FORMAT), target, {})
    return target


def kept(
    path: str | os.PathLike[str] | None,
    config: dict[str, Any],
    compute: Callable[[], xr.Dataset],
    starts: Callable[[], dict[str, Any]],
    *,
    resume: bool,
) -> xr.Dataset:
    """The part of a study that lies at `path`; computed and written where none does. `None` keeps nothing.

    `starts`: quantities by name that the part starts from, such as a loss and a vector field. What lies there is taken
    only if they come out the same.

    **Raises** `ValueError` for a part that was computed with another `config` or from other numbers, for one of a
    version that does not tell, and where `write_dataset` does.
    """
    if path is None:
        return compute()
    target = pathlib.Path(path)
    if resume and _is_ours(target):
        found = open_store(target)
        _refuse(_changes(found.attrs.get("part", "{}"), json.dumps(config)), path)
        if "part_starts" not in found.attrs:
            raise _unknown(target)
        _refuse(measured_changes(json.loads(found.attrs["part_starts"]), measured(starts())), path)
        return found
    _refuse_foreign(target)
    check_writable("store", target)
    found = compute().assign_attrs(part=json.dumps(config), part_starts=json.dumps(measured(starts())))
    write_dataset(found, target)
    return found


def to_netcdf(ds: xr.Dataset | str | os.PathLike[str], path: str | os.PathLike[str]) -> pathlib.Path:
    """Writes a data set, or the store at a path, as one netCDF 4 file. Needs the packages `h5netcdf` and `h5py`.

    **Raises** `ValueError` if one of these is missing, or the file cannot be written.

    >>> import gradflow as gf, pathlib, tempfile, xarray as xr
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = gf.sweeps.to_netcdf(xr.Dataset({"a": ("x", [1.0])}), pathlib.Path(folder) / "a.nc")
    ...     float(xr.load_dataset(path).a[0])
    1.0
    """
    lacking = [name for name in ("h5netcdf", "h5py") if importlib.util.find_spec(name) is None]
    if lacking:
        advice = f"pip install {' '.join(lacking)}"
        raise fail("path", f"be a zarr store while {' and '.join(lacking)} is missing", repr(str(path)), advice)
    check_writable("path", path)
    whole = ds if isinstance(ds, xr.Dataset) else open_store(ds)
    for variable in whole.variables.values():
        variable.encoding = {}
    unfinished = pathlib.Path(path).with_name(f".{pathlib.Path(path).name}.unfinished")
    whole.to_netcdf(unfinished, engine="h5netcdf")
    os.replace(unfinished, path)
    return pathlib.Path(path)


def discard(path: str | os.PathLike[str]) -> None:
    """Deletes a store of ours; leaves anything else alone, with a complaint."""
    _refuse_foreign(pathlib.Path(path))
    shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(_beside(pathlib.Path(path)), ignore_errors=True)


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
        self.beside = _beside(self.path)
        self._names = [str(name) for name in template.data_vars]
        _refuse_foreign(self.path)
        check_writable("store", path)
        if resume and self._find(template, alone):
            return
        if alone:
            shutil.rmtree(self.beside, ignore_errors=True)
        # Chunks hold a part of a row along the last axis of the grid, which is the one that runs fastest.
        axes = json.loads(template.attrs["config"])["axes"]
        inner = list(axes)[-1]
        encoding = {}
        for name, variable in template.data_vars.items():
            length = {inner: min(CHUNK, len(axes[inner]))} | dict.fromkeys(list(axes)[:-1], 1)
            sizes = [length.get(str(dim), size) for dim, size in variable.sizes.items()]
            encoding[name] = {"chunks": tuple(sizes)} if sizes else {}
        try:
            _create(template, self.path, encoding, replace=alone, identity=identity)
        except OSError:
            # Another process was faster.
            if alone or not self._find(template, alone):
                raise

    def _find(self, template: xr.Dataset, alone: bool) -> bool:
        """Whether there is a store to go on with."""
        if not _is_ours(self.path):
            return False
        found = open_store(self.path)
        if "config" not in found.attrs:
            actual = f"{str(self.path)!r}, which holds another study"
            raise fail("store", "hold a sweep in order to be resumed", actual)
        if alone and not np.any(found["status"].values != found["status"].attrs["flag_values"][0]):
            return False
        kept = _identity_in(self.path)
        old, new = found.attrs["config"], template.attrs["config"]
        # Members of other grids are not the same ones.
        comparable = json.loads(old)["axes"] == json.loads(new)["axes"]
        _refuse(_changes(old, new) + (self._differences(kept) if comparable else []), self.path)
        self.found = found
        return True

    def write(self, indices: list[tuple[int, ...]], arrays: dict[str, np.ndarray]) -> None:
        """Writes the members at `indices` from arrays over the whole grid.

        The status goes last, so that a member counts as done only when it is all there. What lies between the members
        within a chunk is written as well; on disk it is what it is in memory.
        """
        group: Any = zarr.open_group(self.path, mode="r+")
        rows = []
        for (outer, _), members in itertools.groupby(sorted(indices), key=lambda i: (i[:-1], i[-1] // CHUNK)):
            inner = [index[-1] for index in members]
            rows.append((*outer, slice(inner[0], inner[-1] + 1)))
        for name in sorted(self._names, key=lambda n: n == "status"):
            for row in rows:
                group[name][row] = arrays[name][row]

    def record(self, spent: dict[str, Any], share: Any) -> None:
        """Keeps what a run of this process took, whether it came to an end or not."""
        self.beside.mkdir(exist_ok=True)
        about = {"chunk": str(share), "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        (self.beside / f"run-{share}-{time.time_ns()}.json").write_text(json.dumps(spent | about))

    def finish(self) -> dict[str, Any]:
        """What all runs have taken together. Once nothing is missing it goes into the attributes of the store."""
        records = [json.loads(file.read_text()) for file in sorted(self.beside.glob("run-*.json"))]
        if not records:
            return {}
        total = taken(records)
        group: Any = zarr.open_group(self.path, mode="r+")
        if np.all(group["status"][...] != -1):
            group.attrs.update(total)
            zarr.consolidate_metadata(str(self.path))
            shutil.rmtree(self.beside, ignore_errors=True)
        return total


def taken(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The attributes that tell what one run, or several, have taken."""
    return {
        "wall_seconds": round(sum(record["wall_seconds"] for record in records), 3),
        "evaluations_spent": sum(record["evaluations_spent"] for record in records),
        "runs": json.dumps(records),
    }


def _beside(path: pathlib.Path) -> pathlib.Path:
    """Where an unfinished sweep keeps what is no part of its results: who is in flight, and what runs have taken."""
    return path.with_name(f".{path.name}.progress")


def check_writable(argument: str, path: str | os.PathLike[str]) -> None:
    """Refuses paths at which no folder can be made, before anything is computed.

    **Arguments**: `argument`: what the complaint calls the path. Folders above it are made.

    **Raises** `ValueError` for a path that cannot be written.

    >>> import gradflow as gf
    >>> gf.sweeps.check_writable("store", "/dev/null/a.zarr")
    Traceback (most recent call last):
    ...
    ValueError: Argument `store` must be a path that can be written, but is '/dev/null/a.zarr' ...
    """
    target = pathlib.Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        actual = f"{str(path)!r} ({error.strerror or error})"
        raise fail(argument, "be a path that can be written", actual, "Choose another folder.") from error


def _create(
    ds: xr.Dataset,
    path: pathlib.Path,
    encoding: dict[str, Any],
    replace: bool = True,
    identity: Identity | None = None,
) -> None:
    """Writes a store beside its place and moves it there, so that what stands there can always be opened."""
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    # Format 2: fixed-length strings, which coordinates such as the name of a loss are, have no place in format 3.
    ds.to_zarr(unfinished, mode="w", zarr_format=2, encoding=encoding)
    if identity is not None:
        group: Any = zarr.open_group(unfinished, mode="r+")
        group = group.create_group(IDENTITY, attributes={"record": json.dumps(identity.record)})
        group.create_array("sketches", data=identity.sketches)
        zarr.consolidate_metadata(str(unfinished))
    if replace and path.exists():
        shutil.rmtree(path)
    try:
        unfinished.rename(path)
    except OSError:
        shutil.rmtree(unfinished)
        raise


def _is_ours(path: pathlib.Path) -> bool:
    try:
        group = zarr.open_group(path, mode="r")
    except (OSError, ValueError, KeyError):
        return False
    return group.attrs.get("format") == FORMAT


def _refuse_foreign(path: pathlib.Path) -> None:
    if path.exists() and not _is_ours(path) and not _is_empty(path):
        actual = f"{str(path)!r}, which holds something else"
        raise fail("store", "be a new path or a gradflow store", actual, "Nothing was overwritten.")


def _is_empty(path: pathlib.Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _identity_in(path: pathlib.Path) -> Identity:
    """What a store keeps about what it holds; complains about stores that do not."""
    try:
        group: Any = zarr.open_group(path / IDENTITY, mode="r")
        kept = Identity(json.loads(group.attrs["record"]), group["sketches"][...])
    except (OSError, ValueError, KeyError):
        kept = None
    if kept is None or kept.record["version"] != VERSION:
        raise _unknown(path)
    return kept


def _unknown(path: pathlib.Path) -> ValueError:
    actual = f"{str(path)!r}, which another version of gradflow wrote, or which was copied without it"
    advice = f"It can be read by gradflow.sweeps.open_store. {AFRESH}"
    return fail("store", "keep what tells its numbers from others in order to be resumed", actual, advice)


def _changes(old: str, new: str) -> list[str]:
    """What differs between two configurations, in words."""
    before, after = json.loads(old), json.loads(new)
    # As text, since the order of the axes counts.
    names = sorted(before.keys() | after.keys())
    changed = [name for name in names if json.dumps(before.get(name)) != json.dumps(after.get(name))]
    return [_change(name, before.get(name), after.get(name)) for name in changed]


def _refuse(changes: list[str], path: Any) -> None:
    if changes:
        actual = f"{str(path)!r} with changes ({'; '.join(changes)})"
        raise fail("store", "hold the same sweep in order to be resumed", actual, AFRESH)


def _change(name: str, before: Any, after: Any) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        said = [f"{name}[{key!r}]: {_short(before.get(key))} -> {_short(after.get(key))}" for key in keys]
        return "; ".join(said) or f"order of {name}: {_short(list(before))} -> {_short(list(after))}"
    return f"{name}: {_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
