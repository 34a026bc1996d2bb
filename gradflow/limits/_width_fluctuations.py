"""`width_fluctuations`: how far networks of finite width deviate from the limit, predicted from the limit alone."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from gradflow import _checks
from gradflow._tree import split
from gradflow.flows import MeanFieldFlow
from gradflow.models import MeanFieldStart
from gradflow.models.nodes import AbstractNodeRule
from gradflow.problems import EmpiricalRisk, PopulationRisk
from gradflow.runs._arguments import check_times
from gradflow.runs._solve import solve


class WidthFluctuations(NamedTuple):
    """What `width_fluctuations` found.

    `limit (T, n)`: predictions at width infinity; `variances (T, n, L)`: what the labels of each layer add to `N`
    times the variance of those of a finite network.
    """

    limit: Float[Array, "T n"]
    variances: Float[Array, "T n L"]

    def std(self, width: ArrayLike | Sequence[int]) -> Float[Array, "T n"]:
        """Standard deviation of the predictions of networks of one width, or of one for each hidden layer."""
        widths = jnp.broadcast_to(jnp.asarray(width, float), (self.variances.shape[-1],))
        return jnp.sqrt(jnp.sum(self.variances / widths[None, None, :], axis=-1))


def width_fluctuations(
    problem: EmpiricalRisk | PopulationRisk,
    start: MeanFieldStart,
    ts: ArrayLike | Sequence[float],
    *,
    rule: AbstractNodeRule | Sequence[AbstractNodeRule] | None = None,
    decay: ArrayLike = 0.0,
    rtol: float = 1e-6,
) -> WidthFluctuations:
    """How far predictions of finite networks deviate from width infinity.

    Their standard deviation under gradient flow, to leading order `N^-1/2`.

    A network of `N` nodes starts from the empirical measure of `N` labels, which deviates from the law by `N^-1/2`. Its
    predictions deviate by what the limit answers to that, to first order: with `G_j` the derivative of a prediction of
    the limit by the weight of node `j` of a layer, all nodes moving along,

        N Var = sum over layers of  sum_j p_j (G_j - sum_k p_k G_k)^2

    Entries between layers that are drawn independently add to the order `1 / N` only, as does the bias of the mean.

    **Arguments**: as for `gradflow.infinite_width`; `rule`: nodes at which derivatives are taken, one run each.

    **Raises** `ValueError` for bad input, as there.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> from gradflow.models.nodes import GaussLegendre, Uniform
    >>> start = gf.models.MeanFieldStart(1, first=Uniform(-1, 1), output=Uniform(-1, 1))
    >>> problem = gf.EmpiricalRisk(jnp.ones((1, 1)), jnp.ones(1), gf.losses.square)
    >>> result = gf.width_fluctuations(problem, start, [0.0, 1.0], rule=GaussLegendre(4))
    >>> bool(result.std(100)[1, 0] < result.std(100)[0, 0] < 0.1)  # training draws networks together
    True
    """
    if not isinstance(start, MeanFieldStart):
        raise _checks.fail("start", "be a gradflow.models.MeanFieldStart", f"of type {type(start).__name__}")
    times = check_times(ts, 0.0)
    nodes = start.nodes(rule)
    MeanFieldFlow(problem, nodes.weights, decay).check_values(*split(nodes.net))

    def predictions(weights: tuple[Array, ...]) -> Array:
        flow = MeanFieldFlow(problem, weights, decay)
        observe, solver = {"g": flow.predictions}, diffrax.Tsit5()
        run = solve(flow, nodes.net, times, observe=observe, rtol=rtol, solver=solver, save_params=False, throw=False)
        return run.observed["g"]

    return _variances(predictions, nodes.weights)


def _variances(predictions: Callable[[tuple[Array, ...]], Array], weights: tuple[Array, ...]) -> WidthFluctuations:
    flat = jnp.concatenate(weights)
    ends = [sum(p.shape[0] for p in weights[: i + 1]) for i in range(len(weights))]

    def of_flat(p: Array) -> Array:
        return predictions(tuple(jnp.split(p, ends[:-1])))

    def answer(direction: Array) -> tuple[Array, Array]:
        return jax.jvp(of_flat, (flat,), (direction,))

    limit, slopes = jax.jit(jax.vmap(answer, out_axes=(None, 0)))(jnp.eye(flat.size, dtype=flat.dtype))
    variances = []
    for p, slope in zip(weights, jnp.split(slopes, ends[:-1]), strict=True):
        deviations = slope - jnp.tensordot(p, slope, axes=1)[None, ...]
        variances.append(jnp.tensordot(p, deviations**2, axes=1))
    return WidthFluctuations(limit, jnp.stack(variances, axis=-1))
