"""Learning-rate schedules with finitely many parameters."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar

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

    def __init__(self, ts: Any, factors: Any):
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


def _increases(ts: np.ndarray) -> bool:
    return bool(np.all(ts[1:] > ts[:-1]))
