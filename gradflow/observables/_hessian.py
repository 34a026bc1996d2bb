"""Sharpness and leading eigenvalues of the Hessian, by Lanczos on Hessian-vector products."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from gradflow._checks import check_callable, check_count, check_positive, fail
from gradflow._linalg import hessian_vector_product, lanczos
from gradflow._tree import at_least_single, full_precision, join, split
from gradflow.programs import fresh_jit


class HessianEigenvalues(eqx.Module):
    """The `k` largest eigenvalues of the Hessian of the loss, decreasing: `(k,)`.

    Band Lanczos with full reorthogonalisation, until the error bounds fall below `rtol` times the largest eigenvalue in
    modulus, or after `iterations` Hessian-vector products. Memory is `iterations + k` parameter vectors; no matrix of
    the size of the parameters squared is formed. Eigenvalues come as often as their multiplicity: a network of several
    outputs repeats them. Half precision is computed in float32. `with_bounds(params)` also returns error bounds and the
    products spent.

    **Arguments**: `problem`: `params -> scalar`; `k`; `rtol`; `iterations`; `seed` of the random start.

    **Raises** `ValueError` for a problem that cannot be called, fewer iterations than `k`, and an `rtol` that is not
    positive; when evaluated, for `k` above the number of parameters.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> top = gf.observables.HessianEigenvalues(lambda w: 0.5 * (jnp.arange(1.0, 6.0) * w**2).sum(), k=2)
    >>> top(jnp.ones(5)).round(4).tolist()
    [5.0, 4.0]
    """

    problem: Callable[[Any], Any]
    k: int = eqx.field(static=True)
    rtol: float = eqx.field(static=True)
    iterations: int = eqx.field(static=True)
    seed: int = eqx.field(static=True)

    def __init__(
        self, problem: Callable[[Any], Any], k: int, *, rtol: float = 1e-4, iterations: int = 100, seed: int = 0
    ):
        self.problem = check_callable("problem", problem, "problem(params) -> scalar")
        check_count("k", k)
        check_count("iterations", iterations, least=k)
        check_positive("rtol", rtol)
        self.k, self.rtol, self.iterations, self.seed = k, rtol, iterations, seed

    def __call__(self, params: PyTree) -> Float[Array, " k"]:
        return self.with_bounds(params)[0]

    @fresh_jit
    @full_precision
    def with_bounds(self, params: PyTree) -> tuple[Float[Array, " k"], Float[Array, " k"], Array]:
        """Eigenvalues, bounds on their errors, and the number of Hessian-vector products spent."""
        trainable, frozen = split(at_least_single(params))
        problem = at_least_single(self.problem)
        product, flat = hessian_vector_product(lambda p: problem(join(p, frozen)), trainable)
        if self.k > flat.size:
            raise fail("k", f"be at most the number of parameters, {flat.size}", str(self.k))
        start = jax.random.normal(jax.random.key(self.seed), (self.k, flat.size), flat.dtype)
        return lanczos(product, start, self.iterations, self.rtol)


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
