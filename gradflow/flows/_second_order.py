"""Second-order flows `X'' + a(t) X' + b(t) Hess f X' + c(t) grad f = 0`, integrated without Hessians."""

import abc
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_callable, check_finite, check_not_negative, check_positive, fail, is_concrete
from gradflow._conserved import Conserved
from gradflow._tree import join, split
from gradflow.flows._base import AbstractFlow
from gradflow.flows._gradient_flow import check_scalar, field_kinks


class MomentumState(NamedTuple):
    """Parameters `X`, momentum `V = X' + b grad f(X)`, and the energy dissipated so far."""

    position: PyTree
    momentum: PyTree
    dissipated: Float[Array, ""]


class AbstractSecondOrderFlow(AbstractFlow):
    """`X'' + a(t) X' + b(t) Hess f(X) X' + c(t) grad f(X) = 0`, in first-order form without the Hessian:

        X' = V - b grad f(X)
        V' = -a V - (c - b' - a b) grad f(X)

    which is the same flow, with `b'` the derivative of `b`. An evaluation costs one gradient. The form needs no second
    derivative, so it also holds for ReLU, where `Hess f X'` misses the jumps of the gradient.

    The state carries how much of `f + |V|^2 / 2` is dissipated, at no extra gradient; with what is left it is constant
    on the exact flow of any problem, and its drift stands in the `Solution` as `"energy"`.
    """

    problem: Callable[[PyTree], Scalar]
    oscillatory: ClassVar[bool] = True
    autonomous: ClassVar[bool] = False
    """Whether the coefficients are constant."""

    @abc.abstractmethod
    def damping(self, t: Scalar) -> Scalar:
        """The coefficient `a(t)` of `X'`."""

    @abc.abstractmethod
    def hessian_damping(self, t: Scalar) -> Scalar:
        """The coefficient `b(t)` of `Hess f X'`."""

    @abc.abstractmethod
    def gradient_weight(self, t: Scalar) -> Scalar:
        """The coefficient `c(t)` of `grad f`."""

    @abc.abstractmethod
    def initial_momentum(self) -> Scalar | None:
        """Its coefficient, `V(t0) = initial_momentum * grad f(x0)`; `None`: at rest, which saves a gradient."""

    @property
    def start_cost(self) -> tuple[int, int]:
        return (0, 0) if self.initial_momentum() is None else (1, 0)

    @property
    def velocity_free(self) -> bool:
        """Whether it is `X'' = -a X' + F(X)` with constant `a`, as `gradflow.solvers.Nystrom` asks for."""
        return False

    def coefficients(self, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """`a`, `b` and `c - b' - a b` at a time."""
        a, c = self.damping(t), self.gradient_weight(t)
        b, rate = jax.jvp(self.hessian_damping, (t,), (jnp.ones_like(t),))
        return a, b, c - rate - a * b

    def init(self, trainable: PyTree, frozen: PyTree) -> MomentumState:
        initial_momentum = self.initial_momentum()
        zero = jnp.zeros((), jnp.result_type(*jax.tree_util.tree_leaves(trainable)))
        if initial_momentum is None:
            return MomentumState(trainable, jax.tree_util.tree_map(jnp.zeros_like, trainable), zero)
        gradient = jax.grad(lambda p: self.problem(join(p, frozen)))(trainable)
        return MomentumState(trainable, scaled(initial_momentum, gradient), zero)

    def vector_field(self, t: Scalar, state: MomentumState, frozen: PyTree) -> MomentumState:
        gradient = jax.grad(lambda p: self.problem(join(p, frozen)))(state.position)
        a, b, g = self.coefficients(t)
        velocity = jax.tree_util.tree_map(
            lambda v, f: v - b.astype(v.dtype) * f.astype(v.dtype), state.momentum, gradient
        )
        force = jax.tree_util.tree_map(
            lambda v, f: -a.astype(v.dtype) * v - g.astype(v.dtype) * f.astype(v.dtype), state.momentum, gradient
        )
        squares, works, slopes = (
            dot(state.momentum, state.momentum),
            dot(state.momentum, gradient),
            dot(gradient, gradient),
        )
        a, b, g = (one.astype(state.dissipated.dtype) for one in (a, b, g))
        dissipated = a * squares + (g - 1) * works + b * slopes
        return MomentumState(velocity, force, dissipated.astype(state.dissipated.dtype))

    def dissipation(self, t: Scalar, squares: Scalar, works: Scalar) -> Scalar:
        """The derivative of `dissipated` without Hessian damping, from `|X'|^2` and `X' . F`, `F = -c grad f`."""
        a, c = (one.astype(squares.dtype) for one in (self.damping(t), self.gradient_weight(t)))
        return a * squares + (1 / c - 1) * works

    def kinks(self, trainable: PyTree, frozen: PyTree) -> tuple[str, ...] | None:
        return field_kinks(self.problem, trainable, frozen)

    def params(self, state: MomentumState) -> PyTree:
        return state.position

    def controlled(self, state: MomentumState) -> PyTree:
        return state.position, state.momentum

    def loss(self, state: MomentumState, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(join(state.position, frozen))

    def conserved(self, state: MomentumState, frozen: PyTree) -> dict[str, Conserved]:
        loss, motion = self.loss(state, frozen), 0.5 * dot(state.momentum, state.momentum)
        return {
            "energy": Conserved(loss + motion + state.dissipated, jnp.abs(loss) + motion + jnp.abs(state.dissipated))
        }

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        check_scalar(self.problem, join(trainable, frozen))


Coefficient = Callable[[Scalar], ArrayLike] | Float[Array, ""]


class SecondOrderFlow(AbstractSecondOrderFlow):
    """Any second-order flow, with coefficients of one's own:

        X'' + a(t) X' + b(t) Hess f(X) X' + c(t) grad f(X) = 0,     X(t0) = x0,     X'(t0) = velocity * grad f(x0)

    **Time unit**: that of the coefficients.

    **Arguments**

    - `problem`: a callable `params -> scalar`.
    - `damping`, `hessian_damping`, `gradient_weight`: `a`, `b` and `c`, each a number, or a function of time that JAX
      can trace and, for `b`, differentiate once.
    - `velocity`: factor of the gradient in the initial velocity; usually negative or zero.
    - `initial_velocity`: the initial velocity itself instead, a pytree like the parameters that flow.
    - `t0`: time at which it starts; the coefficients have to be finite there.

    **Raises** `ValueError` for a problem that cannot be called, numbers that are not finite, and something that is
    neither a number nor a function.

    Source: B. Shi, S. S. Du, M. I. Jordan and W. J. Su (2018), arXiv 1810.08907, whose flows are of this form.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.SecondOrderFlow(lambda w: 0.5 * w**2, damping=0.0)
    >>> sol = gf.solve(flow, jnp.array(1.0), [jnp.pi / 3], rtol=1e-8)
    >>> round(float(sol.final), 6)
    0.5
    """

    problem: Callable[[PyTree], Scalar]
    a: Coefficient
    b: Coefficient
    c: Coefficient
    velocity: Float[Array, ""]
    initial_velocity: PyTree | None
    start_time: Float[Array, ""]

    def __init__(
        self,
        problem: Callable[[PyTree], Scalar],
        damping: Callable[[Scalar], ArrayLike] | ArrayLike,
        hessian_damping: Callable[[Scalar], ArrayLike] | ArrayLike = 0.0,
        gradient_weight: Callable[[Scalar], ArrayLike] | ArrayLike = 1.0,
        *,
        velocity: ArrayLike = 0.0,
        initial_velocity: PyTree | None = None,
        t0: ArrayLike = 0.0,
    ):
        check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
        self.problem = problem
        self.a = _coefficient("damping", damping)
        self.b = _coefficient("hessian_damping", hessian_damping)
        self.c = _coefficient("gradient_weight", gradient_weight)
        self.velocity = _number("velocity", velocity)
        self.initial_velocity = None if initial_velocity is None else split(initial_velocity)[0]
        check_finite("initial_velocity", self.initial_velocity)
        self.start_time = _number("t0", t0)

    @property
    def t0(self) -> Scalar:
        return self.start_time

    def damping(self, t: Scalar) -> Scalar:
        return _at(self.a, t)

    def hessian_damping(self, t: Scalar) -> Scalar:
        return _at(self.b, t)

    def gradient_weight(self, t: Scalar) -> Scalar:
        return _at(self.c, t)

    def initial_momentum(self) -> Scalar:
        given = self.velocity if self.initial_velocity is None else jnp.zeros_like(self.velocity)
        return given + self.hessian_damping(self.start_time)

    def init(self, trainable: PyTree, frozen: PyTree) -> MomentumState:
        start = super().init(trainable, frozen)
        if self.initial_velocity is None:
            return start
        momentum = jax.tree_util.tree_map(lambda a, b: a + b.astype(a.dtype), start.momentum, self.initial_velocity)
        return MomentumState(start.position, momentum, start.dissipated)

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        super().check(trainable, frozen)
        if self.initial_velocity is None:
            return
        shapes = [
            [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
            for tree in (trainable, self.initial_velocity)
        ]
        if shapes[0] != shapes[1]:
            wanted = f"have the shapes of the parameters that flow, {shapes[0]}"
            raise fail("initial_velocity", wanted, f"of {shapes[1]}")


def check_strong_convexity(mu: ArrayLike, s: ArrayLike) -> None:
    """Refuses a step size that is not positive, and a parameter `mu` that is negative or larger than `1 / s`.

    The strong-convexity parameter is at most the sharpness, and methods with it are meant for `s <= 1 / sharpness`;
    beyond `mu = 1 / s` their momentum is negative.
    """
    check_step(s)
    check_not_negative("mu", mu, "It is the strong-convexity parameter: a bound from below on Hessian eigenvalues.")
    if not is_concrete((mu, s)) or jnp.ndim(mu) or jnp.ndim(s):
        return
    convexity, step = float(np.asarray(mu)), float(np.asarray(s))
    if convexity * step > 1:
        advice = "The strong-convexity parameter is at most the sharpness, and `s` at most one over that."
        raise fail("mu", f"be at most 1 / s = {1 / step:g}", f"{convexity:g}", advice)


def check_step(s: ArrayLike) -> None:
    check_positive("s", s, "It is the step size of the discrete method, at most about 1 / sharpness.")


def scaled(factor: Scalar, tree: PyTree) -> PyTree:
    """A pytree times a number, in the types of its leaves."""
    return jax.tree_util.tree_map(lambda leaf: factor.astype(leaf.dtype) * leaf, tree)


def displacement(position: PyTree, minimum: PyTree) -> PyTree:
    """How far a position is from the minimum."""
    return jax.tree_util.tree_map(jnp.subtract, position, minimum)


def shifted(tree: PyTree, factor: Scalar, other: PyTree) -> PyTree:
    """`tree + factor * other`, in the types of the leaves."""
    return jax.tree_util.tree_map(lambda a, b: a + factor.astype(a.dtype) * b, tree, other)


def dot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    parts = jax.tree_util.tree_map(lambda x, y: jnp.sum(x * y), a, b)
    return jnp.sum(jnp.stack(jax.tree_util.tree_leaves(parts)))


def _coefficient(name: str, value: Callable[[Scalar], ArrayLike] | ArrayLike) -> Coefficient:
    return value if callable(value) else _number(name, value)


def _number(name: str, value: ArrayLike) -> Float[Array, ""]:
    try:
        number = jnp.asarray(value, float)
    except (TypeError, ValueError) as error:
        raise fail(name, "be a number or a function of time", f"of type {type(value).__name__}") from error
    if number.shape != ():
        raise fail(name, "be a scalar", f"of shape {number.shape}", "Use jax.vmap over several.")
    check_finite(name, number)
    return number


def _at(coefficient: Coefficient, t: Scalar) -> Scalar:
    value = coefficient(t) if callable(coefficient) else coefficient
    return jnp.asarray(value, t.dtype)
