"""Diagonal linear network in logarithmic coordinates, `beta = alpha^2 sinh(2 q)`, for any `alpha` however small."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Int

from gradflow._checks import check_count, check_finite, fail, is_concrete
from gradflow.models._diagonal_linear import DiagonalLinear
from gradflow.models._parametrisation import resolve_dtype


class LogDiagonal(eqx.Module):
    """`f(x) = beta . x`, `beta = exp(2 log_scale) sinh(2 q)`.

    The start of `gradflow.LogDiagonalFlow`.

    It stands for the diagonal linear network `u = s sqrt(2) alpha cosh q`, `v = s sqrt(2) alpha sinh q`, with
    `alpha = exp(log_scale)` and signs `s`, whose imbalance `u^2 - v^2 = 2 alpha^2` gradient flow conserves. `q = 0` is
    the start of `DiagonalLinear`; `log_scale=-2302.6` is `alpha = 1e-1000`. Observables see the `DiagonalLinear`.

    **Arguments**: `in_size`; `log_scale`, the natural logarithm of `alpha`, a scalar or one per coordinate; `dtype`.

    **Raises** `ValueError` for a size below one and a scale that is not finite or of another shape; so does `of` for a
    model without `|u| > |v|` in every coordinate.

    >>> import gradflow as gf
    >>> model = gf.models.LogDiagonal.of(gf.models.DiagonalLinear(3, init_scale=0.1))
    >>> round(float(model.log_scale[0]), 4), model.beta().tolist()
    (-2.3026, [0.0, 0.0, 0.0])
    """

    q: Float[Array, " in_size"]
    log_scale: Float[Array, " in_size"]
    sign: Int[Array, " in_size"]

    def __init__(self, in_size: int, *, log_scale: ArrayLike, dtype: DTypeLike | None = None):
        check_count("in_size", in_size)
        dtype = resolve_dtype(dtype)
        check_finite("log_scale", np.asarray(log_scale, float) if is_concrete(log_scale) else log_scale)
        if jnp.shape(log_scale) not in ((), (in_size,)):
            raise fail("log_scale", f"be a scalar or of shape ({in_size},)", f"of shape {jnp.shape(log_scale)}")
        self.q = jnp.zeros(in_size, dtype)
        self.log_scale = jnp.broadcast_to(jnp.asarray(log_scale, dtype), (in_size,))
        self.sign = jnp.ones(in_size, jnp.int32)

    @classmethod
    def of(cls, model: DiagonalLinear) -> "LogDiagonal":
        """The same network in logarithmic coordinates; `|u|` has to exceed `|v|` in every coordinate."""
        u, v = model.u, model.v
        if is_concrete((u, v)) and not np.all(np.abs(np.asarray(u)) > np.abs(np.asarray(v))):
            raise fail("model", "have |u| > |v| in every coordinate", "one without", "Exchange u and v there.")
        log_model = cls(u.size, log_scale=0.0, dtype=u.dtype)
        logs = jnp.log(jnp.abs(u)) + 0.5 * jnp.log1p(-((v / u) ** 2)) - 0.5 * jnp.log(jnp.asarray(2.0, u.dtype))
        parts = (jnp.arctanh(v / u), logs, jnp.sign(u).astype(jnp.int32))
        return eqx.tree_at(lambda m: (m.q, m.log_scale, m.sign), log_model, parts)

    def __call__(self, x: Float[Array, " in_size"]) -> Float[Array, ""]:
        return self.beta() @ x

    def beta(self) -> Float[Array, "*rows in_size"]:
        """The linear predictor `alpha^2 sinh(2 q)`, formed without under- or overflow on the way."""
        size = jnp.abs(2 * self.q)
        return jnp.sign(self.q) * jnp.exp(2 * self.log_scale + size) * -jnp.expm1(-2 * size) / 2

    def weight_norms(self) -> Float[Array, " in_size"]:
        """`u^2 + v^2 = 2 alpha^2 cosh(2 q)` of every coordinate."""
        size = jnp.abs(2 * self.q)
        return jnp.exp(2 * self.log_scale + size) * (1 + jnp.exp(-2 * size))

    def ordinary(self) -> DiagonalLinear:
        """The `DiagonalLinear` that it stands for; weights that underflow are zero."""
        size = jnp.abs(self.q)
        grown = (
            self.sign.astype(self.q.dtype) * jnp.exp(self.log_scale + size) / jnp.sqrt(jnp.asarray(2.0, self.q.dtype))
        )
        u, v = grown * (1 + jnp.exp(-2 * size)), jnp.sign(self.q) * grown * -jnp.expm1(-2 * size)
        return eqx.tree_at(lambda m: (m.u, m.v), DiagonalLinear(1, dtype=self.q.dtype), (u, v))
