"""Modified equations: first-order flows that follow gradient descent and momentum methods to higher order."""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_callable, check_choice, check_finite, check_positive, fail
from gradflow._tree import join
from gradflow.flows._base import AbstractFlow
from gradflow.flows._gradient_flow import check_scalar, field_kinks
from gradflow.flows._momentum_flow import check_momentum
from gradflow.flows._second_order import shifted


class ModifiedFlow(AbstractFlow):
    """The flow that descent or momentum follows to order 1, 2 or 3.

    For learning rate `eta` and fixed momentum `beta`:

        X' = -g - eps k H g - eps^2 (p H^2 g + q T)           eps = eta / (1 - beta),    K = (1 + beta) / (2 (1 - beta))
        g = grad f(X),    H = Hess f(X),    T = f'''(X)[g, g]

        heavy ball, gradient descent:    k = K,           p = 2 K^2 - 1/6,                 q = K^2 - 1/6
        Nesterov:                        k = K - beta,    p = (2K - beta) k - beta/2 - 1/6,   q = K k - beta/2 - 1/6

    with the terms up to `eps^(order - 1)`. At order 2 it is gradient flow of `f + (eps k / 2) |grad f|^2`. Gradient
    descent, `beta = 0`, has `k = 1/2`, `p = 1/3`, `q = 1/12`.

    **Time unit**: iterate `k` sits at `t = k eps`. The gap to the iterates at a fixed time is of order `eps^order`, for
    momentum once the transient of about `1/(1 - beta)` steps is over: the iterates approach the flow like `beta^k`.

    **Arguments**

    - `problem`: a callable `params -> scalar`, differentiable `order` times where the run goes. `learning_rate`:
      positive; `momentum`: in `[0, 1)`; both may be traced. `nesterov`: whether the method is Nesterov's.
    - `order`: 1, 2 or 3. An evaluation takes one gradient, and one Hessian-vector product at order 2, three at order 3
      (the third derivative is the directional derivative of such a product, and counts as one).
    - `start`: `"matched"` starts at the point that the iterates, from `x0` at rest, seem to come from,
      `X(0) = x0 + eps (c1 g + eps c2 H g)` with as many terms as `order - 1`; `"plain"` at `x0` itself, which suits
      iterates whose past lies on the flow. Without momentum the two are the same. With momentum and a plain start the
      gap is of first order at any `order`.
    - `first_step`: size of the method's first step over that of a plain one; by default 1, and `1 + beta` for Nesterov.

    **Raises** `ValueError` for a problem that cannot be called, a learning rate that is not positive, momentum outside
    `[0, 1)`, a `first_step` that is not finite, and another `order` or `start`.

    Source: D. Barrett and B. Dherin (2020), arXiv 2009.11162, for gradient descent at order 2; the rest was worked out
    by matching powers of `eps`, here, and is confirmed by the measured orders.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.ModifiedFlow(lambda w: 0.5 * w**2, learning_rate=0.1, order=3)
    >>> exact = gf.iterate(gf.GradientDescent(lambda w: 0.5 * w**2, 0.1), jnp.array(1.0), 10).final
    >>> abs(float(gf.solve(flow, jnp.array(1.0), [1.0], rtol=1e-7).final - exact)) < 2e-4
    True
    """

    problem: Callable[[PyTree], Scalar]
    learning_rate: Float[Array, ""]
    momentum: Float[Array, ""]
    first_step: Float[Array, ""]
    nesterov: bool = eqx.field(static=True)
    order: int = eqx.field(static=True)
    start: Literal["matched", "plain"] = eqx.field(static=True)

    def __init__(
        self,
        problem: Callable[[PyTree], Scalar],
        learning_rate: ArrayLike,
        momentum: ArrayLike = 0.0,
        nesterov: bool = False,
        order: int = 2,
        start: Literal["matched", "plain"] = "matched",
        first_step: ArrayLike | None = None,
    ):
        check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
        check_positive("learning_rate", learning_rate)
        check_momentum(momentum)
        if order not in (1, 2, 3):
            raise fail("order", "be 1, 2 or 3", repr(order))
        check_choice("start", start, ("matched", "plain"))
        check_finite("first_step", first_step)
        self.problem, self.nesterov, self.order, self.start = problem, bool(nesterov), int(order), start
        self.learning_rate, self.momentum = jnp.asarray(learning_rate, float), jnp.asarray(momentum, float)
        plain = 1 + self.momentum if nesterov else 1.0
        self.first_step = jnp.asarray(plain if first_step is None else first_step, float)

    @property
    def symmetric_jacobian(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """At order 3 the flow is no longer a gradient flow."""
        return self.order <= 2

    @property
    def time_unit(self) -> str:
        return "t = k * learning_rate / (1 - momentum)"

    @property
    def products_per_evaluation(self) -> int:
        return (0, 1, 3)[self.order - 1]

    @property
    def start_cost(self) -> tuple[int, int]:
        if self.start == "plain" or self.order == 1:
            return 0, 0
        return 1, self.order - 2

    def init(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        if self.start_cost == (0, 0):
            return trainable
        beta, first = self.momentum, self.first_step
        eps, k = self._eps(), self._factors()[0]
        gradient = self._gradient(frozen)
        g = gradient(trainable)
        c = first - 1 / (1 - beta)
        displaced = shifted(trainable, -eps * c, g)
        if self.order == 2:
            return displaced
        damped = beta**2 if self.nesterov else beta
        _, hg = jax.jvp(gradient, (trainable,), (g,))
        # The method's deviation from the flow is (1 + j eps q H) beta^j C at step j, with q = beta for Nesterov, else
        # 1; this and the flow from X(0) = x0 - C have to add up to the first step.
        second = ((1 + damped) * c - (k - 0.5)) / (1 - beta)
        return shifted(displaced, -(eps**2) * second, hg)

    def vector_field(self, t: Scalar, state: PyTree, frozen: PyTree) -> PyTree:
        gradient = self._gradient(frozen)
        if self.order == 1:
            return jax.tree_util.tree_map(jnp.negative, gradient(state))
        eps, (k, p, q) = self._eps(), self._factors()
        if self.order == 2:
            g = gradient(state)
            _, hg = jax.jvp(gradient, (state,), (g,))
            return shifted(jax.tree_util.tree_map(jnp.negative, g), -eps * k, hg)
        g = gradient(state)

        def along(x: PyTree) -> PyTree:
            return jax.jvp(gradient, (x,), (g,))[1]

        hg, third = jax.jvp(along, (state,), (g,))
        _, hhg = jax.jvp(gradient, (state,), (hg,))
        field = shifted(jax.tree_util.tree_map(jnp.negative, g), -eps * k, hg)
        return shifted(shifted(field, -(eps**2) * p, hhg), -(eps**2) * q, third)

    def kinks(self, trainable: PyTree, frozen: PyTree) -> tuple[str, ...] | None:
        return field_kinks(self.problem, trainable, frozen)

    def params(self, state: PyTree) -> PyTree:
        return state

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(join(state, frozen))

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        check_scalar(self.problem, join(trainable, frozen))

    def _gradient(self, frozen: PyTree) -> Callable[[PyTree], PyTree]:
        return jax.grad(lambda p: self.problem(join(p, frozen)))

    def _eps(self) -> Scalar:
        return self.learning_rate / (1 - self.momentum)

    def _factors(self) -> tuple[Scalar, Scalar, Scalar]:
        beta = self.momentum
        big = (1 + beta) / (2 * (1 - beta))
        extra = beta if self.nesterov else jnp.zeros_like(beta)
        k = big - extra
        return k, (2 * big - extra) * k - extra / 2 - 1 / 6, big * k - extra / 2 - 1 / 6
