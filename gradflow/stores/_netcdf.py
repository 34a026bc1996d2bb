"""Labelled results as one netCDF file."""

import importlib.util
import os
import pathlib

import xarray as xr

from gradflow._checks import fail
from gradflow.stores._zarr_group import check_writable, open_store


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
