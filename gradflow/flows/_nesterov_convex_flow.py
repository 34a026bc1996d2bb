"""Nesterov's method for convex functions in continuous time, at low and at high resolution."""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_callable, check_choice, check_positive
from gradflow.flows._second_order import AbstractSecondOrderFlow, MomentumState, check_step, displacement, dot, shifted


class NesterovConvexFlow(AbstractSecondOrderFlow):
    """Nesterov's method for convex functions in continuous time.

    The limit of `y_{k+1} = x_k - s grad f(x_k)`, `x_{k+1} = y_{k+1} + k/(k + alpha) (y_{k+1} - y_k)`, with
    `h = sqrt(s)`:

        X'' + (alpha/t) X' + h Hess f(X) X' + (1 + alpha h/(2t)) grad f(X) = 0        resolution="high"
        X'' + (alpha/t) X' +                                        grad f(X) = 0        resolution="low"

    At high resolution it starts at `t0 = alpha h / 2`, with `X'(t0) = -h grad f(x0)`, which is `V = 0` in the
    first-order form `X' = V - h grad f`, `V' = -(alpha/t) V - (1 - alpha h/(2t)) grad f`; at low resolution at `t0 =
    0`, at rest.

    **Time unit**: iterate `x_k` sits at `t = (k + alpha/2) sqrt(s)`, at either resolution. The gap to the iterates is
    of order `s` at high resolution; at low resolution it is of order `s^(1/2)`.

    **Arguments**

    - `problem`: a callable `params -> scalar`. `s`: the step size of the method. `alpha`: the friction, 3 in Nesterov's
      method, at least 3 for the rate `1 / t^2` on convex functions. Both may be traced.
    - `resolution`: `"high"` or `"low"`.

    The discrete method is unstable for `s` beyond about 4/3 over the sharpness; the flow is stable for every `s`.

    **Raises** `ValueError` for a problem that cannot be called, an `s` or `alpha` that is not positive, and an unknown
    `resolution`. A time before `t0` is refused by `solve`.

    Source: B. Shi, S. S. Du, M. I. Jordan and W. J. Su (2018), arXiv 1810.08907; at low resolution W. Su, S. Boyd and
    E. J. Candes (2014), arXiv 1503.01243. The starting time for other `alpha` than 3 is derived here, from the
    expansion of the method about the middle of its steps.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.NesterovConvexFlow(lambda w: 0.5 * w**2, s=0.01, resolution="low")
    >>> sol = gf.solve(flow, jnp.array(1.0), [3.8317], rtol=1e-6)
    >>> abs(float(sol.final)) < 1e-4  # 2 J_1(t) / t, at the first zero of the Bessel function
    True
    """

    problem: Callable[[PyTree], Scalar]
    s: Float[Array, ""]
    alpha: Float[Array, ""]
    resolution: Literal["high", "low"] = eqx.field(static=True)

    def __init__(
        self,
        problem: Callable[[PyTree], Scalar],
        s: ArrayLike,
        alpha: ArrayLike = 3.0,
        resolution: Literal["high", "low"] = "high",
    ):
        check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
        check_step(s)
        check_positive("alpha", alpha, "Nesterov's method has 3.")
        check_choice("resolution", resolution, ("high", "low"))
        self.problem, self.resolution = problem, resolution
        self.s, self.alpha = jnp.asarray(s, float), jnp.asarray(alpha, float)

    @property
    def time_unit(self) -> str:
        return "t = (k + alpha/2) sqrt(s)"

    @property
    def t0(self) -> Scalar:
        return 0.5 * self.alpha * self._h()

    def damping(self, t: Scalar) -> Scalar:
        # At t = 0, where V = 0 and V / t = V', the friction is moved into the weight of the gradient.
        return jnp.where(t > 0, self.alpha.astype(t.dtype) / jnp.where(t > 0, t, 1), 0)

    def hessian_damping(self, t: Scalar) -> Scalar:
        return self._h().astype(t.dtype)

    def gradient_weight(self, t: Scalar) -> Scalar:
        alpha, h = self.alpha.astype(t.dtype), self._h().astype(t.dtype)
        return jnp.where(t > 0, 1 + 0.5 * alpha * h / jnp.where(t > 0, t, 1), 1 / (1 + alpha))

    def initial_momentum(self) -> None:
        return None

    def lyapunov(
        self, t: Scalar, state: MomentumState, frozen: PyTree, minimum: PyTree, least: Scalar, kind: str
    ) -> Float[Array, ""]:
        """`t (t + (alpha/2 - 1) h)(f - f*) + |t V + (alpha - 1)(X - x*)|^2 / 2`, which does not increase for
        `alpha >= 3`; the published and the sharp one are the same."""
        time, dtype = jnp.asarray(t), least.dtype
        weight = time * (time + (0.5 * self.alpha - 1) * self._h())
        scaled = shifted(displacement(state.position, minimum), time / (self.alpha - 1), state.momentum)
        half = 0.5 * (self.alpha - 1) ** 2
        return weight.astype(dtype) * (self.loss(state, frozen) - least) + half.astype(dtype) * dot(scaled, scaled)

    def _h(self) -> Scalar:
        return jnp.sqrt(self.s) if self.resolution == "high" else jnp.zeros_like(self.s)
