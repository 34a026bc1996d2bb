"""Two-layer networks of any parametrisation as mean-field nodes, where that is what they are."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from gradflow._checks import fail
from gradflow.models._mean_field_net import MeanFieldNet
from gradflow.models._mean_field_start import MeanFieldNodes
from gradflow.models._two_layer import TwoLayer


class AsNodes(NamedTuple):
    """Nodes of a network, and how much time its gradient flow takes for a unit of mean-field time."""

    nodes: MeanFieldNodes
    pace: float


def as_nodes(model: TwoLayer) -> AsNodes:
    """A two-layer network in mean-field parametrisation or muP as nodes.

    It is one flow, at one pace or another.

    With multipliers `a` and `b` of the layers, `f = b sum_i c_i s(a w_i . x)` is an average over nodes `a w_i` and
    `N b c_i`, which move at the speeds `a^2 / N` and `N b^2`. These agree in mean-field parametrisation (`1 / N`) and
    in muP (one).

    **Arguments**: `model`: a `TwoLayer`.

    **Returns** an `AsNodes`: the nodes, and the flow time of the model for one unit of mean-field time.

    **Raises** `ValueError` for another model, and where the speeds differ, as in NTK parametrisation: its limit is
    `gradflow.LinearisedFlow`.

    >>> import gradflow as gf, jax
    >>> kind = {"activation": jax.numpy.tanh, "key": jax.random.key(0)}
    >>> paces = [
    ...     gf.models.as_nodes(gf.models.TwoLayer(2, 16, parametrisation=p, **kind)).pace for p in ("mean_field", "mup")
    ... ]
    >>> [round(pace, 12) for pace in paces]
    [16.0, 1.0]
    """
    if not isinstance(model, TwoLayer):
        raise fail("model", "be a gradflow.models.TwoLayer", f"of type {type(model).__name__}")
    n = model.weight.shape[0]
    a, b = (float(model.multipliers.of(layer, float)) for layer in (0, 1))
    if not math.isclose(a**2 / n, n * b**2, rel_tol=1e-9):
        actual = f"one whose layers move at the speeds {a**2 / n:.3g} and {n * b**2:.3g}"
        advice = 'Take parametrisation="mean_field" or "mup"; the limit of "ntk" is gradflow.LinearisedFlow.'
        raise fail("model", "be a network of one pace", actual, advice)
    output = jnp.moveaxis(model.output, -1, 0)
    net = MeanFieldNet((a * model.weight,), n * b * output, model.activation)
    return AsNodes(MeanFieldNodes(net, (jnp.full(n, 1 / n, model.weight.dtype),)), n / a**2)
