"""Slots and memory: how many members to run at a time, what that takes, and whether it fits."""

import os
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from gradflow._checks import fail
from gradflow.runs._member import Options
from gradflow.sweeps._program import PerMember, make_program
from gradflow.sweeps._slots import Shapes, shapes_of

LIGHT = 8e5
"""Floating-point operations of an evaluation below which a CPU spends most of its time on everything else: on two-layer
networks and 360 digits, 0.8e6 operations at width 8, four slots took as long as one with the default solver and two
thirds of that with Tsit5, and at width 32 a fifth longer. So as many slots step together as have that in common."""
SLOTS_ON_CPU = 128
"""Slots on a CPU, at most: networks with four neurons on 16 points gained nothing from more."""
ALWAYS = 8
"""Slots that are of use at any number of members; beyond that, each slot has four members to run."""
ON_ACCELERATOR = 256
"""Slots to begin with on anything but a CPU."""
ROOM = 16
"""Members that are pending, and results that are kept on the device, unless there are more slots or the members are
tiny."""
BOX = 2**20
"""Bytes of tiny members and their results that may wait, so that the host is seldom asked."""
LARGEST_ROOM = 512
"""Members that wait at most, unless there are more slots."""
LARGE = 2**30
"""Bytes from which on an estimate is printed."""
SHARE = 0.8
"""Share of the free memory that a sweep may take."""


class Plan(eqx.Module):
    """Workers and slots, and what the sweep takes in bytes."""

    slots: int  # of each worker, on each device
    workers: int
    room: int  # of a worker, for pending members and for results
    shapes: Shapes
    slot_bytes: int  # slots and all that waits for them, on one device
    results: int  # the data set, on the host


def plan(one: PerMember, shared: PyTree, options: Options, batch: int | None, members: int, results: int) -> Plan:
    """Slots for members like this one: as asked for, or as many as are of use and fit.

    On a CPU the cost of a step of all slots is the sum of theirs, and slots wait for one another: one slot wastes
    nothing, and each core gets a worker of its own. Only where an evaluation costs next to nothing do many take hardly
    longer than one. An accelerator wants to be filled. The numbers follow from the problem and the machine, never from
    a stop-watch, so that a sweep which is resumed has the same.

    **Raises** `ValueError` if not even one slot fits, or not as many as were asked for.
    """
    shapes = shapes_of(one, shared, options)
    flops, scratch = _evaluation(one, shared, options)
    slots, workers = _of_use(flops, members) if batch is None else (max(1, min(batch, members)), 1)
    held = _size(eqx.filter(shared, eqx.is_array))
    each_own, result = _size(one), _size(shapes.result)
    each, waiting = 2 * (each_own + _size(shapes.carry)) + scratch, each_own + 2 * result

    def num_bytes(slots: int, workers: int, room: int) -> int:
        return held + workers * (slots * each + room * waiting)

    on_device, on_host = free_memory()
    if on_host is not None and results > SHARE * on_host:
        actual = f"{_describe(results)}, with {_describe(on_host)} free"
        raise fail("ts", "leave results that fit into memory", actual, "Save fewer times, or leave save_params out.")
    free = np.inf if on_device is None else SHARE * on_device
    free -= results if jax.default_backend() == "cpu" else 0
    room = max(slots, ROOM, min(LARGEST_ROOM, BOX // waiting))
    if num_bytes(slots, workers, room) > free:
        room = max(slots, ROOM)
    while num_bytes(slots, workers, room) > free and workers > 1:
        workers -= 1
    while num_bytes(slots, workers, room) > free and slots > 1 and batch is None:
        slots //= 2
        room = max(slots, ROOM)
    slot_bytes = num_bytes(slots, workers, room)
    if slot_bytes > free:
        actual = f"{slots}, which takes {_describe(slot_bytes)} where {_describe(max(free, 0))} are free"
        advice = "Save fewer times, observe less, or leave save_params out" + ("." if slots == 1 else ", or lower it.")
        raise fail("batch", "be a number of members that fit into memory", actual, advice)
    return Plan(slots, workers, room, shapes, slot_bytes, results)


def _of_use(flops: float, members: int) -> tuple[int, int]:
    """Slots and workers, from the operations of an evaluation and the number of members."""
    if jax.default_backend() != "cpu":
        return max(1, min(ON_ACCELERATOR, members)), 1
    ratio = int(np.clip(LIGHT / max(flops, 1.0), 1, SLOTS_ON_CPU))
    slots = min(1 << (ratio.bit_length() - 1), max(ALWAYS, members // 4), members)
    # A slot is the same in every worker only where it has no neighbours.
    alone = slots <= 1 and len(jax.local_devices()) == 1
    return max(1, slots), min(cores(), members) if alone else 1


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def announcement(plans: list[Plan]) -> str | None:
    """What a large sweep takes, in words; `None` for a small one."""
    slot_bytes, results = max(plan.slot_bytes for plan in plans), plans[0].results
    if slot_bytes + results < LARGE:
        return None
    return f"estimated memory: {_describe(slot_bytes)} in slots, {_describe(results)} of results"


def free_memory() -> tuple[int | None, int | None]:
    """Free bytes on a device and on the host; `None` where it is not known."""
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


def _evaluation(one: PerMember, shared: PyTree, options: Options) -> tuple[float, int]:
    """Operations of one evaluation, and the bytes that pass through it, a bound on what it needs at once."""
    evaluate: Any = eqx.filter_jit(
        lambda per_member, shared, options: make_program(per_member, shared, options).evaluation()
    )
    costs = evaluate.lower(one, shared, options).lowered.cost_analysis() or {}
    return float(costs.get("flops", np.inf)), int(costs.get("bytes accessed", 0))


def _size(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(tree))


def _describe(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
