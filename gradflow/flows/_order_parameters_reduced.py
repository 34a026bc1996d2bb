"""The limit of many student units: `M` and the diagonal of what lies outside the space of the teacher."""

from collections.abc import Callable, Mapping, Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import fail
from gradflow.flows._base import AbstractFlow
from gradflow.flows._order_parameters import check_double, errors_of
from gradflow.problems import OrderParameters, TeacherStudent
from gradflow.problems._field_sums import learning_factors, population_risk
from gradflow.problems._order_parameters import check_teacher, joint_covariance
from gradflow.problems._teacher_student import residual_weights, teacher_layer
from gradflow.problems.activations import AbstractActivation, named
from gradflow.programs import fresh_jit


class ReducedOverlaps(eqx.Module):
    """The state of `OverparametrisedFlow`.

    `M (p, k)`, and as `perp (p,)` the squared length over `d` of every student's part orthogonal to all teachers.
    """

    perp: Float[Array, " p"]
    M: Float[Array, "p k"]


class OverparametrisedFlow(AbstractFlow):
    """Order parameters of a wide student at a small learning rate.

    Where `p` is large and `gamma / p` small, the state comes down to `p (k + 1)` numbers:

        Q = M P^-1 M^T + diag(Q_perp)
        dM_jr/dt = sum_a c_a I3(j, r, a)
        dQ_perp,j/dt = 2 Q_perp,j [sum_a c_a K2(j, a) + c_j J2(j, j)]

    Overlaps of different students outside the space of the teacher are of order `1/p` when they start at zero, and are
    left out; so are the terms of order `gamma / p`. The risk is off by a fraction of order `1/p` that grows with time:
    for two erf teachers about `1.5/p` at `t = 1` and `13/p` at `t = 5`. A field costs `O(p^2)`, not `O(p^4)`.

    **Time unit**: step `nu` of SGD sits at `t = nu gamma / (p d)`, as for `OrderParameterFlow`.

    **Arguments**: as for `OrderParameterFlow`. Start from `flow.reduce(order_parameters)`.

    **Raises** `ValueError` for a teacher that is not positive definite, an unknown activation, and a problem with plain
    sums; so does `solve` for order parameters that have not been reduced, or are in float32.

    Source: Veiga et al. (2022), arXiv 2202.00293; Arnaboldi et al. (2023), arXiv 2302.05882.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.TeacherStudent.orthogonal(dim=500, units=1, activation="square", dtype=jnp.float64)
    >>> flow = gf.flows.OverparametrisedFlow(problem)
    >>> start = flow.reduce(problem.order_parameters(problem.uninformed(200, jax.random.key(0))))
    >>> sol = gf.solve(flow, start, [0.0, 10.0])
    >>> bool(flow.risk(sol.final) < 0.1 * flow.risk(start))
    True
    """

    P: Float[Array, "k k"]
    activation: AbstractActivation
    teacher_output: Float[Array, " k"]
    allow_float32: bool = eqx.field(static=True)

    def __init__(
        self,
        P: ArrayLike | TeacherStudent,
        activation: str | Callable[[Array], Array] | None = None,
        *,
        teacher_output: ArrayLike | Sequence[ArrayLike] | None = None,
        allow_float32: bool = False,
    ):
        if isinstance(P, TeacherStudent):
            if not P.normalised:
                raise fail("P", "be normalised", "a problem of plain sums", "Wide students need the factor 1/p.")
            activation, teacher_output, P = P.activation, P.teacher_output, P.P
        self.P = check_teacher(P)
        self.activation = named("erf" if activation is None else activation)
        self.teacher_output = teacher_layer(teacher_output, self.P.shape[0], self.P.dtype)
        self.allow_float32 = bool(allow_float32)

    def reduce(self, params: OrderParameters) -> ReducedOverlaps:
        """Keeps `M` and the diagonal of `Q_perp = Q - M P^-1 M^T`."""
        inside = jnp.sum(params.M * jnp.linalg.solve(self.P.astype(params.M.dtype), params.M.T).T, axis=1)
        return ReducedOverlaps(jnp.maximum(jnp.diagonal(params.Q) - inside, 0), params.M)

    def expand(self, params: ReducedOverlaps) -> OrderParameters:
        """The order parameters, with the overlaps left out as zeros."""
        M = params.M
        Q = M @ jnp.linalg.solve(self.P.astype(M.dtype), M.T) + jnp.diag(params.perp)
        return OrderParameters((Q + Q.T) / 2, M)

    @property
    def time_unit(self) -> str:
        return "t = steps * gamma / (p d)"

    def init(self, trainable: ReducedOverlaps, frozen: PyTree) -> ReducedOverlaps:
        return trainable

    def params(self, state: ReducedOverlaps) -> ReducedOverlaps:
        return state

    def vector_field(self, t: Scalar, state: ReducedOverlaps, frozen: PyTree) -> ReducedOverlaps:
        full = self.expand(state)
        p = full.M.shape[0]
        C, c = joint_covariance(full.Q, full.M, self.P), residual_weights(full, self.teacher_output, True)
        curved, sloped = learning_factors(self.activation, C, c, p)
        dM = full.M * curved[:, None] + sloped @ C[:, p:]
        return ReducedOverlaps(2 * state.perp * (curved + jnp.diagonal(sloped)), dM)

    @fresh_jit
    def risk(self, params: ReducedOverlaps) -> Float[Array, ""]:
        """`E (f - f*)^2 / 2`, without the noise."""
        full = self.expand(params)
        c = residual_weights(full, self.teacher_output, True)
        return population_risk(self.activation, joint_covariance(full.Q, full.M, self.P), c)

    def loss(self, state: ReducedOverlaps, frozen: PyTree) -> Float[Array, ""]:
        return self.risk(state)

    def errors(self, state: ReducedOverlaps, frozen: PyTree) -> dict[str, Scalar]:
        return errors_of(self.activation, self.expand(state).Q, self.P)

    def complaint(self, errors: Mapping[str, ArrayLike]) -> str:
        return self.activation.complaint(float(np.asarray(errors["quadrature"])))

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        if not isinstance(trainable, ReducedOverlaps):
            actual = f"of type {type(trainable).__name__}"
            raise fail("params", "be reduced order parameters", actual, "Start from `flow.reduce(order_parameters)`.")
        if trainable.M.shape[1] != self.P.shape[0]:
            actual = f"of shape {trainable.M.shape} for {self.P.shape[0]} teacher units"
            raise fail("params.M", "have one column for each teacher unit", actual)
        check_double(trainable.M.dtype, self.allow_float32)
