"""Networks as distributions of particles: histograms along a run, distances between two."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_callable, check_count, fail, is_concrete
from gradflow._tree import in_single, join
from gradflow.models import MeanFieldNet, MeanFieldNodes


def first_norms(net: MeanFieldNet) -> Float[Array, " nodes"]:
    """Lengths of the incoming weights of the nodes of the first layer."""
    return jnp.linalg.norm(net.layers[0], axis=1)


class ParticleHistogram(eqx.Module):
    """Histogram of a number that every node of a layer has: `(bins,)`.

    Along a `MeanFieldFlow` nodes count with their weights, so that finite networks and the limit compare; elsewhere
    with `1 / N` each. What lies outside of the edges is left out.

    **Arguments**: `edges`: increasing, `(bins + 1,)`. `value`: function `MeanFieldNet -> (nodes,)`, by default the
    lengths `|w|` of the first layer. `layer`: the hidden layer whose nodes these are, from zero.

    **Raises** `ValueError` for edges that do not increase, a `value` that cannot be called, and a negative layer; when
    evaluated, for a layer that the network does not have.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> net = gf.models.MeanFieldNet((jnp.array([[0.1], [0.4], [0.6], [2.0]]),), jnp.ones(4))
    >>> gf.observables.ParticleHistogram([0.0, 0.5, 1.0])(net).tolist()
    [0.5, 0.25]
    """

    edges: Float[Array, " edges"]
    value: Callable[[MeanFieldNet], Array]
    layer: int = eqx.field(static=True)

    def __init__(
        self, edges: ArrayLike | Sequence[float], value: Callable[[MeanFieldNet], Array] = first_norms, layer: int = 0
    ):
        self.edges = jnp.asarray(edges, float)
        if self.edges.ndim != 1 or self.edges.shape[0] < 2 or not bool(jnp.all(jnp.diff(self.edges) > 0)):
            raise fail("edges", "increase", f"{edges!r}")
        check_callable("value", value, "value(net) -> (nodes,)")
        check_count("layer", layer, 0)
        self.value, self.layer = value, int(layer)

    @in_single
    def __call__(self, params: MeanFieldNet) -> Float[Array, " bins"]:
        if self.layer >= len(params.widths):
            raise fail("layer", f"be below {len(params.widths)}, the number of hidden layers", str(self.layer))
        n = params.widths[self.layer]
        return self._masses(params, jnp.full(n, 1 / n, params.output.dtype))

    def of_state(self, flow: Any, t: Scalar, state: PyTree, frozen: PyTree) -> Float[Array, " bins"]:
        """The same, with the weights of the nodes of the flow."""
        net = join(flow.params(state), frozen)
        weights = getattr(flow, "weights", None)
        return self(net) if weights is None else self._masses(net, weights[self.layer])

    def _masses(self, net: MeanFieldNet, weights: Array) -> Float[Array, " bins"]:
        values = self.value(net)
        edges = self.edges.astype(values.dtype)
        inside = (values >= edges[0]) & (values < edges[-1])
        which = jnp.clip(jnp.searchsorted(edges, values, side="right") - 1, 0, edges.shape[0] - 2)
        masses = jnp.where(inside, weights.astype(values.dtype), 0)
        return jax.ops.segment_sum(masses, which, edges.shape[0] - 1)


def wasserstein(
    x: Float[Array, " n"], p: Float[Array, " n"], y: Float[Array, " m"], q: Float[Array, " m"], order: float = 2.0
) -> Float[Array, ""]:
    """Wasserstein distance of two weighted samples of numbers, exactly:

        (int |F^-1 - G^-1|^order)^(1/order)

    with `F`, `G` their distribution functions; weights are divided by their sum.

    **Arguments**: `x`, `y`: the numbers; `p`, `q`: their weights, not negative; `order`: at least one.

    **Raises** `ValueError` unless there is one weight for each number, and for an order below one.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> x, p = jnp.array([0.0, 1.0]), jnp.array([0.5, 0.5])
    >>> float(gf.observables.wasserstein(x, p, x + 2, p))
    2.0
    """
    for name, numbers, weights in (("p", x, p), ("q", y, q)):
        if jnp.shape(weights) != jnp.shape(numbers):
            raise fail(name, f"have a weight for each of {jnp.size(numbers)} numbers", f"of shape {jnp.shape(weights)}")
    if is_concrete(order) and not order >= 1:
        raise fail("order", "be at least 1", f"{order:g}")
    i, j = jnp.argsort(x), jnp.argsort(y)
    up, uq = jnp.cumsum(p[i]) / jnp.sum(p), jnp.cumsum(q[j]) / jnp.sum(q)
    levels = jnp.sort(jnp.concatenate([jnp.zeros(1, up.dtype), up, uq]))
    middle, width = (levels[1:] + levels[:-1]) / 2, jnp.diff(levels)
    a = x[i][jnp.clip(jnp.searchsorted(up, middle), 0, x.shape[0] - 1)]
    b = y[j][jnp.clip(jnp.searchsorted(uq, middle), 0, y.shape[0] - 1)]
    return jnp.sum(width * jnp.abs(a - b) ** order) ** (1 / order)


@eqx.filter_jit
def particle_distance(a: MeanFieldNodes, b: MeanFieldNodes, directions: int = 64, seed: int = 0) -> Float[Array, ""]:
    """Sliced 2-Wasserstein distance of two networks of one hidden layer.

    They are taken as distributions of nodes `(w, c)`.

    The root of the mean square, over random directions, of the Wasserstein distances of projections; it does not ask
    for equal numbers of nodes, and the order of these does not matter.

    **Arguments**: `a`, `b`: `gradflow.models.MeanFieldNodes`, a network and the weights of its nodes.

    `directions`: their number; `seed`: of their draw.

    **Raises** `ValueError` for anything else, for more than one hidden layer, whose entries belong to pairs of nodes,
    and for nodes of different sizes.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> nodes = gf.models.MeanFieldNodes(
    ...     gf.models.MeanFieldNet((jnp.eye(2),), jnp.ones(2)), (jnp.array([0.5, 0.5]),)
    ... )
    >>> float(gf.observables.particle_distance(nodes, nodes))
    0.0
    """
    check_count("directions", directions)
    points = [_points(name, nodes) for name, nodes in (("a", a), ("b", b))]
    if points[0].shape[1] != points[1].shape[1]:
        raise fail("b", f"have nodes of {points[0].shape[1]} entries", f"with {points[1].shape[1]}")
    drawn = jax.random.normal(jax.random.key(seed), (directions, points[0].shape[1]), points[0].dtype)
    units = drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)

    def along(unit: Array) -> Array:
        return wasserstein(points[0] @ unit, a.weights[0], points[1] @ unit, b.weights[0]) ** 2

    return jnp.sqrt(jnp.mean(jax.vmap(along)(units)))


def _points(argument: str, nodes: object) -> Float[Array, "nodes entries"]:
    if not isinstance(nodes, MeanFieldNodes):
        advice = "For instance from gradflow.models.as_nodes."
        raise fail(argument, "be gradflow.models.MeanFieldNodes", f"of type {type(nodes).__name__}", advice)
    if len(nodes.weights) != 1:
        raise fail(argument, "have one hidden layer", f"of {len(nodes.weights)}", "Compare predictions instead.")
    output = nodes.net.output.reshape(nodes.net.output.shape[0], -1)
    return jnp.concatenate([nodes.net.layers[0], output], axis=1)
