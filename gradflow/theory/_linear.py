"""Linear networks whose modes decouple: every singular mode of the data grows, and saturates, for itself."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import ArrayLike, Float

from gradflow._checks import check_choice, check_count, check_finite, check_positive, fail
from gradflow.theory._diagonal import Saddles


def linear_saddles(x: ArrayLike, y: ArrayLike, *, depth: int = 2, reduction: str = "mean") -> Saddles:
    """Saddles that a deep linear network visits from a vanishing start.

    For `depth` layers and square loss, where modes decouple.

    Mode `k` has the singular value `s_k` of the correlation `y^T x` (over `n` for a mean); the network learns modes in
    order of size, at the times

        depth 2: t_k = 1 / s_k,  in units of ln(1/delta)      depth L > 2: t_k = 1 / ((L - 2) s_k),  of delta^(2 - L)

    for layers whose singular values start at `delta`; plateau losses are `sum_{i > k} s_i^2 / (2 v_i)` above the loss
    that no linear map can undo, with `v_i` the variance of the inputs along the right singular vector of the mode. It
    takes inputs whose covariance has these as eigenvectors, as whitened ones do. Elsewhere modes mix as they saturate:
    the first time still holds, and the rest is for the flow, with `gradflow.find_saddles`.

    **Arguments**: `x (n, d)`; `y (n, k)`; `depth`; `reduction`.

    **Returns** the `Saddles`, with predictors `(k, d)`.

    **Raises** `ValueError` for inputs whose covariance mixes the modes, entries that are not finite, a depth below two,
    an unknown reduction, and other shapes.

    Source: A. Saxe, J. McClelland and S. Ganguli (2014), arXiv 1312.6120.

    >>> import gradflow as gf, numpy as np
    >>> result = gf.theory.linear_saddles(np.eye(2), np.diag([4.0, 2.0]), reduction="sum")
    >>> result.times.tolist(), result.losses.tolist()
    ([0.0, 0.25, 0.5], [10.0, 2.0, 0.0])
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    y = y[:, None] if y.ndim == 1 else y
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise fail("y", "have one row per input", f"of shape {y.shape} against {x.shape}")
    check_finite("x", x)
    check_finite("y", y)
    check_count("depth", depth, least=2)
    check_choice("reduction", reduction, ("mean", "sum"))
    weight = 1 / len(y) if reduction == "mean" else 1.0
    left, s, right = np.linalg.svd(weight * y.T @ x)
    s = s[s > 1e-12 * max(s[0], 1e-300)] if s.size else s
    along = right[: len(s)]
    turned = weight * (along @ x.T) @ x
    variances = np.sum(turned * along, axis=1)
    if np.max(np.abs(turned - variances[:, None] * along), initial=0.0) > 1e-8 * np.max(variances, initial=0.0):
        advice = "Multiply them by the inverse square root of their covariance, or integrate the flow and take"
        advice += " gradflow.find_saddles."
        raise fail("x", "have the modes as principal axes, as whitened inputs do", "such that it mixes them", advice)
    modes = left[:, : len(s)].T[:, :, None] * along[:, None, :] * (s / variances)[:, None, None]
    predictors = np.concatenate([np.zeros((1, y.shape[1], x.shape[1])), np.cumsum(modes, axis=0)])
    gains = s**2 / (2 * variances)
    min_loss = weight / 2 * np.sum(y**2) - np.sum(gains)
    losses = min_loss + np.append(np.cumsum(gains[::-1])[::-1], 0.0)
    times = np.append(0.0, 1 / (s if depth == 2 else (depth - 2) * s))
    return Saddles(times, predictors, losses)


def saxe_mode(t: ArrayLike | Sequence[float], s: float, start: float) -> Float[np.ndarray, "*times"]:
    """Strength over time of a mode of a balanced two-layer linear network.

    The solution of `c' = 2 c (s - c)`, `c(0) = start`, on the clock of gradient flow of the sum of squares:

        c(t) = s / (1 + (s/start - 1) exp(-2 s t))

    **Arguments**: `t`: times; `s`: its singular value; `start`: in `(0, s)`, the product of both layers at the start.

    **Returns** `c` at these times, of their shape.

    **Raises** `ValueError` for `s` or `start` that are not positive.

    Source: A. Saxe, J. McClelland and S. Ganguli (2014), arXiv 1312.6120.

    >>> import gradflow as gf
    >>> round(float(gf.theory.saxe_mode(2.0, s=1.0, start=1e-2)), 4)
    0.3555
    """
    check_positive("s", s)
    check_positive("start", start)
    return np.asarray(s / (1 + (s / start - 1) * np.exp(-2 * s * np.asarray(t, float))))
