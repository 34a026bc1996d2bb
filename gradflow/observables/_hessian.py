"""Sharpness, leading eigenvalues and eigenvectors of the Hessian, by products with it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from gradflow._checks import check_callable, check_count, check_positive, fail
from gradflow._linalg import Basis, Product, empty_basis, expanded, hessian_vector_product, images, lanczos, renewed
from gradflow._tree import at_least_single, flatten, full_precision, join, split
from gradflow.programs import fresh_jit

ROUNDS = 6
"""Rounds of products with residuals, after which Lanczos is cheaper."""
LOOK_AROUND, LOOK_PRODUCTS, LOOK_ROUGH = 10, 12, 0.1
"""Save times after which directions are looked for that are orthogonal to all that are known, and how: products at
most, accuracy."""
GAP = 3.0
"""Gap below the wanted eigenvalues, over their residuals, from which on it is believed."""
MIXED_IN = 0.1
"""Size of the random direction that is mixed into the last row at every save time, for what it is orthogonal to."""


class Eigenpairs(NamedTuple):
    """Eigenvalues, decreasing, bounds on their errors, the products spent, and eigenvectors where they are wanted."""

    values: Float[Array, "*rows k"]
    bounds: Float[Array, "*rows k"]
    products: Int[Array, "*rows"]
    vectors: Float[Array, "*rows k size"] | None


class KnownPairs(eqx.Module):
    """What is known of the eigenpairs at the save time before."""

    basis: Basis  # one row more than pairs are wanted
    rows: Int[Array, ""]  # save times so far


class HessianEigenpairs(eqx.Module):
    """The `k` largest eigenvalues of the Hessian of the loss, with eigenvectors.

    Of the preconditioned Hessian, if a preconditioner is given.

    Called on parameters, by band Lanczos with full reorthogonalisation, as `HessianEigenvalues`. Along a run the
    eigenvectors of one save time are the start at the next: a Rayleigh-Ritz step with one product for each, then one
    for each residual until the bounds are met, and Lanczos where they are not after some rounds. One pair more than is
    asked for is kept, with a little noise, and directions orthogonal to all of them are looked for at every tenth save
    time, so that eigenvalues may cross and new ones come up from below. One that comes up in a subspace of its own,
    as symmetries of the problem make them, may go unseen for some save times.

    **Arguments**

    - `problem`: `params -> scalar`. `k`: number of pairs.
    - `preconditioner`: `params -> D`, a pytree like the trainable parameters, or a number, all positive; the pairs are
      those of `D^-1/2 H D^-1/2`. `None`: those of the Hessian.
    - `rtol`: error bounds, over the largest eigenvalue in modulus. `iterations`: products of Lanczos, at most. `seed`:
      of its random start. `vectors`: whether to record the eigenvectors, flat.

    **Returns** `Eigenpairs`: `values (k,)`, decreasing, `bounds (k,)`, `products`, `vectors (k, size)` or `None`. The
    bounds are norms of residuals, along a run also their squares over the gap to the next pair, where that is smaller.

    **Raises** `ValueError` as `HessianEigenvalues`, and for a preconditioner that cannot be called.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> pairs = gf.observables.HessianEigenpairs(lambda w: 0.5 * (jnp.arange(1.0, 6.0) * w**2).sum(), k=2)
    >>> found = pairs(jnp.ones(5))
    >>> found.values.round(4).tolist(), bool(found.products <= 5)
    ([5.0, 4.0], True)
    """

    problem: Callable[[Any], Any]
    preconditioner: Callable[[Any], Any] | None
    k: int = eqx.field(static=True)
    rtol: float = eqx.field(static=True)
    iterations: int = eqx.field(static=True)
    seed: int = eqx.field(static=True)
    vectors: bool = eqx.field(static=True)

    def __init__(
        self,
        problem: Callable[[Any], Any],
        k: int,
        *,
        preconditioner: Callable[[Any], Any] | None = None,
        rtol: float = 1e-4,
        iterations: int = 100,
        seed: int = 0,
        vectors: bool = False,
    ):
        self.problem = check_callable("problem", problem, "problem(params) -> scalar")
        if preconditioner is not None:
            check_callable("preconditioner", preconditioner, "preconditioner(params) -> pytree of positive numbers")
        self.preconditioner = preconditioner
        check_count("k", k)
        check_count("iterations", iterations, least=k)
        check_positive("rtol", rtol)
        self.k, self.rtol, self.iterations, self.seed = k, rtol, iterations, seed
        self.vectors = bool(vectors)

    @fresh_jit
    @full_precision
    def __call__(self, params: PyTree) -> Eigenpairs:
        product, size, dtype = self._product(params)
        return self._afresh(product, self._start(size, dtype))[0]

    def first_memory(self, params: PyTree) -> KnownPairs:
        """What is known before the first save time of a run: nothing."""
        flat, _ = flatten(at_least_single(split(params)[0]))
        return KnownPairs(empty_basis(min(self.k + 1, flat.size), flat.size, flat.dtype), jnp.asarray(0))

    @fresh_jit
    @full_precision
    def follow(self, memory: KnownPairs, params: PyTree) -> tuple[KnownPairs, Eigenpairs]:
        """The pairs at the next save time of a run, and what is known then."""
        product, size, dtype = self._product(params)
        basis, num_products, good = self._improved(product, memory)

        def again(_: tuple) -> tuple:
            eigenpairs, fresh = self._afresh(product, self._start(size, dtype))
            return jnp.asarray(True), fresh, eigenpairs.products

        # A loop of at most one round, so that under `vmap` it costs nothing where no member needs it.
        start = good, basis, jnp.asarray(0)
        _, basis, more = jax.lax.while_loop(lambda state: ~state[0], again, start)
        eigenpairs = self._found(basis, num_products + more)
        return KnownPairs(basis, memory.rows + 1), eigenpairs._replace(bounds=_bounds(basis, self.k)[: self.k])

    def _product(self, params: PyTree) -> tuple[Product, int, jnp.dtype]:
        trainable, frozen = split(at_least_single(params))
        problem = at_least_single(self.problem)
        product, flat = hessian_vector_product(lambda p: problem(join(p, frozen)), trainable)
        if self.k > flat.size:
            raise fail("k", f"be at most the number of parameters, {flat.size}", str(self.k))
        if self.preconditioner is None:
            return product, flat.size, flat.dtype
        scale, _ = flatten(at_least_single(self.preconditioner(params)))
        root = 1 / jnp.sqrt(scale.astype(flat.dtype))
        return lambda v: root * product(root * v), flat.size, flat.dtype

    def _start(self, size: int, dtype: jnp.dtype) -> Float[Array, "k size"]:
        return jax.random.normal(jax.random.key(self.seed), (self.k, size), dtype)

    def _afresh(self, product: Product, start: Float[Array, "k size"]) -> tuple[Eigenpairs, Basis]:
        """By Lanczos."""
        values, bounds, num_products, vectors = lanczos(product, start, self.iterations, self.rtol)
        k, size = start.shape
        rows = min(k + 1, size)
        more = rows - k
        extra = jax.random.normal(jax.random.key(self.seed + 1), (more, size), start.dtype)
        for _ in range(2):
            extra = extra - (extra @ vectors.T) @ vectors
        extra = extra / jnp.linalg.norm(extra, axis=1)[:, None]
        pad = jnp.zeros(more, start.dtype)
        numbers = (jnp.concatenate([numbers_of, pad]) for numbers_of in (values, bounds))
        basis = Basis(jnp.concatenate([vectors, extra]), *numbers, count=jnp.asarray(rows))
        return self._found(basis, num_products), basis

    def _found(self, basis: Basis, num_products: Int[Array, ""]) -> Eigenpairs:
        k = self.k
        vectors = basis.vectors[:k] if self.vectors else None
        return Eigenpairs(basis.values[:k], basis.residuals[:k], num_products, vectors)

    def _improved(self, product: Product, memory: KnownPairs) -> tuple[Basis, Int[Array, ""], Bool[Array, ""]]:
        """The pairs by Rayleigh-Ritz from those that are known, the products, and whether the bounds are met."""
        key = jax.random.fold_in(jax.random.key(self.seed + 2), memory.rows)
        basis, none = memory.basis, jnp.asarray(0)
        followed = basis.count > 0

        def look(state: tuple) -> tuple:
            _, now, num_products = state
            now, more = renewed(product, now, key, 1, LOOK_PRODUCTS, LOOK_ROUGH)
            return jnp.asarray(False), now, num_products + more

        due = followed & (memory.rows % LOOK_AROUND == 0)
        _, basis, num_products = jax.lax.while_loop(lambda state: state[0], look, (due, basis, none))
        basis = _stirred(basis, self.k, key)
        mapped, more = images(product, basis.vectors, basis.used)

        def tolerance(values: Float[Array, " rows"]) -> Float[Array, " rows"]:
            # The last row is improved in the first round alone, by whatever it lacks.
            wanted = jnp.arange(values.size) < self.k
            return jnp.where(wanted, self.rtol * jnp.max(jnp.abs(values)), jnp.inf).astype(values.dtype)

        def unmet(basis: Basis) -> Bool[Array, ""]:
            return jnp.any(basis.used & (_bounds(basis, self.k) > tolerance(basis.values)))

        def improve(state: tuple) -> tuple:
            now, mapped, num_products, rounds = state
            each = lambda values: jnp.where(rounds == 0, 0, tolerance(values))  # noqa: E731
            now, mapped, more = expanded(product, now, mapped, each)
            return now, mapped, num_products + more, rounds + 1

        def unfinished(state: tuple) -> Bool[Array, ""]:
            now, _, _, rounds = state
            return followed & ((rounds == 0) | unmet(now)) & (rounds < ROUNDS)

        start = basis, mapped, num_products + more, jnp.asarray(0)
        basis, _, num_products, _ = jax.lax.while_loop(unfinished, improve, start)
        return basis, num_products, followed & ~unmet(basis) & jnp.all(jnp.isfinite(basis.values))


def _bounds(basis: Basis, k: int) -> Float[Array, " rows"]:
    """Bounds on the errors of the wanted values: residuals, or their squares over the gap to what follows (Kato and
    Temple), if that is the smaller one and the gap is the larger of the two."""
    if basis.values.size == k:
        return basis.residuals
    gap = basis.values[k - 1] - basis.values[k]
    together = jnp.sum(jnp.where(jnp.arange(basis.values.size) < k, basis.residuals**2, 0))
    apart = gap > GAP * jnp.sqrt(together)
    return jnp.where(apart, jnp.minimum(basis.residuals, together / jnp.where(apart, gap, 1)), basis.residuals)


def _stirred(basis: Basis, k: int, key: Array) -> Basis:
    """With some noise in the rows beyond those that are wanted, kept orthonormal."""
    rows, size = basis.vectors.shape
    if rows == k:
        return basis
    wanted, last = basis.vectors[:k], basis.vectors[k:]
    noise = jax.random.normal(key, last.shape, last.dtype) / jnp.sqrt(jnp.asarray(size, last.dtype))
    last = last + MIXED_IN * noise
    for _ in range(2):
        last = last - (last @ wanted.T) @ wanted
    sizes = jnp.linalg.norm(last, axis=1)[:, None]
    last = last / jnp.where(sizes > 0, sizes, 1)
    return eqx.tree_at(lambda b: b.vectors, basis, jnp.concatenate([wanted, last]))


class HessianEigenvalues(eqx.Module):
    """The `k` largest eigenvalues of the Hessian of the loss, decreasing: `(k,)`.

    Band Lanczos with full reorthogonalisation, until the error bounds fall below `rtol` times the largest eigenvalue in
    modulus, or after `iterations` Hessian-vector products. Memory is `iterations + k` parameter vectors; no matrix of
    the size of the parameters squared is formed. Eigenvalues come as often as their multiplicity: a network of several
    outputs repeats them. Half precision is computed in float32. `with_bounds(params)` also returns error bounds and the
    products spent. Along a run the eigenvectors are followed from one save time to the next, at a few products each:
    see `HessianEigenpairs`.

    **Arguments**: `problem`: `params -> scalar`; `k`; `rtol`; `iterations`; `seed` of the random start.

    **Raises** `ValueError` for a problem that cannot be called, fewer iterations than `k`, and an `rtol` that is not
    positive; when evaluated, for `k` above the number of parameters.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> top = gf.observables.HessianEigenvalues(lambda w: 0.5 * (jnp.arange(1.0, 6.0) * w**2).sum(), k=2)
    >>> top(jnp.ones(5)).round(4).tolist()
    [5.0, 4.0]
    """

    pairs: HessianEigenpairs

    def __init__(
        self, problem: Callable[[Any], Any], k: int, *, rtol: float = 1e-4, iterations: int = 100, seed: int = 0
    ):
        self.pairs = HessianEigenpairs(problem, k, rtol=rtol, iterations=iterations, seed=seed)

    def __call__(self, params: PyTree) -> Float[Array, " k"]:
        return self.pairs(params).values

    def with_bounds(self, params: PyTree) -> tuple[Float[Array, " k"], Float[Array, " k"], Array]:
        """Eigenvalues, bounds on their errors, and the number of Hessian-vector products spent."""
        eigenpairs = self.pairs(params)
        return eigenpairs.values, eigenpairs.bounds, eigenpairs.products

    def first_memory(self, params: PyTree) -> KnownPairs:
        return self.pairs.first_memory(params)

    def follow(self, memory: KnownPairs, params: PyTree) -> tuple[KnownPairs, Float[Array, " k"]]:
        memory, eigenpairs = self.pairs.follow(memory, params)
        return memory, eigenpairs.values


class Sharpness(eqx.Module):
    """The largest eigenvalue of the Hessian of the loss; see `HessianEigenvalues`.

    Explicit methods, gradient descent among them, are stable for steps up to about `2 / sharpness`.

    **Arguments**, **Raises**: as for `HessianEigenvalues`, where `k` is one.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> round(float(gf.observables.Sharpness(lambda w: w @ w)(jnp.ones(3))), 4)
    2.0
    """

    eigenvalues: HessianEigenvalues

    def __init__(self, problem: Callable[[Any], Any], *, rtol: float = 1e-4, iterations: int = 100, seed: int = 0):
        self.eigenvalues = HessianEigenvalues(problem, 1, rtol=rtol, iterations=iterations, seed=seed)

    def __call__(self, params: PyTree) -> Float[Array, ""]:
        return self.eigenvalues(params)[0]

    def first_memory(self, params: PyTree) -> KnownPairs:
        return self.eigenvalues.first_memory(params)

    def follow(self, memory: KnownPairs, params: PyTree) -> tuple[KnownPairs, Float[Array, ""]]:
        memory, values = self.eigenvalues.follow(memory, params)
        return memory, values[0]
