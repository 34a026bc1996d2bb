"""Stores of sweeps: a zarr group that xarray opens, written member by member and valid at any moment."""

import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np
import xarray as xr
import zarr

from gradflow._checks import fail

FORMAT = "gradflow-1"


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
    ds.assign_attrs(format=FORMAT).to_zarr(target, mode="w", zarr_format=2)
    return target


class Store:
    """A store being filled. Numbers go to disk as soon as `write` returns."""

    def __init__(self, path: str | os.PathLike[str], template: xr.Dataset, *, resume: bool):
        self.path = pathlib.Path(path)
        self.found: xr.Dataset | None = None
        _refuse_foreign(self.path)
        if resume and _is_ours(self.path):
            self.found = open_store(self.path)
            _refuse_changes(self.found.attrs, template.attrs, path)
            return
        check_writable("store", path)
        if self.path.exists():
            shutil.rmtree(self.path)
        # Chunks hold one row along the last axis of the grid, which is the one that runs fastest.
        axes = json.loads(template.attrs["config"])["axes"]
        inner = list(axes)[-1]
        encoding = {}
        for name, variable in template.data_vars.items():
            sizes = [size if dim == inner or dim not in axes else 1 for dim, size in variable.sizes.items()]
            encoding[name] = {"chunks": tuple(sizes)} if sizes else {}
        # Format 2: fixed-length strings, which coordinates such as the name of a loss are, have no place in format 3.
        template.to_zarr(self.path, mode="w", zarr_format=2, encoding=encoding)

    def write(self, index: tuple[int, ...], values: dict[str, np.ndarray]) -> None:
        """Writes one member; the status goes last, so that a member counts as done only when it is all there."""
        group: Any = zarr.open_group(self.path, mode="r+")
        for name in sorted(values, key=lambda n: n == "status"):
            group[name][index] = values[name]

    def finish(self, attrs: dict[str, Any]) -> None:
        """Adds attributes known only at the end."""
        zarr.open_group(self.path, mode="r+").attrs.update(attrs)
        zarr.consolidate_metadata(str(self.path))


def check_writable(argument: str, path: str | os.PathLike[str]) -> None:
    """Refuses paths at which no folder can be made, before anything is computed."""
    target = pathlib.Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = target.parent / f".{target.name}.probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        actual = f"{str(path)!r} ({error.strerror or error})"
        raise fail(argument, "be a path that can be written", actual, "Choose another folder.") from error


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


def _refuse_changes(old: dict[str, Any], new: dict[str, Any], path: Any) -> None:
    before, after = json.loads(old["config"]), json.loads(new["config"])
    changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    if changed:
        what = "; ".join(f"{name}: {_short(before.get(name))} -> {_short(after.get(name))}" for name in changed)
        advice = "Use another path, or resume=False to start this one over."
        raise fail(
            "store", "hold the same sweep in order to be resumed", f"{str(path)!r} with changes ({what})", advice
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
