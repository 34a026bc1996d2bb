"""One period of a sine on a line, with a constant beside the line for networks without biases."""

import numpy as np
from jax.typing import DTypeLike

from gradflow._checks import check_count
from gradflow.data._dataset import Dataset, float_dtype


def sine(n: int = 20, *, dtype: DTypeLike | None = None) -> Dataset:
    """Regression in one dimension: a sine over equally spaced points.

        x = (s, 1),   y = sin(pi s),   s = -1 ... 1

    **Arguments**: `n`: number of points; `dtype`: as in `gradflow.data.Options`.

    **Returns** a `Dataset` with `x` of shape `(n, 2)` and `y` of shape `(n,)`.

    **Raises** `ValueError` for `n` below one, and a `dtype` other than float32 and float64.

    >>> import gradflow as gf
    >>> x, y = gf.data.sine(5)
    >>> x[:, 0].tolist(), y.round(5).tolist()
    ([-1.0, -0.5, 0.0, 0.5, 1.0], [-0.0, -1.0, 0.0, 1.0, 0.0])
    """
    check_count("n", n)
    resolved = float_dtype(dtype)
    line = np.linspace(-1, 1, n)
    x, y = np.stack([line, np.ones_like(line)], axis=1), np.sin(np.pi * line)
    return Dataset(x.astype(resolved), y.astype(resolved), name="sine", description="x = (s, 1); y = sin(pi s)")
