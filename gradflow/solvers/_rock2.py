"""ROCK2: a second-order orthogonal Runge-Kutta-Chebyshev method, from published coefficients.

With the recurrence of degree `m` (`s = m + 2` stages), a step of length `h` from `K_0 = y` is

    K_1 = K_0 + r_0 h f(t, K_0),
    K_i = a_i h f(t + c_{i-1} h, K_{i-1}) + (1 - g_i) K_{i-1} + g_i K_{i-2},     i = 2 ... m,
    F = f(t + c_m h, K_m),     Z = K_m + p h F,     G = f(t + (c_m + p) h, Z),
    E = q h (G - F),     y_new = Z + p h G + E,

with `a_i = r_{2i-3}`, `g_i = -r_{2i-2}`; `E` is the error estimate. Real stability interval `~ 0.81 s^2`.
"""

import functools
import importlib.resources
import json
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Scalar

from gradflow import _checks
from gradflow.solvers._stabilised import AbstractStabilised, combine, loop


class AbstractROCK2(AbstractStabilised):
    """What methods have in common that take long steps by ROCK2, and by a nonstiff method what is short for them."""

    def __check_init__(self):
        _checks.check_count("refresh", self.refresh)
        if self.max_stages is not None:
            _checks.check_count("max_stages", self.max_stages, least=3)

    def stages(self, product: Scalar, max_stages: int) -> Int[Array, ""]:
        stage_numbers = available(max_stages)
        index = jnp.sum(jnp.asarray(stability_interval(stage_numbers), product.dtype) < product)
        return jnp.asarray(stage_numbers)[jnp.minimum(index, len(stage_numbers) - 1)].astype(int)

    def stability_limit(self, max_stages: int) -> float:
        return float(stability_interval(available(max_stages))[-1])

    def advance(
        self,
        field: Callable[[Scalar, PyTree], PyTree],
        y: PyTree,
        f: PyTree,
        h: Scalar,
        product: Scalar,
        stages: Int[Array, ""],
    ) -> tuple[PyTree, PyTree, PyTree]:
        max_stages = self._most_stages(h.dtype)
        first = row_of(stages)
        if self.nonstiff:
            first = jnp.where(product <= self.nonstiff, load().nonstiff, first)
        return recur(field, y, f, h, first, stages, max_stages if self.bounded else None)


class ROCK2(AbstractROCK2):
    """Stabilised explicit Runge-Kutta of order 2, of 3 to 200 stages.

    For stiff fields with real spectrum, gradient flows first of all: a step costs `~ sqrt(1.23 h rho)` evaluations,
    where an explicit method without stabilisation takes `~ h rho / 3`. Errors fall in proportion to the tolerance. At
    loose tolerances it damps fast modes less than `RKC2`, which shows in the loss. Not for oscillatory flows.

    **Arguments**

    - `spectral_radius`: `fn(t, y, args) -> scalar`, a bound on the spectral radius of the Jacobian, taken as it is (its
      modulus); what it evaluates is not counted. `None`: a power method on differences of the field, times 1.2. In
      `gradflow.solve`, `t` counts from the start of the step.
    - `refresh`: steps after which the spectral radius is found anew. It also is after a rejection in `gradflow.solve`.
    - `max_stages`: cap on the stages; `None`: 200, or 100 in float32, as rounding grows like their square. A step that
      would need more is refused, at no cost, with an infinite error.
    - `bounded`: loops over stages that reverse mode can follow, at the memory of `max_stages` stages. Without it
      forward mode alone is available.

    **Raises** `ValueError` where `refresh` is no positive integer, or `max_stages` none of at least 3.

    Source: A. Abdulle and A. A. Medovikov, Second order Chebyshev methods based on orthogonal polynomials,
    Numer. Math. 90 (2001) 1-18, with the coefficients of the published program.

    >>> import diffrax, jax.numpy as jnp
    >>> import gradflow as gf
    >>> term = diffrax.ODETerm(lambda t, y, args: -jnp.array([1.0, 1e4]) * y)
    >>> control = diffrax.PIDController(rtol=1e-4, atol=1e-6)
    >>> sol = diffrax.diffeqsolve(term, gf.solvers.ROCK2(), 0, 2, 1e-5, jnp.ones(2), stepsize_controller=control)
    >>> bool(abs(sol.ys[0, 0] - jnp.exp(-2)) < 1e-3)
    True
    """

    spectral_radius: Callable[[Scalar, PyTree, PyTree], Scalar] | None = None
    refresh: int = eqx.field(default=25, static=True)
    max_stages: int | None = eqx.field(default=None, static=True)
    bounded: bool = eqx.field(default=False, static=True)

    def error_order(self, terms: diffrax.AbstractTerm) -> int:
        del terms
        return 2


