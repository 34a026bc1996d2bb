"""Norms of the parameters and of the gradient."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from gradflow._checks import check_callable
from gradflow._tree import full_precision, in_single, join, split, tree_norm


class ParameterNorm(eqx.Module):
    """Norm of all floating-point parameters, exact down to the smallest floats.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> float(gf.observables.ParameterNorm()({"a": jnp.array([3.0]), "b": jnp.array([4.0])}))
    5.0
    """

    @in_single
    def __call__(self, params: PyTree) -> Float[Array, ""]:
        return tree_norm(params)


class GradientNorm(eqx.Module):
    """Euclidean norm of the gradient of the loss.

    Costs one gradient, which the run does not count as its own.

    **Arguments**: `problem`: `params -> scalar`.

    **Raises** `ValueError` for a problem that cannot be called.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> float(gf.observables.GradientNorm(lambda w: 0.5 * w**2)(jnp.array(2.0)))
    2.0
    """

    problem: Callable[[PyTree], Array]

    def __init__(self, problem: Callable[[PyTree], Array]):
        self.problem = check_callable("problem", problem, "problem(params) -> scalar")

    @in_single
    @full_precision
    def __call__(self, params: PyTree) -> Float[Array, ""]:
        trainable, frozen = split(params)
        return tree_norm(jax.grad(lambda p: self.problem(join(p, frozen)))(trainable))
