"""How fast a two-layer ReLU network leaves the saddle at zero, and in which directions.

Near zero, gradient flow of `f(x) = sum_j a_j relu(w_j . x)` is driven by `z_i = -dl/dp(0, y_i)` alone. One neuron of
unit size has the correlation `N(a, w) = a g(w)`, `g(w) = mean_i z_i relu(w . x_i)`; it is largest for `|a| = |w|`,
where it is `max |g| / 2` over unit `w`. The norm of the weights then grows like `exp(2 N t)`, so that

    escape time = ln(1/scale) / (2 N) + O(1) = ln(1/scale) / max |g| + O(1)

(Kumar & Haupt 2024, arXiv 2402.09226; with a sum instead of a mean over samples everything runs `n` times as fast).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from gradflow._checks import check_count, check_finite, fail


class ReLUEscape(NamedTuple):
    """`correlation`: the largest value `N` of the neural correlation function found; `slope`: `1 / (2 N)`, by which the
    escape time grows with `ln(1/scale)`; `directions`: unit vectors `(2, d)` that maximise `g` and `-g`, towards which
    neurons of positive and of negative output weight turn."""

    correlation: float
    slope: float
    directions: Float[np.ndarray, "2 d"]


def relu_escape(x: Float[np.ndarray, "n d"], z: Float[np.ndarray, " n"], iterations: int = 200) -> ReLUEscape:
    """Slope of the escape time of a ReLU network, and where its neurons turn.

    For inputs `x (n, d)` and residuals at the origin `z (n,)` (square loss: `y`; logistic: `y / 2`), mean reduction.

    Moves unit vectors `w` along `grad g(w)`, in steps that shrink so as to settle on kinks too (inputs with a negative
    label make maxima there), from every input, its opposite, the mean of `z_i x_i` and some random directions; keeps
    the best point met. The maximum is a global one as far as these starts reach.

    **Returns** a `ReLUEscape`.

    **Raises** `ValueError` if the shapes do not agree, for entries that are not finite, fewer than 20 iterations, or if
    no neuron has any correlation with the labels.

    Source: A. Kumar and J. Haupt (2024), arXiv 2402.09226.

    >>> import gradflow as gf, numpy as np
    >>> result = gf.theory.relu_escape(np.eye(2), np.array([1.0, 1.0]))
    >>> round(result.slope, 4)  # g is largest, 1/sqrt(2), midway between the two inputs
    1.4142
    """
    x, z = np.asarray(x, float), np.asarray(z, float)
    if x.ndim != 2 or z.shape != x.shape[:1]:
        raise fail("z", "have one entry per input", f"of shape {z.shape} against {x.shape}")
    check_finite("x", x)
    check_finite("z", z)
    check_count("iterations", iterations, least=20)
    maxima = [_maximise(x, sign * z, iterations) for sign in (1.0, -1.0)]
    best = max(value for value, _ in maxima)
    if best <= 0:
        raise fail("z", "correlate with some ReLU neuron", "such that none does", "Are all labels or inputs zero?")
    return ReLUEscape(best / 2, 1 / best, np.stack([direction for _, direction in maxima]))


def _maximise(x: np.ndarray, z: np.ndarray, iterations: int) -> tuple[float, np.ndarray]:
    """The largest `g` met, and where; the last, infinite steps land on the maximum of a linear piece exactly."""
    weighted = z[:, None] * x / len(z)
    random = np.random.default_rng(0).normal(size=(_RANDOM_STARTS, x.shape[1]))
    starts = np.concatenate([x, -x, weighted.sum(0, keepdims=True), random])
    directions = _unit(starts[np.any(starts != 0, axis=1)])
    value, best = -np.inf, directions[-1]
    for k, step in enumerate([*np.geomspace(3, 1e-10, iterations - 5), *[np.inf] * 5]):
        active = directions @ x.T
        values = np.maximum(active, 0) @ z / len(z)
        top = int(np.argmax(values))
        if values[top] > value:
            value, best = float(values[top]), directions[top]
        if k == _PRUNE_AFTER:
            leading = np.argsort(-values)[:_KEPT]
            directions, active = directions[leading], active[leading]
        towards = _unit((active > 0) @ weighted)
        stepped = towards if np.isinf(step) else directions + step * towards
        # A neuron that sees no input stays where it is.
        directions = np.where(np.any(towards != 0, axis=1, keepdims=True), _unit(stepped), directions)
    return value, best


_RANDOM_STARTS, _PRUNE_AFTER, _KEPT = 64, 20, 64


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one; rows of zeros stay."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)
