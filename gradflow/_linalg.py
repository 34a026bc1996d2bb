"""Matrix-free linear algebra: Hessian-vector products, Lanczos, and the contraction of Jacobians to kernels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

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
    start: Float[Array, "count size"],
    iterations: int,
    rtol: float,
) -> tuple[Float[Array, " count"], Float[Array, " count"], Int[Array, ""]]:
    """The largest eigenvalues of a symmetric operator, bounds on their errors, and the products spent.

    Band Lanczos (Ruhe 1979, Math. Comp. 33) with full reorthogonalisation, stopped when every bound is below `rtol`
    times the largest eigenvalue in modulus, or after `iterations` products. It starts from as many directions as
    eigenvalues are wanted: from a single one, an eigenvalue of multiplicity two is seen once. A chain of directions
    that ends, because the space it spans is invariant, goes on from a fresh one.
    """
    count, size = start.shape
    steps = min(iterations, size)
    dtype = start.dtype
    eps = jnp.finfo(dtype).eps
    # Row j of `projected` holds the coefficients of H q_j: the rows of `basis` from `done` on are still to be mapped.
    basis = jnp.zeros((steps + count, size), dtype).at[:count].set(jnp.linalg.qr(start.T)[0].T)
    projected = jnp.zeros((steps, steps + count), dtype)
    fresh_keys = jax.random.split(jax.random.key(1), steps)

    def ritz(projected: Array, done: Array) -> tuple[Array, Array, Array]:
        """Ritz values and error bounds of the leading block; the unused rest is moved out of the way."""
        largest = jnp.max(jnp.abs(projected))
        scale = jnp.where(largest > 0, largest, 1)
        inside = jnp.arange(steps) < done
        block = jnp.where(inside[:, None] & inside[None, :], projected[:, :steps] / scale, 0)
        low = -2 * jnp.max(jnp.sum(jnp.abs(block), axis=1)) - 1
        values, vectors = jnp.linalg.eigh(block + jnp.diag(jnp.where(inside, 0, low)))
        outside = jax.lax.dynamic_slice_in_dim(projected / scale, done, count, axis=1)
        bounds = jnp.linalg.norm(outside.T @ vectors, axis=0)
        size_of_all = jnp.max(jnp.where(jnp.arange(steps) >= steps - done, jnp.abs(values), 0))
        return scale * values[::-1][:count], scale * bounds[::-1][:count], scale * size_of_all

    def unfinished(state: tuple[Any, ...]) -> Array:
        return ~state[3]

    def expand(state: tuple[Any, ...]) -> tuple[Any, ...]:
        basis, projected, done, _ = state
        image = product(basis[done])
        # Beyond `size` directions there is no room for another orthogonal one.
        index = jnp.arange(steps + count)
        used = ((index < done + count) & (index < size)).astype(dtype)

        def orthogonal(v: Array) -> Array:
            for _ in range(2):
                v = v - basis.T @ (used * (basis @ v))
            return v

        coefficients = used * (basis @ image)
        left = orthogonal(image)
        beta = scaled_norm(left)
        scale = jnp.maximum(scaled_norm(image), jnp.max(jnp.abs(projected)))
        exhausted = beta <= 100 * eps * scale
        fresh = orthogonal(jax.random.normal(fresh_keys[done], (size,), dtype))
        follow = jnp.where(exhausted, fresh, left)
        length = scaled_norm(follow)
        basis = basis.at[done + count].set(follow / jnp.where(length > 0, length, 1))
        row = coefficients.at[done + count].set(jnp.where(exhausted, 0, beta))
        projected, done = projected.at[done].set(row), done + 1
        _, bounds, largest = ritz(projected, done)
        settled = (done >= count) & jnp.all(bounds <= rtol * largest)
        return basis, projected, done, settled | (done >= steps) | ~jnp.all(jnp.isfinite(row))

    state = (basis, projected, jnp.asarray(0), jnp.asarray(False))
    _, projected, done, _ = jax.lax.while_loop(unfinished, expand, state)
    values, bounds, _ = ritz(projected, done)
    broken = ~jnp.all(jnp.isfinite(projected))
    return jnp.where(broken, jnp.nan, values), jnp.where(broken, jnp.nan, bounds), done


def matrix_function(
    product: Callable[[Float[Array, " size"]], Float[Array, " size"]],
    vector: Float[Array, " size"],
    function: Callable[[Array], Array],
    iterations: int,
) -> Float[Array, " size"]:
    """`f(H) v` for a symmetric operator, from `iterations` Lanczos steps with full reorthogonalisation.

    Once the space that `v` spans under `H` is exhausted the result is exact; directions beyond it are left at zero, and
    have no weight.
    """
    steps = min(iterations, vector.size)
    dtype = vector.dtype
    norm = scaled_norm(vector)
    basis = jnp.zeros((steps + 1, vector.size), dtype).at[0].set(vector / jnp.where(norm > 0, norm, 1))
    diagonal, off_diagonal = jnp.zeros(steps, dtype), jnp.zeros(steps, dtype)

    def expand(j: Int[ArrayLike, ""], state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        basis, diagonal, off_diagonal = state
        image = product(basis[j])
        left = image
        for _ in range(2):
            left = left - basis.T @ (basis @ left)
        size = scaled_norm(left)
        exhausted = size <= 100 * jnp.finfo(dtype).eps * jnp.maximum(scaled_norm(image), jnp.max(jnp.abs(diagonal)))
        following = jnp.where(exhausted, 0, left / jnp.where(size > 0, size, 1))
        alpha = basis[j] @ image
        return (
            basis.at[j + 1].set(following),
            diagonal.at[j].set(alpha),
            off_diagonal.at[j].set(jnp.where(exhausted, 0, size)),
        )

    basis, diagonal, off_diagonal = jax.lax.fori_loop(0, steps, expand, (basis, diagonal, off_diagonal))
    small = jnp.diag(diagonal) + jnp.diag(off_diagonal[:-1], 1) + jnp.diag(off_diagonal[:-1], -1)
    values, vectors = jnp.linalg.eigh(small)
    return norm * (basis[:-1].T @ (vectors @ (function(values) * vectors[0])))


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
