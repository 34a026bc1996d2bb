"""What a step along the edge of stability needs at a point: curvature, its third derivative, the preconditioner."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Scalar

from gradflow._tree import flatten
from gradflow.protocols import UpdateForm
from gradflow.solvers._complementarity import pairs

Gradient = Callable[[Float[Array, " size"]], Float[Array, " size"]]


class Preconditioner(eqx.Module):
    """`P = D / eta` of a rule, and its memory as one vector, one number, or none; time is counted in steps `k`."""

    form: UpdateForm

    def flat(self, memory: PyTree, like: Float[Array, " size"]) -> Array:
        """The memory as an array, zero where the rule has none."""
        if self.form.memory is None:
            return jnp.zeros((), like.dtype)
        return memory if self.form.memory.scalar else flatten(memory)[0]

    def at(self, memory: Array, k: Scalar) -> Array:
        """`P`, an entry for each parameter or one for all."""
        eta = self.form.learning_rate.astype(memory.dtype)
        if self.form.memory is None:
            return 1 / eta
        return self.form.memory.scale(memory, k) / eta

    def slope(self, memory: Array, k: Scalar) -> Array:
        """The derivative of `P` in the memory."""
        form = self.form.memory
        if form is None:
            return jnp.zeros_like(memory)
        c, eta = form.correction(k).astype(memory.dtype), self.form.learning_rate.astype(memory.dtype)
        return 0.5 * c * inverse(jnp.sqrt(c * memory + form.inside.astype(memory.dtype))) / eta

    def advanced(self, memory: Array, h: Scalar, squares: Array) -> Array:
        """The memory after `h` steps with these squares: exact in the linear term to second order, and stable."""
        if self.form.memory is None:
            return memory
        half = 0.5 * h * self.form.memory.pace().astype(memory.dtype)
        return memory + 2 * half / (1 + half) * (squares - memory)

    def weight(self, h: Scalar, dtype: jnp.dtype) -> Scalar:
        """How much of the squares enters the memory in `h` steps."""
        if self.form.memory is None:
            return jnp.zeros((), dtype)
        half = 0.5 * h * self.form.memory.pace().astype(dtype)
        return 2 * half / (1 + half)

    def squares(self, gradient: Float[Array, " size"]) -> Array:
        if self.form.memory is None:
            return jnp.zeros((), gradient.dtype)
        return self.form.memory.squares(gradient)

    def spread(self, p: Array, vectors: Float[Array, "k size"], x: Float[Array, "k k"]) -> Array:
        """What the oscillation adds to the squares: `diag(H Sigma H)` or its trace, with `H U = 2 P U`."""
        if self.form.memory is None:
            return jnp.zeros((), p.dtype)
        each = 4 * p**2 * jnp.sum(vectors * (x @ vectors), axis=0)
        return jnp.sum(each) if self.form.memory.scalar else each


def inverse(p: Array) -> Array:
    """`1 / p`; zero where `p` is: parameters that have never had a gradient do not move."""
    return jnp.where(p > 0, 1 / jnp.where(p > 0, p, 1), 0)


def rowwise(p: Array) -> Array:
    """An entry for each parameter, or one for all, as it multiplies rows of parameters."""
    return p[None] if p.ndim else p


class Curvature(eqx.Module):
    """`H U`, and `F_ij = T[u_i, u_j]` for the pairs of critical directions, packed as `pairs` orders them."""

    mapped: Float[Array, "k size"]
    thirds: Float[Array, "pairs size"]
    evaluations: Int[Array, ""]
    products: Int[Array, ""]


def curvature(
    gradient: Gradient,
    w: Float[Array, " size"],
    g: Float[Array, " size"],
    u: Float[Array, "k size"],
    critical: Int[Array, ""],
    used: Int[Array, ""],
) -> Curvature:
    """The curvature at `w`, where the gradient is `g`, along the first `used` rows, of which some are `critical`.

    In float64 by differences, two gradients for each row and for each pair: an error of about `eps^(1/2)`. In float32
    that would be useless, and forward mode is taken twice.
    """
    k = u.shape[0]
    exact = jnp.finfo(w.dtype).bits < 64
    size = jnp.linalg.norm(w)
    reach = jnp.finfo(w.dtype).eps ** 0.25 * jnp.where(size > 0, size, 1)
    rows, columns = pairs(k)
    number = critical * (critical + 1) // 2

    def both(v: Array) -> tuple[Array, Array]:
        """`H v` and `T[v, v]`."""
        if exact:
            return jax.jvp(lambda x: jax.jvp(gradient, (x,), (v,))[1], (w,), (v,))
        length = jnp.linalg.norm(v)
        step = reach / jnp.where(length > 0, length, 1)
        ahead, behind = gradient(w + step * v), gradient(w - step * v)
        return (ahead - behind) / (2 * step), (ahead + behind - 2 * g) / step**2

    def pair(p: Int[ArrayLike, ""], rows_so_far: tuple[Array, Array]) -> tuple[Array, Array]:
        mapped, squares = rows_so_far
        i, j = rows[p], columns[p]
        first, second = both(jnp.where(i == j, u[i], u[i] + u[j]))
        return mapped.at[i].set(jnp.where(i == j, first, mapped[i])), squares.at[p].set(second)

    def alone(i: Int[ArrayLike, ""], mapped: Array) -> Array:
        return mapped.at[i].set(jax.jvp(gradient, (w,), (u[i],))[1])

    start = jnp.zeros_like(u), jnp.zeros((rows.size, w.size), w.dtype)
    mapped, squares = jax.lax.fori_loop(0, number, pair, start)
    mapped = jax.lax.fori_loop(critical, used, alone, mapped)
    diagonal = jnp.asarray([j * (j + 1) // 2 + j for j in range(k)])  # of the pair (j, j)
    mixed = 0.5 * (squares - squares[diagonal[rows]] - squares[diagonal[columns]])
    thirds = jnp.where((rows == columns)[:, None], squares, mixed)
    thirds = jnp.where((columns < critical)[:, None], thirds, 0)
    num_alone = used - critical
    return Curvature(mapped, thirds, jnp.where(exact, 0, 2 * number), num_alone + jnp.where(exact, 2 * number, 0))


def unpacked(packed: Float[Array, " pairs"], k: int) -> Float[Array, "k k"]:
    """The symmetric matrix of these entries."""
    return packed[_places(k)]


def gram(packed: Float[Array, "pairs pairs"], k: int) -> Float[Array, "k k k k"]:
    """The map of symmetric matrices with these entries."""
    places = _places(k).reshape(-1)
    return packed[places][:, places].reshape(k, k, k, k)


def _places(k: int) -> Int[Array, "k k"]:
    return jnp.asarray([[max(i, j) * (max(i, j) + 1) // 2 + min(i, j) for j in range(k)] for i in range(k)])


def chosen_block(matrix: Float[Array, "k k"], inside: Bool[Array, " k"], outside: float) -> Float[Array, "k k"]:
    """The block of those inside, with a number on the rest of the diagonal."""
    block = jnp.where(inside[:, None] & inside[None], matrix, 0)
    return block + jnp.diag(jnp.where(inside, 0, outside).astype(matrix.dtype))
