"""Matrix-free linear algebra: Hessian-vector products, Lanczos, eigenpairs that are followed, and the contraction of
Jacobians to kernels."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PyTree, Scalar

from gradflow._tree import flatten, scaled_norm

Product = Callable[[Float[Array, " size"]], Float[Array, " size"]]
INDEPENDENT = 1e-6
"""Part of a direction that has to lie outside of those before it, for a product to be spent on it."""

OUTSIDE = 0.5
"""Part of a new direction that has to lie outside of the basis."""


Chain = tuple[Float[Array, "rows size"], Float[Array, "steps rows"], Int[Array, ""], Bool[Array, ""]]
"""Band Lanczos on its way: basis, projected operator, directions that are mapped, and whether these are enough."""


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
) -> tuple[Float[Array, " count"], Float[Array, " count"], Int[Array, ""], Float[Array, "count size"]]:
    """The largest eigenvalues of a symmetric operator, bounds on their errors, the products spent, and Ritz vectors.

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

    def unfinished(state: Chain) -> Array:
        return ~state[3]

    def expand(state: Chain) -> Chain:
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
        _, bounds, largest, _ = _leading_ritz(projected, done)
        settled = (done >= count) & jnp.all(bounds <= rtol * largest)
        return basis, projected, done, settled | (done >= steps) | ~jnp.all(jnp.isfinite(row))

    state = (basis, projected, jnp.asarray(0), jnp.asarray(False))
    basis, projected, done, _ = jax.lax.while_loop(unfinished, expand, state)
    values, bounds, _, vectors = _leading_ritz(projected, done)
    broken = ~jnp.all(jnp.isfinite(projected))
    vectors = vectors[:, :count].T @ basis[:steps]
    return jnp.where(broken, jnp.nan, values), jnp.where(broken, jnp.nan, bounds), done, vectors


def _leading_ritz(
    projected: Float[Array, "steps rows"], done: Int[Array, ""]
) -> tuple[Float[Array, " count"], Float[Array, " count"], Float[Array, ""], Float[Array, "steps steps"]]:
    """Ritz values, bounds, size and vectors of the leading block; the unused rest is moved out of the way."""
    steps, count = projected.shape[0], projected.shape[1] - projected.shape[0]
    largest = jnp.max(jnp.abs(projected))
    scale = jnp.where(largest > 0, largest, 1)
    inside = jnp.arange(steps) < done
    block = jnp.where(inside[:, None] & inside[None, :], projected[:, :steps] / scale, 0)
    low = -2 * jnp.max(jnp.sum(jnp.abs(block), axis=1)) - 1
    values, vectors = jnp.linalg.eigh(block + jnp.diag(jnp.where(inside, 0, low)))
    outside = jax.lax.dynamic_slice_in_dim(projected / scale, done, count, axis=1)
    bounds = jnp.linalg.norm(outside.T @ vectors, axis=0)
    size_of_all = jnp.max(jnp.where(jnp.arange(steps) >= steps - done, jnp.abs(values), 0))
    return scale * values[::-1][:count], scale * bounds[::-1][:count], scale * size_of_all, vectors[:, ::-1]


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


def averaged(fn: Callable[[PyTree], Array], params: PyTree, rows: PyTree) -> Array:
    """The mean of a function over deviations from `params` whose covariance is the sum of the outer products of `rows`,
    to second order: `fn + <Hess fn, Sigma> / 2`."""

    def curved(row: PyTree) -> Array:
        slope = lambda p: jax.jvp(fn, (p,), (row,))[1]  # noqa: E731
        return jax.jvp(slope, (params,), (row,))[1]

    return fn(params) + 0.5 * jnp.sum(jax.lax.map(curved, rows), axis=0)


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


class Basis(eqx.Module):
    """Orthonormal rows with decreasing Ritz values and the norms of their residuals; rows beyond `count` are unused."""

    vectors: Float[Array, "k size"]
    values: Float[Array, " k"]
    residuals: Float[Array, " k"]
    count: Int[Array, ""]

    @property
    def used(self) -> Bool[Array, " k"]:
        return jnp.arange(self.values.size) < self.count


def images(
    product: Product, vectors: Float[Array, "k size"], chosen: Bool[Array, " k"]
) -> tuple[Float[Array, "k size"], Int[Array, ""]]:
    """Products with the rows that are chosen, zero for all others, and their number.

    A loop over those that are chosen alone: the others cost nothing, also where many operators are batched.
    """
    order = jnp.argsort(~chosen, stable=True)
    number = jnp.sum(chosen)

    def one(i: Int[ArrayLike, ""], rows: Array) -> Array:
        return rows.at[order[i]].set(product(vectors[order[i]]))

    return jax.lax.fori_loop(0, number, one, jnp.zeros_like(vectors)), number


