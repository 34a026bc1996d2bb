"""Nesterov's method `v_{k+1} = w_k - s grad L(w_k)`, `w_{k+1} = v_{k+1} + beta_k (v_{k+1} - v_k)`."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Scalar

from gradflow._checks import check_callable, check_choice, check_positive, fail
from gradflow._tree import join
from gradflow.flows import AbstractFlow, ModifiedFlow, MomentumFlow, NesterovConvexFlow, NesterovFlow
from gradflow.flows._momentum_flow import check_momentum
from gradflow.flows._second_order import check_strong_convexity
from gradflow.protocols import UpdateForm
from gradflow.rules._base import check_learning_rate, unknown_order
from gradflow.rules._momentum import AbstractMomentumRule


class Nesterov(AbstractMomentumRule):
    """Nesterov's accelerated gradient descent, learning rate `s`, from `v_0 = w_0`:

        v_{k+1} = w_k - s grad L(w_k),        w_{k+1} = v_{k+1} + beta_k (v_{k+1} - v_k)

    with `beta_k = (1 - sqrt(mu s))/(1 + sqrt(mu s))` for a strong-convexity parameter `mu`; a fixed
    `beta_k = momentum`, as in `optax.sgd(s, momentum, nesterov=True)`; or, with neither, `beta_k = k/(k + alpha)`, the
    method for convex functions. The parameters of iterate `k` are `w_k`, where the gradient is taken.

    **Time unit**: with `mu`, iterate `k` sits at `t = k sqrt(s)`, the time of `NesterovFlow`; with fixed momentum at
    `t = k s/(1 - beta)`, that of gradient flow; with neither at `t = (k + alpha/2) sqrt(s)`, that of
    `NesterovConvexFlow`. The iteration is unstable for `s` beyond `2 (1 + beta)/(1 + 2 beta) / sharpness`, about 4/3
    over the sharpness; the flows are stable for every `s`.

    **Arguments**

    - `problem`: a callable `params -> scalar`. `learning_rate`: the step size `s`, positive.
    - at most one of `mu`, not negative and at most `1 / s`, and `momentum`, in `[0, 1)`. `alpha`: positive, for
      `k/(k + alpha)`. All numbers may be traced.

    **Raises** `ValueError` for a problem that cannot be called, numbers outside these ranges, and if both `mu` and
    `momentum` are given; so does `flow` for an unknown order or resolution.

    Source: Y. Nesterov (1983, 2004); in this form B. Shi, S. S. Du, M. I. Jordan and W. J. Su (2018), arXiv 1810.08907.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.Nesterov(lambda w: 0.5 * w**2, 0.1, momentum=0.5)
    >>> [round(float(w), 4) for w in gf.iterate(rule, jnp.array(1.0), 2, save_every=1).params]
    [1.0, 0.85, 0.6975]
    """

    problem: Callable[[PyTree], Scalar]
    learning_rate: Float[Array, ""]
    mu: Float[Array, ""] | None
    momentum: Float[Array, ""] | None
    alpha: Float[Array, ""]

    def __init__(
        self,
        problem: Callable[[PyTree], Scalar],
        learning_rate: ArrayLike,
        *,
        mu: ArrayLike | None = None,
        momentum: ArrayLike | None = None,
        alpha: ArrayLike = 3.0,
    ):
        check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
        check_learning_rate(learning_rate)
        check_positive("alpha", alpha, "Nesterov's method has 3.")
        if mu is not None and momentum is not None:
            raise fail("momentum", "be None when `mu` is given", repr(momentum), "Either decides on the coefficient.")
        if mu is not None:
            check_strong_convexity(mu, learning_rate)
        if momentum is not None:
            check_momentum(momentum)
        self.problem = problem
        self.learning_rate, self.alpha = jnp.asarray(learning_rate, float), jnp.asarray(alpha, float)
        self.mu = None if mu is None else jnp.asarray(mu, float)
        self.momentum = None if momentum is None else jnp.asarray(momentum, float)

    @property
    def convex(self) -> bool:
        """Whether the coefficient is `k/(k + alpha)`."""
        return self.mu is None and self.momentum is None

    def beta(self, k: ArrayLike) -> Scalar:
        """The coefficient of step `k`."""
        if self.convex:
            count = jnp.asarray(k, self.alpha.dtype)
            return count / (count + self.alpha)
        return self.coefficient()

    @property
    def time_unit(self) -> str:
        return "t = (k + alpha/2) sqrt(s)" if self.convex else super().time_unit

    def time(self, k: ArrayLike) -> Float[Array, "..."]:
        shift = 0.5 * self.alpha if self.convex else 0.0
        unit = self.unit_of_time()
        return (jnp.asarray(k, unit.dtype) + shift) * unit

    def step(self, k: Int[Array, ""], state: PyTree, frozen: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        w, v = state
        loss, gradient = jax.value_and_grad(lambda p: self.problem(join(p, frozen)))(w)
        beta = self.beta(k)
        descended = jax.tree_util.tree_map(lambda p, g: p - self.learning_rate.astype(p.dtype) * g, w, gradient)
        ahead = jax.tree_util.tree_map(lambda new, old: new + beta.astype(new.dtype) * (new - old), descended, v)
        return (ahead, descended), loss

    def form(self) -> UpdateForm:
        beta = jnp.ones_like(self.alpha) if self.convex else self.coefficient()  # k/(k + alpha) tends to one
        return UpdateForm(self.learning_rate, beta, "nesterov")

    def flow(self, order: int = 1, resolution: Literal["high", "low"] = "high") -> AbstractFlow:
        """With `mu` or neither: `NesterovFlow` or `NesterovConvexFlow` of that resolution, started to match. With fixed
        momentum: `ModifiedFlow` of that order for `resolution="low"` or an order above 1, and `MomentumFlow` at order 1
        and high resolution."""
        check_choice("resolution", resolution, ("high", "low"))
        if order not in self.orders:
            raise unknown_order(self, order)
        if self.mu is not None:
            return NesterovFlow(self.problem, self.mu, self.learning_rate, resolution)
        if self.momentum is None:
            return NesterovConvexFlow(self.problem, self.learning_rate, self.alpha, resolution)
        if order == 1 and resolution == "high":
            return MomentumFlow(self.problem, self.learning_rate, self.momentum, nesterov=True)
        return ModifiedFlow(self.problem, self.learning_rate, self.momentum, nesterov=True, order=order)
