"""When and how fast a homogeneous network leaves zero: what the correlation `N` at a KKT point tells."""

from typing import NamedTuple

import numpy as np

from gradflow._checks import check_count, check_finite, check_positive, fail


class Escape(NamedTuple):
    """`time`: leading order of the escape time; `slope`: its derivative in `ln(1/delta)`, for degree 2, or in
    `delta^(2 - degree)`; `rate`: of the alignment, `None` without a curvature, in the time in which the norm grows like
    `exp(degree N t)`; `exponent`: the residual at the escape is about `delta^exponent`."""

    time: float
    slope: float
    rate: float | None
    exponent: float | None


def escape(correlation: float, log_norm: float, *, degree: int = 2, curvature: float | None = None) -> Escape:
    """Escape time of a homogeneous network from a small start, by theory.

    For a start of norm `delta = exp(log_norm)` along a KKT point with `N = correlation`, on the clock of gradient flow:

        degree 2:     t = ln(1/delta) / (2 N) + O(1)
        degree k > 2: t = delta^(2 - k) / (k (k - 2) N),  the blow-up of the flow of N along the ray

    The first holds for any start whose direction converges to the point; the `O(1)` is that of the alignment. The
    second is exact for a start on the ray, to leading order in `delta`; off the ray, alignment takes a like time.
    Directions converge at the rate `k N - mu`, with `mu` the largest tangential eigenvalue of the Hessian of `N`, in
    the time in which the norm grows at the rate `k N`; so the residual at the escape is about
    `delta^((k N - mu)/(k N))`, on top of a floor that the loss sets.

    **Arguments**: `correlation`: positive. `log_norm`: `ln delta`, negative. `degree`. `curvature`: `mu`.

    **Returns** an `Escape`.

    **Raises** `ValueError` for a correlation that is not positive, a log-norm that is not negative, a degree below two,
    and a curvature that is not finite.

    Source: Kumar & Haupt (2024), arXiv 2402.09226; the rates from the linearised flow of `N` on the sphere.

    >>> import gradflow as gf
    >>> result = gf.theory.escape(0.5, -2302.6, curvature=0.0)
    >>> result.time, result.slope, result.rate
    (2302.6, 1.0, 1.0)
    """
    check_positive("correlation", correlation, "Directions with a negative one decay towards zero.")
    check_count("degree", degree, least=2)
    if not log_norm < 0:
        raise fail("log_norm", "be negative", f"{log_norm:g}", "Small initialisation is below norm one.")
    check_finite("curvature", curvature)
    if degree == 2:
        slope = 1 / (2 * correlation)
        time = -log_norm * slope
    else:
        slope = 1 / (degree * (degree - 2) * correlation)
        time = float(np.exp(-(degree - 2) * log_norm)) * slope if log_norm > -700 / (degree - 2) else float("inf")
    if curvature is None:
        return Escape(time, slope, None, None)
    rate = degree * correlation - curvature
    return Escape(time, slope, rate, rate / (degree * correlation))
