"""Order parameters of one-pass SGD on a two-layer network with many inputs (Saad and Solla)."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_callable, check_not_negative, check_positive, fail, is_concrete
from gradflow.flows._base import AbstractFlow
from gradflow.flows._schedule import schedule_jumps
from gradflow.problems import OrderParameters, TeacherStudent
from gradflow.problems._field_sums import (
    correlation_with_residual,
    learning_factors,
    learning_terms,
    population_risk,
    slope_products,
    square_terms,
    triangle,
)
from gradflow.problems._order_parameters import check_covariance, check_teacher, joint_covariance
from gradflow.problems._teacher_student import check_noise, residual_weights, teacher_layer
from gradflow.problems.activations import AbstractActivation, named
from gradflow.programs import fresh_jit

TERMS = ("M", "Q", "square", "noise")
REGIMES: dict[str, tuple[str, ...]] = {
    "full": TERMS,
    "green": ("M", "Q"),
    "blue": TERMS,
    "orange": ("square", "noise"),
}
"""Groups of terms kept in each region of the phase diagram of Veiga et al. (2022)."""

MOST = 1e11
"""Expectations over four fields in one evaluation beyond which a flow is refused: some 20 minutes on one core."""


class Overlaps(NamedTuple):
    """State: the upper triangle of `Q` row by row, `M`, and the second layer, if it has one."""

    Q: Float[Array, " pairs"]
    M: Float[Array, "p k"]
    output: Float[Array, " p"] | None


class OrderParameterFlow(AbstractFlow):
    """Order parameters of one-pass SGD, for any learning rate and noise:

        dM_jr/dt = sum_a c_a I3(j, r, a)
        dQ_jl/dt = sum_a c_a [I3(j, l, a) + I3(l, j, a)] + g [sum_ab c_a c_b I4(j, l, a, b) + noise J2(j, l)]

    with `c_a = -1/p` for students, `+1/k` for teachers, `g = gamma / p`, and `I3, I4, J2` the Gaussian expectations of
    `gradflow.problems.activations`. SGD with `w_j += gamma / (p sqrt d) s'(lambda_j) (y - f) x` stays within
    `O(sqrt(g / d))` of it.

    **Time unit**: step `nu` of SGD sits at `t = nu g / d`. With `normalised=False` the sums go without `1/p` and `1/k`,
    the step is `gamma / sqrt d`, and `gamma_over_p` stands for `gamma`: the convention of Saad and Solla.

    **Arguments**

    - `P`: overlaps `(k, k)` of the teacher, positive definite; or a `gradflow.TeacherStudent`, which brings its
      activation, noise, second layer and normalisation.
    - `activation`: `"erf"`, `"square"`, `"relu"`, an elementwise function, or a `gradflow.problems.activations`.
    - `gamma_over_p`: learning rate over width. `noise`: variance of the label noise.
    - `terms`: `"full"`; a regime, `"green"` (no terms of order `g`), `"blue"` (all) or `"orange"` (those of order `g`
      only); or the groups to keep, among `"M"`, `"Q"`, `"square"` and `"noise"`.
    - `dim`: with the number of inputs, the expected step of SGD is met exactly: the terms of order `g` carry
      a factor `|x|^2 / d`, whose correlation with the fields is `(2/d) d/ds` of their covariance `s C` at `s = 1`.
      Fluctuations, of order `sqrt(g / d)`, remain.
    - `schedule`: function `t -> factor` on the learning rate; time goes on counting steps, `t = nu g / d`. Where it is
      an `InterpolatedSchedule` or one of optax, or has an attribute `jumps`, steps end at its jumps; those of other
      functions go to `gradflow.solve` as `jumps=`.
    - `batch_size`: samples `b` that a step of SGD averages over. It divides the terms of order `g`; with `dim` the
      products of different samples come in, `g (1 - 1/b) / d` times the overlaps of the expected steps.
    - `teacher_output`: second layer of the teacher, ones by default. `second_layer_rate`: learning rate of the second
      layer over that of the first; used where the parameters have an `output`, and zero by default.
    - `allow_float32`: start from float32 parameters all the same, for risks no better than 1e-6.

    **Size**: an evaluation takes `p^2 (p + k)^2 / 4` expectations over four fields at about 10 ns each (erf, one core):
    50 microseconds for `p = 8, k = 4`, 0.3 s for `p = 100`, 5 s for `p = 200`; in bounded memory. With `x^2` they are
    products of matrices, and without the terms of order `g` there are none: thousands of units.

    **Raises** `ValueError` for a teacher that is not positive definite, learning rates and batch sizes that are not
    positive, negative noise, unknown activations and terms, and for what a `TeacherStudent` brings given beside it;
    where `dim` is given, for `g^2 > d`, where SGD has no limit of this kind: run `gradflow.OnePassSGD`; and in `solve`
    for parameters in float32, and for so many units that an evaluation takes more than 1e11 expectations.

    It is stiff near a minimum, where its spectrum is close to the negative real axis, so that the default solver, which
    is implicit there, takes far fewer steps than explicit ones: with four teacher and eight student units, noise 0.001
    and an uninformed start, 823 evaluations to `t = 10^4` for a risk good to 1e-5, where `Tsit5` takes 9,321 for 5e-3,
    both at `rtol=1e-4`.

    Source: Saad and Solla (1995); Veiga, Stephan, Loureiro, Krzakala, Zdeborova (2022), arXiv 2202.00293.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.TeacherStudent.orthogonal(dim=1000, units=2, noise=1e-3, dtype=jnp.float64)
    >>> flow = gf.OrderParameterFlow(problem, gamma_over_p=0.5)
    >>> start = problem.order_parameters(problem.informed(4, jax.random.key(0)))
    >>> sol = gf.solve(flow, start, [0.0, 100.0])
    >>> bool(flow.risk(sol.final) < 0.01 * flow.risk(start))
    True
    """

    P: Float[Array, "k k"]
    activation: AbstractActivation
    gamma_over_p: Scalar
    noise: Scalar
    dim: Scalar | None
    schedule: Callable[[Scalar], ArrayLike] | None
    teacher_output: Float[Array, " k"]
    second_layer_rate: Scalar
    batch_size: Scalar
    normalised: bool = eqx.field(static=True)
    groups: tuple[str, ...] = eqx.field(static=True)
    allow_float32: bool = eqx.field(static=True)

    def __init__(
        self,
        P: ArrayLike | TeacherStudent,
        activation: str | Callable[[Array], Array] | None = None,
        *,
        gamma_over_p: ArrayLike,
        noise: ArrayLike | None = None,
        normalised: bool | None = None,
        terms: str | Collection[str] = "full",
        dim: ArrayLike | None = None,
        schedule: Callable[[Scalar], ArrayLike] | None = None,
        teacher_output: ArrayLike | Sequence[ArrayLike] | None = None,
        second_layer_rate: ArrayLike = 0.0,
        batch_size: ArrayLike = 1,
        allow_float32: bool = False,
    ):
        if isinstance(P, TeacherStudent):
            scalars = {
                "activation": activation,
                "noise": noise,
                "normalised": normalised,
                "teacher_output": teacher_output,
            }
            given = [name for name, value in scalars.items() if value is not None]
            if given:
                raise fail(given[0], "be left to the problem", "given beside one", "Change it in the TeacherStudent.")
            activation, noise, normalised, teacher_output = P.activation, P.noise, P.normalised, P.teacher_output
            P = P.P
        self.P = check_teacher(P)
        self.activation = named("erf" if activation is None else activation)
        check_positive("gamma_over_p", gamma_over_p, "It is the learning rate over the width.")
        noise = 0.0 if noise is None else noise
        check_noise(noise)
        if dim is not None:
            check_positive("dim", dim, "It is the number of inputs.")
            check_limit(gamma_over_p, dim)
        if schedule is not None:
            check_callable("schedule", schedule, "schedule(t) -> factor on the learning rate")
        self.gamma_over_p, self.noise = jnp.asarray(gamma_over_p, float), jnp.asarray(noise, float)
        self.dim = None if dim is None else jnp.asarray(dim, float)
        self.schedule = schedule
        self.teacher_output = teacher_layer(teacher_output, self.P.shape[0], self.P.dtype)
        self.second_layer_rate = jnp.asarray(second_layer_rate, float)
        check_not_negative("second_layer_rate", second_layer_rate, "Zero keeps the second layer as it is.")
        check_positive("batch_size", batch_size, "It is the number of samples in a step.")
        self.batch_size = jnp.asarray(batch_size, float)
        self.normalised = True if normalised is None else bool(normalised)
        self.groups = check_terms(terms)
        self.allow_float32 = bool(allow_float32)

    @property
    def time_unit(self) -> str:
        return "t = steps * gamma / (p d)"

    @property
    def jumps(self) -> Float[Array, " n"] | None:
        return schedule_jumps(self.schedule)

    def init(self, trainable: OrderParameters, frozen: PyTree) -> Overlaps:
        rows, columns = triangle(trainable.Q.shape[0])
        return Overlaps(trainable.Q[rows, columns], trainable.M, trainable.output)

    def params(self, state: Overlaps) -> OrderParameters:
        p = state.M.shape[0]
        return OrderParameters(state.Q[_square_index(p)], state.M, state.output)

    def vector_field(self, t: Scalar, state: Overlaps, frozen: PyTree) -> Overlaps:
        params = self.params(state)
        p, dtype = params.M.shape[0], params.Q.dtype
        rows, columns = triangle(p)
        C, c = self.covariance(params), self.residual_weights(params)
        factor = jnp.asarray(1 if self.schedule is None else self.schedule(t), dtype)
        dQ, dM, output = jnp.zeros_like(state.Q), jnp.zeros_like(params.M), params.output
        if "M" in self.groups or "Q" in self.groups:
            drift = learning_terms(self.activation, C, c, p)
            drift = factor * (drift if output is None else output[:, None] * drift)
            dM = drift[:, p:] if "M" in self.groups else dM
            dQ = drift[rows, columns] + drift[columns, rows] if "Q" in self.groups else dQ
        if "square" in self.groups or "noise" in self.groups:
            spread = self._spread(C, c, p)
            spread = spread if output is None else output[rows] * output[columns] * spread
            dQ = dQ + factor**2 * self.gamma_over_p.astype(dtype) * spread
        d_output = None
        if output is not None:
            rate = self.second_layer_rate.astype(dtype) * factor
            d_output = rate * correlation_with_residual(self.activation, C, c, p)
        return Overlaps(dQ, dM, d_output)

    @fresh_jit
    def risk(self, params: OrderParameters) -> Float[Array, ""]:
        """`E (f - f*)^2 / 2`, without the noise."""
        return population_risk(self.activation, self.covariance(params), self.residual_weights(params))

    def loss(self, state: Overlaps, frozen: PyTree) -> Float[Array, ""]:
        return self.risk(self.params(state))

    def errors(self, state: Overlaps, frozen: PyTree) -> dict[str, Scalar]:
        return errors_of(self.activation, self.params(state).Q, self.P)

    def complaint(self, errors: Mapping[str, ArrayLike]) -> str:
        return self.activation.complaint(float(np.asarray(errors["quadrature"])))

    def covariance(self, params: OrderParameters) -> Float[Array, "n n"]:
        """Covariance `[[Q, M], [M^T, P]]` of all fields."""
        return joint_covariance(params.Q, params.M, self.P)

    def residual_weights(self, params: OrderParameters) -> Float[Array, " n"]:
        """The weights `c` of all units in the residual `y - f`, students first."""
        return residual_weights(params, self.teacher_output, self.normalised)

    def _spread(self, C: Float[Array, "n n"], c: Float[Array, " n"], p: int) -> Float[Array, " pairs"]:
        """`E s'(x_j) s'(x_l) (y - f)^2 |x|^2 / d`: the terms of order `g`."""

        def spread(scale: Scalar) -> Float[Array, " pairs"]:
            total = jnp.zeros(p * (p + 1) // 2, C.dtype)
            if "square" in self.groups:
                total = total + square_terms(self.activation, scale * C, c, p)
            if "noise" in self.groups:
                total = total + self.noise.astype(C.dtype) * slope_products(self.activation, scale * C, p)
            return total

        one, per_sample = jnp.ones((), C.dtype), 1 / self.batch_size.astype(C.dtype)
        if self.dim is None:
            return per_sample * spread(one)
        value, slope = jax.jvp(spread, (one,), (one,))
        total = per_sample * (value + 2 / self.dim.astype(C.dtype) * slope)
        if "square" not in self.groups:
            return total
        # Different samples of a batch: the expected steps of two students, which are sums of all weights.
        rows, columns = triangle(p)
        curved, steps = learning_factors(self.activation, C, c, p)
        steps = steps.at[jnp.arange(p), jnp.arange(p)].add(curved)
        return total + (1 - per_sample) / self.dim.astype(C.dtype) * (steps @ C @ steps.T)[rows, columns]

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        if not isinstance(trainable, OrderParameters):
            advice = "Take them from weights, with `gradflow.TeacherStudent.order_parameters`."
            raise fail("params", "be gradflow.OrderParameters", f"of type {type(trainable).__name__}", advice)
        if trainable.M.shape[1] != self.P.shape[0]:
            actual = f"of shape {trainable.M.shape} for {self.P.shape[0]} teacher units"
            raise fail("params.M", "have one column for each teacher unit", actual)
        check_double(trainable.Q.dtype, self.allow_float32)
        p, k = trainable.M.shape
        if "square" in self.groups and self.activation.expectations(p, k) > MOST:
            must = f"hold so few units that an evaluation takes at most {MOST:.0e} expectations"
            advice = (
                'Take `terms="green"`, `gradflow.flows.OverparametrisedFlow`, the activation "square",'
                " or run gradflow.OnePassSGD."
            )
            actual = f"of {p}, which take {self.activation.expectations(p, k):.1e}"
            raise fail("params.Q", must, actual, advice)

    def check_values(self, trainable: PyTree, frozen: PyTree) -> None:
        self.check(trainable, frozen)
        check_covariance(trainable, self.P)


def errors_of(activation: AbstractActivation, Q: Float[Array, "p p"], P: Float[Array, "k k"]) -> dict[str, Scalar]:
    """The error of the expectations at these variances, where they are not exact."""
    error = activation.error(jnp.concatenate([jnp.diagonal(Q), jnp.diagonal(P).astype(Q.dtype)]))
    return {} if error is None else {"quadrature": error}


def check_terms(terms: str | Collection[str]) -> tuple[str, ...]:
    """The groups of terms by name of a regime, or as they are listed."""
    if isinstance(terms, str) and terms in REGIMES:
        return REGIMES[terms]
    listed = ", ".join(repr(name) for name in REGIMES)
    groups = ", ".join(repr(name) for name in TERMS)
    if isinstance(terms, str) or not set(terms) or not set(terms) <= set(TERMS):
        raise fail("terms", f"be one of {listed}, or groups among {groups}", repr(terms))
    return tuple(name for name in TERMS if name in terms)


def check_double(dtype: DTypeLike, allowed: bool) -> None:
    """Asks for float64: the risk is a difference of numbers of order one."""
    if dtype != jnp.float64 and not allowed:
        advice = (
            "In single precision risks are good to 1e-6 at best. Enable float64 with"
            " jax.config.update('jax_enable_x64', True) and float64 parameters, or give the flow allow_float32=True."
        )
        raise fail("params", "be in float64", f"in {dtype}", advice)


def check_limit(gamma_over_p: ArrayLike, dim: ArrayLike) -> None:
    """Refuses learning rates so large that a single step moves the order parameters by more than their size."""
    if not is_concrete((gamma_over_p, dim)):
        return
    if float(np.max(np.asarray(gamma_over_p, float))) ** 2 > float(np.min(np.asarray(dim, float))):
        raise fail(
            "gamma_over_p",
            f"be at most sqrt(dim) = {float(np.sqrt(np.min(np.asarray(dim, float)))):.3g}",
            f"{float(np.max(np.asarray(gamma_over_p, float))):.3g}",
            "Beyond, no differential equation describes SGD (kappa + delta < -1/2): run gradflow.OnePassSGD.",
        )


def _square_index(p: int) -> np.ndarray:
    """Where entry `(j, l)` of a symmetric matrix lies in its triangle."""
    index = np.zeros((p, p), int)
    rows, columns = triangle(p)
    index[rows, columns] = index[columns, rows] = np.arange(rows.size)
    return index
