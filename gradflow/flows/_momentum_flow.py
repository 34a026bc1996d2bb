"""Momentum methods with a fixed coefficient, as people train: their second-order flow."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_callable, check_positive, fail, is_concrete
from gradflow.flows._second_order import AbstractSecondOrderFlow


class MomentumFlow(AbstractSecondOrderFlow):
    """Momentum with a fixed coefficient, in the time of gradient flow.

    The flow of `w_{k+1} = w_k + beta (w_k - w_{k-1}) - eta grad f(w_k)`:

        eps K X'' + X' + grad f(X) = 0,        eps = eta / (1 - beta),    K = (1 + beta) / (2 (1 - beta))
        eps K X'' + (1 + eps beta Hess f) X' + grad f(X) = 0                for Nesterov's method

    **Time unit**: iterate `k` sits at `t = k eps`. (In `tau = k eta` it reads `eta (1 + beta)/2 X'' + (1 - beta) X' +
    grad f = 0`.) From a method started at rest the gap is of order `eps^2` once the first `1/(1 - beta)` steps or so
    are over, and of order `eps` with a small constant during these: the flow forgets its initial velocity like
    `exp(-k/K)`, the method like `beta^k`.

    **Arguments**: `problem`, a callable `params -> scalar`; `learning_rate`, positive; `momentum`, in `[0, 1)`; both
    may be traced; `nesterov`: whether the method is Nesterov's.

    The initial velocity is `-(1 - beta)/(1 + beta) grad f(x0)` for the heavy ball, whose first step from `x_{-1} = x_0`
    is plain, and `-(1 - 2 beta^2/(1 + beta)) grad f(x0)` for Nesterov's method, which starts with `1 + beta` times
    that.

    **Raises** `ValueError` for a problem that cannot be called, a learning rate that is not positive, and momentum
    outside `[0, 1)`.

    Source: the second-order equation is that of N. Qian (1999), *On the momentum term in gradient descent learning
    algorithms*; the coefficient `K` and the initial velocity come from expanding the method about `k`.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.MomentumFlow(lambda w: 0.5 * w**2, learning_rate=0.01, momentum=0.9)
    >>> rule = gf.HeavyBall(lambda w: 0.5 * w**2, 0.01, momentum=0.9)
    >>> sol, discrete = gf.solve(flow, jnp.array(1.0), [5.0]), gf.iterate(rule, jnp.array(1.0), 50)
    >>> abs(float(sol.final - discrete.final)) < 1e-3
    True
    """

    problem: Callable[[PyTree], Scalar]
    autonomous: ClassVar[bool] = True
    learning_rate: Float[Array, ""]
    momentum: Float[Array, ""]
    nesterov: bool = eqx.field(static=True)

    def __init__(
        self, problem: Callable[[PyTree], Scalar], learning_rate: ArrayLike, momentum: ArrayLike, nesterov: bool = False
    ):
        check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
        check_positive("learning_rate", learning_rate)
        check_momentum(momentum)
        self.problem, self.nesterov = problem, bool(nesterov)
        self.learning_rate, self.momentum = jnp.asarray(learning_rate, float), jnp.asarray(momentum, float)

    @property
    def time_unit(self) -> str:
        return "t = k * learning_rate / (1 - momentum)"

    @property
    def velocity_free(self) -> bool:
        return not self.nesterov

    def damping(self, t: Scalar) -> Scalar:
        return self._rate().astype(t.dtype)

    def hessian_damping(self, t: Scalar) -> Scalar:
        return self._correction().astype(t.dtype)

    def gradient_weight(self, t: Scalar) -> Scalar:
        return self._rate().astype(t.dtype)

    def initial_momentum(self) -> Scalar:
        # From X'(0) = -v grad f, the transient of the flow moves it by (1 - v) K eps grad f in all; a first step of
        # -first * eta grad f moves the iterates by (1/(1 - beta) - first) eps grad f, against gradient flow.
        beta = self.momentum
        first = 1 + beta if self.nesterov else jnp.ones_like(beta)
        speed = 1 - (1 / (1 - beta) - first) / self._ratio()
        return self._correction() - speed

    def _ratio(self) -> Scalar:
        return (1 + self.momentum) / (2 * (1 - self.momentum))

    def _rate(self) -> Scalar:
        return (1 - self.momentum) / (self.learning_rate * self._ratio())

    def _correction(self) -> Scalar:
        return self.momentum / self._ratio() if self.nesterov else jnp.zeros_like(self.momentum)


def check_momentum(momentum: ArrayLike) -> None:
    """Refuses momentum outside `[0, 1)`."""
    if not is_concrete(momentum):
        return
    value = float(np.asarray(momentum))
    if not 0 <= value < 1:
        raise fail("momentum", "lie in [0, 1)", f"{value:g}", "Typical values are 0.9 and 0.99.")
