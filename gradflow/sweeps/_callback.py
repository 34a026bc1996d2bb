"""What a sweep tells while it goes on: a small record after each segment."""

from collections.abc import Sequence
from typing import NamedTuple

AxisValue = bool | int | float | str
"""A value of an axis of a grid."""


class SweepSnapshot(NamedTuple):
    """Where a sweep is, as its `callback` gets it after each segment of about half a second of a worker.

    - `finished`, `total`: members that are done, those of a store included, and all of them, here or in the chunk.
    - `members`: the coordinates of those that have finished since the record before, such as
      `{"scale": 1e-3, "seed": 0}`. `statuses`, `losses`: how these ended, as in `Solution.status`, and the last loss;
      `None` where there is none.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> build = lambda rate: (gf.GradientDescent(lambda w: 0.5 * w**2, rate), jnp.array(1.0))
    >>> seen = []
    >>> ds = gf.sweep(build, {"rate": [0.1, 0.5]}, [1.0], progress=False, callback=seen.append)
    >>> seen[-1].finished, seen[-1].total, [member["rate"] for record in seen for member in record.members]
    (2, 2, [0.1, 0.5])
    """

    finished: int
    total: int
    members: list[dict[str, AxisValue]]
    statuses: list[str]
    losses: Sequence[float | None]
