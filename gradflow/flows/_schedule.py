"""Learning-rate schedules with finitely many parameters, and the times at which schedules jump."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Scalar

from gradflow._checks import check_finite, check_positive, fail, is_concrete


class InterpolatedSchedule(eqx.Module):
    """A factor on the learning rate, interpolated between given times.

    Its logarithm is linear between them and constant outside.

    **Arguments**: `ts (n,)`: increasing times on the clock of the flow; `factors (n,)`: positive. Both are leaves, so
    that schedules can be swept over, and differentiated with respect to.

    **Raises** `ValueError` for times that do not increase or are not finite, and for factors that are not positive.

    >>> import gradflow as gf
    >>> round(float(gf.flows.InterpolatedSchedule([0.0, 2.0], [1.0, 0.25])(1.0)), 6)
    0.5
    """

    ts: Float[Array, " n"]
    log_factors: Float[Array, " n"]

    def __init__(self, ts: ArrayLike | Sequence[ArrayLike], factors: ArrayLike | Sequence[ArrayLike]):
        ts, factors = jnp.asarray(ts, float), jnp.asarray(factors, float)
        if ts.ndim != 1 or ts.size == 0 or (is_concrete(ts) and not _increases(np.asarray(ts))):
            raise fail("ts", "be increasing times (n,)", f"of shape {ts.shape}, or not increasing")
        check_finite("ts", ts)
        if factors.shape != ts.shape:
            raise fail("factors", f"have shape {ts.shape}", f"of shape {factors.shape}")
        check_positive("factors", factors)
        self.ts, self.log_factors = ts, jnp.log(factors)

    def __call__(self, t: float | Scalar) -> Scalar:
        return jnp.exp(jnp.interp(jnp.asarray(t, self.ts.dtype), self.ts, self.log_factors))


def schedule_jumps(schedule: Callable[[Scalar], ArrayLike] | None) -> Float[Array, " n"] | None:
    """Times at which a schedule is known to jump or to bend, in order; `None` where none are.

    Known are the knots of an `InterpolatedSchedule`, an attribute `jumps` of any schedule, and what the schedules of
    optax keep: the boundaries of piecewise ones, of joined ones and the parts of these, and both ends of polynomial and
    of cosine ones. Nothing is known of other functions.
    """
    if isinstance(schedule, InterpolatedSchedule):
        return schedule.ts
    declared = getattr(schedule, "jumps", None)
    if declared is not None:
        return jnp.sort(jnp.asarray(declared, float))
    jumps = sorted(set(_optax_boundaries(schedule, 0.0, np.inf)))
    return jnp.asarray(jumps, float) if jumps else None


def _optax_boundaries(schedule: Callable[[Scalar], ArrayLike] | None, begin: float, end: float) -> list[float]:
    """Boundaries of a schedule of optax that starts at `begin` and gives way to another at `end`."""
    if not str(getattr(schedule, "__module__", "")).startswith("optax"):
        return []
    variables = _closure(schedule)
    if "schedules" in variables and "boundaries" in variables:
        edges = [0.0, *map(float, variables["boundaries"]), np.inf]
        boundaries = [begin + edge for edge in edges[1:-1]]
        for part, low, high in zip(variables["schedules"], edges[:-1], edges[1:], strict=False):
            boundaries += _optax_boundaries(part, begin + low, begin + high)
        return [time for time in boundaries if begin <= time <= end]
    local: list[float] = []
    if variables.get("boundaries_and_scales"):
        local += map(float, variables["boundaries_and_scales"])
    if "interpolate_fn" in variables:
        local += map(float, variables["boundaries"])
    if "transition_steps" in variables and "decay_rate" not in variables:
        first = float(variables.get("transition_begin", 0))
        local += [first, first + float(variables["transition_steps"])]
    if "decay_steps" in variables:
        local.append(float(variables["decay_steps"]))
    return [begin + time for time in local if begin <= begin + time <= end]


def _closure(function: object) -> dict[str, Any]:
    """The variables that a function keeps from where it was made; those not yet set are left out."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    variables = {}
    for name, cell in zip(code.co_freevars if code is not None else (), cells, strict=True):
        try:
            variables[name] = cell.cell_contents
        except ValueError:
            continue
    return variables


def _increases(ts: np.ndarray) -> bool:
    return bool(np.all(ts[1:] > ts[:-1]))
