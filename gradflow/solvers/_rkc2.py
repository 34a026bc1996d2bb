"""RKC2: a second-order Runge-Kutta-Chebyshev method for any number of stages.

With Chebyshev polynomials `T_j` at `w0 = 1 + e / s^2`, `e = 2/13`, `w1 = T_s'(w0) / T_s''(w0)` and
`b_j = T_j''(w0) / T_j'(w0)^2` (`b_0 = b_1 = b_2`), a step of length `h` from `Y_0 = y` is

    Y_1 = Y_0 + m_1 h f(Y_0),     m_1 = b_1 w1,
    Y_j = (1 - mu_j - nu_j) Y_0 + mu_j Y_{j-1} + nu_j Y_{j-2} + m_j h f(t + c_{j-1} h, Y_{j-1}) + g_j h f(t, Y_0),
    mu_j = 2 b_j w0 / b_{j-1},  nu_j = -b_j / b_{j-2},  m_j = 2 b_j w1 / b_{j-1},  g_j = -(1 - b_{j-1} T_{j-1}) m_j,
    c_1 = m_1,  c_j = w1 T_j'' / T_j',  c_s = 1,

stable on the real interval `[-beta, 0]` with `beta = (2/3) (s^2 - 1) (1 - 2 e / 15)`.
"""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree, Scalar

from gradflow import _checks
from gradflow.solvers._stabilised import AbstractStabilised, combine, loop

DAMPING = 2 / 13


class RKC2(AbstractStabilised):
    """Stabilised explicit Runge-Kutta of order 2, as many stages as it takes.

    For stiff fields with real spectrum, gradient flows first of all: a step costs `~ sqrt(1.54 h rho)` evaluations,
    where an explicit method without stabilisation takes `~ h rho / 3`. Its error estimate
    `0.8 (y_n - y_{n+1}) + 0.4 h (f_n + f_{n+1})` is of third order, so errors fall like `rtol^(2/3)`. Not for
    oscillatory flows. `ROCK2` reaches further with as many stages; `RKC2` damps fast modes better.

    **Arguments**

    - `spectral_radius`: `fn(t, y, args) -> scalar`, a bound on the spectral radius of the Jacobian, taken as it is (its
      modulus); what it evaluates is not counted. `None`: a power method on differences of the field, times 1.2. In
      `gradflow.solve`, `t` counts from the start of the step.
    - `refresh`: steps after which the spectral radius is found anew. It also is after a rejection in `gradflow.solve`.
    - `max_stages`: cap on the stages; `None`: 200, or 100 in float32, as rounding grows like their square. A step that
      would need more is refused, at no cost, with an infinite error.
    - `bounded`: loops over stages that reverse mode can follow, at the memory of `max_stages` stages. Without it
      forward mode alone is available.

    **Raises** `ValueError` where `refresh` is no positive integer, or `max_stages` none of at least 2.

    Source: B. P. Sommeijer, L. F. Shampine and J. G. Verwer, RKC: an explicit solver for parabolic PDEs,
    J. Comput. Appl. Math. 88 (1998) 315-326.

    >>> import diffrax, jax.numpy as jnp
    >>> import gradflow as gf
    >>> term = diffrax.ODETerm(lambda t, y, args: -jnp.array([1.0, 1e4]) * y)
    >>> control = diffrax.PIDController(rtol=1e-4, atol=1e-6)
    >>> sol = diffrax.diffeqsolve(term, gf.solvers.RKC2(), 0, 2, 1e-5, jnp.ones(2), stepsize_controller=control)
    >>> bool(abs(sol.ys[0, 0] - jnp.exp(-2)) < 1e-3)
    True
    """

    spectral_radius: Callable[[Scalar, PyTree, PyTree], Scalar] | None = None
    refresh: int = eqx.field(default=25, static=True)
    max_stages: int | None = eqx.field(default=None, static=True)
    bounded: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        _checks.check_count("refresh", self.refresh)
        if self.max_stages is not None:
            _checks.check_count("max_stages", self.max_stages, least=2)

    def error_order(self, terms: diffrax.AbstractTerm) -> int:
        del terms
        return 3

    def stages(self, product: Scalar, max_stages: int) -> Int[Array, ""]:
        needed = 1 + jnp.floor(jnp.sqrt(1 + 1.54 * product))
        return jnp.clip(needed, 2, max_stages).astype(int)

    def stability_limit(self, max_stages: int) -> float:
        return (max_stages**2 - 1) / 1.54

    def advance(
        self,
        field: Callable[[Scalar, PyTree], PyTree],
        y: PyTree,
        f: PyTree,
        h: Scalar,
        product: Scalar,
        stages: Int[Array, ""],
    ) -> tuple[PyTree, PyTree, PyTree]:
        del product
        max_stages = self._most_stages(h.dtype)
        c, mu, nu, m, g = coefficients(jnp.maximum(stages, 2), max_stages, h.dtype)

        def stage(j: Int[Array, ""], state: tuple) -> tuple:
            """From `Y_j` to the field there and to `Y_{j+1}`; at the last one `Y_s` stays."""
            now, before, _ = state
            slope = field(c[j], now)
            weight = 1 - mu[j] - nu[j]
            after = combine((weight, y), (mu[j], now), (nu[j], before), (m[j] * h, slope), (g[j] * h, f))
            return after, now, slope

        start = (combine((1.0, y), (m[0] * h, f)), y, f)
        y1, _, f1 = loop(stage, start, stages, max_stages if self.bounded else None)
        error = combine((0.8, combine((1.0, y), (-1.0, y1))), (0.4 * h, combine((1.0, f), (1.0, f1))))
        return y1, f1, error


