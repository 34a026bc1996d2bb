"""Slots and memory: how many members to keep in flight, what that takes, and whether it fits."""

import os
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from gradflow._checks import fail
from gradflow.sweeps._flight import shapes_of
from gradflow.sweeps._program import Options, Own, make_program
from gradflow.sweeps._queue import ROOM

LIGHT = 1e5
"""Floating-point operations of an evaluation below which a CPU spends its time on everything else."""
SLOTS_OF_LIGHT_ONES = 8
"""Slots on a CPU below that."""
ON_ACCELERATOR = 256
"""Slots to begin with on anything but a CPU."""
LARGE = 2**30
"""Bytes from which on an estimate is printed."""
SHARE = 0.8
"""Share of the free memory that a sweep may take."""


class Plan(eqx.Module):
    """Slots per device, and what the sweep takes in bytes."""

    slots: int
    shapes: tuple[PyTree, PyTree]
    flight: int  # all that is in flight, on one device
    results: int  # the data set, on the host


def plan(one: Own, shared: PyTree, options: Options, batch: int | None, members: int, results: int) -> Plan:
    """Slots for members like this one: as asked for, or as many as are of use and fit.

    On a CPU the cost of a tick is that of its slots, and slots wait for one another: one slot wastes nothing. Only
    where an evaluation costs next to nothing do eight take hardly longer than one. An accelerator wants to be filled.

    **Raises** `ValueError` if not even one slot fits, or not as many as were asked for.
    """
    shapes = shapes_of(one, shared, options)
    flops, scratch = _evaluation(one, shared, options)
    usual = ON_ACCELERATOR if jax.default_backend() != "cpu" else SLOTS_OF_LIGHT_ONES if flops < LIGHT else 1
    slots = max(1, min(usual if batch is None else batch, members))
    held = _size(eqx.filter(shared, eqx.is_array))
    each = 2 * (_size(one) + _size(shapes[0])) + scratch

    def taken(slots: int) -> int:
        room = max(slots, ROOM)
        return held + slots * each + room * (_size(one) + 2 * _size(shapes[1]))

    on_device, on_host = free_memory()
    if on_host is not None and results > SHARE * on_host:
        actual = f"{_said(results)}, with {_said(on_host)} free"
        raise fail("ts", "leave results that fit into memory", actual, "Save fewer times, or leave save_params out.")
    free = None if on_device is None else SHARE * on_device - (results if jax.default_backend() == "cpu" else 0)
    while free is not None and taken(slots) > free and slots > 1 and batch is None:
        slots //= 2
    if free is not None and taken(slots) > free:
        actual = f"{slots}, which takes {_said(taken(slots))} where {_said(max(free, 0))} are free"
        advice = "Save fewer times, observe less, or leave save_params out" + ("." if slots == 1 else ", or lower it.")
        raise fail("batch", "be a number of members that fit into memory", actual, advice)
    return Plan(slots, shapes, taken(slots), results)


def announcement(plans: list[Plan]) -> str | None:
    """What a large sweep takes, in words; `None` for a small one."""
    most, results = max(plan.flight for plan in plans), plans[0].results
    if most + results < LARGE:
        return None
    return f"estimated memory: {_said(most)} in flight, {_said(results)} of results"


def free_memory() -> tuple[int | None, int | None]:
    """Free bytes on a device and on the host; `None` where nobody tells."""
    try:
        host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        host = None
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return host, host
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else limit - stats.get("bytes_in_use", 0), host


def _evaluation(one: Own, shared: PyTree, options: Options) -> tuple[float, int]:
    """Operations of one evaluation, and the bytes that pass through it, a bound on what it needs at once."""
    evaluate: Any = eqx.filter_jit(lambda own, shared, options: make_program(own, shared, options).evaluation())
    costs = evaluate.lower(one, shared, options).lowered.cost_analysis() or {}
    return float(costs.get("flops", np.inf)), int(costs.get("bytes accessed", 0))


def _size(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(tree))


def _said(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
