"""What `gradflow info` prints."""

import importlib.metadata
import inspect
import json
import os
import pathlib
import platform
from types import ModuleType

import numpy as np

PACKAGES = ("gradflow-jax", "jax", "jaxlib", "diffrax", "equinox", "optax", "numpy", "xarray", "zarr")


def describe_installation() -> str:
    """Versions, devices, and one line for every flow, rule, observable, model and solver, from their docstrings."""
    import jax

    from gradflow import data, flows, models, observables, rules, solvers

    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"]
    lines.append(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    for device in jax.devices():
        lines.append(f"device {device.id}: {device.platform}, {device.device_kind}")
    for title, room in (
        ("flows", flows),
        ("rules", rules),
        ("models", models),
        ("observables", observables),
        ("solvers", solvers),
    ):
        lines += ["", f"{title}:", *_classes(room)]
    lines += ["", "data sets: " + ", ".join(data.names())]
    return "\n".join(lines)


def describe_store(path: pathlib.Path) -> str:
    """What a store holds: sizes, how every run ended, how it was computed."""
    from gradflow._solution import STATUS
    from gradflow.sweeps import open_store

    ds = open_store(path)
    lines = [f"{path}: " + ", ".join(f"{size} {dim}" for dim, size in ds.sizes.items())]
    if "status" in ds:
        codes, counts = np.unique(ds.status.values, return_counts=True)
        named = {-1: "missing", **dict(enumerate(STATUS))}
        ended = ", ".join(f"{count} {named[int(code)]}" for code, count in zip(codes, counts, strict=True))
        lines.append(f"runs: {ended}")
    for name, value in ds.attrs.items():
        if name == "config":
            settings = {k: v for k, v in json.loads(value).items() if k != "axes"}
            lines.append(f"config: {json.dumps(settings)}")
        else:
            lines.append(f"{name}: {value}")
    lines.append("variables: " + ", ".join(f"{name} {tuple(ds[name].dims)}" for name in ds.data_vars))
    return "\n".join(lines)


def _classes(room: ModuleType) -> list[str]:
    found = []
    for name, value in sorted(vars(room).items()):
        if inspect.isclass(value) and not name.startswith(("_", "Abstract")):
            first = (inspect.getdoc(value) or "").split("\n")[0]
            found.append(f"  {name:<20} {first}")
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
