"""Unit vectors in the plane with `y = 5 max(0, x_1)^2 + 4 max(0, x_2)^2`."""

import numpy as np
from jax.typing import DTypeLike

from gradflow._checks import check_count, fail
from gradflow.data._dataset import Dataset, float_dtype


def circle(n: int = 50, *, evenly_spaced: bool = False, seed: int = 0, dtype: DTypeLike | None = None) -> Dataset:
    """Inputs on the unit circle, labelled by two squared-ReLU neurons.

        x = (cos a, sin a),   y = 5 max(0, x_1)^2 + 4 max(0, x_2)^2

    **Arguments**

    - `n`: number of inputs.
    - `evenly_spaced`: angles `2 pi i / n` instead of independent uniform ones.
    - `seed`: of the angles; `dtype`: as in `gradflow.data.Options`.

    **Returns** a `Dataset` with `x` of shape `(n, 2)` and `y` of shape `(n,)`; its `teacher` holds `weight` (the two
    axes, as rows) and `output` (5 and 4).

    **Raises** `ValueError` for `n` below one, a negative seed, and a `dtype` other than float32 and float64.

    Source: A. Kumar and J. Haupt (2024), *Directional convergence near small initializations and saddles in
    two-homogeneous neural networks*, arXiv 2402.09226, Figure 1.

    >>> import gradflow as gf
    >>> x, y = gf.data.circle(4, evenly_spaced=True)
    >>> y.round(5).tolist()
    [5.0, 4.0, 0.0, 0.0]
    """
    check_count("n", n)
    if not isinstance(evenly_spaced, bool | np.bool_):
        raise fail("evenly_spaced", "be True or False", repr(evenly_spaced))
    check_count("seed", seed, least=0)
    resolved = float_dtype(dtype)
    turns = np.arange(n) / n if evenly_spaced else np.random.default_rng(seed).random(n)
    x = np.stack([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], axis=1)
    output = np.array([5.0, 4.0])
    angles = "evenly spaced angles" if evenly_spaced else f"uniform random angles, seed {seed}"
    return Dataset(
        x.astype(resolved),
        (np.maximum(x, 0) ** 2 @ output).astype(resolved),
        name="circle",
        description=f"unit norm, {angles}; y = 5 max(0, x_1)^2 + 4 max(0, x_2)^2",
        teacher={"weight": np.eye(2, dtype=resolved), "output": output.astype(resolved)},
    )
