"""Copies of two inputs at a small angle, of opposite labels."""

import numpy as np
from jax.typing import DTypeLike

from gradflow._checks import check_count, fail
from gradflow.data._dataset import Dataset, float_dtype


def two_directions(n_plus: int = 3, n_minus: int = 1, *, angle: float = 0.1, dtype: DTypeLike | None = None) -> Dataset:
    """Copies of two nearby inputs of opposite labels.

    `n_plus` of `(1, 0)` of label +1, `n_minus` of `(cos angle, sin angle)` of label -1.

    The smallest data on which ReLU networks go through a plateau, and on which neurons slide along a kink for good.

    **Arguments**: `n_plus`, `n_minus`: numbers of copies; `angle`: in radians, between 0 and pi; `dtype`: as in
    `gradflow.data.Options`.

    **Returns** a `Dataset` with targets +1 and -1, `classes == (1, -1)`.

    **Raises** `ValueError` for counts below one, other angles, and a `dtype` other than float32 and float64.

    Source: M. Wang and C. Ma (2023), arXiv 2305.12467.

    >>> import gradflow as gf
    >>> gf.data.two_directions(2, 1, angle=0.5).y.tolist()
    [1.0, 1.0, -1.0]
    """
    check_count("n_plus", n_plus)
    check_count("n_minus", n_minus)
    if not 0 < angle < np.pi:
        raise fail("angle", "lie between 0 and pi", f"{angle:g}", "It is in radians.")
    resolved = float_dtype(dtype)
    rows = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
    return Dataset(
        np.repeat(rows, [n_plus, n_minus], axis=0).astype(resolved),
        np.repeat([1.0, -1.0], [n_plus, n_minus]).astype(resolved),
        name="two-directions",
        classes=(1, -1),
        description=f"{n_plus} and {n_minus} copies of two inputs at an angle of {angle:g}",
    )
