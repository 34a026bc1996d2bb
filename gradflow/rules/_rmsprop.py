"""RMSProp: descent over the root of an average of squared gradients, entry by entry or as a whole."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Scalar

from gradflow._checks import check_callable, check_not_negative, fail, is_concrete
from gradflow._tree import join
from gradflow.flows import AbstractFlow
from gradflow.flows._gradient_flow import check_scalar
from gradflow.protocols import SecondMoment, UpdateForm
from gradflow.rules._base import AbstractRule, AbstractRuleOfDescentTime, check_learning_rate


class AbstractRMSProp(AbstractRuleOfDescentTime):
    """What the two forms share; the state holds the parameters and the memory."""

    problem: eqx.AbstractVar[Callable[[PyTree], Scalar]]
    learning_rate: eqx.AbstractVar[Float[Array, ""]]
    memory: eqx.AbstractVar[SecondMoment]

    def init(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        return trainable, self.memory.start(trainable)

    def step(self, k: Int[Array, ""], state: PyTree, frozen: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        trainable, memory = state
        loss, gradient = jax.value_and_grad(lambda p: self.problem(join(p, frozen)))(trainable)
        memory = self.memory.after(memory, gradient)
        scale = self.memory.scale(memory, k)
        scale = jax.tree_util.tree_map(lambda _: scale, gradient) if self.memory.scalar else scale

        def move(w: Array, g: Array, d: Array) -> Array:
            return w - self.learning_rate.astype(w.dtype) * g / d.astype(w.dtype)

        return (jax.tree_util.tree_map(move, trainable, gradient, scale), memory), loss

    def params(self, state: PyTree) -> PyTree:
        return state[0]

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(join(state[0], frozen))

    def form(self) -> UpdateForm:
        return UpdateForm(self.learning_rate, memory=self.memory)

    def flow(self, order: int = 1) -> AbstractFlow:
        advice = "gradflow.CentralFlow(rule) is the flow of its averages."
        raise fail("order", "name a known continuous limit", f"{order!r}, and none is known", advice)

    def with_learning_rate(self, learning_rate: float | Scalar) -> AbstractRule:
        check_learning_rate(learning_rate)
        return eqx.tree_at(lambda rule: rule.learning_rate, self, jnp.asarray(learning_rate, float))

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        check_scalar(self.problem, join(trainable, frozen))


class RMSProp(AbstractRMSProp):
    """RMSProp with learning rate `eta`, by the conventions of `optax.rmsprop`:

        nu_{k+1} = decay nu_k + (1 - decay) g_k^2,      theta_{k+1} = theta_k - eta g_k / sqrt(nu_{k+1} + eps)

    with `g_k = grad L(theta_k)` and all operations entry by entry.

    **Time unit**: iterate `k` sits at `t = k eta`. Unstable where `eta` times the largest eigenvalue of
    `D^-1 H`, `D = sqrt(nu + eps)`, stays above 2: see `gradflow.theory.stability_threshold`.

    **Arguments**

    - `problem`: a callable `params -> scalar`. `learning_rate`: positive, may be traced.
    - `decay`: in `[0, 1)`. `eps`: not negative, added inside the root, or to the root unless `eps_in_sqrt`.
    - `initial_scale`: what `nu` starts from, not negative. With zero the first step is one of size
      `eta / sqrt(1 - decay)` in every entry, unless `bias_correction` divides `nu` by `1 - decay^(k+1)`.

    **Raises** `ValueError` for a problem that cannot be called and numbers outside these ranges; `flow` always does.

    Source: T. Tieleman and G. Hinton (2012), lecture 6.5 of a course on neural networks.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.RMSProp(lambda w: 0.5 * jnp.sum(w**2), 0.1, decay=0.75)
    >>> [round(float(w), 3) for w in gf.iterate(rule, jnp.array([1.0, 10.0]), 1).final]
    [0.8, 9.8]
    """

    problem: Callable[[PyTree], Scalar]
    learning_rate: Float[Array, ""]
    memory: SecondMoment

    def __init__(
        self,
        problem: Callable[[PyTree], Scalar],
        learning_rate: ArrayLike,
        decay: ArrayLike = 0.9,
        eps: ArrayLike = 1e-8,
        initial_scale: ArrayLike = 0.0,
        eps_in_sqrt: bool = True,
        bias_correction: bool = False,
    ):
        check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
        check_learning_rate(learning_rate)
        self.problem, self.learning_rate = problem, jnp.asarray(learning_rate, float)
        self.memory = second_moment(decay, eps, initial_scale, eps_in_sqrt, bias_correction, scalar=False)


class ScalarRMSProp(AbstractRMSProp):
    """RMSProp with one number for all parameters, learning rate `eta`:

        nu_{k+1} = decay nu_k + (1 - decay) |g_k|^2,    theta_{k+1} = theta_k - eta g_k / sqrt(nu_{k+1} + eps)

    **Time unit**: iterate `k` sits at `t = k eta`. Unstable where `eta sharpness / sqrt(nu + eps)` stays above 2.

    **Arguments**, **Raises**: as for `RMSProp`, with which it agrees for a single parameter.

    Source: J. Cohen et al. (2024), arXiv 2410.24206, there with `decay` as `beta_2` and without `eps`.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.ScalarRMSProp(lambda w: 0.5 * jnp.sum(w**2), 0.1, decay=0.75)
    >>> [round(float(w), 3) for w in gf.iterate(rule, jnp.array([3.0, 4.0]), 1).final]
    [2.88, 3.84]
    """

    problem: Callable[[PyTree], Scalar]
    learning_rate: Float[Array, ""]
    memory: SecondMoment

    def __init__(
        self,
        problem: Callable[[PyTree], Scalar],
        learning_rate: ArrayLike,
        decay: ArrayLike = 0.9,
        eps: ArrayLike = 1e-8,
        initial_scale: ArrayLike = 0.0,
        eps_in_sqrt: bool = True,
        bias_correction: bool = False,
    ):
        check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
        check_learning_rate(learning_rate)
        self.problem, self.learning_rate = problem, jnp.asarray(learning_rate, float)
        self.memory = second_moment(decay, eps, initial_scale, eps_in_sqrt, bias_correction, scalar=True)


def second_moment(
    decay: ArrayLike, eps: ArrayLike, initial_scale: ArrayLike, eps_in_sqrt: bool, bias_correction: bool, scalar: bool
) -> SecondMoment:
    """The memory of these constants, checked; they are named as optax names them."""
    check_not_negative("decay", decay)
    if is_concrete(decay) and np.any(np.asarray(decay) >= 1):
        raise fail("decay", "lie in [0, 1)", f"{np.max(decay):g}", "Typical values are 0.9 and 0.99.")
    check_not_negative("eps", eps)
    check_not_negative("initial_scale", initial_scale)
    zero, eps = jnp.zeros((), float), jnp.asarray(eps, float)
    inside, outside = (eps, zero) if eps_in_sqrt else (zero, eps)
    decay, initial = jnp.asarray(decay, float), jnp.asarray(initial_scale, float)
    return SecondMoment(decay, inside, outside, initial, scalar, bool(bias_correction))
