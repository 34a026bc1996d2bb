"""Probabilities that two and that four correlated Gaussian fields are all positive, for singular covariances too."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gradflow.problems.activations._base import Covariance, Entries

NODES = 32
"""Points of the Gauss-Legendre rule."""


def loosened(C: Covariance) -> Covariance:
    """The covariance with its off-diagonal entries smaller by a share `eps^(2/3)`, 4e-11 in float64.

    It makes dependent fields the limit of independent ones, which is what the formulas below hold for, and leaves their
    conditional variances well above rounding.
    """
    less = 1 - float(jnp.finfo(jnp.result_type(*(C[i][i] for i in range(len(C))))).eps) ** (2 / 3)
    return [[C[i][j] if i == j else less * C[i][j] for j in range(len(C))] for i in range(len(C))]


def _tiny(x: Entries) -> float:
    return 4 * float(jnp.finfo(x.dtype).eps)


def root(x: Entries, scale: Entries) -> Entries:
    """`sqrt(x)`, and zero with zero slope where `x` vanishes beside `scale`, or is negative by rounding."""
    x = jnp.asarray(x)
    positive = x > _tiny(x) ** 2 * scale
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def inverse_root(x: Entries, scale: Entries) -> Entries:
    """`1 / sqrt(x)`, and zero where `x` vanishes beside `scale`: what it multiplies vanishes there."""
    x = jnp.asarray(x)
    positive = x > _tiny(x) * scale
    return jnp.where(positive, 1 / jnp.sqrt(jnp.where(positive, x, 1)), 0)


def arcsin(r: Entries) -> Entries:
    """Arcsine of a correlation, clipped to -1 ... 1; with zero slope at the ends, where the true one is infinite."""
    inside = jnp.abs(r) < 1
    return jnp.where(inside, jnp.arcsin(jnp.where(inside, r, 0)), jnp.sign(r) * jnp.pi / 2)


def partial(C: Covariance, at: int, i: int, j: int, scale: Sequence[Entries] | None = None) -> Entries:
    """Covariance of fields `i` and `j` given that field `at` is zero."""
    variance = C[at][at] if scale is None else scale[at]
    return C[i][j] - C[i][at] * C[at][j] * inverse_root(C[at][at], variance) ** 2


def orthant2(
    a: Entries, ab: Entries, b: Entries, scale_a: Entries | None = None, scale_b: Entries | None = None
) -> Entries:
    """`P(x0 > 0, x1 > 0) = 1/4 + asin(correlation) / 2 pi`; a field without variance counts as independent."""
    scale_a, scale_b = a if scale_a is None else scale_a, b if scale_b is None else scale_b
    return 0.25 + arcsin(ab * inverse_root(a, scale_a) * inverse_root(b, scale_b)) / (2 * jnp.pi)


def orthant4(C: Covariance) -> Entries:
    """`P(x0, x1, x2, x3 > 0)`.

    The correlations of the last field are turned on along `s = sin(phi)`, `0 <= phi <= pi/2`; the derivative of the
    probability with respect to a correlation is the density of two fields at zero times an orthant probability of the
    other two (Plackett 1954).
    """
    unit = [inverse_root(C[i][i], C[i][i]) for i in range(4)]
    r = [[C[i][j] * unit[i] * unit[j] for j in range(4)] for i in range(4)]
    three = 0.125 + (arcsin(r[0][1]) + arcsin(r[0][2]) + arcsin(r[1][2])) / (4 * jnp.pi)
    straight = arcsin(r[0][3]) + arcsin(r[1][3]) + arcsin(r[2][3])
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    angles, weights = (nodes + 1) * np.pi / 4, weights * np.pi / 4
    dtype = jnp.result_type(r[0][3])
    table = jnp.asarray(np.stack([np.sin(angles), np.cos(angles), weights], axis=1), dtype)

    def add(total: Entries, node: Entries) -> tuple[Entries, None]:
        sine, cosine, weight = node
        return total + weight * sum(_slope(r, i, sine, cosine) for i in range(3)), None

    shape = jnp.broadcast_shapes(*(jnp.shape(r[i][j]) for i in range(4) for j in range(i)))
    integral, _ = jax.lax.scan(add, jnp.zeros(shape, dtype), table)
    return three / 2 + straight / (8 * jnp.pi) + integral / (4 * jnp.pi**2)


def _slope(r: Covariance, i: int, sine: Entries, cosine: Entries) -> Entries:
    """What the correlation of fields `i` and 3 adds, with all correlations of field 3 multiplied by `sine`."""
    j, k = (n for n in range(3) if n != i)
    left = cosine**2 + sine**2 * (1 - r[i][3]) * (1 + r[i][3])
    # What is left of fields j and k given i and 3, each up to a factor `left`; in this form nothing large cancels.
    own_j, own_k = r[j][3] - r[i][3] * r[i][j], r[k][3] - r[i][3] * r[i][k]
    var_j = left * (1 - r[i][j]) * (1 + r[i][j]) - (sine * own_j) ** 2
    var_k = left * (1 - r[i][k]) * (1 + r[i][k]) - (sine * own_k) ** 2
    cov = left * (r[j][k] - r[i][j] * r[i][k]) - sine**2 * own_j * own_k
    ratio = cov * inverse_root(var_j, left) * inverse_root(var_k, left)
    return r[i][3] * cosine / jnp.sqrt(left) * arcsin(ratio)
