"""The heavy ball `w_{k+1} = w_k + beta (w_k - w_{k-1}) - s grad L(w_k)`."""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Scalar

from gradflow._checks import check_callable, check_choice
from gradflow._tree import join
from gradflow.flows import AbstractFlow, HeavyBallFlow, ModifiedFlow, MomentumFlow
from gradflow.flows._momentum_flow import check_momentum
from gradflow.flows._second_order import check_strong_convexity
from gradflow.protocols import UpdateForm
from gradflow.rules._base import check_learning_rate, unknown_order
from gradflow.rules._momentum import AbstractMomentumRule


class HeavyBall(AbstractMomentumRule):
    """Gradient descent with momentum (Polyak), learning rate `s`:

        w_{k+1} = w_k + beta (w_k - w_{k-1}) - s grad L(w_k)

    with `beta = (1 - sqrt(mu s))/(1 + sqrt(mu s))` for a strong-convexity parameter `mu`, or a fixed `beta = momentum`.

    **Time unit**: with `mu`, iterate `k` sits at `t = k sqrt(s)`, the time of `HeavyBallFlow`; with fixed momentum at
    `t = k s/(1 - beta)`, that of gradient flow. The iteration is unstable for `s` beyond `2 (1 + beta) / sharpness`;
    the flows are stable for every `s`.

    **Arguments**

    - `problem`: a callable `params -> scalar`. `learning_rate`: the step size `s`, positive.
    - one of `mu`, not negative and at most `1 / s`, and `momentum`, in `[0, 1)`. All numbers may be traced.
    - `start`: the first step. `"paper"`: `-2 s/(1 + sqrt(mu s)) grad L(w_0) = -(1 + beta) s grad L(w_0)`, the default
      with `mu`; `"rest"`: `-s grad L(w_0)`, from `w_{-1} = w_0`, the default with `momentum`, as in
      `optax.sgd(s, momentum)`.

    **Raises** `ValueError` for a problem that cannot be called, numbers outside these ranges, an unknown `start`, and
    unless exactly one of `mu` and `momentum` is given; so does `flow` for an unknown order or resolution.

    Source: B. T. Polyak (1964); in this form B. Shi, S. S. Du, M. I. Jordan and W. J. Su (2018), arXiv 1810.08907.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.HeavyBall(lambda w: 0.5 * w**2, 0.1, momentum=0.5)
    >>> [round(float(w), 4) for w in gf.iterate(rule, jnp.array(1.0), 3, save_every=1).params]
    [1.0, 0.9, 0.76, 0.614]
    """

    problem: Callable[[PyTree], Scalar]
    learning_rate: Float[Array, ""]
    mu: Float[Array, ""] | None
    momentum: Float[Array, ""] | None
    start: Literal["paper", "rest"] = eqx.field(static=True)

    def __init__(
        self,
        problem: Callable[[PyTree], Scalar],
        learning_rate: ArrayLike,
        *,
        mu: ArrayLike | None = None,
        momentum: ArrayLike | None = None,
        start: Literal["paper", "rest"] | None = None,
    ):
        check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
        check_learning_rate(learning_rate)
        if (mu is None) == (momentum is None):
            given = "neither" if mu is None else "both"
            raise ValueError(f"Exactly one of the arguments `mu` and `momentum` must be given, but {given} is.")
        start = ("paper" if momentum is None else "rest") if start is None else start
        check_choice("start", start, ("paper", "rest"))
        if mu is not None:
            check_strong_convexity(mu, learning_rate)
        elif momentum is not None:
            check_momentum(momentum)
        self.problem, self.start = problem, start
        self.learning_rate = jnp.asarray(learning_rate, float)
        self.mu = None if mu is None else jnp.asarray(mu, float)
        self.momentum = None if momentum is None else jnp.asarray(momentum, float)

    @property
    def beta(self) -> Scalar:
        """The coefficient of the last step."""
        return self.coefficient()

    def time(self, k: ArrayLike) -> Float[Array, "..."]:
        unit = self.unit_of_time()
        return jnp.asarray(k, unit.dtype) * unit

    def step(self, k: Int[Array, ""], state: PyTree, frozen: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        now, before = state
        loss, gradient = jax.value_and_grad(lambda p: self.problem(join(p, frozen)))(now)
        beta, s = self.beta, self.learning_rate
        size = jnp.where((k == 0) & (self.start == "paper"), (1 + beta) * s, s)

        def move(w: Array, old: Array, g: Array) -> Array:
            return w + beta.astype(w.dtype) * (w - old) - size.astype(w.dtype) * g

        return (jax.tree_util.tree_map(move, now, before, gradient), now), loss

    def form(self) -> UpdateForm:
        return UpdateForm(self.learning_rate, self.beta, "heavy_ball")

    def flow(self, order: int = 1, resolution: Literal["high", "low"] = "high") -> AbstractFlow:
        """With `mu`: `HeavyBallFlow` of that resolution, started to match. With fixed momentum: `ModifiedFlow` of that
        order for `resolution="low"` or an order above 1, and `MomentumFlow` at order 1 and high resolution."""
        check_choice("resolution", resolution, ("high", "low"))
        if order not in self.orders:
            raise unknown_order(self, order)
        if self.mu is not None:
            start = "matched" if self.start == "paper" else "rest"
            return HeavyBallFlow(self.problem, self.mu, self.learning_rate, resolution, start)
        assert self.momentum is not None  # one of the two is given
        if order == 1 and resolution == "high" and self.start == "rest":
            return MomentumFlow(self.problem, self.learning_rate, self.momentum)
        first = 1.0 if self.start == "rest" else 1 + self.momentum
        return ModifiedFlow(self.problem, self.learning_rate, self.momentum, order=order, first_step=first)
