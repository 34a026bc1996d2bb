"""What becomes of networks of many nodes: which limit there is, how fast it is approached, and what to do without."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float

from gradflow._checks import check_count, check_finite, fail
from gradflow.models._parametrisation import Parametrisation, resolve

FLUCTUATION = -0.5
"""Power of the width with which one network deviates from the limit."""
BIAS = -1.0
"""Power of the width with which the mean over networks approaches the limit."""


class WidthLimit(NamedTuple):
    """The limit of many nodes: `flow` that computes it, and a `title` that says what it is."""

    flow: str
    title: str


def width_limit(parametrisation: Parametrisation | str, depth: int = 1) -> WidthLimit:
    """Which flow is the infinite-width limit of a parametrisation.

    For gradient flow of networks of `depth` hidden layers:

    | parametrisation | one hidden layer | more |
    |---|---|---|
    | mean field | flow of a measure: `MeanFieldFlow` | the same in labels, with layerwise rates: `MeanFieldSGD` |
    | NTK | linear, with a constant kernel: `LinearisedFlow` | the same |
    | muP | mean field | has memory, no ODE: refused |

    **Arguments**: `parametrisation`: a name, or a `gradflow.models.Parametrisation`; `depth`: number of hidden layers.

    **Returns** a `WidthLimit`.

    **Raises** `ValueError` for unknown names, a depth below one, and what has no limit as an ODE: muP with two or more
    hidden layers, where the backward pass sees weights that correlate with what it goes through, so that the velocities
    depend on the whole past; and the standard parametrisation, whose kernel grows with the width.

    >>> import gradflow as gf
    >>> gf.theory.width_limit("mup", 1).flow, gf.theory.width_limit("ntk", 3).flow
    ('MeanFieldFlow', 'LinearisedFlow')
    """
    check_count("depth", depth, advice="It counts hidden layers.")
    scaling = resolve(parametrisation)
    way_out = "Run a few finite widths and extrapolate: gradflow.theory.extrapolate_width."
    if scaling.name == "mup" and depth > 1:
        must = "have an ODE for its limit of infinite width"
        actual = f"'mup' with {depth} hidden layers, whose limit has memory (dynamical mean-field theory)"
        raise fail("parametrisation", must, actual, way_out)
    if scaling.name in ("mean_field", "mup"):
        return WidthLimit("MeanFieldFlow", "flow of the distribution of nodes" if depth == 1 else "flow in labels")
    if scaling.name == "ntk":
        return WidthLimit("LinearisedFlow", "linear flow with the kernel of the start")
    must = "have a limit of infinite width at one learning rate"
    raise fail("parametrisation", must, f"{scaling.name!r}", f"Take 'ntk', 'mean_field' or 'mup'. {way_out}")


class ExtrapolatedWidth(NamedTuple):
    """What finite widths tend to: the `limit`, the standard `error` of it, and the `slope` of the means towards it."""

    limit: Float[np.ndarray, "..."] | np.floating
    error: Float[np.ndarray, "..."] | np.floating
    slope: float


def extrapolate_width(widths: ArrayLike | Sequence[int], values: ArrayLike) -> ExtrapolatedWidth:
    """Extrapolates means over seeds to width infinity.

    Fits `mean_N = limit + a / N` by weighted least squares.

    For limits that have no equation of their own, such as that of deep networks in muP.

    **Arguments**: `widths (k,)`, at least two; `values (k, seeds, ...)`, at least two seeds.

    **Returns** an `ExtrapolatedWidth`: the limit and its error, the larger of what the scatter of the seeds makes of it
    and of how far the fit moves when the narrowest width is left out (with three or more widths). `slope`: fitted
    exponent of the distance between means and the limit (root mean square over entries), which should be near -1.

    **Raises** `ValueError` for widths that are equal or below one, values that are not finite, and other shapes.

    >>> import gradflow as gf, numpy as np
    >>> widths = np.array([8, 16, 32])
    >>> noise = np.random.default_rng(0).normal(size=(3, 200, 1)) * 0.01
    >>> result = gf.theory.extrapolate_width(widths, 2 + 3 / widths[:, None, None] + noise)
    >>> bool(abs(result.limit[0] - 2) < 4 * result.error[0])
    True
    """
    sizes, data = np.asarray(widths, float), np.asarray(values, float)
    check_finite("values", data)
    if sizes.ndim != 1 or sizes.size < 2 or len(np.unique(sizes)) != sizes.size or np.min(sizes) < 1:
        raise fail("widths", "hold at least two different widths", f"{widths!r}")
    if data.ndim < 2 or data.shape[0] != sizes.size or data.shape[1] < 2:
        raise fail("values", f"have shape ({sizes.size}, seeds, ...), two seeds at least", f"of shape {data.shape}")
    means = data.mean(axis=1)
    errors = data.std(axis=1, ddof=1) / np.sqrt(data.shape[1])
    limit, scatter = _fit(sizes, means, errors)
    error = scatter
    if sizes.size > 2:
        keep = sizes != np.min(sizes)
        error = np.maximum(scatter, np.abs(limit - _fit(sizes[keep], means[keep], errors[keep])[0]))
    distance = np.sqrt(np.mean((means - limit) ** 2, axis=tuple(range(1, means.ndim))))
    slope = float(np.polyfit(np.log(sizes), np.log(distance), 1)[0]) if np.all(distance > 0) else float("nan")
    return ExtrapolatedWidth(limit, error, slope)


def _fit(
    sizes: Float[np.ndarray, " k"], means: Float[np.ndarray, "k ..."], errors: Float[np.ndarray, "k ..."]
) -> tuple[np.ndarray | np.floating, np.ndarray | np.floating]:
    """Intercept of the weighted straight line in `1 / N`, and its standard error, entry by entry."""
    h = (1 / sizes).reshape(-1, *[1] * (means.ndim - 1))
    min_error = np.max(errors, axis=0, keepdims=True) * 1e-6 + np.finfo(float).tiny
    w = 1 / np.maximum(errors, min_error) ** 2
    w = w / np.max(w, axis=0, keepdims=True)
    s0, s1, s2 = (np.sum(w * h**power, axis=0) for power in (0, 1, 2))
    determinant = s0 * s2 - s1**2
    weights = w * (s2 - s1 * h) / determinant
    return np.sum(weights * means, axis=0), np.sqrt(np.sum((weights * errors) ** 2, axis=0))
