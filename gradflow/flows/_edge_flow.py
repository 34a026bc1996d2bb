"""Edge flow: a centre, the direction of its largest eigenvalue, and how far gradient descent alternates along it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow.flows._split_flow import (
    AbstractSplitFlow,
    Gradient,
    Vector,
    check_descent,
    iterates_from,
    probe,
    probe_scale,
)


class EdgeFlow(AbstractSplitFlow):
    """Centre `c`, direction `u` and magnitude `rho` of what alternates:

        eta c' = -(eta/2) (grad L(c + rho u) + grad L(c - rho u))
        eta u' = eta (I - u u') H(c) u,      eta rho' = (eta u'H(c) u - 2) rho

    This is `DescentAscentFlow` of order 1 with the linear part of its amplitude, `a = rho u`.

    **Time unit**: `t = k * learning_rate`, as for `DescentAscentFlow`; so are the start and what observables see.

    **Arguments**: `problem`, a callable `params -> scalar`; `learning_rate`, positive, may be traced. An evaluation
    takes two gradients and one Hessian-vector product.

    **Raises** `ValueError` for a problem that cannot be called and a learning rate that is not positive.

    Source: P. Marion (2026), *Edge Flow*, arXiv 2606.18080, after the description in its abstract: the published
    equations may differ in constants.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> loss = lambda w: 0.5 * (w[0] + w[1]) * w[0] ** 2 - 0.01 * (w[0] + w[1])
    >>> sol = gf.solve(gf.EdgeFlow(loss, learning_rate=0.3), jnp.array([0.1, 6.5]), [180.0], rtol=1e-3)
    >>> round(0.3 * float(sol.final[1]), 1)
    2.0
    """

    problem: Callable[[PyTree], Scalar]
    learning_rate: Float[Array, ""]

    def __init__(self, problem: Callable[[PyTree], Scalar], learning_rate: ArrayLike):
        self.problem, self.learning_rate = check_descent(problem, learning_rate)

    @property
    def start_cost(self) -> tuple[int, int]:
        return 1, 0

    @property
    def products_per_evaluation(self) -> int:
        return 1

    def start(self, trainable: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
        w0, w1 = iterates_from(self.gradient(frozen), trainable, self.learning_rate, 1)
        amplitude = jax.tree_util.tree_map(lambda a, b: (a - b) / 2, w0, w1)
        return jax.tree_util.tree_map(jnp.subtract, w0, amplitude), amplitude

    def rates(self, gradient: Gradient, centre: Vector, direction: Vector, log_size: Scalar) -> tuple[Vector, Vector]:
        eta = self.learning_rate.astype(centre.dtype)
        seen = probe(gradient, centre, direction, probe_scale(centre, direction, log_size))
        curved = jax.jvp(gradient, (centre,), (direction,))[1]
        return -eta * seen.mean, eta * curved - 2 * direction
