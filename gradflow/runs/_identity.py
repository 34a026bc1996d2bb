"""What tells one computation from another, whatever it is: where it runs, and what it starts from, in numbers."""

import os
import platform
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradflow.programs._code import ArrayObject
from gradflow.programs._digest import measure
from gradflow.stores._installation import versions

ROUNDING = 8
"""Rounding errors, in units of the last place, by which the same numbers differ from machine to machine."""

SENSITIVE = 100
"""Times the change under a change of the parameters by rounding that a quantity may differ by."""


Measure = list[float]
"""Of an array: its size, two random sums, a count of what is not finite, the change under rounding, the slack."""

Measures = dict[str, list[list[Measure]]]
"""Of quantities, by name: of every leaf, at one point after another."""


def machine() -> dict[str, object]:
    """Where and how numbers are computed to the bit."""
    device = next(iter(jnp.zeros(()).devices()))
    settings = [str(getattr(jax.config, f"jax_{name}")) for name in ("default_prng_impl", "default_matmul_precision")]
    return {
        "node": platform.node(),
        "device": f"{device.platform}: {device.device_kind}",
        "flags": os.environ.get("XLA_FLAGS", ""),
        "settings": settings,
        "versions": versions(),
    }


def measured(quantities: dict[str, PyTree]) -> Measures:
    """Measures of quantities that a computation starts from, to be kept beside its results."""
    eps = float(jnp.finfo(jnp.result_type(float)).eps)
    return {
        name: [[[*measure(a), 0.0, max(eps, spacing(a)) ** 0.5] for a in jax.tree_util.tree_leaves(value)]]
        for name, value in quantities.items()
    }


def measured_changes(before: Measures, after: Measures) -> list[str]:
    """What differs between two of these, in words."""
    changed = probes_that_differ({"0": before}, {"0": after})
    return [f"{name}: {change}" for name, (_, change) in changed]


def spacing(a: ArrayObject) -> float:
    return float(jnp.finfo(a.dtype).eps) if jnp.issubdtype(a.dtype, jnp.inexact) else 0.0


def probes_that_differ(
    before: Mapping[str, Measures | None], after: Mapping[str, Measures | None]
) -> list[tuple[str, tuple[str, str]]]:
    """Names of quantities with the member and what has become of their size."""
    names = []
    for number in sorted({*before} & {*after}, key=int):
        old, new = before[number], after[number]
        if old is None or new is None:
            continue
        for name in {**old, **new}:
            change = _difference(old.get(name, []), new.get(name, []))
            if change is not None:
                names.append((name, (number, change)))
    return names


def _difference(old: list[list[Measure]], new: list[list[Measure]]) -> str | None:
    """The sizes of the first leaf that differs, at any of the points."""
    if [len(leaves) for leaves in old] != [len(leaves) for leaves in new]:
        return "another structure"
    for i in range(len(old[0]) if old else 0):
        sizes = [max(a[i][0], b[i][0]) for a, b in zip(old, new, strict=True)]
        for a, b in zip((look[i] for look in old), (look[i] for look in new), strict=True):
            slack = max(a[5], b[5])
            room = slack * max(a[0], b[0]) + slack**2 * max(sizes) + SENSITIVE * max(a[4], b[4])
            gap = max(abs(x - y) for x, y in zip(a[:3], b[:3], strict=True))
            if gap > room or a[3] != b[3]:
                return f"size {a[0]:.6g} -> {b[0]:.6g}"
    return None


def close(a: np.ndarray, b: np.ndarray, eps: float) -> bool:
    """Whether sketches are the same within rounding."""
    return bool(np.all(np.abs(a - b) <= ROUNDING * eps * (1 + np.abs(a) + np.abs(b))))
