"""Costs at given errors, from measured curves."""

import math
from collections.abc import Sequence

import numpy as np


def cost_at(target: float, costs: Sequence[float], errors: Sequence[float]) -> tuple[float, bool]:
    """The least cost at which the error `target` was met, and whether that is only a bound from above.

    Points that others beat in both are dropped; between the rest, the logarithms are interpolated linearly. A cheapest
    point that is already better than the target bounds the cost from above. NaN where the target was never met.
    """
    front: list[tuple[float, float]] = []
    for cost, error in sorted(zip(costs, errors, strict=True)):
        if math.isfinite(error) and error > 0 and (not front or error < front[-1][1]):
            front.append((cost, error))
    if not front or front[-1][1] > target:
        return math.nan, False
    if front[0][1] <= target:
        return float(front[0][0]), front[0][1] < target / 2
    x = np.log([cost for cost, _ in front])
    y = np.log([error for _, error in front])
    return float(np.exp(np.interp(math.log(target), y[::-1], x[::-1]))), False


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The power law through positive points, by least squares on logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
