"""Tables of backward differences: equidistant history of a solution, its interpolant, and another spacing."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Scalar


def weights(s: Scalar, order: Int[Array, ""], rows: int) -> Float[Array, " rows"]:
    """Weights of the rows in the interpolant of that order at `s` spacings past the newest point:

    y(t_n + s h) = sum_{j <= order} nabla^j y_n  s (s + 1) ... (s + j - 1) / j!
    """
    j = jnp.arange(rows - 1, dtype=s.dtype)
    products = jnp.concatenate([jnp.ones(1, s.dtype), jnp.cumprod((s + j) / (j + 1))])
    return jnp.where(jnp.arange(rows) <= order, products, 0)


def change_of_spacing(factor: Scalar, order: Int[Array, ""], rows: int) -> Float[Array, "rows rows"]:
    """The matrix that takes a table to that of the same interpolant with spacing `factor` times as wide.

    Rows past the order are left as they are. (Shampine & Reichelt 1997, SIAM J. Sci. Comput. 18.)
    """
    wide, unit = _values(factor, rows), _values(jnp.ones_like(factor), rows)
    matrix = (wide @ unit).T
    inside = jnp.arange(rows) <= order
    return jnp.where(inside[:, None] & inside[None, :], matrix, jnp.eye(rows, dtype=factor.dtype))


def _values(factor: Scalar, rows: int) -> Float[Array, "rows rows"]:
    """Entry `i, j`: what difference `i` contributes to the point `j` spacings of relative width `factor` back."""
    i = jnp.arange(1, rows, dtype=factor.dtype)[:, None]
    j = jnp.arange(1, rows, dtype=factor.dtype)[None, :]
    first = jnp.ones((1, rows), factor.dtype)
    below = jnp.concatenate([jnp.zeros((rows - 1, 1), factor.dtype), (i - 1 - factor * j) / i], axis=1)
    return jnp.cumprod(jnp.concatenate([first, below]), axis=0)


def append(table: Float[Array, "rows size"], correction: Float[Array, " size"], order: Int[Array, ""]) -> Array:
    """The table one point on, where the new value lies `correction` off the extrapolation of that order.

    `correction` is the difference of order `order + 1` of the new point; the row above it takes that of order two
    higher.
    """
    rows = table.shape[0]
    index = jnp.arange(rows)[:, None]
    second = correction - jnp.take(table, order + 1, axis=0)
    raised = jnp.where(index == order + 1, correction[None, :], jnp.where(index == order + 2, second[None, :], table))
    # Row j of the new point is the sum of row j of the old one and row j + 1 of the new one.
    lower = jnp.where(index <= order + 1, raised, 0)
    sums = jnp.cumsum(lower[::-1], axis=0)[::-1]
    return jnp.where(index <= order, sums, raised)
