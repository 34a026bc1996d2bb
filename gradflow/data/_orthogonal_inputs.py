"""Orthonormal inputs, `x_i . x_j = 1` if `i = j`, else 0: the best understood setting of shallow ReLU networks."""

import numpy as np
from jax.typing import DTypeLike

from gradflow._checks import check_count, check_finite, fail
from gradflow.data._dataset import Dataset, float_dtype
from gradflow.data._draw import orthonormal_columns


def orthogonal_inputs(
    n: int,
    in_size: int,
    *,
    y: object = None,
    seed: int = 0,
    dtype: DTypeLike | None = None,
) -> Dataset:
    """Orthonormal inputs at random, with given targets or random signs.

    **Arguments**

    - `n`: number of inputs, at most `in_size`; `in_size`: their dimension `d`.
    - `y`: targets `(n,)` or `(n, k)`; `None` for signs, as many +1 as -1 (one more +1 if `n` is odd), in random order.
    - `seed`: of everything random; `dtype`: as in `gradflow.data.Options`.

    **Returns** a `Dataset`, with `classes == (1, -1)` if the targets are signs of its own, `()` otherwise.

    **Raises** `ValueError` for sizes below one, `n > in_size`, targets of another length or not finite, a negative
    seed, and a `dtype` other than float32 and float64.

    Source: E. Boursier, L. Pillaud-Vivien and N. Flammarion (2022), *Gradient flow dynamics of shallow ReLU networks
    for square loss and orthogonal inputs*, arXiv 2206.00939.

    >>> import gradflow as gf, numpy as np
    >>> x, y = gf.data.orthogonal_inputs(3, 10, y=[1.0, -2.0, 0.5])
    >>> bool(np.allclose(x @ x.T, np.eye(3), atol=1e-6)), y.tolist()
    (True, [1.0, -2.0, 0.5])
    """
    check_count("n", n)
    check_count("in_size", in_size)
    if n > in_size:
        raise fail("n", f"be at most in_size={in_size}", str(n), "No more inputs than dimensions can be orthogonal.")
    check_count("seed", seed, least=0)
    resolved = float_dtype(dtype)
    rng = np.random.default_rng(seed)
    x = orthonormal_columns(rng, in_size, n).T
    if y is None:
        targets = rng.permutation(np.where(np.arange(n) % 2 == 0, 1.0, -1.0))
        classes, description = (1, -1), "targets random signs"
    else:
        targets = _check_targets(y, n)
        classes, description = (), "targets given"
    return Dataset(
        np.ascontiguousarray(x, dtype=resolved),
        targets.astype(resolved),
        name="orthogonal-inputs",
        classes=classes,
        description=f"orthonormal inputs; {description}; seed {seed}",
    )


def _check_targets(y: object, n: int) -> np.ndarray:
    try:
        targets = np.asarray(y, dtype=np.float64)
    except (TypeError, ValueError):
        raise fail("y", "be an array of numbers", f"of type {type(y).__name__}") from None
    if targets.ndim not in (1, 2) or len(targets) != n:
        raise fail("y", f"be of shape ({n},) or ({n}, k)", f"of shape {targets.shape}", "Give one target per input.")
    check_finite("y", targets)
    return targets
