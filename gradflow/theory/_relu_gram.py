"""The tangent kernel of a two-layer ReLU network whose output weights are fixed."""

import numpy as np
from jaxtyping import ArrayLike, Float

from gradflow._checks import check_finite, fail


def relu_gram(x: ArrayLike, weight: ArrayLike | None = None) -> Float[np.ndarray, "n n"]:
    """The Gram matrix of a wide ReLU network, and its limit.

    `H` of `f(x) = m^(-1/2) sum_r a_r relu(w_r . x)`, `a_r = +-1` fixed, in the weights `w_r`:

        H_ij    = (x_i . x_j) #{r : w_r . x_i > 0 and w_r . x_j > 0} / m        with `weight`
        Hinf_ij = (x_i . x_j) (pi - angle(x_i, x_j)) / (2 pi)                   without: its limit for normal `w_r`

    The limit is positive definite if no two inputs are parallel. Residuals `D = u - y` of the sum of squares
    `|u - y|^2 / 2` move as `D' = -H D` along gradient flow, as long as no neuron changes its activation pattern.

    **Arguments**: `x`: inputs `(n, d)`; `weight`: neurons `(m, d)`, or `None`.

    **Raises** `ValueError` for entries that are not finite and shapes that do not agree.

    Source: S. S. Du, X. Zhai, B. Poczos and A. Singh (2018), arXiv 1810.02054.

    >>> import gradflow as gf, numpy as np
    >>> gf.theory.relu_gram(np.eye(2)).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    x = np.asarray(x, float)
    check_finite("x", x)
    if x.ndim != 2 or x.size == 0:
        raise fail("x", "be of shape (n, d), not empty", f"of shape {x.shape}")
    products = x @ x.T
    if weight is not None:
        w = np.asarray(weight, float)
        check_finite("weight", w)
        if w.ndim != 2 or w.shape[1] != x.shape[1]:
            raise fail("weight", f"be of shape (m, {x.shape[1]})", f"of shape {w.shape}")
        active = (x @ w.T > 0).astype(float)
        return products * (active @ active.T) / len(w)
    lengths = np.sqrt(np.diag(products))
    sizes = np.outer(lengths, lengths)
    cosines = np.clip(products / np.where(sizes > 0, sizes, 1), -1, 1)
    np.fill_diagonal(cosines, 1)
    return products * (np.pi - np.arccos(cosines)) / (2 * np.pi)
