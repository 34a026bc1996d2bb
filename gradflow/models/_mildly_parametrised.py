"""Two-layer networks with output weights larger than input weights, as theory of early training has them."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import ArrayLike, Key

from gradflow._checks import check_positive
from gradflow.models._two_layer import TwoLayer


def mildly_parametrised(
    in_size: int,
    width: int,
    out_size: int | None = None,
    *,
    kappa: ArrayLike = 0.1,
    dtype: DTypeLike | None = None,
    key: Key[jax.Array, ""],
) -> TwoLayer:
    """A two-layer ReLU network from a start with large output weights, mildly parametrised as Wang and Ma call it.

    `f(x) = sum_k a_k relu(b_k . x)`, both layers trained, starts from

        a_k = +-1 / sqrt(m) at random,    b_k ~ N(0, kappa^2 / (m d) I)

    for input size `d` and width `m`. For small `kappa` it is not balanced: `|a_k| > |b_k|`, and since gradient flow
    conserves `a_k^2 - |b_k|^2`, no `a_k` changes its sign. Its output is of size `kappa` at any width.

    **Arguments**: as for `TwoLayer`; `kappa`: positive, may be traced.

    **Raises** `ValueError` as `TwoLayer` does, and for a `kappa` that is not positive.

    Source: M. Wang and C. Ma (2022), arXiv 2206.02139.

    >>> import gradflow as gf, jax
    >>> model = gf.models.mildly_parametrised(8, 16, key=jax.random.key(0))
    >>> bool((model.imbalance() > 0).all())
    True
    """
    check_positive("kappa", kappa, "Typical values are 1e-2 ... 1.")
    first, second = jax.random.split(key)
    model = TwoLayer(in_size, width, out_size, dtype=dtype, key=first)
    param_dtype = model.weight.dtype
    weight = (
        jnp.asarray(kappa, param_dtype)
        * jax.random.normal(first, model.weight.shape, param_dtype)
        / (width * in_size) ** 0.5
    )
    output = jax.random.rademacher(second, model.output.shape, param_dtype) / width**0.5
    return eqx.tree_at(lambda m: (m.weight, m.output), model, (weight, output))
