"""Any smooth activation: Gaussian expectations by tensor products of Gauss-Hermite rules."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gradflow._checks import check_callable, check_count
from gradflow.problems.activations._base import AbstractActivation, Covariance, Entries


class Quadrature(AbstractActivation):
    """An activation given as an elementwise function, twice differentiable by JAX.

    Expectations over two and four fields are sums over `nodes^2` and `nodes^4` points. For functions as smooth as tanh
    on fields of unit variance 16 nodes give five digits; kinks converge slowly, and a jump in `s'` is not seen by
    `k2` at all. The cost of the full order-parameter system is that of `p^2 (p + k)^2 / 4` expectations over four
    fields: a few units at the most.

    **Arguments**: `fn`: elementwise function; `nodes`: points per field.

    **Raises** `ValueError` for something that cannot be called, and for less than two nodes.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> cubic = gf.problems.activations.Quadrature(lambda x: x**3, nodes=8)
    >>> round(float(cubic.i2(jnp.ones((2, 2)))), 6)  # the sixth moment
    15.0
    """

    fn: Callable[[Any], Any]
    nodes: int = eqx.field(static=True)

    def __init__(self, fn: Any, nodes: int = 16):
        check_callable("fn", fn, "fn(array), elementwise")
        check_count("nodes", nodes, least=2)
        self.fn, self.nodes = fn, nodes

    def __call__(self, x: Entries) -> Entries:
        return self.fn(x)

    def second(self, x: Entries) -> Entries:
        """`s''(x)`, elementwise."""
        return jax.jvp(self.derivative, (x,), (jnp.ones_like(x),))[1]

    @property
    def scratch(self) -> int:
        return 4 * self.nodes**2

    def i2(self, C: Covariance) -> Entries:
        return self._pair(C, self, self)

    def j2(self, C: Covariance) -> Entries:
        return self._pair(C, self.derivative, self.derivative)

    def k2(self, C: Covariance) -> Entries:
        return self._pair(C, self.second, self)

    def _pair(self, C: Covariance, first: Callable[[Any], Any], second: Callable[[Any], Any]) -> Entries:
        L = _factor(C, 2)
        nodes, w = _rule(self.nodes, L[0][0].dtype)
        z = _last(nodes, L[0][0])

        def add(total: Entries, node: tuple[Entries, Entries]) -> tuple[Entries, None]:
            x, weight = node
            inner = second(L[1][0] * x + L[1][1] * z) @ w
            return total + weight * first(L[0][0] * x)[..., 0] * inner, None

        return jax.lax.scan(add, jnp.zeros(L[0][0].shape[:-1], w.dtype), (nodes, w))[0]

    def i4(self, C: Covariance) -> Entries:
        L = _factor(C, 4)
        nodes, w = _rule(self.nodes, L[0][0].dtype)
        grid = jnp.stack([jnp.repeat(nodes, nodes.size), jnp.tile(nodes, nodes.size)], axis=1)
        weights = jnp.repeat(w, w.size) * jnp.tile(w, w.size)
        z = _last(nodes, L[0][0])
        across = (L[3][3] * z)[..., None, :]

        def add(total: Entries, node: tuple[Entries, Entries]) -> tuple[Entries, None]:
            (x, y), weight = node
            third = self(L[2][0] * x + L[2][1] * y + L[2][2] * z)
            along = (L[3][0] * x + L[3][1] * y + L[3][2] * z)[..., None]
            fourth = self(along + across) @ w
            slopes = self.derivative(L[0][0] * x) * self.derivative(L[1][0] * x + L[1][1] * y)
            return total + weight * slopes[..., 0] * ((third * fourth) @ w), None

        return jax.lax.scan(add, jnp.zeros(L[0][0].shape[:-1], w.dtype), (grid, weights))[0]


def _rule(nodes: int, dtype: Any) -> tuple[Entries, Entries]:
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    return jnp.asarray(z, dtype), jnp.asarray(w / np.sqrt(2 * np.pi), dtype)


def _last(nodes: Entries, like: Entries) -> Entries:
    """The nodes along the last axis of an array of that many axes."""
    return nodes.reshape((1,) * (like.ndim - 1) + (-1,))


def _factor(C: Covariance, size: int) -> list[list[Entries]]:
    """Entries of the Cholesky factor, each with one more axis; a direction without variance gets a column of zeros."""
    entries = [jnp.asarray(C[i][j]) for i in range(size) for j in range(size)]
    shape = jnp.broadcast_shapes(*(entry.shape for entry in entries))
    full = [jnp.broadcast_to(entry, shape)[..., None] for entry in entries]
    A = [[full[size * i + j] for j in range(size)] for i in range(size)]
    zero = jnp.zeros_like(full[0])
    L = [[zero] * size for _ in range(size)]
    for j in range(size):
        left = A[j][j] - sum((L[j][n] ** 2 for n in range(j)), zero)
        positive = left > 64 * float(jnp.finfo(left.dtype).eps) * A[j][j]
        pivot = jnp.sqrt(jnp.where(positive, left, 1))
        L[j][j] = jnp.where(positive, pivot, 0)
        for i in range(j + 1, size):
            covered = sum((L[i][n] * L[j][n] for n in range(j)), zero)
            L[i][j] = jnp.where(positive, (A[i][j] - covered) / pivot, 0)
    return L
