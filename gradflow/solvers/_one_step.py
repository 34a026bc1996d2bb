"""Any one-step method of diffrax, with the proportional-integral controller of this package."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, Scalar

from gradflow.solvers._control import SCALE_FRACTION, StepControl
from gradflow.solvers._cost import counts_evaluations, evaluations_per_step
from gradflow.solvers._method import AbstractMethod, Attempt, Field, PaddedTerm
from gradflow.solvers._stabilised import AbstractStabilised

MAX_STEP_LENGTH_RATIO = 2.0
"""Times the farthest that a flow lets its steps go, beyond which a step is taken again."""


class OneStep(AbstractMethod):
    """A diffrax solver with an error estimate, as a method of this package.

    >>> import gradflow as gf
    >>> gf.solvers.OneStep(gf.solvers.Tsit5()).name
    'Tsit5'
    """

    solver: diffrax.AbstractSolver

    @property
    def exact_counts(self) -> bool:
        return counts_evaluations(self.solver)

    @property
    def name(self) -> str:
        return type(self.solver).__name__

    @property
    def first_order(self) -> int:
        order = self.solver.error_order(diffrax.ODETerm(_nothing))
        return 2 if order is None else int(order)

    def begin(self, field: Field, y: PyTree, slope: PyTree, dt: Scalar) -> PyTree:
        zero = jnp.zeros((), state_dtype(y))
        inner = self.solver.init(_terms(field), zero, dt.astype(zero.dtype), y, field.frozen)
        if isinstance(self.solver, AbstractStabilised):
            inner = self.solver.warm_up(inner)
        return inner, jnp.ones((), zero.dtype), jnp.asarray(False), zero

    def attempt(
        self,
        field: Field,
        y: PyTree,
        dt: Scalar,
        control: StepControl,
        scale: PyTree,
        state: PyTree,
    ) -> Attempt:
        inner, previous, failed, fastest = state
        local = state_dtype(y)
        start, stop = jnp.zeros((), local), dt.astype(local)
        y1, error, dense, solver_state, result = self.solver.step(
            _terms(field), start, stop, y, field.frozen, inner, made_jump=jnp.asarray(False)
        )
        ratio = control.ratio(field.controlled(error), field.error_weights(y), field.error_weights(y1), scale)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree_util.tree_leaves(y1)]))
        usable = finite & (result == diffrax.RESULTS.successful)
        ratio = jax.lax.stop_gradient(jnp.where(usable, ratio, jnp.inf))
        num_evaluations = evaluations_per_step(self.solver, inner, solver_state)
        after_rejection = (
            self.solver.rejected(solver_state, inner) if isinstance(self.solver, AbstractStabilised) else inner
        )
        factor = control.factor(ratio, previous, failed, self.first_order)
        if isinstance(self.solver, AbstractStabilised):
            factor = (self.solver.propose_step(solver_state, factor.astype(dt.dtype) * dt) / dt).astype(factor.dtype)
            bound = (self.solver.longest_step(solver_state).astype(dt.dtype) / dt).astype(factor.dtype)
            factor = jnp.where(bound < 1, bound, jnp.minimum(factor, bound))
        step_length_ratio, seen = field.step_length_ratio(y, y1), fastest
        if step_length_ratio is not None:
            # The fastest growth met so far limits all later steps: what is still small goes on at a like rate while
            # the state as a whole rests.
            step_length_ratio = jax.lax.stop_gradient(step_length_ratio).astype(ratio.dtype)
            ratio = jnp.where(step_length_ratio > MAX_STEP_LENGTH_RATIO, jnp.maximum(ratio, step_length_ratio), ratio)
            seen = jnp.maximum(fastest, (step_length_ratio.astype(dt.dtype) / dt).astype(fastest.dtype))
            factor = jnp.minimum(factor, (1 / jnp.maximum(seen.astype(dt.dtype) * dt, 1e-30)).astype(factor.dtype))
        return Attempt(
            y1=y1,
            ratio=ratio,
            factor=factor,
            accepted=(solver_state, ratio, jnp.asarray(False), seen),
            rejected=(after_rejection, previous, jnp.asarray(True), fastest),
            dense=(start, stop, dense),
            finite=finite,
            evaluations=jnp.asarray(-1) if num_evaluations is None else num_evaluations,
            products=jnp.asarray(0),
        )

    def scale_fraction(self, state: PyTree) -> float:
        return SCALE_FRACTION

    def piece(self, field: Field, dt: Scalar, y: PyTree, state: PyTree) -> tuple[PyTree, Bool[Array, ""]]:
        zero, stop = jnp.zeros((), state_dtype(y)), dt.astype(state_dtype(y))
        terms = _terms(field)
        inner = self.solver.init(terms, zero, stop, y, field.frozen)
        y1, *_ = self.solver.step(terms, zero, stop, y, field.frozen, inner, made_jump=jnp.asarray(False))
        return y1, jnp.asarray(True)

    def renewed(self, field: Field, dt: Scalar, y: PyTree, state: PyTree) -> PyTree:
        inner, *others = state
        if isinstance(self.solver, AbstractStabilised):
            return eqx.tree_at(lambda s: s.field, inner, field(dt, y)), *others
        tableau = getattr(self.solver, "tableau", None)
        if isinstance(self.solver, diffrax.AbstractERK) and getattr(tableau, "fsal", False) and inner is not None:
            return (inner[0], field(dt, y)), *others
        return state

    def interpolate(self, field: Field, dense: PyTree, s: Scalar) -> PyTree:
        start, stop, parts = dense
        return self.solver.interpolation_cls(t0=start, t1=stop, **parts).evaluate(s.astype(stop.dtype))


def state_dtype(y: PyTree) -> jnp.dtype:
    return jnp.result_type(*jax.tree_util.tree_leaves(y))


def _nothing(t: object, y: PyTree, args: PyTree) -> PyTree:
    return y


def _terms(field: Field) -> diffrax.ODETerm:
    fn = lambda s, y, frozen: field(jnp.asarray(s), y)  # noqa: E731
    return diffrax.ODETerm(fn) if field.extents is None else PaddedTerm(fn, field.extents)
