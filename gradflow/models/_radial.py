"""Radial reduction: for isotropic data and laws, nodes are told by their length, and an activation by its mean."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow._checks import check_callable, check_count


@dataclasses.dataclass(frozen=True)
class RadialActivation:
    """`phi(z) = E s(z n_1)`: what a shell of nodes computes.

    `n` is uniform on the sphere in `dim` dimensions.

    For inputs of an isotropic law, targets that depend on `|x|` alone and weights that start isotropic, one hidden
    layer stays isotropic, and its flow in `d` dimensions is that of one input `|x|`, of nodes `r = |w|`, with `phi` in
    the place of `s`. So `MeanFieldFlow` in one dimension, at any accuracy, is a check on particles in many. Of an odd
    activation nothing is left.

    **Arguments**: `activation`: elementwise; `dim`; `n`: nodes of the Gauss-Jacobi rule for `n_1`, whose density is
    `(1 - t^2)^((dim - 3) / 2)`.

    **Raises** `ValueError` for an activation that cannot be called, and numbers below one.

    **Source**: the reduction is that of Mei, Montanari and Nguyen 2018, arXiv 1804.06561.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> phi = gf.models.RadialActivation(jnp.cos, dim=3)
    >>> round(float(phi(jnp.array(2.0))), 12) == round(float(jnp.sin(2.0) / 2), 12)
    True
    """

    activation: Callable[[Array], Array]
    dim: int
    n: int = 32

    def __post_init__(self) -> None:
        check_callable("activation", self.activation, "activation(array)")
        check_count("dim", self.dim)
        check_count("n", self.n)

    def __call__(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        points, mass = _first_entry(self.dim, self.n)
        terms = self.activation(z[..., None] * jnp.asarray(points, z.dtype).reshape(*[1] * z.ndim, -1))
        return jnp.tensordot(terms, jnp.asarray(mass, z.dtype), axes=1)


def _first_entry(dim: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for one entry of a uniform unit vector."""
    if dim == 1:
        return np.array([-1.0, 1.0]), np.array([0.5, 0.5])
    from scipy.special import roots_jacobi

    exponent = (dim - 3) / 2
    points, mass = roots_jacobi(n, exponent, exponent)
    return np.asarray(points), np.asarray(mass) / np.sum(mass)
