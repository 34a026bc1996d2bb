"""The limit of vanishing initialisation of diagonal linear networks: a sequence of saddles, computed exactly."""

from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float

from gradflow._checks import check_choice, check_finite, fail


class Saddles(NamedTuple):
    """Saddles that a flow visits: it arrives at `predictors[k]`, of loss `losses[k]`, at time `times[k]`.

    The first is zero, at time zero; the last is the end. The unit of time is said by what made them."""

    times: Float[np.ndarray, " saddles"]
    predictors: Float[np.ndarray, "saddles ..."]
    losses: Float[np.ndarray, " saddles"]


def diagonal_saddles(x: ArrayLike, y: ArrayLike, *, reduction: str = "mean", limit: int = 1000) -> Saddles:
    """Saddles that a diagonal linear network visits from a vanishing start.

    Gradient flow of `f(x) = (u * v) . x` from `u = sqrt(2) alpha`, `v = 0`, under square loss, as `alpha -> 0`.

    Times are in units of `ln(1/alpha)`. With `s = 0`, `beta = 0` at first, repeat: `g = grad L(beta)`; go on by the
    least `D` for which some `s_i - D g_i` reaches `+-1`; then `beta` minimises the loss among predictors with
    `beta_i >= 0` where `s_i = 1`, `<= 0` where `s_i = -1` and `= 0` elsewhere. Coordinates may leave again, and come
    back with the other sign. At finite `alpha` the flow arrives later by `O(1 / ln(1/alpha))`, relatively.

    **Arguments**: `x (n, d)`, in general position; `y (n,)`; `reduction` of the loss, `"mean"` or `"sum"`; `limit` on
    the number of saddles.

    **Returns** the `Saddles`, with predictors `(d,)`.

    **Raises** `ValueError` for other shapes, entries that are not finite, an unknown reduction, and if `limit` is
    reached.

    Source: S. Pesme and N. Flammarion (2023), *Saddle-to-saddle dynamics in diagonal linear networks*,
    arXiv 2304.00488.

    >>> import gradflow as gf, numpy as np
    >>> result = gf.theory.diagonal_saddles(np.eye(2), np.array([1.0, -2.0]), reduction="sum")
    >>> result.times.tolist(), result.predictors.tolist()
    ([0.0, 0.5, 1.0], [[0.0, 0.0], [0.0, -2.0], [1.0, -2.0]])
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise fail("y", "have one entry per input", f"of shape {y.shape} against {x.shape}")
    check_finite("x", x)
    check_finite("y", y)
    check_choice("reduction", reduction, ("mean", "sum"))
    weight = 1 / len(y) if reduction == "mean" else 1.0
    threshold = 1e-12 * weight * float(np.max(np.abs(x.T @ y), initial=0.0))
    s, beta, time = np.zeros(x.shape[1]), np.zeros(x.shape[1]), 0.0
    times, predictors = [time], [beta]
    for _ in range(limit):
        g = weight * x.T @ (x @ beta - y)
        g[np.abs(g) <= threshold] = 0.0
        if not g.any():
            residuals = np.stack(predictors) @ x.T - y
            return Saddles(np.array(times), np.stack(predictors), weight / 2 * np.sum(residuals**2, axis=1))
        with np.errstate(divide="ignore", invalid="ignore"):
            waits = np.where(g == 0, np.inf, (s * np.sign(g) + 1) / np.abs(g))
        waits[(s * np.sign(g) + 1) < 1e-12] = np.inf
        wait = float(np.min(waits))
        if not np.isfinite(wait):
            break
        time, s = time + wait, s - wait * g
        reached = (np.abs(np.abs(s) - 1) < 1e-9) | (waits <= wait * (1 + 1e-12))
        s = np.where(reached, np.sign(s), s)
        beta = _constrained(x, y, np.where(reached, s, 0.0))
        times.append(time)
        predictors.append(beta)
    raise fail("limit", "allow for all saddles", str(limit), "Or are the inputs not in general position?")


def _constrained(x: np.ndarray, y: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Least squares over predictors of these signs, zero where the sign is zero."""
    from scipy.optimize import nnls

    free = np.flatnonzero(signs)
    beta = np.zeros(len(signs))
    beta[free] = signs[free] * nnls(x[:, free] * signs[free], y)[0]
    return beta
