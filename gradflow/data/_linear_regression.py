"""Linear regression with a prescribed spectrum: `X^T X / n` has eigenvalues spaced evenly in the logarithm."""

import math

import numpy as np
from jax.typing import DTypeLike

from gradflow._checks import check_count, fail
from gradflow.data._dataset import Dataset, float_dtype
from gradflow.data._draw import add_noise, check_noise, describe_noise, is_number, orthonormal_columns


def linear_regression(
    n: int, in_size: int, *, condition: float = 10.0, noise: float = 0.0, seed: int = 0, dtype: DTypeLike | None = None
) -> Dataset:
    """A linear teacher on inputs whose covariance is known exactly.

        X = sqrt(n) U diag(l)^(1/2) V^T,   y = X w + noise * N(0, 1),   l_1 = 1 > ... > l_d = 1 / condition

    with random orthonormal `U` (`n` by `d`) and `V` (`d` by `d`), so that `X^T X / n = V diag(l) V^T`. Under gradient
    flow on the mean square loss the error along column `k` of `V` decays as `exp(-l_k t)`.

    **Arguments**

    - `n`: number of samples, at least `in_size`; `in_size`: dimension `d`.
    - `condition`: ratio of the largest to the smallest eigenvalue, at least one.
    - `noise`: standard deviation of the noise on the targets.
    - `seed`: of everything random; `dtype`: as in `gradflow.data.Options`.

    **Returns** a `Dataset`; its `teacher` holds `weight` `(d,)`, a uniform direction of norm one, `eigenvalues` `(d,)`,
    decreasing, and `eigenvectors` `(d, d)`, as columns.

    **Raises** `ValueError` for sizes below one, `n < in_size`, `condition` below one, `condition` other than one in one
    dimension, negative noise, a negative seed, and a `dtype` other than float32 and float64.

    Source: the construction is the singular value decomposition read backwards.

    >>> import gradflow as gf, numpy as np
    >>> x, y = gf.data.linear_regression(20, 3, condition=100.0)
    >>> np.linalg.eigvalsh(x.T @ x / 20).round(4).tolist() == np.array([0.01, 0.1, 1.0], x.dtype).round(4).tolist()
    True
    """
    check_count("n", n)
    check_count("in_size", in_size)
    if n < in_size:
        advice = "With fewer samples some eigenvalues would be zero."
        raise fail("n", f"be at least in_size={in_size}", str(n), advice)
    if not is_number(condition) or not math.isfinite(condition) or condition < 1:
        advice = "It is the largest eigenvalue over the smallest."
        raise fail("condition", "be a finite number of at least 1", repr(condition), advice)
    if in_size == 1 and condition != 1:
        raise fail("condition", "be 1 when in_size=1", f"{condition:g}", "There is only one eigenvalue.")
    noise, resolved = check_noise(noise), float_dtype(dtype)
    check_count("seed", seed, least=0)
    rng = np.random.default_rng(seed)
    eigenvalues = np.logspace(0.0, -math.log10(condition), in_size)
    eigenvectors = orthonormal_columns(rng, in_size, in_size)
    x = np.sqrt(n) * (orthonormal_columns(rng, n, in_size) * np.sqrt(eigenvalues)) @ eigenvectors.T
    weight = orthonormal_columns(rng, in_size, 1)[:, 0]
    y = add_noise(rng, x @ weight, noise)
    description = f"covariance eigenvalues from 1 to {1 / condition:g}; y = x . w{describe_noise(noise)}; seed {seed}"
    teacher = {"weight": weight, "eigenvalues": eigenvalues, "eigenvectors": eigenvectors}
    return Dataset(
        x.astype(resolved),
        y.astype(resolved),
        name="linear-regression",
        description=description,
        teacher={name: value.astype(resolved) for name, value in teacher.items()},
    )
