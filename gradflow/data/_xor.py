"""Four clusters at the corners `(+-1, +-1)`, labelled by the product of the corner's coordinates."""

import numpy as np
from jax.typing import DTypeLike

from gradflow._checks import check_count
from gradflow.data._dataset import Dataset, float_dtype
from gradflow.data._draw import add_noise, check_noise

# Going round the square the label alternates, so that every prefix is as balanced as it can be.
CORNERS = ((1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0))


def xor(
    n: int = 100, *, noise: float = 0.1, in_size: int = 2, seed: int = 0, dtype: DTypeLike | None = None
) -> Dataset:
    """Exclusive or: opposite corners share a label.

    No linear classifier can follow it.

        x = (c_1, c_2, 0, ..., 0) + noise * N(0, I),   y = c_1 c_2,   c in {-1, 1}^2

    **Arguments**

    - `n`: number of samples, spread over the corners (1, 1), (-1, 1), (-1, -1), (1, -1) in turn.
    - `noise`: standard deviation of the clusters, in all `in_size` coordinates.
    - `in_size`: dimension, at least two; coordinates beyond the second are pure noise.
    - `seed`: of the noise; `dtype`: as in `gradflow.data.Options`.

    **Returns** a `Dataset` with targets +1 and -1 of shape `(n,)`, `classes == (1, -1)`.

    **Raises** `ValueError` for `n` below one, `in_size` below two, negative noise, a negative seed, and a `dtype` other
    than float32 and float64.

    Source: S. Frei, N. S. Chatterji and P. L. Bartlett (2022), *Random feature amplification: feature learning and
    generalization in neural networks*, arXiv 2202.07626.

    >>> import gradflow as gf
    >>> x, y = gf.data.xor(4, noise=0.0)
    >>> x.tolist(), y.tolist()
    ([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]], [1.0, -1.0, 1.0, -1.0])
    """
    check_count("n", n)
    check_count("in_size", in_size, least=2)
    noise, resolved = check_noise(noise), float_dtype(dtype)
    check_count("seed", seed, least=0)
    corners = np.array(CORNERS)[np.arange(n) % 4]
    centres = np.zeros((n, in_size))
    centres[:, :2] = corners
    x = add_noise(np.random.default_rng(seed), centres, noise)
    return Dataset(
        x.astype(resolved),
        np.prod(corners, axis=1).astype(resolved),
        name="xor",
        classes=(1, -1),
        description=f"four corners + {noise:g} N(0, I) in {in_size} dimensions; y = product of the corner's signs; "
        f"seed {seed}",
    )
