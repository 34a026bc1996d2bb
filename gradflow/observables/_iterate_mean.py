"""What an observable is on average over the oscillation of a rule about its flow."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from gradflow._checks import check_callable, fail
from gradflow._tree import flatten, join
from gradflow.protocols import HasDeviations, offered


class IterateMean(eqx.Module):
    """The mean of `fn` over the iterates of a rule, along a `CentralFlow`:

        E fn = fn(w) + <Hess fn(w), Sigma> / 2

    the loss that descent shows on average, `IterateMean(problem)`, among them, and the square of its gradient norm,
    for `fn` that square. To second order in the oscillation.

    **Arguments**: `fn`: `params -> array`, twice differentiable.

    **Raises** `ValueError` for a function that cannot be called, and along flows and rules without a covariance.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> valley = lambda w: 0.5 * (w[0] + w[1]) * w[0] ** 2 - 0.01 * (w[0] + w[1])
    >>> flow = gf.CentralFlow(gf.GradientDescent(valley, 0.3))
    >>> see = {"square": gf.observables.IterateMean(lambda w: w[0] ** 2)}
    >>> sol = gf.solve(flow, jnp.array([0.0, 6.0]), [120.0], observe=see)
    >>> round(float(sol.observed["square"][0]), 3)
    0.02
    """

    fn: Callable[[Any], Any]

    def __init__(self, fn: Callable[[Any], Any]):
        self.fn = check_callable("fn", fn, "fn(params) -> array")

    def __call__(self, params: PyTree) -> Array:
        advice = "Observe it along a run."
        raise fail("observe", "be functions of the parameters here", "a mean over iterates", advice)

    def of_state(self, flow: Any, t: Scalar, state: PyTree, frozen: PyTree) -> Array:
        knowing = offered(flow, HasDeviations)
        if knowing is None:
            actual = f"observing a {type(flow).__name__}, which has none"
            raise fail("observe", "hold a mean over iterates for a flow with a covariance", actual, "See CentralFlow.")
        params, rows = knowing.params(state), knowing.deviations(state)

        def value(p: PyTree) -> Array:
            return jnp.asarray(self.fn(join(p, frozen)))

        def curved(row: PyTree) -> Array:
            slope = lambda p: jax.jvp(value, (p,), (row,))[1]  # noqa: E731
            return jax.jvp(slope, (params,), (row,))[1]

        return value(params) + 0.5 * jnp.sum(jax.lax.map(curved, rows), axis=0)


class IterateVariance(eqx.Module):
    """The variance of the iterates of a rule about its `CentralFlow`, `tr Sigma`.

    It is zero below the edge of stability.

    **Unit**: that of the square of the parameters.

    **Raises** `ValueError` along flows and rules without a covariance.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.CentralFlow(gf.GradientDescent(lambda w: 0.5 * jnp.sum(w**2), 0.3))
    >>> see = {"variance": gf.observables.IterateVariance()}
    >>> float(gf.solve(flow, jnp.ones(2), [1.0], observe=see).observed["variance"][0])
    0.0
    """

    def __call__(self, params: PyTree) -> Float[Array, ""]:
        raise fail(
            "observe", "be functions of the parameters here", "a variance of iterates", "Observe it along a run."
        )

    def of_state(self, flow: Any, t: Scalar, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        knowing = offered(flow, HasDeviations)
        if knowing is None:
            actual = f"observing a {type(flow).__name__}, which has none"
            raise fail("observe", "hold a variance of iterates for a flow that knows it", actual, "See CentralFlow.")
        return jnp.sum(flatten(knowing.deviations(state))[0] ** 2)
