"""The square `s(x) = x^2`, whose Gaussian integrals are polynomials (Wick's theorem)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow.problems.activations._base import AbstractActivation, Covariance, Entries


class Square(AbstractActivation):
    """`s(x) = x^2`, the activation of phase retrieval.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> float(gf.problems.activations.Square().i2(jnp.ones((2, 2))))  # the fourth moment
    3.0
    """

    def __call__(self, x: Entries) -> Entries:
        return x**2

    def derivative(self, x: Entries) -> Entries:
        return 2 * x

    def i2(self, C: Covariance) -> Entries:
        return C[0][0] * C[1][1] + 2 * C[0][1] ** 2

    def j2(self, C: Covariance) -> Entries:
        return 4 * C[0][1]

    def k2(self, C: Covariance) -> Entries:
        return 2 * C[1][1] * jnp.ones_like(C[0][1])

    def i4(self, C: Covariance) -> Entries:
        apart = C[0][1] * (C[2][2] * C[3][3] + 2 * C[2][3] ** 2)
        crossed = C[0][2] * C[1][2] * C[3][3] + C[0][3] * C[1][3] * C[2][2]
        chained = C[2][3] * (C[0][2] * C[1][3] + C[0][3] * C[1][2])
        return 4 * (apart + 2 * crossed + 4 * chained)

    def squares(
        self, C: Float[Array, "n n"], c: Float[Array, " n"], first: np.ndarray, second: np.ndarray
    ) -> Float[Array, " pairs"]:
        weighted = C * c[None, :]
        once = weighted @ C
        twice = weighted @ once
        # The residual itself is a square: E (sum_a c_a x_a^2)^2.
        mean = c @ jnp.diagonal(C)
        residual = mean**2 + 2 * c @ C**2 @ c
        return 4 * (C[first, second] * residual + 4 * mean * once[first, second] + 8 * twice[first, second])

    def expectations(self, students: int, teachers: int) -> int:
        return students + teachers  # products of matrices
