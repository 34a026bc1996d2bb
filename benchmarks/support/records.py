"""Results as JSON, with the versions and the device that they come from."""

import argparse
import importlib.metadata
import json
import math
import pathlib
import platform
from typing import Any

import jax

import gradflow as gf

PACKAGES = ("jax", "diffrax", "scipy", "torch", "torchdiffeq", "sundials4py", "scikit-sundae")


def arguments(doc: str) -> argparse.Namespace:
    """The command line of a benchmark that knows `--quick` and `--out` only, described by the first line of `doc`."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="toy size, seconds")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    return parser.parse_args()


def versions() -> dict[str, str]:
    """Of everything that may have taken part, as far as it is installed."""
    packages = {"gradflow": gf.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return packages


def finite(value: Any) -> Any:
    """The same with NaN and infinity as null, for JSON knows neither."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def comparison(what: str, peer: str, times: float, of: str = "gradients") -> dict[str, Any]:
    """How many times as much a peer takes as gradflow, in units `of` gradients, seconds, ..., for the same."""
    return {"what": what, "peer": peer, "times": float(times), "of": of}


def write(record: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """Writes `record` as `<benchmark>.json`, and returns its path. Its `comparisons` go into the table of all."""
    device = jax.devices()[0]
    record = record | {"versions": versions(), "device": f"{device.platform}: {device.device_kind}"}
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{record['benchmark']}.json"
    target.write_text(json.dumps(finite(record), indent=2) + "\n")
    return target