class Table(NamedTuple):
    """All recurrences one below the other: `rows[starts[k] + i]` takes the method of `stages[k]` stages past stage `i`.

    A row is `(c, r, g, q, e)`: `K_{i+1} = (1 - g) K_i + g K_{i-1} + r h f_i + q h (f_i - f_{i-1})`, with
    `f_i = f(t + c h, K_i)`, and the error is the sum of `e h f_i`. The finish is of this form too, and a last row
    without a step is the field at the end. So is the method of P. Bogacki and L. F. Shampine, A 3(2) pair of
    Runge-Kutta formulas, Appl. Math. Lett. 2 (1989) 321-325, of order three; its rows, from `nonstiff` on, come last.
    """

    stages: Int[np.ndarray, " methods"]
    starts: Int[np.ndarray, " methods"]
    rows: Float[np.ndarray, "rows 5"]
    nonstiff: int


BOGACKI_SHAMPINE = np.array(
    [
        [0, 1 / 2, 0, 0, -5 / 72],
        [1 / 2, 3 / 4, 1, 0, 1 / 12],
        [3 / 4, 13 / 36, 4 / 9, 1 / 12, 1 / 9],
        [1, 0, 0, 0, -1 / 8],
    ]
)


@functools.cache
def load() -> Table:
    """The coefficients, read once."""
    text = importlib.resources.files("gradflow.solvers").joinpath("rock2.json").read_text()
    data = json.loads(text)
    blocks = []
    for m, recurrence, p, q in zip(data["degrees"], data["recf"], data["fp1"], data["fp2"], strict=True):
        rows = np.zeros((m + 3, 5))
        rows[:m, 1] = [recurrence[0], *recurrence[1::2]]
        rows[1:m, 2] = -np.asarray(recurrence[2::2])
        rows[m : m + 2, 1] = p
        rows[m + 1, 3] = q
        rows[m : m + 2, 4] = -q, q
        for i in range(m + 1):
            _, r, g, *_ = rows[i]
            rows[i + 1, 0] = (1 - g) * rows[i, 0] + g * rows[max(i - 1, 0), 0] + r
        rows[m + 2, 0] = 1
        blocks.append(rows)
    lengths = np.array([len(rows) for rows in blocks])
    rows = np.concatenate([*blocks, BOGACKI_SHAMPINE])
    return Table(lengths - 1, np.cumsum(lengths) - lengths, rows, len(rows) - len(BOGACKI_SHAMPINE))


def recur(
    field: Callable[[Scalar, PyTree], PyTree],
    y: PyTree,
    f: PyTree,
    h: Scalar,
    first: Int[ArrayLike, ""],
    stages: Int[Array, ""],
    bound: int | None,
) -> tuple[PyTree, PyTree, PyTree]:
    """The state after a step by the recurrence from row `first` on, the field there, and the error."""
    c, r, g, q, e = (jnp.asarray(column, h.dtype) for column in load().rows.T)

    def stage(i: Int[Array, ""], state: tuple) -> tuple:
        now, before, slope, error = state
        row = first + i
        new = field(c[row], now)
        step = ((r[row] + q[row]) * h, new), (-q[row] * h, slope)
        after = combine((1 - g[row], now), (g[row], before), *step)
        return after, now, new, combine((1.0, error), (e[row] * h, new))

    start = (combine((1.0, y), (r[first] * h, f)), y, f, combine((e[first] * h, f)))
    y1, _, f1, error = loop(stage, start, stages, bound)
    return y1, f1, error


def row_of(stages: Int[Array, ""]) -> Int[Array, ""]:
    """Where the recurrence of that many stages begins."""
    table = load()
    return jnp.asarray(table.starts, stages.dtype)[jnp.sum(jnp.asarray(table.stages, stages.dtype) < stages)]


def available(max_stages: int) -> Int[np.ndarray, " methods"]:
    """Numbers of stages for which there are coefficients, up to `most`."""
    stages = load().stages
    return stages[stages <= max_stages]


def stability_interval(stages: Int[np.ndarray, " methods"]) -> Float[np.ndarray, " methods"]:
    """Length of the real interval of stability, within a part in 200 below the exact one from 18 stages on.

    The published `0.811 s^2 - 1.5` holds up to 9 stages; from 10 on it exceeds the interval, by up to 0.4 %.
    """
    return np.where(stages < 10, 0.811 * stages**2 - 1.5, 0.81 * stages**2 - 2.6)
