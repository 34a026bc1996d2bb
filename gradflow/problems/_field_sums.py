"""Sums over all units of a student and a teacher of Gaussian expectations of their activations.

`C (n, n)` is the covariance of all fields, the `p` students first; `c (n,)` are the weights with which the units enter
the residual `sum_a c_a s(x_a)` of student minus teacher, or its opposite.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow.problems.activations import AbstractActivation


def population_risk(activation: AbstractActivation, C: Float[Array, "n n"], c: Float[Array, " n"]) -> Float[Array, ""]:
    """`E (sum_a c_a s(x_a))^2 / 2`."""
    diagonal = jnp.diagonal(C)
    return c @ activation.i2(((diagonal[:, None], C), (C, diagonal[None, :]))) @ c / 2


def correlation_with_residual(
    activation: AbstractActivation, C: Float[Array, "n n"], c: Float[Array, " n"], p: int
) -> Float[Array, " p"]:
    """`sum_a c_a E s(x_j) s(x_a)` of every student `j`."""
    diagonal, left = jnp.diagonal(C), C[:p]
    return activation.i2(((diagonal[:p, None], left), (left, diagonal[None, :]))) @ c


def learning_terms(
    activation: AbstractActivation, C: Float[Array, "n n"], c: Float[Array, " n"], p: int
) -> Float[Array, "p n"]:
    """`sum_a c_a E s'(x_j) x_b s(x_a)` for every student `j` and field `b`, in `O(p n)` expectations."""
    curved, sloped = learning_factors(activation, C, c, p)
    return C[:p] * curved[:, None] + sloped @ C


def learning_factors(
    activation: AbstractActivation, C: Float[Array, "n n"], c: Float[Array, " n"], p: int
) -> tuple[Float[Array, " p"], Float[Array, "p n"]]:
    """`sum_a c_a E s''(x_j) s(x_a)` and `c_a E s'(x_j) s'(x_a)`, of which `learning_terms` is made."""
    diagonal, left = jnp.diagonal(C), C[:p]
    pair = ((diagonal[:p, None], left), (left, diagonal[None, :]))
    return activation.k2(pair) @ c, activation.j2(pair) * c[None, :]


def triangle(p: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the upper triangle of a `(p, p)` matrix, in the order in which it is stored."""
    rows, columns = np.triu_indices(p)
    return rows, columns


def square_terms(
    activation: AbstractActivation, C: Float[Array, "n n"], c: Float[Array, " n"], p: int
) -> Float[Array, " pairs"]:
    """`E s'(x_j) s'(x_l) (sum_a c_a s(x_a))^2` for all pairs `j <= l` of students, in the order of `triangle`."""
    return activation.squares(C, c, *triangle(p))


def slope_products(activation: AbstractActivation, C: Float[Array, "n n"], p: int) -> Float[Array, " pairs"]:
    """`E s'(x_j) s'(x_l)` for all pairs `j <= l` of students, in the order of `triangle`."""
    j, k = triangle(p)
    diagonal = jnp.diagonal(C)
    return activation.j2(((diagonal[j], C[j, k]), (C[j, k], diagonal[k])))
