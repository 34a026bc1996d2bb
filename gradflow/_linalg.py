"""Matrix-free linear algebra: Hessian-vector products, Lanczos, and the contraction of Jacobians to kernels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from gradflow._tree import flatten, scaled_norm


def hessian_vector_product(
    loss: Callable[[PyTree], Array], params: PyTree
) -> tuple[Callable[[Float[Array, " size"]], Float[Array, " size"]], Float[Array, " size"]]:
    """`v -> H v` on flat vectors at fixed parameters, and the flat parameters.

    The gradient is linearised once; each product then costs less than differentiating it anew.
    """
    flat, unflatten = flatten(params)
    _, product = jax.linearize(jax.grad(lambda v: loss(unflatten(v))), flat)
    return product, flat


def lanczos(
    product: Callable[[Float[Array, " size"]], Float[Array, " size"]],
    start: Float[Array, " size"],
    count: int,
    iterations: int,
    rtol: float,
) -> tuple[Float[Array, " count"], Float[Array, " count"], Int[Array, ""]]:
    """The `count` largest eigenvalues of a symmetric operator, bounds on their errors, and the products spent.

    Lanczos with full reorthogonalisation, stopped when every bound is below `rtol` times the largest eigenvalue in
    modulus, or after `iterations`. When the Krylov space is exhausted it goes on from a fresh direction, so that
    multiple eigenvalues are found as well.
    """
    size = start.size
    steps = min(iterations, size)
    count = min(count, size)
    dtype = start.dtype
    eps = jnp.finfo(dtype).eps
    basis = jnp.zeros((steps + 1, size), dtype).at[0].set(start / scaled_norm(start))
    diagonal, off = jnp.zeros(steps, dtype), jnp.zeros(steps, dtype)
    directions = jax.random.split(jax.random.key(1), steps)

    def ritz(diagonal: Array, off: Array, done: Array) -> tuple[Array, Array, Array]:
        """Ritz values and error bounds of the leading block; the unused rest is moved out of the way."""
        inside = jnp.arange(steps) < done
        low = -2 * (jnp.max(jnp.abs(diagonal)) + 2 * jnp.max(jnp.abs(off))) - 1
        coupling = jnp.where(jnp.arange(1, steps) < done, off[: steps - 1], 0)
        matrix = jnp.diag(jnp.where(inside, diagonal, low)) + jnp.diag(coupling, 1) + jnp.diag(coupling, -1)
        values, vectors = jnp.linalg.eigh(matrix)
        last = jnp.maximum(done - 1, 0)
        bounds = jnp.abs(off[last] * vectors[last])
        largest = jnp.max(jnp.where(jnp.arange(steps) >= steps - done, jnp.abs(values), 0))
        return values[::-1][:count], bounds[::-1][:count], largest

    def unfinished(state: tuple[Any, ...]) -> Array:
        return ~state[4]

    def expand(state: tuple[Any, ...]) -> tuple[Any, ...]:
        basis, diagonal, off, done, _ = state
        vector = basis[done]
        image = product(vector)
        alpha = vector @ image
        used = (jnp.arange(steps + 1) <= done).astype(dtype)

        def orthogonal(v: Array) -> Array:
            for _ in range(2):
                v = v - basis.T @ (used * (basis @ v))
            return v

        image_left = orthogonal(image)
        beta = scaled_norm(image_left)
        scale = jnp.maximum(scaled_norm(image), jnp.max(jnp.abs(diagonal)))
        exhausted = beta <= 100 * eps * scale
        fresh = orthogonal(jax.random.normal(directions[done], (size,), dtype))
        follow = jnp.where(exhausted, fresh, image_left)
        length = scaled_norm(follow)
        basis = basis.at[done + 1].set(follow / jnp.where(length > 0, length, 1))
        diagonal = diagonal.at[done].set(alpha)
        off = off.at[done].set(jnp.where(exhausted, 0, beta))
        done = done + 1
        _, bounds, largest = ritz(diagonal, off, done)
        # A bound of zero right after a restart is not a sign of convergence of what has not been seen yet.
        settled = (done > count) & ~exhausted & jnp.all(bounds <= rtol * largest)
        return basis, diagonal, off, done, settled | (done >= steps) | ~jnp.isfinite(alpha)

    state = (basis, diagonal, off, jnp.asarray(0), jnp.asarray(False))
    _, diagonal, off, done, _ = jax.lax.while_loop(unfinished, expand, state)
    values, bounds, _ = ritz(diagonal, off, done)
    broken = ~jnp.all(jnp.isfinite(diagonal))
    return jnp.where(broken, jnp.nan, values), jnp.where(broken, jnp.nan, bounds), done


def random_unit(key: Key[Array, ""], like: Float[Array, " size"]) -> Float[Array, " size"]:
    """A random unit vector of the shape and type of `like`."""
    draw = jax.random.normal(key, like.shape, like.dtype)
    return draw / jnp.linalg.norm(draw)


def kernel(predict: Callable[[PyTree], Float[Array, "n ..."]], params: PyTree, chunk: int) -> Float[Array, "rows rows"]:
    """`J J^T` of the Jacobian of all predictions, flattened, by one product with `J^T` and one with `J` per row.

    Neither `J` (rows x parameters) nor anything larger than `chunk` times the parameters is held.
    """
    flat, unflatten = flatten(params)

    def outputs(v: Array) -> Array:
        return jnp.ravel(predict(unflatten(v)))

    values, forward = jax.linearize(outputs, flat)
    backward = jax.linear_transpose(forward, flat)
    rows = values.size

    def column(index: Int[Array, ""]) -> Array:
        (pulled,) = backward(jnp.zeros(rows, values.dtype).at[index].set(1))
        return forward(pulled)

    columns = jax.lax.map(column, jnp.arange(rows), batch_size=min(chunk, rows))
    return 0.5 * (columns + columns.T)
