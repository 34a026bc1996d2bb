"""Diagonal linear network `f(x) = (u * v) . x`: sparse regression by gradient flow."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Key

from gradflow._checks import check_count
from gradflow._conserved import Conserved
from gradflow.models._parametrisation import check_scale, draw, resolve_dtype


class DiagonalLinear(eqx.Module):
    """`f(x) = (u * v) . x`, a diagonal linear network.

    It starts at `u = sqrt(2) init_scale`, `v = 0` in every coordinate, so at `beta = u * v = 0`.

    From this start `beta = init_scale^2 sinh(2 q)` with `q' = -grad_beta L`, and `u^2 - v^2` is conserved (Woodworth
    et al. 2020, arXiv 2002.09277; Pesme & Flammarion 2023, arXiv 2304.00488).

    **Arguments**: `in_size`; `init_scale`, the `alpha` of these papers; `law` with `key`: random signs and sizes for
    `u` instead of the constant start; `dtype`.

    **Raises** `ValueError` as `TwoLayer` does, and for a law without a key.

    >>> import gradflow as gf
    >>> float(gf.models.DiagonalLinear(3, init_scale=0.1).beta().sum())
    0.0
    """

    u: Float[Array, " in_size"]
    v: Float[Array, " in_size"]

    def __init__(
        self,
        in_size: int,
        *,
        init_scale: ArrayLike = 1.0,
        law: Callable[..., Array] | None = None,
        dtype: DTypeLike | None = None,
        key: Key[Array, ""] | None = None,
    ):
        check_count("in_size", in_size)
        dtype = resolve_dtype(dtype)
        check_scale(init_scale, dtype)
        if law is None:
            start = jnp.ones(in_size, dtype)
        elif key is None:
            raise ValueError("Argument `key` must be given with a law, but is None. Pass jax.random.key(seed).")
        else:
            start = draw(law, key, (1, in_size), 1.0, dtype)[0]
        self.u = jnp.asarray(init_scale, dtype) * jnp.sqrt(jnp.asarray(2.0, dtype)) * start
        self.v = jnp.zeros(in_size, dtype)

    def __call__(self, x: Float[Array, " in_size"]) -> Float[Array, ""]:
        return self.beta() @ x

    def beta(self) -> Float[Array, " in_size"]:
        """The linear predictor `u * v`."""
        return self.u * self.v

    def neuron_weights(self) -> Float[Array, "in_size 2"]:
        """`(u_i, v_i)` of every coordinate: a neuron each."""
        return jnp.stack([self.u, self.v], axis=1)

    def with_neuron_weights(self, rows: Float[Array, "in_size 2"]) -> "DiagonalLinear":
        """The network with other weights, one row per coordinate."""
        return eqx.tree_at(lambda m: (m.u, m.v), self, (rows[:, 0], rows[:, 1]))

    def imbalance(self) -> Float[Array, " in_size"]:
        """`u^2 - v^2` in every coordinate."""
        return self.u**2 - self.v**2

    def conserved(self) -> dict[str, Conserved]:
        """`u^2 - v^2`, constant along gradient flow."""
        return {"balancedness": Conserved(self.imbalance(), self.u**2 + self.v**2)}