def coefficients(stages: Int[Array, ""], max_stages: int, dtype: DTypeLike) -> tuple[Float[Array, " rows"], ...]:
    """`c_j`, and `mu, nu, m, g` of stage `j + 1` in row `j`; row `stages` leaves the state as it is.

    The polynomials are summed in powers of `w0 - 1`, `T_j = sum_k a_k` with
    `a_{k+1} = a_k (j^2 - k^2) (w0 - 1) / ((2 k + 1) (k + 1))`: as `j^2 (w0 - 1) <= 2/13`, ten terms give full
    precision, in float32 as well, where recurrences in `j` lose half the digits.
    """
    s = stages.astype(dtype)
    j = jnp.minimum(jnp.arange(max_stages + 1, dtype=dtype), s)
    excess = DAMPING / s**2
    w0 = 1 + excess
    term = jnp.ones_like(j)
    t, t1, t2 = term, jnp.zeros_like(j), jnp.zeros_like(j)
    for k in range(10):
        term = term * (j**2 - k**2) / ((2 * k + 1) * (k + 1))
        power = excess**k
        t, t1 = t + term * power * excess, t1 + (k + 1) * term * power
        t2 = t2 + (k + 1) * k * term * excess ** max(k - 1, 0)
    w1 = t1[stages] / t2[stages]
    flat = 1 / (4 * w0**2)
    b = jnp.where(j < 2, flat, t2 / jnp.where(j < 1, 1, t1) ** 2)
    first = flat * w1
    c = jnp.where(j < 2, j * first, w1 * t2 / jnp.where(j < 1, 1, t1))
    c = jnp.where(j == s, 1.0, c)
    older = jnp.concatenate([b[:1], b[:-1]])
    newer = jnp.concatenate([b[1:], b[-1:]])
    mu, nu, m = 2 * newer * w0 / b, -newer / older, 2 * newer * w1 / b
    g = -(1 - b * t) * m
    inside = (j >= 1) & (j < s)
    mu, nu = jnp.where(inside, mu, 1), jnp.where(inside, nu, 0)
    m, g = jnp.where(inside, m, jnp.where(j < 1, first, 0)), jnp.where(inside, g, 0)
    return c, mu, nu, m, g
