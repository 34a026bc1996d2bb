"""What an observable is on average over the oscillation of a rule about its flow."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from gradflow._checks import check_callable, fail
from gradflow._linalg import averaged
from gradflow._tree import join
from gradflow.protocols import HasAmplitude, HasDeviations, offered


class IterateMean(eqx.Module):
    """The predicted mean of `fn` over iterates that oscillate about a flow:

        fn(w) + <Hess fn(w), Sigma> / 2         along a `CentralFlow`, to second order in the oscillation
        [fn(c + a) + fn(c - a)] / 2             along a `DescentAscentFlow` and all that alternate

    the square of the gradient norm, for `fn` that square, among them. Of the loss it is `MeanLoss()`.

    **Arguments**: `fn`: `params -> array`, twice differentiable along a `CentralFlow`.

    **Raises** `ValueError` for a function that cannot be called, and along flows and rules about which nothing
    oscillates.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> valley = lambda w: 0.5 * (w[0] + w[1]) * w[0] ** 2 - 0.1 * (w[0] + w[1])
    >>> flow = gf.CentralFlow(gf.GradientDescent(valley, 0.3))
    >>> see = {"square": gf.observables.IterateMean(lambda w: w[0] ** 2)}
    >>> sol = gf.solve(flow, jnp.array([0.1, 6.3]), [60.0], observe=see)
    >>> round(float(sol.observed["square"][0]), 2)
    0.2
    """

    fn: Callable[[PyTree], Array]

    def __init__(self, fn: Callable[[PyTree], Array]):
        self.fn = check_callable("fn", fn, "fn(params) -> array")

    def __call__(self, params: PyTree) -> Array:
        advice = "Observe it along a run."
        raise fail("observe", "be functions of the parameters here", "a mean over iterates", advice)

    def of_state(self, flow: Any, t: Scalar, state: PyTree, frozen: PyTree) -> Array:
        def value(p: PyTree) -> Array:
            return jnp.asarray(self.fn(join(p, frozen)))

        knowing = offered(flow, HasDeviations)
        if knowing is not None:
            return averaged(value, knowing.params(state), knowing.deviations(state))
        alternating = offered(flow, HasAmplitude)
        if alternating is None:
            actual = f"observing a {type(flow).__name__}"
            advice = "See CentralFlow and DescentAscentFlow."
            raise fail("observe", "hold a mean over iterates for a flow about which they oscillate", actual, advice)
        centre, a = flow.params(state), alternating.amplitude(state)
        sides = [jax.tree_util.tree_map(lambda c, b, s=s: c + s * b, centre, a) for s in (1, -1)]
        return (value(sides[0]) + value(sides[1])) / 2
