"""Any activation: Gaussian expectations by quadrature, to an accuracy."""

import itertools
import warnings
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradflow._checks import check_callable, check_positive, fail
from gradflow.problems.activations._base import BLOCK, AbstractActivation, Covariance, Entries
from gradflow.problems.activations._gaussian_rule import Rule, at_kinks, choose, difference, interpolate

Powers = tuple[tuple[int, int], ...]
"""For each of some different fields how often `s'` and `s` of it are factors of an integrand."""


class Quadrature(AbstractActivation):
    """An activation given as an elementwise function, differentiable by JAX.

    Expectations are sums over equidistant nodes, as many in every field as the accuracy takes at the largest variance:
    with tanh and the defaults 96, with softplus 32. Over two fields these are `nodes^2` points, over four
    `nodes^3`: the last field is integrated out into a table first. Fields that coincide are integrated over once. So
    one student and one teacher take sums over `nodes^2` points, and of all expectations for `p` students among `n`
    fields in all only `p (p - 1) (n - 2) (n - 3) / 4` take `nodes^3`: a few units at the most.

    Where there are kinks, expectations of `s''` are integrated by parts, so that they count as what they are. The error
    falls only like one over the number of nodes then: such activations get 256, and a warning with the accuracy that
    they reach.

    A run of `gradflow.OrderParameterFlow` estimates the error at the variances it visits, in `Solution.errors`, and
    warns where it exceeds the accuracy.

    **Arguments**: `fn`: elementwise function; `accuracy`: error of each expectation, relative to that over coincident
    fields; `variance`: largest variance of a field at which it is held. `promised`: the accuracy, or what is reached.

    **Raises** `ValueError` for something that cannot be called, or not elementwise, for an accuracy or variance that is
    not positive, and for functions that jump, or without finite moments, such as `exp(x^2)`.

    Source: Trefethen and Weideman (2014), doi 10.1137/130932132, for the rule.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> cubic = gf.problems.activations.Quadrature(lambda x: x**3)
    >>> round(float(cubic.i2(jnp.ones((2, 2)))), 3)  # the sixth moment
    15.0
    """

    fn: Callable[[Array], Array]
    accuracy: float = eqx.field(static=True)
    variance: float = eqx.field(static=True)
    rule: Rule = eqx.field(static=True)
    promised: float = eqx.field(static=True)
    nonsmooth: bool = eqx.field(static=True)

    def __init__(self, fn: Callable[[Array], Array], accuracy: float = 1e-5, variance: float = 9.0):
        check_callable("fn", fn, "fn(array), elementwise")
        check_positive("accuracy", accuracy, "For instance 1e-5.")
        check_positive("variance", variance, "It is the largest that a field will have.")
        if jax.eval_shape(fn, jax.ShapeDtypeStruct((3,), jnp.result_type(float))).shape != (3,):
            raise fail("fn", "be elementwise", "not: three numbers give another shape", "For instance jax.numpy.tanh.")
        self.fn, self.accuracy, self.variance = fn, float(accuracy), float(variance)
        chosen = choose(fn, self.accuracy, self.variance)
        if chosen is None:
            actual = f"not finite within 30 standard deviations at variance {self.variance:g}"
            raise fail("fn", "be finite, with its moments", actual, "Does it overflow? Give a smaller variance=.")
        if chosen.jumps:
            raise fail("fn", "be continuous", "not: its derivative misses a jump", "Smooth it.")
        self.rule, self.nonsmooth = chosen.rule, chosen.nonsmooth
        self.promised = max(self.accuracy, chosen.error)
        if chosen.error > self.accuracy:
            warnings.warn(
                f"Expectations of this activation are good to {chosen.error:.0e} at variance {self.variance:g}, with"
                f" {self.rule.nodes} nodes per field, and not to {self.accuracy:.0e}: has it kinks? Smooth it, give a"
                " smaller variance=, or ask for less with accuracy=.",
                stacklevel=2,
            )

    def __call__(self, x: Entries) -> Entries:
        return self.fn(x)

    def error(self, variances: Entries) -> Float[Array, ""]:
        error = difference(self, self.derivative, self.rule, variances)
        return jnp.maximum(error, at_kinks(self.rule)) if self.nonsmooth else error

    def complaint(self, error: float) -> str:
        if error <= self.promised:
            return ""
        return (
            f"Expectations of the activation were off by {error:.0e} in this run, at the largest variance it visited."
            f" They are good to {self.promised:.0e} up to variance {self.variance:g}: give the largest diagonal entry"
            f" of Q and P to gradflow.problems.activations.Quadrature(fn, accuracy={self.accuracy:g}, variance=...)."
        )

    def i2(self, C: Covariance) -> Entries:
        return self._pair(C, self, self)

    def j2(self, C: Covariance) -> Entries:
        return self._pair(C, self.derivative, self.derivative)

    def k2(self, C: Covariance) -> Entries:
        if not self.nonsmooth:
            return self._pair(C, self._second, self)
        # With x0 = a z0 and x1 = b z0 + c z1: E z0 s'(x0) s(x1) = a E s''(x0) s(x1) + b E s'(x0) s'(x1).
        (a, _), (b, _) = ((entry[..., 0] for entry in row) for row in _factor(C, 2))
        moves = a > 0
        parts = self._pair(C, self.derivative, self, moment=True) - b * self.j2(C)
        still = self._second(jnp.zeros_like(a)) * self._pair(C, jnp.ones_like, self)
        return jnp.where(moves, parts / jnp.where(moves, a, 1), still)

    def _second(self, x: Entries) -> Entries:
        return jax.jvp(self.derivative, (x,), (jnp.ones_like(x),))[1]

    def i4(self, C: Covariance) -> Entries:
        return self._expect(((1, 0), (1, 0), (0, 1), (0, 1)), C)

    def squares(
        self, C: Float[Array, "n n"], c: Float[Array, " n"], first: np.ndarray, second: np.ndarray
    ) -> Float[Array, " pairs"]:
        total = jnp.zeros(first.size, C.dtype)
        for powers, terms in _by_powers(C.shape[0], first, second).items():
            fields, pair, a, b = terms[:, :-3], *terms[:, -3:].T
            some = self.rule.nodes ** max(0, len(powers) - 2)

            def one(index: Array, powers: Powers = powers) -> Array:
                entries = C[index[:, None], index[None, :]]
                return self._expect(powers, [[entry[None] for entry in row] for row in entries])[0]

            values = jax.lax.map(one, jnp.asarray(fields), batch_size=max(1, min(len(terms), BLOCK // (8 * some))))
            total = total.at[pair].add(np.where(a == b, 1, 2).astype(c.dtype) * c[a] * c[b] * values)
        return total

    def expectations(self, students: int, teachers: int) -> int:
        # Points of the sums: one costs about as much as an expectation in closed form.
        n, nodes = students + teachers, self.rule.nodes
        pairs = students * (students - 1) // 2
        num_products = students * (students + 1) // 2 * n * (n + 1) // 2
        return pairs * (n - 2) * (n - 3) // 2 * nodes**3 + num_products * self.rule.finer * nodes**2

    def _factors(self, powers: tuple[int, int]) -> Callable[[Array], Array]:
        """`s'^m s^n`."""
        slopes, values = powers

        def product(x: Entries) -> Entries:
            factor = jnp.ones_like(x)
            if slopes:
                factor = self.derivative(x) ** slopes
            return factor * self(x) ** values if values else factor

        return product

    def _expect(self, powers: Powers, C: Covariance) -> Entries:
        """The expectation over one to four fields of the product of these factors."""
        fns = [self._factors(power) for power in powers]
        if len(fns) == 1:
            fns.append(jnp.ones_like)
            C = ((C[0][0], jnp.zeros_like(C[0][0])), (jnp.zeros_like(C[0][0]), jnp.zeros_like(C[0][0])))
        if len(fns) == 2:
            return self._pair(C, fns[0], fns[1])
        return self._many(C, fns)

    def _pair(
        self, C: Covariance, first: Callable[[Array], Array], second: Callable[[Array], Array], moment: bool = False
    ) -> Entries:
        """`E f(x0) g(x1)`; with `moment`, times the standardised first field."""
        L = _factor(C, 2)
        z, w = self.rule.points(L[0][0].dtype)
        across = L[1][1] * _last(z, L[0][0])

        def add(total: Entries, node: tuple[Entries, Entries]) -> tuple[Entries, None]:
            x, weight = node
            inner = second(L[1][0] * x + across) @ w
            return total + weight * first(L[0][0] * x)[..., 0] * inner, None

        return jax.lax.scan(add, jnp.zeros(L[0][0].shape[:-1], w.dtype), (z, w * z if moment else w))[0]

    def _many(self, C: Covariance, fns: list[Callable[[Array], Array]]) -> Entries:
        """The same over three or four fields; the last is integrated out into a table over the mean it is given."""
        size = len(fns)
        L = _factor(C, size)
        shape = L[0][0].shape[:-1]
        L = [[entry.reshape(-1, 1) for entry in row] for row in L]
        z, w = self.rule.points(L[0][0].dtype)
        wide = self.rule.extent * jnp.sqrt(sum((entry**2 for entry in L[-1][:-1]), jnp.zeros_like(L[0][0])))
        points = self.rule.finer * self.rule.nodes
        spacing = 2 * wide / (points - 1)
        means = spacing * jnp.arange(points, dtype=w.dtype)[None] - wide
        # A sum over nodes one by one, for the table has one row per expectation.
        table = jax.lax.scan(
            lambda total, node: (total + node[1] * fns[-1](means + L[-1][-1] * node[0]), None),
            jnp.zeros_like(means),
            (z, w),
        )[0]
        others = np.array(list(itertools.product(range(self.rule.nodes), repeat=size - 2)))
        squared = np.asarray(self.rule.spacing * (others + 0.5) - self.rule.extent) ** 2
        others = others[np.sum(squared, axis=1) <= self.rule.extent**2]
        inner, inner_weights = z[others][None], jnp.prod(w[others], axis=1)[None]

        def add(total: Entries, node: tuple[Entries, Entries]) -> tuple[Entries, None]:
            x, weight = node
            product = inner_weights
            for row, fn in enumerate(fns[:-1]):
                at = L[row][0] * x + sum((L[row][m] * inner[..., m - 1] for m in range(1, row + 1)), 0.0)
                product = product * fn(at)
            mean = L[-1][0] * x + sum((L[-1][m] * inner[..., m - 1] for m in range(1, size - 1)), 0.0)
            value = jnp.sum(product * interpolate(table, -wide, spacing, mean), axis=-1)
            return total + weight * value, None

        return jax.lax.scan(add, jnp.zeros(means.shape[0], w.dtype), (z, w))[0].reshape(shape)


def _by_powers(n: int, first: np.ndarray, second: np.ndarray) -> dict[Powers, np.ndarray]:
    """All terms `s'(x_j) s'(x_l) s(x_a) s(x_b)` with `a <= b`, by the powers in which their different fields come in.

    A row holds the fields, the pair `j, l` it belongs to, and `a, b`. Fields with `s'` come first.
    """
    indices: dict[Powers, list[tuple[int, ...]]] = {}
    for pair, (j, m) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        for a, b in itertools.combinations_with_replacement(range(n), 2):
            powers = {field: ((j, m).count(field), (a, b).count(field)) for field in (j, m, a, b)}
            order = sorted(powers, key=lambda field: powers[field], reverse=True)
            indices.setdefault(tuple(powers[field] for field in order), []).append((*order, pair, a, b))
    return {powers: np.array(rows) for powers, rows in indices.items()}


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
