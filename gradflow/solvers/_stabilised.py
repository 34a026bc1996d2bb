"""What stabilised explicit Runge-Kutta methods share: state, spectral radius, number of stages, cost.

A method with `s` stages is stable for real eigenvalues within `[-limit(s), 0] / h`, with `limit(s) ~ s^2`: a step of
length `h` on a field of spectral radius `rho` takes about `sqrt(h rho)` evaluations instead of `h rho`.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import AbstractVar
from jaxtyping import Array, ArrayLike, Bool, Int, PyTree, Scalar

from gradflow._tree import Extents
from gradflow.solvers._method import PaddedTerm
from gradflow.solvers._spectral_radius import estimate_spectral_radius

SAFETY = 1.2
"""By how much an estimated spectral radius is enlarged: it is a lower bound, and it ages."""
STEPS_BEFORE_ESTIMATE = 4
"""Nonstiff steps before the first estimate of the spectral radius, in `gradflow.solve`."""
NONSTIFF_STEP_RATIO = 1.5
"""How much longer a nonstiff step is for the same error."""


class StabilisedState(eqx.Module):
    """What a stabilised method keeps from step to step."""

    field: PyTree  # f at the start of the step, where `known`: the last evaluation of the step before
    known: Bool[Array, ""]
    radius: Scalar  # bound on the spectral radius, safety factor included; zero before the first estimate
    direction: PyTree  # unit vector that the power method ended with
    age: Int[Array, ""]  # steps since the estimate
    product: Scalar  # of step and spectral radius, in the last attempt
    evaluations: Int[Array, ""]  # of the field, since `init`, those of the power method included


class AbstractStabilised(diffrax.AbstractAdaptiveSolver[StabilisedState]):
    """A stabilised explicit method: subclasses say how far `s` stages reach and how they are computed.

    The last evaluation of a step is the first of the next one, so dense output is a cubic Hermite polynomial with
    exact derivatives at both ends, at no cost.
    """

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar = diffrax.ThirdOrderHermitePolynomialInterpolation

    nonstiff: ClassVar[float] = 0.0
    """`h rho` up to which steps are taken by a nonstiff method, for which the spectral radius hardly matters."""

    spectral_radius: AbstractVar[Callable[[Scalar, PyTree, PyTree], Scalar] | None]
    refresh: AbstractVar[int]
    max_stages: AbstractVar[int | None]
    bounded: AbstractVar[bool]

    @abc.abstractmethod
    def stages(self, product: Scalar, max_stages: int) -> Int[Array, ""]:
        """The fewest stages, of at most `most`, that are stable for `h rho = product`."""

    @abc.abstractmethod
    def stability_limit(self, max_stages: int) -> float:
        """The largest `h rho` for which at most `most` stages suffice."""

    @abc.abstractmethod
    def advance(
        self,
        field: Callable[[Scalar, PyTree], PyTree],
        y: PyTree,
        f: PyTree,
        h: Scalar,
        product: Scalar,
        stages: Int[Array, ""],
    ) -> tuple[PyTree, PyTree, PyTree]:
        """The state after a step, the field there and the error, with `field(c, y) = f(t + c h, y)`, `product = h rho`.

        Evaluates the field once per stage; no stages, no evaluations, and no meaning to what is returned.
        """

    def init(
        self, terms: diffrax.AbstractTerm, t0: ArrayLike, t1: ArrayLike, y0: PyTree, args: PyTree
    ) -> StabilisedState:
        """Evaluates nothing: the first step does, and counts it."""
        del terms, t0, t1, args
        zeros = jax.tree_util.tree_map(jnp.zeros_like, y0)
        return StabilisedState(
            field=zeros,
            known=jnp.asarray(False),
            radius=jnp.zeros((), _real_dtype(y0)),
            direction=zeros,
            age=jnp.asarray(self.refresh),
            product=jnp.zeros((), _real_dtype(y0)),
            evaluations=jnp.asarray(0),
        )

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: ArrayLike,
        t1: ArrayLike,
        y0: PyTree,
        args: PyTree,
        solver_state: StabilisedState,
        made_jump: Bool[ArrayLike, ""],
    ) -> tuple[PyTree, PyTree, dict[str, PyTree], StabilisedState, diffrax.RESULTS]:
        """One attempt. Where the cap on the stages forbids it, state and error are not finite, and nothing is spent."""
        begin, end = jnp.asarray(t0), jnp.asarray(t1)
        length, h = end - begin, jnp.asarray(terms.contr(begin, end)).astype(_real_dtype(y0))

        def field(c: Scalar, y: PyTree) -> PyTree:
            return terms.vf(begin + c.astype(length.dtype) * length, y, args)

        f_given = solver_state.known & ~jnp.asarray(made_jump)
        extents = terms.extents if isinstance(terms, PaddedTerm) else None
        state = self._survey(field, begin, y0, args, h, solver_state, f_given, extents)
        max_stages = self._most_stages(h.dtype)
        product = jnp.abs(jax.lax.stop_gradient(h)) * state.radius
        fits = product <= self.stability_limit(max_stages)
        stages = jnp.where(fits, self.stages(product, max_stages), 0)
        y1, f1, error = self.advance(field, y0, state.field, h, product, stages)
        nan, infinite = jnp.asarray(jnp.nan), jnp.asarray(jnp.inf)
        y1 = jax.tree_util.tree_map(lambda x: jnp.where(fits, x, nan.astype(x.dtype)), y1)
        error = jax.tree_util.tree_map(lambda x: jnp.where(fits, x, infinite.astype(x.dtype)), error)
        slopes = [jax.tree_util.tree_map(lambda x: h.astype(x.dtype) * x, f) for f in (state.field, f1)]
        dense = {"y0": y0, "y1": y1, "k0": slopes[0], "k1": slopes[1]}
        num_evaluations = state.evaluations + stages
        new = StabilisedState(f1, fits, state.radius, state.direction, state.age + 1, product, num_evaluations)
        return y1, error, dense, new, diffrax.RESULTS.successful

    def func(self, terms: diffrax.AbstractTerm, t0: ArrayLike, y0: PyTree, args: PyTree) -> PyTree:
        return terms.vf(jnp.asarray(t0), y0, args)

    def order(self, terms: diffrax.AbstractTerm) -> int:
        del terms
        return 2

    def rejected(self, new: StabilisedState, old: StabilisedState) -> StabilisedState:
        """The state to try again from, after an attempt from `old` ended in `new` and was turned down.

        It keeps what was spent and what was learnt of the spectral radius, and asks for a new estimate unless the
        attempt made one, or was a nonstiff one, which is turned down for other reasons. `gradflow.solve` calls it;
        plain diffrax goes back to `old`, so that an estimate made in an attempt that fails is made again in the next
        one, and one that has aged is kept until its time is up.
        """
        age = jnp.where(new.age == 1, 0, self.refresh).astype(new.age.dtype)
        if self.nonstiff:
            age = jnp.where(new.product <= self.nonstiff, new.age - 1, age)
        return StabilisedState(old.field, old.known, new.radius, new.direction, age, new.product, new.evaluations)

    def warm_up(self, state: StabilisedState) -> StabilisedState:
        """A first state for runs with error control: nonstiff steps can do without the spectral radius for a while."""
        age = max(self.refresh - STEPS_BEFORE_ESTIMATE, 0) if self.nonstiff else self.refresh
        return dataclasses.replace(state, age=jnp.asarray(age))

    def longest_step(self, state: StabilisedState) -> Scalar:
        """The longest step for which the stages suffice, by the last estimate of the spectral radius."""
        limit = 0.999 * self.stability_limit(self._most_stages(state.radius.dtype))
        return jnp.where(state.radius > 0, limit / jnp.where(state.radius > 0, state.radius, 1), jnp.inf)

    def propose_step(self, state: StabilisedState, step: Scalar) -> Scalar:
        """The step to go on with, where the error suggests one, from the method of the last attempt.

        For the same error a nonstiff step may be `NONSTIFF_STEP_RATIO` times longer than a stabilised one. It is held
        within its stability, until a stabilised one is longer.
        """
        if not self.nonstiff:
            return step
        radius = state.radius.astype(step.dtype)
        edge = jnp.where(radius > 0, self.nonstiff / jnp.where(radius > 0, radius, 1), jnp.inf)
        after_nonstiff = jnp.where(step <= edge, step, jnp.maximum(step / NONSTIFF_STEP_RATIO, edge))
        after_stabilised = jnp.where(step < edge, jnp.minimum(NONSTIFF_STEP_RATIO * step, edge), step)
        return jnp.where(state.product <= self.nonstiff, after_nonstiff, after_stabilised)

    def _most_stages(self, dtype: jnp.dtype) -> int:
        if self.max_stages is not None:
            return self.max_stages
        return 200 if jnp.finfo(dtype).bits >= 64 else 100

    def _survey(
        self,
        field: Callable[[Scalar, PyTree], PyTree],
        t: Scalar,
        y: PyTree,
        args: PyTree,
        h: Scalar,
        state: StabilisedState,
        f_given: Bool[Array, ""],
        extents: Extents | None,
    ) -> StabilisedState:
        """The state with the field and the spectral radius at the start of the step filled in."""
        stale = state.age >= self.refresh
        origin, num_evaluations = jnp.zeros_like(h), state.evaluations
        f = state.field
        if self.bounded:  # The field at the start must be seen by reverse mode, which cannot look into the loop below.
            f = jax.lax.cond(f_given, lambda: f, lambda: field(origin, y))
            num_evaluations, f_given = num_evaluations + jnp.where(f_given, 0, 1), jnp.asarray(True)
        fixed_y, fixed_f = jax.lax.stop_gradient((y, f))
        wanted = stale & (self.spectral_radius is None)

        def evaluate(y: PyTree) -> PyTree:
            return jax.lax.stop_gradient(field(origin, y)) if self.bounded else field(origin, y)

        # Forward mode follows the loop, so that the slope which it evaluates has the derivatives of the state and of
        # all that the field depends on.
        start = (fixed_y, fixed_f) if self.bounded else (y, f)
        estimate = estimate_spectral_radius(evaluate, *start, f_given, wanted, state.direction, jnp.abs(h), extents)
        radius = SAFETY * estimate.radius
        if self.spectral_radius is not None:
            fn = self.spectral_radius
            given = lambda: jnp.asarray(fn(t, fixed_y, args)).astype(radius.dtype)  # noqa: E731
            radius = jax.lax.cond(stale, given, lambda: state.radius)
        radius = jnp.where(jnp.isfinite(radius), jnp.abs(radius), state.radius)
        return StabilisedState(
            field=f if self.bounded else estimate.field,
            known=jnp.asarray(True),
            radius=jax.lax.stop_gradient(radius),
            direction=jax.lax.stop_gradient(estimate.direction),
            age=jnp.where(stale, 0, state.age),
            product=state.product,
            evaluations=num_evaluations + estimate.evaluations,
        )


def loop(
    body: Callable[[Int[Array, ""], PyTree], PyTree],
    start: PyTree,
    stop: Int[Array, ""],
    bound: int | None,
) -> PyTree:
    """`state = body(i, state)` for `i = 1 ... stop`; with a static `bound` on `stop`, reverse mode can follow."""
    if bound is None:
        # Without jit the counter is a number of Python's.
        return jax.lax.fori_loop(1, stop + 1, lambda i, state: body(jnp.asarray(i), state), start)

    def masked(state: PyTree, i: Int[Array, ""]) -> tuple[PyTree, None]:
        return jax.lax.cond(i <= stop, body, lambda _, same: same, i, state), None

    return jax.lax.scan(masked, start, jnp.arange(1, bound + 1))[0]


def combine(*parts: tuple[Scalar | float, PyTree]) -> PyTree:
    """The sum of `factor * tree`, each leaf in its own type."""
    factors = [jnp.asarray(factor) for factor, _ in parts]

    def total(*leaves: Array) -> Array:
        pairs = zip(factors, leaves, strict=True)
        return sum((c.astype(x.dtype) * x for c, x in pairs), start=jnp.zeros((), leaves[0].dtype))

    return jax.tree_util.tree_map(total, *(tree for _, tree in parts))


def _real_dtype(y: PyTree) -> jnp.dtype:
    return jnp.result_type(*jax.tree_util.tree_leaves(y))
