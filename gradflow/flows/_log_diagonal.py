"""Gradient flow of diagonal linear networks in logarithmic coordinates, `beta = alpha^2 sinh(2 q)`."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from gradflow._checks import fail
from gradflow._conserved import Conserved
from gradflow._tree import join
from gradflow.flows._base import AbstractFlow
from gradflow.flows._traits import ErrorWeights
from gradflow.models import LogDiagonal
from gradflow.problems import EmpiricalRisk
from gradflow.problems._correlation import check_risk


class LogDiagonalState(eqx.Module):
    """The model, and the integral of the squared gradient with respect to `u` and `v`."""

    model: LogDiagonal
    energy: Scalar


class LogDiagonalFlow(AbstractFlow):
    """Gradient flow of a diagonal linear network in logarithmic coordinates.

    For `f(x) = (u * v) . x` in the coordinates of `gradflow.models.LogDiagonal`:

        q' = -grad L(beta),        beta = alpha^2 sinh(2 q)

    It is the flow `u' = -v grad L(beta)`, `v' = -u grad L(beta)`, since `u^2 - v^2` is conserved (Woodworth et al.
    2020, arXiv 2002.09277). All features that are yet to appear stay exact: `q` grows in time as a straight line while
    `beta` rests at a saddle. Errors of `q` are controlled absolutely.

    **Time unit**: that of gradient flow, `t = k * learning_rate` at iterate `k`. Over `ln(1/alpha)`, it is the time of
    `gradflow.theory.diagonal_saddles`.

    **Arguments**: `problem`: an `EmpiricalRisk` with inputs `(n, in_size)`. Starts are `gradflow.models.LogDiagonal`.

    **Raises** `ValueError` for other problems; so does `solve` for other parameters.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([1.0, -2.0]), gf.losses.square, reduction="sum")
    >>> start = gf.models.LogDiagonal(2, log_scale=-2302.585)
    >>> sol = gf.solve(gf.LogDiagonalFlow(problem), start, jnp.array([0.4, 0.6, 1.1]) * 2302.585)
    >>> [[round(float(b), 3) for b in row] for row in sol.params.beta()]  # the second appears at 1/2, the first at 1
    [[0.0, -0.0], [0.0, -2.0], [1.0, -2.0]]
    """

    problem: EmpiricalRisk
    step_limited: ClassVar[bool] = True
    # The Jacobian is the negative product of the Hessian in `beta` and of the positive diagonal `d beta / d q`.
    real_spectrum: ClassVar[bool] = True

    def __init__(self, problem: EmpiricalRisk):
        self.problem = check_risk(problem)

    @property
    def time_unit(self) -> str:
        return "t = k * learning_rate"

    def init(self, trainable: PyTree, frozen: PyTree) -> LogDiagonalState:
        return LogDiagonalState(trainable, jnp.zeros_like(trainable.q[0]))

    def vector_field(self, t: Scalar, state: LogDiagonalState, frozen: PyTree) -> LogDiagonalState:
        model = join(state.model, frozen)
        features = self.problem.x.astype(model.q.dtype)
        correlation = features.T @ self.problem.residuals(features @ model.beta())
        velocity = eqx.tree_at(lambda m: (m.q, m.log_scale), state.model, (correlation, jnp.zeros_like(correlation)))
        return LogDiagonalState(velocity, jnp.sum(model.weight_norms() * correlation**2))

    def params(self, state: LogDiagonalState) -> PyTree:
        return state.model

    def controlled(self, state: LogDiagonalState) -> PyTree:
        return state.model.q

    def error_weights(self, controlled: PyTree) -> ErrorWeights:
        return ErrorWeights(jnp.ones_like(controlled))

    def loss(self, state: LogDiagonalState, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(join(state.model, frozen))

    def conserved(self, state: LogDiagonalState, frozen: PyTree) -> dict[str, Conserved]:
        loss = self.loss(state, frozen)
        return {"energy": Conserved(loss + state.energy, jnp.abs(loss) + state.energy)}

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        if not isinstance(trainable, LogDiagonal):
            advice = "gradflow.models.LogDiagonal.of(model) converts a DiagonalLinear."
            raise fail("params", "be a gradflow.models.LogDiagonal", f"of type {type(trainable).__name__}", advice)
        shape = self.problem.x.shape
        if shape[1:] != trainable.q.shape or self.problem.y.shape != shape[:1] or self.problem.predict is not None:
            actual = f"one with inputs of shape {shape} and targets of shape {self.problem.y.shape}"
            must = f"have inputs (n, {trainable.q.size}), targets (n,) and predict=None"
            raise fail("problem", must, actual)
        jax.eval_shape(self.problem.residuals, jnp.zeros(shape[0], trainable.q.dtype))
