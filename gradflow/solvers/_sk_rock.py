"""SK-ROCK: a stabilised explicit method of weak order 1 for stochastic flows with stiff drift.

With Chebyshev polynomials `T_j`, `w0 = 1 + e / s^2`, `e = 0.05`, `w1 = T_s(w0) / T_s'(w0)` and `Q = G(t, y) dW`, a step
of length `h` with `s` stages from `K_0 = y` is

    K_1 = K_0 + m_1 h F(t, K_0 + n_1 Q) + k_1 Q,      m_1 = w1 / w0,  n_1 = s w1 / 2,  k_1 = s w1 / w0,
    K_j = m_j h F(t + c_{j-1} h, K_{j-1}) + n_j K_{j-1} + k_j K_{j-2},      j = 2 ... s,
    m_j = 2 w1 T_{j-1} / T_j,  n_j = 2 w0 T_{j-1} / T_j,  k_j = -T_{j-2} / T_j      (at w0),

with `c_j` the sums that the same recurrence gives for `F = 1`. For `F = l y`, `G` constant, `p = h l`, a step is

    y_1 = A(p) y + B(p) Q,      A = T_s(w0 + w1 p) / T_s(w0),      B = U_{s-1}(w0 + w1 p) (1 + w1 p / 2) / U_{s-1}(w0).
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Scalar

from gradflow._checks import check_count, check_positive, fail, is_concrete
from gradflow.protocols import HasNoise
from gradflow.solvers._euler_maruyama import AbstractStochasticMethod
from gradflow.solvers._stabilised import combine

DAMPING = 0.05
REACH = 2 - 4 / 3 * DAMPING
"""The interval of stability is about this times the square of the number of stages."""


class SKROCK(AbstractStochasticMethod):
    """Stabilised method of weak order 1, for steps far above `2 / sharpness`.

    A step takes `s + 1` gradients, and may be `0.95 s^2` times as long as one of `EulerMaruyama`. It pays where slow
    directions are asked about, to an accuracy that allows steps of more than some ten times `2 / sharpness`: then it
    takes a fraction of the gradients. Directions that relax within a step are stable, but get less noise than they
    should, so that the mean loss, to which they contribute most, comes out too low (by half in the benchmark
    `stochastic`). With steps of the learning rate of a stable SGD it pays nothing.

    **Arguments**

    - `dt`: largest step.
    - `spectral_radius`: a bound on that of the Jacobian of the drift along the path, such as 1.2 times the largest
      `gradflow.observables.Sharpness` met; known when the solver is built, since it sets the number of stages.
    - `stages`: their number, instead: stable for `dt * spectral_radius <= 1.93 (stages - 0.5)^2 - 1.5`.

    **Raises** `ValueError` unless one of the two is given, for values that are not positive, and for a spectral radius
    or `dt` that is traced.

    Source: A. Abdulle, I. Almuslimani and G. Vilmart (2018), *Optimal explicit stabilized integrator of weak order 1
    for stiff and ergodic stochastic differential equations*, SIAM/ASA J. Uncertain. Quantif. 6, 937-964.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(30 * jnp.eye(2), jnp.ones(2), gf.losses.square, predict=lambda w, x: x @ w)
    >>> flow = gf.SGDFlow(problem, learning_rate=1e-3, batch_size=1)
    >>> solver = gf.solvers.SKROCK(0.1, spectral_radius=450.0)
    >>> sol = gf.solve(flow, jnp.zeros(2), [1.0], solver=solver, key=jax.random.key(0))
    >>> solver.stages, int(sol.stats["gradient_evaluations"])
    (6, 70)
    """

    dt: Scalar | None
    stages: int = eqx.field(static=True)

    def __init__(self, dt: object, *, spectral_radius: ArrayLike | None = None, stages: int | None = None):
        check_positive("dt", dt, "It is the largest step in time.")
        if (spectral_radius is None) == (stages is None):
            actual = "given together with `stages`" if stages is not None else "missing, and so is `stages`"
            raise fail("spectral_radius", "be given, or else `stages`", actual)
        if stages is None:
            if not is_concrete((dt, spectral_radius)):
                advice = "Pass a number of `stages`."
                raise fail("spectral_radius", "be known when the solver is built, as `dt`", "traced", advice)
            check_positive("spectral_radius", spectral_radius)
            product = float(np.asarray(dt)) * float(np.asarray(spectral_radius))
            stages = math.ceil(math.sqrt((product + 1.5) / REACH) + 0.5)
        check_count("stages", stages)
        self.dt, self.stages = jnp.asarray(dt, float), int(stages)

    def step(self, flow: HasNoise, frozen: PyTree, t: Scalar, dt: Scalar, y: PyTree, dw: Float[Array, " n"]) -> PyTree:
        noise = flow.noise(t, y, frozen, dw)
        rows = coefficients(self.stages)
        c, m, n, k = (jnp.asarray(column, float) for column in rows)

        def stage(j: Int[ArrayLike, ""], state: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            now, before = state
            slope = flow.vector_field(t + c[j - 1] * dt, now, frozen)
            return combine((m[j] * dt, slope), (n[j], now), (k[j], before)), now

        slope = flow.vector_field(t, combine((1.0, y), (n[1], noise)), frozen)
        first = combine((1.0, y), (m[1] * dt, slope), (k[1], noise))
        return jax.lax.fori_loop(2, self.stages + 1, stage, (first, y))[0]

    def evaluations(self, flow: HasNoise) -> tuple[int, int]:
        return self.stages + 1, self.stages * flow.products_per_evaluation


class Coefficients(NamedTuple):
    """`c, m, n, k` of the stages, by their number; the entries at zero are those of the start."""

    c: Float[np.ndarray, " rows"]
    m: Float[np.ndarray, " rows"]
    n: Float[np.ndarray, " rows"]
    k: Float[np.ndarray, " rows"]


def coefficients(stages: int) -> Coefficients:
    """The coefficients for a number of stages, in double precision."""
    s = stages
    w0 = 1 + DAMPING / s**2
    angle = np.arccosh(w0)
    T = np.cosh(np.arange(s + 1) * angle)
    w1 = T[s] * np.sinh(angle) / (s * np.sinh(s * angle))
    c, m, n, k = np.zeros((4, s + 1))
    c[1] = m[1] = w1 / w0
    n[1], k[1] = s * w1 / 2, s * w1 / w0
    for j in range(2, s + 1):
        m[j], n[j], k[j] = 2 * w1 * T[j - 1] / T[j], 2 * w0 * T[j - 1] / T[j], -T[j - 2] / T[j]
        c[j] = m[j] + n[j] * c[j - 1] + k[j] * c[j - 2]
    return Coefficients(c, m, n, k)
