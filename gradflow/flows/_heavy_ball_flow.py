"""The heavy ball in continuous time, at low and at high resolution."""

from collections.abc import Callable
from typing import ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_callable, check_choice
from gradflow.flows._second_order import (
    AbstractSecondOrderFlow,
    MomentumState,
    check_strong_convexity,
    displacement,
    dot,
    shifted,
)

START = {"matched": -1.5, "rest": -0.5}
"""Initial velocity over `sqrt(s) grad f(x0)`."""


class HeavyBallFlow(AbstractSecondOrderFlow):
    """The heavy ball in continuous time, for a strong-convexity parameter `mu`.

    The limit of `w_{k+1} = w_k + beta (w_k - w_{k-1}) - s grad f(w_k)`, `beta = (1 - r)/(1 + r)`, `r = sqrt(mu s)`:

        X'' + 2 sqrt(mu) X' + (1 + r) grad f(X) = 0        resolution="high"
        X'' + 2 sqrt(mu) X' +         grad f(X) = 0        resolution="low", the limit `s -> 0`

    **Time unit**: iterate `k` sits at `t = k sqrt(s)`. On a fixed interval the gap to the iterates is of order
    `s^(1/2)` at low resolution and of order `s` at high resolution, the latter from the matched start only: with the
    velocity published along with the equation it is `s^(1/2)` as well.

    **Arguments**

    - `problem`: a callable `params -> scalar`. `mu`: the strong-convexity parameter that the method uses, at most
      `1 / s`; zero for no damping. `s`: the step size of the method. Both may be traced.
    - `resolution`: `"high"` or `"low"`.
    - `start`: at high resolution, the velocity `X'(0)`. `"matched"`: `-(3/2) sqrt(s) grad f(x0)`, the mean of the steps
      before and after `x0` for a method whose first step is the published `-2 s/(1 + r) grad f(x0)`; `"rest"`:
      `-(1/2) sqrt(s) grad f(x0)`, for one that starts with a plain step `-s grad f(x0)`; `"paper"`:
      `-2 sqrt(s)/(1 + r) grad f(x0)`. At low resolution it starts at rest.

    The discrete method is unstable for `s` beyond `2 (1 + beta) / sharpness`; the flow is stable for every `s`.

    **Raises** `ValueError` for a problem that cannot be called, an `s` that is not positive, a `mu` that is negative or
    above `1 / s`, and an unknown `resolution` or `start`.

    Source: B. Shi, S. S. Du, M. I. Jordan and W. J. Su (2018), arXiv 1810.08907.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.HeavyBallFlow(lambda w: 0.5 * w**2, mu=1.0, s=0.01, resolution="low")
    >>> sol = gf.solve(flow, jnp.array(1.0), [1.0], rtol=1e-7)
    >>> round(float(sol.final), 4)  # (1 + t) exp(-t), critically damped
    0.7358
    """

    problem: Callable[[PyTree], Scalar]
    autonomous: ClassVar[bool] = True
    mu: Float[Array, ""]
    s: Float[Array, ""]
    resolution: Literal["high", "low"] = eqx.field(static=True)
    start: Literal["matched", "paper", "rest"] = eqx.field(static=True)

    def __init__(
        self,
        problem: Callable[[PyTree], Scalar],
        mu: ArrayLike,
        s: ArrayLike,
        resolution: Literal["high", "low"] = "high",
        start: Literal["matched", "paper", "rest"] = "matched",
    ):
        check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
        check_strong_convexity(mu, s)
        check_choice("resolution", resolution, ("high", "low"))
        check_choice("start", start, ("matched", "paper", "rest"))
        self.problem, self.resolution, self.start = problem, resolution, start
        self.mu, self.s = jnp.asarray(mu, float), jnp.asarray(s, float)

    @property
    def time_unit(self) -> str:
        return "t = k sqrt(s)"

    @property
    def velocity_free(self) -> bool:
        return True

    def damping(self, t: Scalar) -> Scalar:
        return (2 * jnp.sqrt(self.mu)).astype(t.dtype)

    def hessian_damping(self, t: Scalar) -> Scalar:
        return jnp.zeros_like(t)

    def gradient_weight(self, t: Scalar) -> Scalar:
        return (1 + self._r()).astype(t.dtype)

    def initial_momentum(self) -> Scalar | None:
        if self.resolution == "low":
            return None
        factor = -2 / (1 + self._r()) if self.start == "paper" else START[self.start]
        return factor * jnp.sqrt(self.s)

    def lyapunov(
        self, t: Scalar, state: MomentumState, frozen: PyTree, minimum: PyTree, least: Scalar, kind: str
    ) -> Float[Array, ""]:
        """`(1 + r)(f - f*) + |V + sqrt(mu)(X - x*)|^2 / 2` (sharp), which falls at least like `exp(-sqrt(mu) t)`.

        Published: `(1 + r)(f - f*) + |V|^2 / 4 + |V + 2 sqrt(mu)(X - x*)|^2 / 4`, at least like `exp(-sqrt(mu) t / 4)`.
        """
        away, root, v = displacement(state.position, minimum), jnp.sqrt(self.mu), state.momentum
        above = (1 + self._r()) * (self.loss(state, frozen) - least)
        if kind == "sharp":
            mixed = shifted(v, root, away)
            return above + 0.5 * dot(mixed, mixed)
        mixed = shifted(v, 2 * root, away)
        return above + 0.25 * dot(v, v) + 0.25 * dot(mixed, mixed)

    def _r(self) -> Scalar:
        return jnp.sqrt(self.mu * self.s) if self.resolution == "high" else jnp.zeros_like(self.s)
