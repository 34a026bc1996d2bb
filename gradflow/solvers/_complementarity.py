"""The complementarity problem of symmetric matrices `X >= 0, M = a + B[X] >= 0, <X, M> = 0`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SWEEPS = 2000
"""Steps of the iteration, at most; it takes tens from a good start, some hundreds from none."""
ROUNDING = 8
"""Units of rounding of the residual, over the size of its terms, at which the iteration ends."""


def complementary(
    a: Float[Array, "k k"], b: Float[Array, "k k k k"], start: Float[Array, "k k"]
) -> tuple[Float[Array, "k k"], Float[Array, ""]]:
    """`X`, and the residual of `X = (X - M)_+` in units of the largest eigenvalue of `B`.

    `B` is symmetric and positive semi-definite as a map of symmetric matrices, so `X` minimises the convex
    `<a, X> + <X, B[X]> / 2` over `X >= 0`. Projected gradients with Nesterov's momentum, restarted where it points
    uphill (O'Donoghue and Candes 2012, arXiv 1204.3982); a projection is one eigendecomposition.
    """
    k = a.shape[0]
    flat = b.reshape(k * k, k * k)
    largest = jnp.linalg.eigvalsh(0.5 * (flat + flat.T))[-1]
    size = jnp.where(largest > 0, largest, 1)
    tolerance = ROUNDING * jnp.finfo(a.dtype).eps

    def forced(x: Array) -> Array:
        return (a + jnp.einsum("ijkl,kl->ij", b, x)) / size

    def unfinished(state: tuple[Array, Array, Array, Array, Array]) -> Bool[Array, ""]:
        x, _, _, residual, count = state
        return (residual > tolerance * (jnp.max(jnp.abs(x)) + jnp.max(jnp.abs(a)) / size)) & (count < SWEEPS)

    def sweep(state: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
        x, y, momentum, _, count = state
        new = positive_part(y - forced(y))
        following = 0.5 * (1 + jnp.sqrt(1 + 4 * momentum**2))
        uphill = jnp.sum((y - new) * (new - x)) > 0
        ahead = jnp.where(uphill, 0, (momentum - 1) / following)
        residual = jnp.max(jnp.abs(new - y))
        return new, new + ahead * (new - x), jnp.where(uphill, 1, following), residual, count + 1

    one, count = jnp.ones((), a.dtype), jnp.asarray(0)
    state = (start, start, one, jnp.full((), jnp.inf, a.dtype), count)
    x, *_ = jax.lax.while_loop(unfinished, sweep, state)
    return x, jnp.max(jnp.abs(x - positive_part(x - forced(x))))


def positive_part(x: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The nearest positive semi-definite matrix."""
    values, vectors = jnp.linalg.eigh(0.5 * (x + x.T))
    return (vectors * jnp.maximum(values, 0)[None]) @ vectors.T


def pairs(k: int) -> tuple[Int[Array, " pairs"], Int[Array, " pairs"]]:
    """Indices `i <= j` of symmetric matrices, ordered by `j`: the first `m (m + 1) / 2` are those of the first `m`."""
    indices = [(i, j) for j in range(k) for i in range(j + 1)]
    return jnp.asarray([i for i, _ in indices]), jnp.asarray([j for _, j in indices])
