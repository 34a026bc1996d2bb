"""With what results were computed: versions, device, time, and the commit that is checked out, if one is."""

import datetime
import importlib.metadata
import json
import pathlib
import platform

import jax

PACKAGES = ("gradflow-jax", "jax", "jaxlib", "diffrax", "equinox", "numpy")


def installation() -> dict[str, str]:
    """What a store, or a report, says about where its numbers come from.

    >>> from gradflow.stores._installation import installation
    >>> sorted(installation())
    ['commit', 'created', 'device', 'python', 'versions']
    """
    device = jax.local_devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "python": platform.python_version(),
        "versions": json.dumps(versions()),
        "commit": _commit(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """The versions of the packages that decide about the last bits."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    """The commit that is checked out where this package lies, or "unknown": an installed one does not know."""
    folder = pathlib.Path(__file__).resolve().parents[2] / ".git"
    try:
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (folder / name).exists():
            return (folder / name).read_text().strip()
        packed = (folder / "packed-refs").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split()[0] for line in packed if line.endswith(f" {name}")), "unknown")
