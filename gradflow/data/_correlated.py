"""Labelled inputs of which those of one label form acute angles, and those of different labels obtuse ones."""

import numpy as np
from jax.typing import DTypeLike

from gradflow._checks import check_count
from gradflow.data._dataset import Dataset, float_dtype
from gradflow.data._draw import orthonormal_columns


def correlated(n: int = 20, in_size: int = 8, *, seed: int = 0, dtype: DTypeLike | None = None) -> Dataset:
    """Unit vectors with labels such that `y_i y_j x_i . x_j >= 0` for all pairs.

        x = y R |g| / |g|,    g ~ N(0, I) with absolute values taken entrywise, R a random rotation, y = +-1 at random

    This is what keeps the neuron partition of a ReLU network in order: `gradflow.theory.partition_condition` holds.

    **Arguments**: `n`: number of samples; `in_size`: their dimension; `seed`: of everything random; `dtype`: as in
    `gradflow.data.Options`.

    **Returns** a `Dataset` with targets +1 and -1, as many of each (one more +1 if `n` is odd), `classes == (1, -1)`.

    **Raises** `ValueError` for sizes below one, a negative seed, and a `dtype` other than float32 and float64.

    >>> import gradflow as gf
    >>> data = gf.data.correlated(6, 3)
    >>> gf.theory.partition_condition(data.x, data.y).holds
    True
    """
    check_count("n", n)
    check_count("in_size", in_size)
    check_count("seed", seed, least=0)
    resolved = float_dtype(dtype)
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.where(np.arange(n) % 2 == 0, 1.0, -1.0))
    cone = np.abs(rng.normal(size=(n, in_size)))
    rows = y[:, None] * (cone @ orthonormal_columns(rng, in_size, in_size).T)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Dataset(
        rows.astype(resolved),
        y.astype(resolved),
        name="correlated",
        classes=(1, -1),
        description=f"unit vectors of a cone, signed by their labels; seed {seed}",
    )
