"""ReLU `s(x) = max(x, 0)`: closed forms for two and three fields, one quadrature for four."""

import jax.numpy as jnp

from gradflow.problems.activations._base import AbstractActivation, Covariance, Entries
from gradflow.problems.activations._orthant import inverse_root, loosened, orthant2, orthant4, partial, root


class ReLU(AbstractActivation):
    """`s(x) = max(x, 0)`, with `s'(x)` the step function.

    The expectation over four fields comes down to the probability that all four are positive, by integration by parts,
    and that is an integral along one line (Plackett 1954), taken by a Gauss-Legendre rule. Expectations of ReLU have
    infinite slopes where two fields coincide; there the slope is replaced by zero, and a covariance that is singular
    up to rounding gives values good to about 1e-6.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> float(gf.problems.activations.ReLU().i2(jnp.ones((2, 2))))
    0.5
    """

    def __call__(self, x: Entries) -> Entries:
        return jnp.maximum(x, 0)

    def derivative(self, x: Entries) -> Entries:
        return (x > 0).astype(x.dtype)

    def i2(self, C: Covariance) -> Entries:
        return root(C[0][0] * C[1][1] - C[0][1] ** 2, C[0][0] * C[1][1]) / (2 * jnp.pi) + C[0][1] * self.j2(C)

    def j2(self, C: Covariance) -> Entries:
        return orthant2(C[0][0], C[0][1], C[1][1])

    def k2(self, C: Covariance) -> Entries:
        spread = root(C[0][0] * C[1][1] - C[0][1] ** 2, C[0][0] * C[1][1])
        return spread * inverse_root(C[0][0], C[0][0]) ** 2 / (2 * jnp.pi)

    @property
    def scratch(self) -> int:
        return 64

    def i4(self, C: Covariance) -> Entries:
        # A step function that comes twice is one: its double is made independent, and worth one half.
        apart = 1 - C[0][1] * inverse_root(C[0][0], C[0][0]) * inverse_root(C[1][1], C[1][1])
        twice = apart <= 16 * float(jnp.finfo(apart.dtype).eps)
        step = [jnp.where(twice, 0, C[1][j]) for j in (0, 2, 3)]
        second = (step[0], C[1][1], step[1], step[2])
        third, fourth = (C[2][0], step[1], C[2][2], C[2][3]), (C[3][0], step[2], C[3][2], C[3][3])
        C = loosened(((C[0][0], step[0], C[0][2], C[0][3]), second, third, fourth))
        # By parts in x2: E s'(x0) s'(x1) [x2 > 0] x2 s(x3), each derivative a delta function on one of the fields.
        total = C[2][3] * orthant4(C)
        for at, others in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
            total = total + C[at][2] * _pinned(C, at, others)
        return jnp.where(twice, 2, 1) * total


def _pinned(C: Covariance, at: int, others: tuple[int, int]) -> Entries:
    """`E delta(x_at) [x_b > 0] [x_c > 0] max(x3, 0)`, once more by parts, in `x3`."""
    order = (*others, 3)
    K = [[partial(C, at, i, j) for j in order] for i in order]
    scale = [C[i][i] for i in order]
    total = 0.0
    for b in range(3):
        c, d = (i for i in range(3) if i != b)
        variance, across, other = (partial(K, b, i, j, scale) for i, j in ((c, c), (c, d), (d, d)))
        density = inverse_root(K[b][b], scale[b]) / jnp.sqrt(2 * jnp.pi)
        total = total + K[2][b] * density * orthant2(variance, across, other, scale[c], scale[d])
    return total * inverse_root(C[at][at], C[at][at]) / jnp.sqrt(2 * jnp.pi)