def expanded(
    product: Product,
    basis: Basis,
    mapped: Float[Array, "k size"],
    tolerance: Callable[[Float[Array, " k"]], Float[Array, " k"]],
) -> tuple[Basis, Float[Array, "k size"], Int[Array, ""]]:
    """One Rayleigh-Ritz step in the span of a basis and of those of its residuals that are larger than tolerated.

    `mapped` holds the products with the used rows of the basis; `tolerance` is a function of the Ritz values. Returns
    the basis, with new rows up to the number of rows there are, the products with its rows, and how many were taken.
    """
    k = basis.values.size
    vectors = jnp.where(basis.used[:, None], basis.vectors, 0)
    small = vectors @ mapped.T
    values, turn = ritz(0.5 * (small + small.T), basis.used)
    vectors, mapped = turn.T @ vectors, turn.T @ mapped
    residual = mapped - values[:, None] * vectors
    for _ in range(2):
        residual = residual - (residual @ vectors.T) @ vectors
    sizes = jnp.linalg.norm(residual, axis=1)
    wanted = basis.used & (sizes > tolerance(values))
    fresh = jnp.where(wanted[:, None], residual / jnp.where(sizes > 0, sizes, 1)[:, None], 0)
    image, num_products = images(product, fresh, wanted)
    gram_values, gram_vectors = jnp.linalg.eigh(fresh @ fresh.T)
    independent = gram_values > INDEPENDENT
    whiten = gram_vectors * jnp.where(independent, 1 / jnp.sqrt(jnp.where(independent, gram_values, 1)), 0)[None]
    fresh, image = whiten.T @ fresh, whiten.T @ image
    both, both_mapped = jnp.concatenate([vectors, fresh]), jnp.concatenate([mapped, image])
    inside = jnp.concatenate([basis.used, independent])
    small = both @ both_mapped.T
    values, turn = ritz(0.5 * (small + small.T), inside)
    vectors, mapped = turn.T[:k] @ both, turn.T[:k] @ both_mapped
    residuals = jnp.linalg.norm(mapped - values[:k, None] * vectors, axis=1)
    count = jnp.minimum(jnp.sum(inside), k)
    used = jnp.arange(k) < count
    vectors, mapped = (jnp.where(used[:, None], rows, 0) for rows in (vectors, mapped))
    values, residuals = (jnp.where(used, numbers, 0) for numbers in (values[:k], residuals))
    return Basis(vectors, values, residuals, count), mapped, num_products


def renewed(
    product: Product, basis: Basis, key: Key[Array, ""], block: int, iterations: int, rtol: float
) -> tuple[Basis, Int[Array, ""]]:
    """The basis with the largest eigenpairs outside of its span, from Lanczos, and the products taken.

    Of all rows together those with the largest values are kept. From an empty basis this is a start.
    """
    k, size = basis.vectors.shape
    inside = jnp.where(basis.used[:, None], basis.vectors, 0)

    def outside(v: Array) -> Array:
        return v - inside.T @ (inside @ v)

    block = min(block, size, k)
    start = jax.vmap(outside)(jax.random.normal(key, (block, size), inside.dtype))
    values, bounds, num_products, vectors = lanczos(lambda v: outside(product(outside(v))), start, iterations, rtol)
    # Where hardly anything lies outside, rounding is all that Lanczos has to start from.
    left = jax.vmap(outside)(vectors)
    sizes = jnp.linalg.norm(left, axis=1)
    valid = sizes > OUTSIDE
    vectors = left / jnp.where(valid, sizes, 1)[:, None]
    order = jnp.argsort(
        -jnp.concatenate([jnp.where(basis.used, basis.values, -jnp.inf), jnp.where(valid, values, -jnp.inf)])
    )[:k]
    count = jnp.minimum(basis.count + jnp.sum(valid), k)
    used = jnp.arange(k) < count
    parts = (jnp.concatenate(pair) for pair in ((inside, vectors), (basis.values, values), (basis.residuals, bounds)))
    vectors, values, residuals = (
        jnp.where(used if part.ndim == 1 else used[:, None], part[order], 0) for part in parts
    )
    return Basis(vectors, values, residuals, count), num_products


def extrapolated(basis: Basis, older: Float[Array, "k size"], spacing: Scalar, ahead: Scalar) -> Basis:
    """The basis some way `ahead`, from one a `spacing` back, linearly; the same where there is none (no spacing).

    Eigenvectors turn among themselves, so the older basis is first turned to match this one as well as it can be.
    """
    rows = jnp.where(basis.used[:, None], basis.vectors, 0)
    overlap = jnp.where(basis.used[:, None], rows @ older.T, 0)
    left, sizes, right = jnp.linalg.svd(overlap)
    turned = jnp.where((sizes > OUTSIDE)[None], left, 0) @ right @ older
    matched = basis.used & (jnp.linalg.norm(turned, axis=1) > OUTSIDE) & (spacing > 0)
    slope = jnp.where(matched[:, None], rows - turned, 0) / jnp.where(spacing > 0, spacing, 1)
    shifted = rows + ahead * slope
    # The nearest orthonormal rows: no row is preferred.
    values, vectors = jnp.linalg.eigh(shifted @ shifted.T + jnp.diag(jnp.where(basis.used, 0, 1).astype(rows.dtype)))
    root = (vectors / jnp.sqrt(values)[None]) @ vectors.T
    return eqx.tree_at(lambda b: b.vectors, basis, jnp.where(basis.used[:, None], root @ shifted, 0))


def empty_basis(k: int, size: int, dtype: jnp.dtype) -> Basis:
    numbers = jnp.zeros(k, dtype)
    return Basis(jnp.zeros((k, size), dtype), numbers, numbers, jnp.asarray(0))


def ritz(small: Float[Array, "m m"], inside: Bool[Array, " m"]) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """Eigenvalues, decreasing, and eigenvectors of the block of those inside; the others follow behind."""
    block = jnp.where(inside[:, None] & inside[None], small, 0)
    low = -2 * jnp.max(jnp.sum(jnp.abs(block), axis=1)) - 1
    values, vectors = jnp.linalg.eigh(block + jnp.diag(jnp.where(inside, 0, low)))
    return values[::-1], vectors[:, ::-1]
