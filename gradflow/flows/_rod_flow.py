"""Rod flow: centre and half-difference of neighbouring iterates of gradient descent."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._tree import scaled_norm
from gradflow.flows._split_flow import (
    AbstractSplitFlow,
    Gradient,
    Vector,
    check_descent,
    iterates_from,
    probe,
    probe_scale,
)


class RodFlow(AbstractSplitFlow):
    """Centre and half-difference of neighbouring iterates, of rank one.

    With `g+- = grad L(c +- d)`, `H+-` the Hessians there,

        eta c' = -(eta/2) (g+ + g-) - (eta^2/8) (H+ + H-) (g+ + g-)
        eta d' = (F n - n (n'F n) / 2) / |d|,    n = d / |d|,    F = (eta^2/4) (g+ g+' + g- g-') - 2 d d'

    A half-difference holds the smooth motion as well as what alternates, of which the larger decides: below the edge
    that is the motion, so that a burst that grows from something small is seen late.

    **Time unit**: `t = k * learning_rate`, where the centre is that of iterate `k` and its neighbours.
    `gradflow.observables.Amplitude` is `d`, without its changing sign.

    **Arguments**: `problem`, a callable `params -> scalar`; `learning_rate`, positive, may be traced. An evaluation
    takes two gradients and two Hessian-vector products, the start two gradients: `c(0) = (3 w_0 + 2 w_1 - w_2) / 4`,
    half a step before the first pair.

    **Raises** `ValueError` for a problem that cannot be called and a learning rate that is not positive.

    Source: rod flow (2026), arXiv 2602.01480, its equations restricted to rank one.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> loss = lambda w: 0.5 * (w[0] + w[1]) * w[0] ** 2 - 0.01 * (w[0] + w[1])
    >>> sol = gf.solve(gf.RodFlow(loss, learning_rate=0.3), jnp.array([0.1, 6.5]), [180.0], rtol=1e-3)
    >>> round(0.3 * float(sol.final[1]), 1)
    2.0
    """

    problem: Callable[[PyTree], Scalar]
    learning_rate: Float[Array, ""]

    def __init__(self, problem: Callable[[PyTree], Scalar], learning_rate: ArrayLike):
        self.problem, self.learning_rate = check_descent(problem, learning_rate)

    @property
    def start_cost(self) -> tuple[int, int]:
        return 2, 0

    @property
    def products_per_evaluation(self) -> int:
        return 2

    def start(self, trainable: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
        w0, w1, w2 = iterates_from(self.gradient(frozen), trainable, self.learning_rate, 2)
        centre = jax.tree_util.tree_map(lambda a, b, c: (3 * a + 2 * b - c) / 4, w0, w1, w2)
        return centre, jax.tree_util.tree_map(lambda a, b: (b - a) / 2, w0, w1)

    def rates(self, gradient: Gradient, centre: Vector, direction: Vector, log_size: Scalar) -> tuple[Vector, Vector]:
        eta = self.learning_rate.astype(centre.dtype)
        length = scaled_norm(direction)
        seen = probe(gradient, centre, direction, probe_scale(centre, direction, log_size))
        safe = jnp.where(length > 0, length, 1)
        n, slope = direction / safe, seen.slope / safe
        size = jnp.exp(log_size).astype(centre.dtype) * safe
        # Everything in units of |d|, which gets as small as the gradient.
        mean = seen.mean / jnp.maximum(size, jnp.finfo(centre.dtype).tiny)
        force = eta**2 / 2 * (mean * (mean @ n) + slope * (slope @ n)) - 2 * n
        bent = [jax.jvp(gradient, (centre + s * seen.scale * direction,), (seen.mean,))[1] for s in (1, -1)]
        motion = -eta * seen.mean - eta**2 / 4 * (bent[0] + bent[1])
        return motion, length * (force - n * (n @ force) / 2)
