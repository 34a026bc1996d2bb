"""What the theory of wide inputs asks of an activation: `E s s`, `E s' s'`, `E s'' s` and `E s' s' s s`."""

import abc
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Entries = Float[Array, "..."]
Covariance = Entries | Sequence[Sequence[Entries]]
"""Covariance of a few Gaussian fields: `C[i][j]` is the entry for fields `i` and `j`, counted from zero. Entries are
arrays that broadcast against one another, so that one call serves a whole table of units."""

BLOCK = 2**24
"""Numbers that the sums over expectations over four fields hold at once, 128 MiB in float64."""


class AbstractActivation(eqx.Module):
    """An activation `s` and its expectations over centred Gaussian fields `x` of covariance `C`.

        i2 = E s(x0) s(x1)      j2 = E s'(x0) s'(x1)      k2 = E s''(x0) s(x1)
        i3 = E s'(x0) x1 s(x2)      i4 = E s'(x0) s'(x1) s(x2) s(x3)

    Integration by parts reduces `i3` to the functions of two fields: `i3 = C01 k2(x0, x2) + C12 j2(x0, x2)`.
    Covariances may be singular; coincident fields are allowed.
    """

    @abc.abstractmethod
    def __call__(self, x: Entries) -> Entries:
        """The activation itself, elementwise."""

    def derivative(self, x: Entries) -> Entries:
        """`s'(x)`, elementwise."""
        return jax.jvp(self.__call__, (x,), (jnp.ones_like(x),))[1]

    @abc.abstractmethod
    def i2(self, C: Covariance) -> Entries:
        """`E s(x0) s(x1)`."""

    @abc.abstractmethod
    def j2(self, C: Covariance) -> Entries:
        """`E s'(x0) s'(x1)`."""

    @abc.abstractmethod
    def k2(self, C: Covariance) -> Entries:
        """`E s''(x0) s(x1)`, with the derivative in the sense of distributions."""

    def i3(self, C: Covariance) -> Entries:
        """`E s'(x0) x1 s(x2)`."""
        outer = ((C[0][0], C[0][2]), (C[0][2], C[2][2]))
        return C[0][1] * self.k2(outer) + C[1][2] * self.j2(outer)

    @abc.abstractmethod
    def i4(self, C: Covariance) -> Entries:
        """`E s'(x0) s'(x1) s(x2) s(x3)`."""

    def error(self, variances: Entries) -> Float[Array, ""] | None:
        """Estimated relative error of expectations over fields of these variances; `None` where they are exact."""
        return None

    def complaint(self, error: float) -> str:
        """What to say of such an error; nothing where it is as promised."""
        return ""

    @property
    def scratch(self) -> int:
        """Numbers that one expectation over four fields holds while it is computed."""
        return 8

    def squares(
        self, C: Float[Array, "n n"], c: Float[Array, " n"], first: np.ndarray, second: np.ndarray
    ) -> Float[Array, " pairs"]:
        """`E s'(x_j) s'(x_l) (sum_a c_a s(x_a))^2` for the pairs `j, l` of `first` and `second`.

        A sum of `n (n + 1) / 2` expectations over four fields for every pair; memory stays bounded, for pairs are
        taken some at a time.
        """
        a, b = (index[None, :] for index in np.triu_indices(C.shape[0]))
        diagonal = jnp.diagonal(C)
        weights = c[a[0]] * c[b[0]] * np.where(a[0] == b[0], 1, 2).astype(c.dtype)

        def some(j: Array, k: Array) -> Array:
            j, k = j[:, None], k[:, None]
            ja, jb, ka, kb, jk, ab = C[j, a], C[j, b], C[k, a], C[k, b], C[j, k], C[a, b]
            entries = (
                (diagonal[j], jk, ja, jb),
                (jk, diagonal[k], ka, kb),
                (ja, ka, diagonal[a], ab),
                (jb, kb, ab, diagonal[b]),
            )
            return self.i4(entries) @ weights

        size, pairs = max(1, BLOCK // (a.size * self.scratch)), first.size
        if size >= pairs:
            return some(jnp.asarray(first), jnp.asarray(second))
        # The last block is filled up with repetitions of the last pair.
        rows = np.minimum(np.arange(-(-pairs // size) * size), pairs - 1).reshape(-1, size)
        blocks = jax.lax.map(lambda pair: some(*pair), (jnp.asarray(first[rows]), jnp.asarray(second[rows])))
        return blocks.reshape(-1)[:pairs]

    def expectations(self, students: int, teachers: int) -> int:
        """Expectations over four fields that the sums over all pairs of students take."""
        n = students + teachers
        return students * (students + 1) // 2 * (n * (n + 1) // 2)
