"""Labelled results on disk: a zarr group that xarray opens, replaced as a whole or not at all."""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping

import numpy as np
import xarray as xr
import zarr

from gradflow._checks import fail
from gradflow.stores._changes import unknown
from gradflow.stores._identity import VERSION, Identity
from gradflow.stores._installation import installation

FORMAT = "gradflow-1"
IDENTITY = "identity"
"""Group within a store that holds what tells its sweep from others."""


def open_store(path: str | os.PathLike[str]) -> xr.Dataset:
    """Opens a store written by `sweep` or by a study, as an `xarray.Dataset` in memory.

    **Raises** `ValueError` if there is no such store.

    >>> import gradflow as gf
    >>> gf.sweeps.open_store("no-such-store.zarr")
    Traceback (most recent call last):
    ...
    ValueError: Argument `store` must be a zarr store written by gradflow, but is 'no-such-store.zarr', which does ...
    """
    if not is_ours(pathlib.Path(path)):
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
    refuse_foreign(target)
    check_writable("store", target)
    # What computed a sweep is known already; what a study puts together is computed by this process.
    create(ds.assign_attrs({**installation(), **ds.attrs, "format": FORMAT}), target, {})
    return target


def array_in(group: zarr.Group, name: str) -> zarr.Array:
    """The array of a name; raises `KeyError` where there is none."""
    node = group[name]
    if not isinstance(node, zarr.Array):
        raise KeyError(name)
    return node


def annotate(path: str | os.PathLike[str], **attrs: str | float) -> None:
    """Adds attributes to a store of ours, such as the command that wrote it.

    >>> import gradflow as gf, pathlib, tempfile, xarray as xr
    >>> from gradflow.stores._zarr_group import annotate
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = gf.sweeps.write_dataset(xr.Dataset({"a": ("x", [1.0])}), pathlib.Path(folder) / "a.zarr")
    ...     annotate(path, command="gradflow compare")
    ...     gf.sweeps.open_store(path).attrs["command"]
    'gradflow compare'
    """
    group = zarr.open_group(path, mode="r+")
    group.attrs.update(attrs)
    zarr.consolidate_metadata(str(path))


def discard(path: str | os.PathLike[str]) -> None:
    """Deletes a store of ours; leaves anything else alone, with a complaint."""
    refuse_foreign(pathlib.Path(path))
    shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(sidecar(pathlib.Path(path)), ignore_errors=True)


def sidecar(path: pathlib.Path) -> pathlib.Path:
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


def create(
    ds: xr.Dataset,
    path: pathlib.Path,
    encoding: Mapping[str, Mapping[str, object]],
    replace: bool = True,
    identity: Identity | None = None,
) -> None:
    """Writes a store beside its place and moves it there, so that what stands there can always be opened."""
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    # Format 2: fixed-length strings, which coordinates such as the name of a loss are, have no place in format 3.
    ds.to_zarr(unfinished, mode="w", zarr_format=2, encoding=encoding)
    if identity is not None:
        group = zarr.open_group(unfinished, mode="r+").create_group(
            IDENTITY, attributes={"record": json.dumps(identity.record)}
        )
        group.create_array("sketches", data=identity.sketches)
        zarr.consolidate_metadata(str(unfinished))
    if replace and path.exists():
        shutil.rmtree(path)
    try:
        unfinished.rename(path)
    except OSError:
        shutil.rmtree(unfinished)
        raise


def identity_in(path: pathlib.Path) -> Identity:
    """What a store keeps about what it holds; complains about stores that do not."""
    try:
        group = zarr.open_group(path / IDENTITY, mode="r")
        record = json.loads(str(group.attrs["record"]))
        identity = Identity(record, np.asarray(array_in(group, "sketches")[...]))
    except (OSError, ValueError, KeyError):
        identity = None
    if identity is None or identity.record["version"] != VERSION:
        raise unknown(path)
    return identity


def is_ours(path: pathlib.Path) -> bool:
    """Whether a store of gradflow lies there."""
    try:
        group = zarr.open_group(path, mode="r")
    except (OSError, ValueError, KeyError):
        return False
    return group.attrs.get("format") == FORMAT


def refuse_foreign(path: pathlib.Path) -> None:
    """Complains about a path that holds something other than a store of ours."""
    if path.exists() and not is_ours(path) and not _is_empty(path):
        actual = f"{str(path)!r}, which holds something else"
        raise fail("store", "be a new path or a gradflow store", actual, "Nothing was overwritten.")


def _is_empty(path: pathlib.Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
