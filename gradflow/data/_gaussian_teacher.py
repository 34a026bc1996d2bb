"""Gaussian inputs labelled by a two-layer teacher, `y = sum_j a_j s(w_j . x)` with `|w_j| = 1` and `a_j = +-1`."""

from collections.abc import Callable

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import ArrayLike

from gradflow._checks import check_callable, check_count, fail
from gradflow.data._dataset import Dataset, float_dtype
from gradflow.data._draw import add_noise, check_noise, describe_noise


def relu(z: np.ndarray) -> np.ndarray:
    """`max(0, z)`, in NumPy."""
    return np.maximum(z, 0)


def gaussian_teacher(
    n: int,
    in_size: int,
    width: int,
    *,
    activation: Callable[[np.ndarray], ArrayLike] = relu,
    out_size: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
    dtype: DTypeLike | None = None,
) -> Dataset:
    """Regression data of a random two-layer teacher.

        y = a s(W x) + noise * N(0, 1),   x ~ N(0, I / d)

    Convention: inputs have norm about one at any dimension, and the teacher's directions `w_j` have norm one, so
    that preactivations are of size `1/sqrt(d)`. Those who want the convention `x ~ N(0, I)`, `|w_j|^2 = d` of order
    parameters, and preactivations of size one, pass `activation=lambda z: s(sqrt(d) * z)`. Outputs are not divided by
    the width.

    **Arguments**

    - `n`: number of samples; `in_size`: their dimension `d`; `width`: number of hidden units of the teacher.
    - `activation`: elementwise, NumPy or JAX; ReLU by default.
    - `out_size`: number of outputs `k`; `None` for targets of shape `(n,)`.
    - `noise`: standard deviation of the noise on the targets.
    - `seed`: of everything random; `dtype`: as in `gradflow.data.Options`.

    **Returns** a `Dataset`; its `teacher` holds `weight` `(width, d)`, uniform directions, and `output` `(width,)` or
    `(k, width)`, random signs, as in `gradflow.models.TwoLayer`.

    **Raises** `ValueError` for sizes below one, negative noise, an activation that is not elementwise, a negative seed,
    and a `dtype` other than float32 and float64.

    Source: D. Saad and S. A. Solla (1995), *On-line learning in soft committee machines*; S. Goldt, M. S. Advani,
    A. M. Saxe, F. Krzakala and L. Zdeborova (2019), arXiv 1906.08632.

    >>> import gradflow as gf
    >>> data = gf.data.gaussian_teacher(100, 5, 3)
    >>> data.x.shape, data.y.shape, data.teacher["weight"].shape
    ((100, 5), (100,), (3, 5))
    """
    check_count("n", n)
    check_count("in_size", in_size)
    check_count("width", width)
    check_callable("activation", activation, "activation(array)")
    if out_size is not None:
        check_count("out_size", out_size, advice="Use None for a scalar output.")
    noise, resolved = check_noise(noise), float_dtype(dtype)
    check_count("seed", seed, least=0)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, in_size)) / np.sqrt(in_size)
    weight = rng.standard_normal((width, in_size))
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    output = rng.choice([-1.0, 1.0], size=(width,) if out_size is None else (out_size, width))
    hidden = np.asarray(activation(x @ weight.T), dtype=np.float64)
    if hidden.shape != (n, width):
        raise fail("activation", f"keep the shape {(n, width)} of its argument", f"returning shape {hidden.shape}")
    y = add_noise(rng, hidden @ output.T, noise)
    description = f"x ~ N(0, I/{in_size}); y = two-layer teacher of width {width}{describe_noise(noise)}; seed {seed}"
    return Dataset(
        x.astype(resolved),
        y.astype(resolved),
        name="gaussian-teacher",
        description=description,
        teacher={"weight": weight.astype(resolved), "output": output.astype(resolved)},
    )
