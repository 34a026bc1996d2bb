"""The error function `s(x) = erf(x / sqrt 2)`, whose Gaussian integrals are arcsines."""

import jax
import jax.numpy as jnp

from gradflow.problems.activations._base import AbstractActivation, Covariance, Entries


class Erf(AbstractActivation):
    """`s(x) = erf(x / sqrt 2)`.

    The activation of Saad and Solla (1995), and of Veiga et al. (2022), arXiv 2202.00293.

    The arguments of all arcsines stay below one in absolute value for every positive semi-definite covariance, singular
    ones and coincident fields included, so that every expectation is a smooth function of the covariance.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> erf = gf.problems.activations.Erf()
    >>> round(float(erf.i2(jnp.ones((2, 2)))), 4)  # one third for a field of unit variance
    0.3333
    """

    def __call__(self, x: Entries) -> Entries:
        return jax.scipy.special.erf(x / jnp.sqrt(2.0).astype(x.dtype))

    def derivative(self, x: Entries) -> Entries:
        return (2 / jnp.pi) ** 0.5 * jnp.exp(-(x**2) / 2)

    def i2(self, C: Covariance) -> Entries:
        return 2 / jnp.pi * jnp.arcsin(C[0][1] / jnp.sqrt((1 + C[0][0]) * (1 + C[1][1])))

    def j2(self, C: Covariance) -> Entries:
        return 2 / jnp.pi / jnp.sqrt((1 + C[0][0]) * (1 + C[1][1]) - C[0][1] ** 2)

    def k2(self, C: Covariance) -> Entries:
        return -self.j2(C) * C[0][1] / (1 + C[0][0])

    def i4(self, C: Covariance) -> Entries:
        one, two = 1 + C[0][0], 1 + C[1][1]
        both = one * two - C[0][1] ** 2
        third = both * (1 + C[2][2]) - C[1][2] ** 2 * one - C[0][2] ** 2 * two + 2 * C[0][1] * C[0][2] * C[1][2]
        fourth = both * (1 + C[3][3]) - C[1][3] ** 2 * one - C[0][3] ** 2 * two + 2 * C[0][1] * C[0][3] * C[1][3]
        cross = both * C[2][3] - C[1][2] * C[1][3] * one - C[0][2] * C[0][3] * two
        cross = cross + C[0][1] * (C[0][2] * C[1][3] + C[0][3] * C[1][2])
        # The arcsine of `cross / sqrt(third * fourth)`, at half the cost.
        return 4 / jnp.pi**2 * jnp.arctan(cross / jnp.sqrt(third * fourth - cross**2)) / jnp.sqrt(both)
