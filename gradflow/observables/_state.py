"""What a run knows besides its parameters: time, velocity, and the whole state of a flow or an optimiser."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from gradflow._checks import check_callable, fail
from gradflow._tree import flatten
from gradflow.protocols import HasVectorField, offered


class Time(eqx.Module):
    """The time of a flow, or of a rule by its own clock.

    **Unit**: that of the flow or the rule.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow, see = gf.GradientFlow(lambda w: 0.5 * w**2), {"t": gf.observables.Time()}
    >>> sol = gf.solve(flow, jnp.array(1.0), [0.0, 1.5], observe=see)
    >>> sol.observed["t"].tolist()
    [0.0, 1.5]
    """

    def __call__(self, params: PyTree) -> Float[Array, ""]:
        raise _needs_a_run("the time")

    def of_state(self, flow: object, t: Scalar, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return jnp.asarray(t, jnp.result_type(float))


class State(eqx.Module):
    """A function of the whole state along a run.

    That holds velocities of a flow, running integrals, the memory of an optimiser.

    **Arguments**: `fn`: `state -> array`. The state is what `Solution.state` holds at the end of the run.

    **Raises** `ValueError` for a function that cannot be called.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.GradientFlow(lambda w: 0.5 * w**2)  # its state: parameters, integral of the squared gradient
    >>> see = {"dissipated": gf.observables.State(lambda state: state[1])}
    >>> sol = gf.solve(flow, jnp.array(1.0), [10.0], observe=see)
    >>> round(float(sol.observed["dissipated"][0]), 3)
    0.5
    """

    fn: Callable[[PyTree], PyTree]

    def __init__(self, fn: Callable[[PyTree], PyTree]):
        self.fn = check_callable("fn", fn, "fn(state) -> array")

    def __call__(self, params: PyTree) -> Array:
        raise _needs_a_run("the whole state")

    def of_state(self, flow: object, t: Scalar, state: PyTree, frozen: PyTree) -> Array:
        return jnp.asarray(self.fn(state))


class Velocity(eqx.Module):
    """The velocity `X'(t)` of the parameters along a flow, in one vector.

    Of a momentum flow `X'' + a X' + b H X' + c grad L = 0` this is `X' = V - b grad L(X)`, with `V` the momentum in its
    state; of any other flow, the derivative of its parameters along its vector field. It costs one gradient for each
    save time, where the velocity is not a part of the state; that one is not counted.

    **Raises** `ValueError` along a rule, which has none.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.SecondOrderFlow(lambda w: 0.5 * w**2, damping=0.0)  # X = cos t
    >>> see = {"velocity": gf.observables.Velocity()}
    >>> sol = gf.solve(flow, jnp.array(1.0), [jnp.pi / 2], observe=see, rtol=1e-8)
    >>> [round(float(v), 6) for v in sol.observed["velocity"][0]]
    [-1.0]
    """

    def __call__(self, params: PyTree) -> Float[Array, " parameters"]:
        raise _needs_a_run("the velocity")

    def of_state(self, flow: object, t: Scalar, state: PyTree, frozen: PyTree) -> Float[Array, " parameters"]:
        moving = offered(flow, HasVectorField)
        if moving is None:
            actual = f"observing a {type(flow).__name__}, which has no velocity"
            raise fail("observe", "hold the velocity of a flow", actual, "Observe it with `solve`.")
        return flatten(jax.jvp(moving.params, (state,), (moving.vector_field(t, state, frozen),))[1])[0]


def _needs_a_run(what: str) -> ValueError:
    return fail("observe", "be functions of the parameters here", f"one of {what}", "Observe it along a run.")
