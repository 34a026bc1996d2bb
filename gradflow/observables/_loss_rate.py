"""How fast the loss falls along gradient flow: what tells a plateau from a jump."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Float, PyTree

from gradflow._checks import check_callable, check_positive
from gradflow._tree import full_precision, in_single, join, split


class LossRate(eqx.Module):
    """Rate at which gradient flow lowers the loss, `|grad L|^2 / scale`.

    `scale` is a loss such as that of the start; the unit is one over flow time.

    A run is on a plateau, near a saddle or a minimum, while this is small. Plateaus are left and entered at

        gradflow.Until(LossRate(problem, scale), above=rate)        gradflow.Until(LossRate(problem, scale), below=rate)

    where the next run goes on from the last state, `sol.final`; times add up. Enter at a smaller rate than that at
    which to leave, for a run that starts at its own event ends there. Near zero it is about `4 N^2 |w|^2`, in degree 2.

    **Arguments**: `problem`: `params -> scalar`; `scale`: positive.

    **Raises** `ValueError` for a problem that cannot be called, and a scale that is not positive.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([2.0, 1.0]), gf.losses.square, reduction="sum")
    >>> flow, rate = gf.LogDiagonalFlow(problem), gf.observables.LossRate(problem, scale=2.5)
    >>> start = gf.models.LogDiagonal(2, log_scale=-50.0)
    >>> left = gf.solve(flow, start, [1e3], until=gf.Until(rate, above=1e-2))
    >>> entered = gf.solve(flow, left.final, [1e3], until=gf.Until(rate, below=1e-3))
    >>> times = left.t_final, left.t_final + entered.t_final
    >>> [round(float(t), 1) for t in times], round(float(problem(entered.final)), 2)
    ([23.7, 26.4], 0.5)
    """

    problem: Callable[[PyTree], jax.Array]
    scale: Float[jax.Array, ""]

    def __init__(self, problem: Callable[[PyTree], jax.Array], scale: ArrayLike = 1.0):
        self.problem = check_callable("problem", problem, "problem(params) -> scalar")
        check_positive("scale", scale)
        self.scale = jnp.asarray(scale, float)

    @in_single
    @full_precision
    def __call__(self, params: PyTree) -> Float[jax.Array, ""]:
        trainable, frozen = split(params)
        gradient = jax.grad(lambda p: self.problem(join(p, frozen)))(trainable)
        squares = [jnp.sum(leaf**2) for leaf in jax.tree_util.tree_leaves(gradient)]
        return jnp.asarray(sum(squares)) / self.scale.astype(squares[0].dtype)
