"""Learning a two-layer teacher from Gaussian inputs: the population risk in closed form."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from gradflow._checks import check_count, check_finite, fail, is_concrete
from gradflow._tree import common_dtype, full_precision
from gradflow.problems._field_sums import population_risk
from gradflow.problems._order_parameters import OrderParameters, check_teacher, joint_covariance
from gradflow.problems.activations import AbstractActivation, named
from gradflow.programs import fresh_jit


class TeacherStudent(eqx.Module):
    """Population risk of a two-layer student of a teacher, Gaussian inputs.

    For `x ~ N(0, I_d)`:

        y = (1/k) sum_r v*_r s(w*_r . x / sqrt d) + sqrt(noise) zeta,     f(x) = (1/p) sum_j v_j s(w_j . x / sqrt d)
        risk = E (f - y)^2 / 2 - noise / 2

    It is exact: a function of the overlaps `Q, M, P` alone. With `normalised=False` both sums go without `1/p` and
    `1/k` (Saad and Solla 1995).

    The parameters may be weights `W (p, d)`, a pair `(W, v)` of weights and second layer, or `OrderParameters`, so that
    one observable serves stochastic gradient descent and its limit.

    **Arguments**

    - `teacher`: weights `W* (k, d)`, linearly independent.
    - `activation`: `"erf"`, `"square"`, `"relu"`, an elementwise function, or a `gradflow.problems.activations`.
    - `noise`: variance of the label noise. `teacher_output`: second layer `v* (k,)`, ones by default.

    **Raises** `ValueError` for weights and a second layer of the wrong shape, a teacher that is degenerate or not
    finite, an unknown activation, and negative noise.

    >>> import gradflow as gf, jax
    >>> problem = gf.TeacherStudent.orthogonal(dim=100, units=2)
    >>> problem(problem.uninformed(4, jax.random.key(0))).shape
    ()
    >>> abs(round(float(problem(problem.teacher)), 12))
    0.0
    """

    teacher: Float[Array, "k d"]
    activation: AbstractActivation
    noise: Float[Array, ""]
    teacher_output: Float[Array, " k"]
    normalised: bool = eqx.field(static=True)

    def __init__(
        self,
        teacher: ArrayLike,
        activation: str | Callable[[Array], Array] = "erf",
        *,
        noise: ArrayLike = 0.0,
        normalised: bool = True,
        teacher_output: ArrayLike | Sequence[ArrayLike] | None = None,
    ):
        teacher = jnp.asarray(teacher)
        if teacher.ndim != 2 or 0 in teacher.shape:
            raise fail("teacher", "hold weights (units, dim)", f"of shape {teacher.shape}")
        check_finite("teacher", teacher)
        self.teacher = teacher.astype(common_dtype(teacher, jnp.float32))
        check_teacher(self.P)
        check_noise(noise)
        self.activation = named(activation)
        self.noise = jnp.asarray(noise, self.teacher.dtype)
        self.teacher_output = teacher_layer(teacher_output, self.teacher.shape[0], self.teacher.dtype)
        self.normalised = bool(normalised)

    @classmethod
    def orthogonal(
        cls,
        dim: int,
        units: int,
        activation: str | Callable[[Array], Array] = "erf",
        *,
        dtype: DTypeLike | None = None,
        noise: ArrayLike = 0.0,
        normalised: bool = True,
        teacher_output: ArrayLike | Sequence[ArrayLike] | None = None,
    ) -> "TeacherStudent":
        """A teacher of orthogonal units of length `sqrt dim`, so that `P = I`; the rest as for the class."""
        check_count("dim", dim)
        check_count("units", units)
        if units > dim:
            raise fail("units", f"be at most dim = {dim}", f"{units}", "No more vectors are orthogonal.")
        dtype = jnp.result_type(float) if dtype is None else dtype
        weights = jnp.sqrt(jnp.asarray(dim, dtype)) * jnp.eye(units, dim, dtype=dtype)
        return cls(weights, activation, noise=noise, normalised=normalised, teacher_output=teacher_output)

    @property
    def dim(self) -> int:
        """Size `d` of the inputs."""
        return self.teacher.shape[1]

    @property
    def P(self) -> Float[Array, "k k"]:  # noqa: N802
        """Overlaps `W* W*^T / d` of the teacher."""
        return self.teacher @ self.teacher.T / self.dim

    @full_precision
    def order_parameters(self, params: PyTree) -> OrderParameters:
        """The overlaps of weights `W` or `(W, v)`; order parameters stay what they are."""
        if isinstance(params, OrderParameters):
            return params
        weights, output = split_weights(params)
        if weights.ndim != 2 or weights.shape[1] != self.dim:
            raise fail("params", f"hold weights of shape (units, {self.dim})", f"of shape {weights.shape}")
        return OrderParameters(weights @ weights.T / self.dim, weights @ self.teacher.T / self.dim, output)

    @fresh_jit
    @full_precision
    def __call__(self, params: PyTree) -> Float[Array, ""]:
        overlaps = self.order_parameters(params)
        c = residual_weights(overlaps, self.teacher_output, self.normalised)
        return population_risk(self.activation, joint_covariance(overlaps.Q, overlaps.M, self.P), c)

    def informed(self, width: int, key: Key[Array, ""]) -> Float[Array, "width d"]:
        """Weights `A W*` with random rows of `A` of unit length: a start that knows the space of the teacher."""
        check_count("width", width)
        mixing = jax.random.normal(key, (width, self.teacher.shape[0]), self.teacher.dtype)
        return mixing / jnp.linalg.norm(mixing, axis=1, keepdims=True) @ self.teacher

    def uninformed(self, width: int, key: Key[Array, ""]) -> Float[Array, "width d"]:
        """Weights drawn from `N(0, 1)`, of length near `sqrt d`, whose overlaps with the teacher are small."""
        check_count("width", width)
        return jax.random.normal(key, (width, self.dim), self.teacher.dtype)


def split_weights(params: PyTree) -> tuple[Array, Array | None]:
    """Weights and second layer, or `None`, of `W` or `(W, v)`."""
    if isinstance(params, tuple):
        if len(params) != 2:
            raise fail("params", "be weights W or a pair (W, v)", f"a tuple of {len(params)}")
        return jnp.asarray(params[0]), jnp.asarray(params[1])
    return jnp.asarray(params), None


def residual_weights(
    params: OrderParameters, teacher_output: Float[Array, " k"], normalised: bool
) -> Float[Array, " n"]:
    """Weights of all units in the residual `y - f`: minus those of the student, then those of the teacher."""
    p, k = params.M.shape
    student = jnp.ones(p, params.Q.dtype) if params.output is None else params.output
    taught = teacher_output.astype(params.Q.dtype)
    return jnp.concatenate([-student / p, taught / k]) if normalised else jnp.concatenate([-student, taught])


def check_noise(noise: ArrayLike) -> None:
    """Refuses a variance that is negative or not finite."""
    if is_concrete(noise) and not np.all(np.isfinite(np.asarray(noise)) & (np.asarray(noise) >= 0)):
        raise fail("noise", "not be negative", f"{noise}", "It is the variance of the label noise.")


def teacher_layer(output: ArrayLike | Sequence[ArrayLike] | None, units: int, dtype: DTypeLike) -> Float[Array, " k"]:
    """The second layer of a teacher, ones by default."""
    layer = jnp.ones(units) if output is None else jnp.asarray(output)
    if layer.shape != (units,):
        raise fail("teacher_output", f"have shape ({units},)", f"of shape {layer.shape}")
    return layer.astype(dtype)
