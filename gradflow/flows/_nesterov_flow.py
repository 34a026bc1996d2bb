"""Nesterov's method for strongly convex functions in continuous time, at low and at high resolution."""

from collections.abc import Callable
from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_callable, check_choice
from gradflow._tree import join
from gradflow.flows._second_order import (
    AbstractSecondOrderFlow,
    MomentumState,
    check_strong_convexity,
    displacement,
    dot,
    shifted,
)


class NesterovFlow(AbstractSecondOrderFlow):
    """Nesterov's method in continuous time, for a strong-convexity parameter `mu`.

    The limit of `v_{k+1} = w_k - s grad f(w_k)`, `w_{k+1} = v_{k+1} + beta (v_{k+1} - v_k)`, with
    `beta = (1 - r)/(1 + r)`, `r = sqrt(mu s)`:

        X'' + 2 sqrt(mu) X' + sqrt(s) Hess f(X) X' + (1 + r) grad f(X) = 0        resolution="high"
        X'' + 2 sqrt(mu) X' +                                grad f(X) = 0        resolution="low", the limit `s -> 0`

    **Time unit**: iterate `w_k` sits at `t = k sqrt(s)`. On a fixed interval the gap to the iterates is of order
    `s^(1/2)` at low resolution and of order `s` at high resolution, the latter from the matched start only: with the
    velocity published along with the equation it is `s^(1/2)` as well.

    **Arguments**

    - `problem`: a callable `params -> scalar`. `mu`: the strong-convexity parameter that the method uses, at most
      `1 / s`; zero for no damping. `s`: the step size of the method. Both may be traced.
    - `resolution`: `"high"` or `"low"`.
    - `start`: at high resolution, the velocity `X'(0)`. `"matched"`: `-(3/2) sqrt(s) grad f(x0)`, the mean of the steps
      before and after `x0`; `"paper"`: `-2 sqrt(s)/(1 + r) grad f(x0)`. At low resolution it starts at rest.

    The discrete method is unstable for `s` beyond `2 (1 + beta) / (1 + 2 beta) / sharpness`, about 4/3 over the
    sharpness; the flow is stable for every `s`. It has the first-order form `X' = V - sqrt(s) grad f`,
    `V' = -2 sqrt(mu) V - (1 - r) grad f`, in which nothing is second-order.

    **Raises** `ValueError` for a problem that cannot be called, an `s` that is not positive, a `mu` that is negative or
    above `1 / s`, and an unknown `resolution` or `start`.

    Source: B. Shi, S. S. Du, M. I. Jordan and W. J. Su (2018), arXiv 1810.08907.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.NesterovFlow(lambda w: 0.5 * w**2, mu=1.0, s=0.01)
    >>> sol = gf.solve(flow, jnp.array(1.0), [1.0], rtol=1e-7)
    >>> rule = gf.Nesterov(lambda w: 0.5 * w**2, 0.01, mu=1.0)
    >>> abs(float(sol.final - gf.iterate(rule, jnp.array(1.0), 10).final)) < 2e-3
    True
    """

    problem: Callable[[PyTree], Scalar]
    autonomous: ClassVar[bool] = True
    mu: Float[Array, ""]
    s: Float[Array, ""]
    resolution: Literal["high", "low"] = eqx.field(static=True)
    start: Literal["matched", "paper"] = eqx.field(static=True)

    def __init__(
        self,
        problem: Callable[[PyTree], Scalar],
        mu: ArrayLike,
        s: ArrayLike,
        resolution: Literal["high", "low"] = "high",
        start: Literal["matched", "paper"] = "matched",
    ):
        check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
        check_strong_convexity(mu, s)
        check_choice("resolution", resolution, ("high", "low"))
        check_choice("start", start, ("matched", "paper"))
        self.problem, self.resolution, self.start = problem, resolution, start
        self.mu, self.s = jnp.asarray(mu, float), jnp.asarray(s, float)

    @property
    def time_unit(self) -> str:
        return "t = k sqrt(s)"

    @property
    def velocity_free(self) -> bool:
        return self.resolution == "low"

    def damping(self, t: Scalar) -> Scalar:
        return (2 * jnp.sqrt(self.mu)).astype(t.dtype)

    def hessian_damping(self, t: Scalar) -> Scalar:
        return self._h().astype(t.dtype)

    def gradient_weight(self, t: Scalar) -> Scalar:
        return (1 + self._r()).astype(t.dtype)

    def initial_momentum(self) -> Scalar | None:
        if self.resolution == "low":
            return None
        factor = -1.5 if self.start == "matched" else -2 / (1 + self._r())
        return (1 + factor) * self._h()

    def lyapunov(
        self, t: Scalar, state: MomentumState, frozen: PyTree, minimum: PyTree, least: Scalar, kind: str
    ) -> Float[Array, ""]:
        """`f - f* + |V + sqrt(mu)(X - x*)|^2 / 2` (sharp), which falls at least like `exp(-sqrt(mu) t)`.

        Published: `(1 + r)(f - f*) + |X'|^2 / 4 + |V + 2 sqrt(mu)(X - x*)|^2 / 4`, at least like
        `exp(-sqrt(mu) t / 4)`; it takes a gradient, for `X' = V - sqrt(s) grad f`.
        """
        away, root, v = displacement(state.position, minimum), jnp.sqrt(self.mu), state.momentum
        above = self.loss(state, frozen)
        above = above - least.astype(above.dtype)
        if kind == "sharp":
            mixed = shifted(v, root, away)
            return above + 0.5 * dot(mixed, mixed)
        gradient = jax.grad(lambda p: self.problem(join(p, frozen)))(state.position)
        velocity, mixed = shifted(v, -self._h(), gradient), shifted(v, 2 * root, away)
        return (1 + self._r()) * above + 0.25 * dot(velocity, velocity) + 0.25 * dot(mixed, mixed)

    def _h(self) -> Scalar:
        return jnp.sqrt(self.s) if self.resolution == "high" else jnp.zeros_like(self.s)

    def _r(self) -> Scalar:
        return jnp.sqrt(self.mu) * self._h()
