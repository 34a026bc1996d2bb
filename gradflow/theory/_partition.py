"""The condition on the data under which true-living and false-dead neurons stay what they are."""

from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike

from gradflow._checks import check_finite, fail


class PartitionCondition(NamedTuple):
    """`holds`: whether `y_i y_j x_i . x_j >= 0` for all pairs; `violations`: pairs `i < j` for which it does not, of
    `pairs`; `worst`: the smallest value, over `|x_i| |x_j|`."""

    holds: bool
    violations: int
    pairs: int
    worst: float


def partition_condition(x: ArrayLike, y: ArrayLike) -> PartitionCondition:
    """Whether data keep the neuron partition of a ReLU network in order.

    They do if inputs of one label never form an obtuse angle, and of different labels never an acute one.

    Then `s_k y_i d(w_k . x_i)/dt >= 0` for two-layer ReLU networks, `s_k` the sign of the output weight, under every
    loss that decreases towards the label: see `gradflow.observables.NeuronPartition`. Values above `-1e-12 |x_i| |x_j|`
    count as zero.

    **Arguments**: `x`: inputs `(n, in_size)`; `y`: labels +1 and -1 `(n,)`.

    **Returns** a `PartitionCondition`.

    **Raises** `ValueError` for other labels, shapes that do not agree, and samples that are not finite or of norm zero.

    Source: M. Wang and C. Ma (2022), arXiv 2206.02139.

    >>> import gradflow as gf, numpy as np
    >>> gf.theory.partition_condition(np.array([[1.0, 0.0], [-1.0, 0.5]]), np.array([1.0, -1.0])).holds
    True
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise fail("y", "have one label per input", f"of shape {y.shape} against {x.shape}")
    check_finite("x", x)
    if not np.all(np.abs(y) == 1):
        raise fail("y", "hold labels +1 and -1", f"{y[np.abs(y) != 1][0]:g} at one place at least")
    lengths = np.linalg.norm(x, axis=1)
    if not np.all(lengths > 0):
        raise fail("x", "hold samples other than zero", f"zero at index {int(np.argmin(lengths))}")
    units = y[:, None] * x / lengths[:, None]
    above = np.triu_indices(len(x), 1)
    values = (units @ units.T)[above]
    bad = int(np.sum(values < -1e-12))
    return PartitionCondition(bad == 0, bad, values.size, float(np.min(values, initial=np.inf)))
