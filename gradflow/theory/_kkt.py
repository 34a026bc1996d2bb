"""KKT points of the neural correlation function on the unit sphere, by projected ascent from many random starts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from gradflow._checks import check_count, fail
from gradflow._tree import full_precision, join, split
from gradflow.problems import NeuralCorrelation


class KKTPoints(NamedTuple):
    """KKT points, best first: directions that a network may take while it is small.

    - `directions (k, size)`: unit vectors; `params(i)`: one of them as parameters.
    - `values (k,)`: `N`; only non-negative ones are listed. `found (k,)`: the starts that led there.
    - `residuals (k,)`: `|grad N - degree N u|`. At a point on a kink of ReLU it does not vanish, for `grad N` jumps
      there: `settled` tells that the ascent came to rest all the same.
    - `curvatures (k,)`: the largest tangential eigenvalue `mu` of the Hessian of `N`; `rates = degree N - mu`, at which
      directions nearby converge to the point. `kinds`: `"maximum"` for a positive rate, `"saddle"` for a negative one,
      `"degenerate"` for zero: then there is a family of such points, and which one is reached the start decides.
    """

    directions: Float[np.ndarray, "k size"]
    values: Float[np.ndarray, " k"]
    found: Any
    residuals: Float[np.ndarray, " k"]
    settled: Any
    curvatures: Float[np.ndarray, " k"]
    rates: Float[np.ndarray, " k"]
    kinds: tuple[str, ...]
    model: PyTree

    def params(self, index: int = 0) -> PyTree:
        """The point as parameters, of length one."""
        trainable, frozen = split(self.model)
        _, unflatten = jax.flatten_util.ravel_pytree(trainable)
        return join(unflatten(jnp.asarray(self.directions[index])), frozen)

    @property
    def ties(self) -> int:
        """Points that share the largest value, to a millionth; more than one, and the first feature is not unique."""
        return int(np.sum(self.values >= self.values[0] * (1 - 1e-6)))


def kkt_points(
    correlation: NeuralCorrelation,
    model: PyTree,
    *,
    starts: int = 64,
    iterations: int = 400,
    tolerance: float = 1e-4,
    key: Any = None,
) -> KKTPoints:
    """The KKT points that ascent of `N` on the unit sphere finds, with `N >= 0`.

    Gradient ascent with steps that grow on success and shrink on failure, then Newton's method on `grad N = degree N u`
    where that lowers the residual. Minima and most saddles of `N` on the sphere are not found; flows do not go there.

    **Arguments**

    - `correlation`: `gradflow.NeuralCorrelation(problem)`, or that of a saddle. It may be called with any number of
      neurons: with one, the points are the features themselves; a wide network has families of points, made of copies
      of one neuron, which are reported as `"degenerate"`.
    - `model`: parameters of the kind wanted, such as `TwoLayer(in_size, 1, key=key)`; only shapes count.
    - `starts`, `iterations`: of the ascent. `tolerance`: distance below which two points count as one.
    - `key`: of the random starts.

    **Raises** `ValueError` for a correlation that is positive nowhere.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([3.0, -1.0]), gf.losses.square, reduction="sum")
    >>> neuron = gf.models.TwoLayer(2, 1, key=jax.random.key(0))
    >>> points = gf.theory.kkt_points(gf.NeuralCorrelation(problem), neuron)
    >>> [round(float(value), 4) for value in points.values]  # relu: |y| / 2 for each sign
    [1.5, 0.5]
    """
    check_count("starts", starts)
    check_count("iterations", iterations)
    trainable, frozen = split(model)
    flat = jax.flatten_util.ravel_pytree(trainable)[0]
    key = jax.random.key(0) if key is None else key
    drawn = jax.random.normal(key, (starts, flat.size), flat.dtype)
    scale = jnp.linalg.norm(correlation.labels).astype(flat.dtype)
    ends = ascend(WholeCorrelation(correlation, trainable, frozen), drawn, scale, correlation.degree, iterations)
    units, values, residuals, steps, curvatures = (np.asarray(part) for part in ends)
    kept = np.flatnonzero(np.isfinite(values) & (values > 1e-10 * np.max(np.abs(values), initial=0.0)))
    if kept.size == 0:
        raise fail("correlation", "be positive somewhere", f"not in {starts} starts", "Are there starts enough?")
    order, found, groups = kept[np.argsort(-values[kept], kind="stable")], [], []
    for index in order:
        near = [g for g, best in enumerate(groups) if np.linalg.norm(units[best] - units[index]) < tolerance]
        if near:
            found[near[0]] += 1
        else:
            groups.append(index)
            found.append(1)
    chosen = np.array(groups)
    rates = correlation.degree * values[chosen] - curvatures[chosen]
    size = correlation.degree * values[chosen]
    kinds = tuple(
        "degenerate" if abs(r) <= 1e-6 * s else "maximum" if r > 0 else "saddle"
        for r, s in zip(rates, size, strict=True)
    )
    settled = (residuals[chosen] <= 1e-6 * size) | (steps[chosen] < 1e-8)
    return KKTPoints(
        units[chosen],
        values[chosen],
        np.array(found),
        residuals[chosen],
        settled,
        curvatures[chosen],
        rates,
        kinds,
        model,
    )


class WholeCorrelation(eqx.Module):
    """`N` as a function of all parameters as one vector."""

    correlation: NeuralCorrelation
    trainable: PyTree
    frozen: PyTree

    def __call__(self, vector: Array, index: Any) -> Float[Array, ""]:
        _, unflatten = jax.flatten_util.ravel_pytree(self.trainable)
        return self.correlation(join(unflatten(vector), self.frozen))


@eqx.filter_jit
@full_precision
def ascend(
    target: Callable[[Array, Any], Array],
    starts: Float[Array, "starts size"],
    scale: Float[Array, ""],
    degree: int,
    iterations: int,
) -> tuple[Array, Array, Array, Array, Array]:
    """Ends of the ascent of `target(u, index)` on the unit sphere from start `index`.

    Unit vectors, values, residuals, last steps, largest tangential eigenvalues. `scale`: a size of `target`.
    """

    def ends(value: Callable[[Array], Array], start: Array) -> tuple[Array, ...]:
        def tangent(u: Array) -> tuple[Array, Array]:
            n, g = jax.value_and_grad(value)(u)
            return n, g - (g @ u) * u

        def step(_: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
            u, n, g, length = state
            v = u + length * g / scale
            v = v / jnp.linalg.norm(v)
            new, slope = tangent(v)
            better = new >= n
            pick = lambda a, b: jnp.where(better, a, b)  # noqa: E731
            return pick(v, u), pick(new, n), pick(slope, g), jnp.where(better, 2.0, 0.3).astype(u.dtype) * length

        u = start / jnp.linalg.norm(start)
        n, g = tangent(u)
        # The first step is a tenth of a radian, so that the basin of the start is not left.
        first = 0.1 * scale / jnp.maximum(jnp.linalg.norm(g), 1e-30)
        u, n, g, length = jax.lax.fori_loop(0, iterations, step, (u, n, g, first.astype(u.dtype)))
        u = jax.lax.fori_loop(0, 4, lambda _, u: _newton(value, degree, u), u)
        n, g = tangent(u)
        project = jnp.eye(u.size, dtype=u.dtype) - jnp.outer(u, u)
        hessian = project @ jax.hessian(value)(u) @ project
        # The direction u itself is moved out of the way.
        low = 2 * jnp.max(jnp.abs(hessian)) * u.size + scale
        return u, n, jnp.linalg.norm(g), length, jnp.linalg.eigvalsh(hessian - low * jnp.outer(u, u))[-1]

    def one(given: tuple[Array, Array]) -> tuple[Array, ...]:
        start, index = given
        return ends(lambda v: target(v, index), start)

    given = (starts, jnp.arange(starts.shape[0]))
    u, n, residual, length, curvature = jax.lax.map(one, given, batch_size=min(16, starts.shape[0]))
    return u, n, residual, length, curvature


def _newton(value: Any, degree: int, u: Array) -> Array:
    """A step of Newton's method on `grad N(u) = degree N(u) u`, taken where it lowers the residual."""

    def off(v: Array) -> Array:
        g = jax.grad(value)(v)
        return g - (g @ v) * v

    project = jnp.eye(u.size, dtype=u.dtype) - jnp.outer(u, u)
    matrix = project @ jax.hessian(value)(u) @ project - degree * value(u) * project
    moved = u - jnp.linalg.pinv(matrix, rtol=1e-8 if u.dtype == jnp.float64 else 1e-4) @ off(u)
    moved = moved / jnp.linalg.norm(moved)
    better = jnp.linalg.norm(off(moved)) < jnp.linalg.norm(off(u))
    better &= jnp.linalg.norm(moved - u) < 0.1
    return jnp.where(better, moved, u)
