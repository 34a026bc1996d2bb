"""What `gradflow info` prints."""

import importlib.metadata
import inspect
import json
import os
import pathlib
import platform
import textwrap
from collections.abc import Callable
from types import ModuleType

import numpy as np

PACKAGES = ("gradflow-jax", "jax", "jaxlib", "diffrax", "equinox", "optax", "numpy", "xarray", "zarr")
WIDTH = 100


def describe_installation() -> str:
    """Versions, devices, and one line for everything on offer, from the docstrings."""
    import diffrax
    import jax

    from gradflow import data, flows, models, observables, problems, rules, solvers, studies, theory
    from gradflow.problems import activations, losses

    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"]
    lines += textwrap.wrap(", ".join(f"{name} {_version(name)}" for name in PACKAGES), WIDTH)
    for device in jax.devices():
        lines.append(f"device {device.id}: {device.platform}, {device.device_kind}")
    methods = (diffrax.AbstractSolver, solvers.AbstractMethod, solvers.AbstractStochasticMethod)
    sections: list[tuple[str, ModuleType, Callable[[object], bool]]] = [
        ("flows", flows, lambda value: _is_a(value, flows.AbstractFlow)),
        ("rules", rules, lambda value: _is_a(value, rules.AbstractRule)),
        ("models", models, _callable),
        ("losses", losses, _function),
        ("problems", problems, inspect.isclass),
        ("activations", activations, lambda value: _is_a(value, activations.AbstractActivation)),
        ("observables", observables, _callable),
        ("solvers", solvers, lambda value: _is_a(value, methods)),
        ("theory", theory, _function),
        ("studies", studies, _function),
        ("data", data, lambda value: _function(value) and value not in (data.load, data.names)),
    ]
    for title, room, offered in sections:
        name = room.__name__.replace("gradflow.problems.losses", "gradflow.losses")
        lines += ["", f"{title} ({name}):", *_entries(room, offered)]
    lines += ["", "data sets for --data: " + ", ".join(data.names())]
    return "\n".join(lines)


def describe_store(path: pathlib.Path) -> str:
    """What a store holds: sizes, how every run ended, how it was computed."""
    from gradflow._solution import Status
    from gradflow.sweeps import open_store

    ds = open_store(path)
    lines = [f"{path}: " + ", ".join(f"{size} {dim}" for dim, size in ds.sizes.items())]
    if "status" in ds:
        codes, counts = np.unique(ds.status.values, return_counts=True)
        about, named = ds.status.attrs, {-1: "missing", **dict(enumerate(Status.labels()))}
        named |= dict(zip(about.get("flag_values", ()), about.get("flag_meanings", "").split(), strict=True))
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


def _is_a(value: object, types: type | tuple[type, ...]) -> bool:
    return inspect.isclass(value) and issubclass(value, types)


def _callable(value: object) -> bool:
    """A class whose instances can be called, or, as observables of a whole state, nearly so."""
    return inspect.isclass(value) and any("__call__" in vars(cls) for cls in value.__mro__[:-1])


def _function(value: object) -> bool:
    return inspect.isfunction(value) and value.__module__.startswith("gradflow.") and "_checks" not in value.__module__


def _entries(room: ModuleType, offered: Callable[[object], bool]) -> list[str]:
    """Name and first line of the docstring, without what belongs to what follows it."""
    entries = []
    for name, value in sorted(vars(room).items(), key=lambda entry: entry[0].lower()):
        if not name.startswith(("_", "Abstract")) and offered(value):
            first = (inspect.getdoc(value) or "").split("\n")[0]
            entries.append(f"  {name:<21} {first.rstrip('.:')}")
    return entries


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
