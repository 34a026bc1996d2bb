"""What alternates about the centre of gradient descent at the edge of stability, as the flows there predict it."""

from typing import TypeVar

import equinox as eqx
from jaxtyping import Array, Float, PyTree, Scalar

from gradflow._checks import fail
from gradflow.protocols import HasAmplitude, PredictsAverages, offered

P = TypeVar("P")


class Amplitude(eqx.Module):
    """The amplitude `a` of alternating sign, `w_k = c_k + (-1)^k a_k`.

    In the structure of the parameters that flow.

    Its leaves are zero where it has underflown; the state of the flow still knows it.

    **Unit**: that of the parameters. **Raises** `ValueError` along a flow without one, and along a rule.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.DescentAscentFlow(lambda w: jnp.sum(w**2), learning_rate=1.05, order=1)  # eta H = 2.1
    >>> sol = gf.solve(flow, jnp.ones(1), [0.0, 1.05], observe={"a": gf.observables.Amplitude()}, rtol=1e-6)
    >>> growth = sol.observed["a"][1, 0] / sol.observed["a"][0, 0]
    >>> round(float(jnp.log(growth)), 4)  # 2.1 - 2, a step of descent later
    0.1
    """

    def __call__(self, params: PyTree) -> PyTree:
        raise _needs_a_flow()

    def of_state(self, flow: object, t: Scalar, state: PyTree, frozen: PyTree) -> PyTree:
        return _ask(flow, HasAmplitude).amplitude(state)


class Variance(eqx.Module):
    """The predicted variance of the iterates, summed over parameters, `|a|^2`.

    Along a `CentralFlow`, `tr Sigma`.

    **Raises** `ValueError` along a flow that predicts none, and along a rule.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.DescentAscentFlow(lambda w: jnp.sum(w**2), learning_rate=0.5, order=1)
    >>> sol = gf.solve(flow, jnp.ones(1), [0.0], observe={"variance": gf.observables.Variance()})
    >>> float(sol.observed["variance"][0])  # of a(0) = (eta H / 2)^2 w_0 = 1/4
    0.0625
    """

    def __call__(self, params: PyTree) -> Float[Array, ""]:
        raise _needs_a_flow()

    def of_state(self, flow: object, t: Scalar, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return _ask(flow, PredictsAverages).predicted_variance(state, frozen)


class MeanLoss(eqx.Module):
    """The predicted mean loss of the iterates, `[L(c + a) + L(c - a)] / 2`.

    Along a `CentralFlow`, `L + <H, Sigma> / 2`.

    To be compared with means of the loss over neighbouring iterates. Its evaluations of the loss are not counted.

    **Raises** `ValueError` along a flow that predicts none, and along a rule.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.DescentAscentFlow(lambda w: jnp.sum(w**2), learning_rate=0.5, order=1)
    >>> sol = gf.solve(flow, jnp.ones(1), [0.0], observe={"loss": gf.observables.MeanLoss()})
    >>> float(sol.observed["loss"][0])  # of c + a = 1 and c - a = 1/2
    0.625
    """

    def __call__(self, params: PyTree) -> Float[Array, ""]:
        raise _needs_a_flow()

    def of_state(self, flow: object, t: Scalar, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return _ask(flow, PredictsAverages).predicted_loss(state, frozen)


def _ask(flow: object, protocol: type[P]) -> P:
    predicting = offered(flow, protocol)
    if predicting is None:
        actual = f"observing a {type(flow).__name__}"
        advice = "Such are gradflow.DescentAscentFlow and, but for an amplitude, CentralFlow."
        raise fail("observe", "hold what alternates only along a flow that has it", actual, advice)
    return predicting


def _needs_a_flow() -> ValueError:
    actual = "one of what alternates about a centre"
    return fail("observe", "be functions of the parameters here", actual, "Observe it along a run of a flow.")
