"""Results as JSON, with the versions and the device that they come from."""

import importlib.metadata
import json
import math
import pathlib
import platform
from typing import Any

import jax

import gradflow as gf

PACKAGES = ("jax", "diffrax", "scipy", "torch", "torchdiffeq", "sundials4py", "scikit-sundae")


def versions() -> dict[str, str]:
    """Of everything that may have taken part, as far as it is installed."""
    found = {"gradflow": gf.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def finite(value: Any) -> Any:
    """The same with NaN and infinity as null, for JSON knows neither."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(record: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """Writes `record` as `<benchmark>.json`, and returns its path."""
    device = jax.devices()[0]
    record = record | {"versions": versions(), "device": f"{device.platform}: {device.device_kind}"}
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{record['benchmark']}.json"
    target.write_text(json.dumps(finite(record), indent=2) + "\n")
    return target
