"""A condition that ends a run: a function of the parameters goes above or below a value."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Scalar, ScalarLike

from gradflow._checks import check_callable, fail, is_concrete
from gradflow.runs._record import seen


class Until(eqx.Module):
    """Ends a run as soon as `fn(params)` is at or beyond a value.

    It is looked at after every accepted step. A flow in adaptive steps then locates it inside the step, to the
    resolution of time; rules and stochastic flows, which are not defined between steps, end at the step that meets it.
    A condition that is met and left again within one step goes unseen. One that holds at the start ends the run there.

    A norm is reached: `Until(LogNorm(whole=True), above=...)`. A direction is a KKT point, or the norm has grown too
    large for that: `Until(Aligned(problem), above=0.0)`. A plateau is left or entered: see `LossRate`. All of these are
    in `gradflow.observables`.

    **Arguments**: `fn`: `params -> scalar`; exactly one of `above` and `below`.

    **Raises** `ValueError` for a function that cannot be called, if neither or both are given, and for a value that is
    NaN or no scalar.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.GradientFlow(lambda w: 0.5 * w**2)
    >>> until = gf.Until(lambda w: w, below=0.5)
    >>> sol = gf.solve(flow, jnp.array(1.0), jnp.array([0.0, 10.0]), until=until)
    >>> sol.status, round(float(sol.t_final), 4)
    ('stopped', 0.6931)
    """

    fn: Callable[[PyTree], ScalarLike]
    value: Float[Array, ""]
    sign: int = eqx.field(static=True)

    def __init__(
        self, fn: Callable[[PyTree], ScalarLike], *, above: ArrayLike | None = None, below: ArrayLike | None = None
    ):
        check_callable("fn", fn, "fn(params) -> scalar")
        if (above is None) == (below is None):
            given = "neither" if above is None else "both"
            raise ValueError(f"Exactly one of the arguments `above` and `below` must be given, but {given} is.")
        for name, value in (("above", above), ("below", below)):
            if value is not None and jnp.ndim(value) != 0:
                raise fail(name, "be a scalar", f"of shape {jnp.shape(value)}", "Use jax.vmap over several.")
            if value is not None and is_concrete(value) and np.isnan(value):
                raise fail(name, "be a number", "NaN")
        self.fn = fn
        self.sign = 1 if below is None else -1
        self.value = jnp.asarray(above if below is None else below, float)

    def event_value(self, params: PyTree) -> Float[Array, ""]:
        """How far beyond the value the function is; the run ends when this is not negative."""
        return self.sign * (jnp.asarray(self.fn(seen(self.fn, params)), self.value.dtype) - self.value)


def check_until(until: object) -> None:
    """Refuses conditions that are none."""
    if until is not None and not isinstance(until, Until):
        advice = "For instance gradflow.Until(problem, below=0.1)."
        raise fail("until", "be a gradflow.Until", f"of type {type(until).__name__}", advice)


def locate(
    until: Until | None,
    params: Callable[[PyTree], PyTree],
    keep: Bool[Array, ""],
    t0: Scalar,
    t1: Scalar,
    at: Callable[[Scalar], PyTree],
    y1: PyTree,
) -> tuple[Bool[Array, ""], Scalar, PyTree]:
    """Where in the step the condition `until` is met, if it is: bisection and secant steps in turn, to rounding."""
    if until is None:
        return jnp.asarray(False), t1, y1
    beyond = until.event_value(params(y1))
    met = keep & (beyond >= 0)

    def excess(t: Scalar) -> Scalar:
        return until.event_value(params(at(t)))

    def wide(state: tuple[Scalar, ...]) -> Bool[Array, ""]:
        low, high, _, _, count = state
        return met & (high - low > 4 * jnp.finfo(t0.dtype).eps * jnp.abs(high)) & (count < 100)

    def narrow(state: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
        low, high, below, above, count = state
        gap = above - below
        secant = low - below * (high - low) / jnp.where(gap > 0, gap, 1)
        usable = (count % 3 != 2) & (gap > 0) & (secant > low) & (secant < high)
        middle = jnp.where(usable, secant, low + 0.5 * (high - low)).astype(low.dtype)
        value = excess(middle)
        up = value >= 0
        ends = (jnp.where(up, low, middle), jnp.where(up, middle, high))
        return (*ends, jnp.where(up, below, value), jnp.where(up, value, above), count + 1)

    def search() -> tuple[Scalar, PyTree]:
        _, crossing, *_ = jax.lax.while_loop(wide, narrow, (t0, t1, excess(t0), beyond, jnp.asarray(0)))
        crossing = jax.lax.stop_gradient(crossing)
        return crossing, at(crossing)

    crossing, located = jax.lax.cond(met, search, lambda: (t1, y1))
    return met, crossing, located
