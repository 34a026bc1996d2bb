"""Rates of momentum methods on a quadratic, mode by mode, and which method is the faster one.

A mode of curvature `lambda` of the high-resolution flows obeys `z'' + p z' + q z = 0` with

    heavy ball:   p = 2 sqrt(mu),                      q = (1 + r) lambda,        r = sqrt(mu s)
    Nesterov:     p = 2 sqrt(mu) + sqrt(s) lambda,     q = (1 + r) lambda

and decays at the rate of its slower root. Underdamped, that is `p / 2`: `sqrt(mu)` for the heavy ball at any
`lambda`, and `sqrt(mu) + sqrt(s) lambda / 2` for Nesterov's method, which is underdamped for
`mu < lambda - s lambda^2 / 4`. The slowest mode decides, the one of the smallest `lambda`. At `mu = lambda` both decay
at `sqrt(lambda)` exactly; above it Nesterov's method is the slower one, however large `mu`. The low-resolution flows
lack `r` and `sqrt(s) lambda`, and are one equation. The iterates obey `z_{k+2} - T z_{k+1} + P z_k = 0` with

    heavy ball:   T = 1 + beta - s lambda,            P = beta,                    beta = (1 - r) / (1 + r)
    Nesterov:     T = (1 + beta) (1 - s lambda),      P = beta (1 - s lambda)

whose value at `z = 1` is `s lambda` for both.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float

from gradflow._checks import check_choice, check_finite, check_not_negative, check_positive, fail, is_concrete


class FasterMethod(NamedTuple):
    """`name`: `"heavy_ball"`, `"nesterov"` or `"tie"`; the rates of both, per unit of flow time `k sqrt(s)`;
    `crossover`: the `mu` at which Nesterov's mode of the smallest `lambda` is critically damped.

    That is `lambda - s lambda^2 / 4` in the high-resolution flow (0 where it is negative, and the mode overdamped at
    every `mu`), and `lambda` in the low-resolution one and for the iterates."""

    name: str
    heavy_ball: float
    nesterov: float
    crossover: float


def momentum_rates(
    eigenvalues: ArrayLike | Sequence[float],
    mu: ArrayLike,
    s: ArrayLike,
    method: Literal["heavy_ball", "nesterov"],
    resolution: Literal["high", "low", "discrete"] = "high",
) -> Float[np.ndarray, "..."]:
    """Rate at which each mode of a quadratic decays under momentum.

    Per unit of flow time, `t = k sqrt(s)` at iterate `k`.

    **Arguments**: `eigenvalues` of the Hessian, not negative; `mu` and `s` of the method, which broadcast against them;
    `resolution`: of the flow, or `"discrete"` for the iterates, where a negative rate is growth.

    **Returns** the rates, of the shape to which eigenvalues, `mu` and `s` broadcast.

    `mu` may be any number: it sets the friction, whether it bounds the eigenvalues from below or exceeds them all. For
    `mu s > 1` the momentum coefficient of the iterates is negative.

    **Raises** `ValueError` for negative eigenvalues or `mu`, `s` that is not positive, numbers that are not finite, and
    an unknown method or resolution.

    Source: roots of the characteristic polynomials. The flows: B. Shi et al. (2018), arXiv 1810.08907.

    >>> import gradflow as gf
    >>> gf.theory.momentum_rates([1.0, 4.0], 0.25, 0.01, "heavy_ball").tolist()
    [0.5, 0.5]
    >>> gf.theory.momentum_rates([1.0, 4.0], 0.25, 0.01, "nesterov").round(12).tolist()
    [0.55, 0.7]
    """
    lam = np.asarray(eigenvalues, float)
    check_finite("eigenvalues", lam)
    check_not_negative("eigenvalues", lam, "Clip what rounding made negative.")
    check_finite("mu", np.asarray(mu, float))
    check_not_negative("mu", mu)
    check_finite("s", np.asarray(s, float))
    check_positive("s", s)
    check_choice("method", method, ("heavy_ball", "nesterov"))
    check_choice("resolution", resolution, ("high", "low", "discrete"))
    mu, s = np.asarray(mu, float), np.asarray(s, float)
    r = np.asarray(np.sqrt(mu * s))
    if resolution == "discrete":
        return _iterate_rates(lam, r, s, method)
    high = resolution == "high"
    half = np.sqrt(mu) + (0.5 * np.sqrt(s) * lam if high and method == "nesterov" else 0 * lam)
    force = (1 + r if high else 1.0) * lam
    inside = half**2 - force
    # The smaller root of an overdamped mode is a difference of numbers that may be close.
    slow = force / np.where(half > 0, half + np.sqrt(np.maximum(inside, 0)), 1)
    return np.where(inside > 0, slow, half)


def _iterate_rates(lam: np.ndarray, r: np.ndarray, s: np.ndarray, method: str) -> np.ndarray:
    """`-ln |z| / sqrt(s)` of the larger root `z` of `z^2 - T z + P`."""
    x, beta = s * lam, (1 - r) / (1 + r)
    # T / 2, P, 1 - T / 2, and T^2 / 4 - P without the cancellation near small x and r.
    if method == "nesterov":
        half, product, gap = (1 - x) / (1 + r), beta * (1 - x), (r + x) / (1 + r)
        inside = (1 - x) * (r**2 - x) / (1 + r) ** 2
    else:
        half, product, gap = 1 / (1 + r) - x / 2, beta + 0 * x, r / (1 + r) + x / 2
        inside = x**2 / 4 - x / (1 + r) + (r / (1 + r)) ** 2
    root = np.sqrt(np.maximum(inside, 0))
    # The roots y of the polynomial in y = 1 - z have the product x: the small one is a quotient, not a difference.
    other = gap + root
    near_one = x / np.where(other > 0, other, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        real = np.where(half >= 0, np.log1p(-near_one), np.log(root - half))
        logs = np.where(inside >= 0, real, np.log(product) / 2)
    return np.asarray(0.0 - logs / np.sqrt(s))


def faster_method(
    eigenvalues: ArrayLike | Sequence[float],
    mu: float,
    s: float,
    resolution: Literal["high", "low", "discrete"] = "high",
) -> FasterMethod:
    """Which of the heavy ball and Nesterov's method is faster in the end.

    Both with the same `mu` and `s`; the answer tells by how much. With `lambda` the smallest eigenvalue,

    - of the high-resolution flows it is Nesterov's for `mu < lambda`, and the heavy ball above;
    - the low-resolution flows are one equation: a tie;
    - of the iterates, for `s` up to one over the largest eigenvalue, it is Nesterov's for
      `mu < lambda (4 - 3 s lambda) / (2 - s lambda)^2`, which is `lambda + s lambda^2 / 4 + O(s^2)`; the heavy ball
      from there to `mu = 1/s`, where both are gradient descent; and Nesterov's above, where `beta` is negative.

    **Arguments** and **raises**: as for `momentum_rates`. Rates that agree to nine digits are a tie.

    >>> import gradflow as gf
    >>> result = gf.theory.faster_method([1.0, 10.0], mu=0.5, s=0.05)
    >>> result.name, result.nesterov > result.heavy_ball, result.crossover
    ('nesterov', True, 0.9875)
    >>> [gf.theory.faster_method([1.0, 10.0], mu, s=0.05, resolution="discrete").name for mu in (0.5, 15.0, 25.0)]
    ['nesterov', 'heavy_ball', 'nesterov']
    """
    first = float(np.min(momentum_rates(eigenvalues, mu, s, "heavy_ball", resolution)))
    second = float(np.min(momentum_rates(eigenvalues, mu, s, "nesterov", resolution)))
    min_eigenvalue = float(np.min(np.asarray(eigenvalues, float)))
    crossover = max(min_eigenvalue - s * min_eigenvalue**2 / 4, 0.0) if resolution == "high" else min_eigenvalue
    tied = abs(first - second) <= 1e-9 * max(abs(first), abs(second))
    name = "tie" if tied else "nesterov" if second > first else "heavy_ball"
    return FasterMethod(name, first, second, crossover)


def effective_mu(momentum: Any, s: Any) -> Any:
    """The `mu` that a fixed momentum stands for, `((1 - beta)/(1 + beta))^2 / s`.

    **Arguments**: `momentum`: the coefficient `beta`, in `[0, 1)`; `s`: the step size, positive. Arrays broadcast.

    **Raises** `ValueError` for numbers outside these ranges.

    >>> import gradflow as gf
    >>> round(gf.theory.effective_mu(0.9, 0.01), 4)
    0.277
    """
    check_not_negative("momentum", momentum)
    if is_concrete(momentum) and np.any(np.asarray(momentum) >= 1):
        raise fail("momentum", "lie in [0, 1)", f"{np.max(momentum):g}", "Typical values are 0.9 and 0.99.")
    check_positive("s", s)
    return ((1 - momentum) / (1 + momentum)) ** 2 / s


def stable_step(sharpness: Any, beta: Any, method: Literal["heavy_ball", "nesterov"]) -> Any:
    """The step size beyond which a momentum method diverges on a quadratic.

        heavy ball: 2 (1 + beta) / sharpness,        Nesterov: 2 (1 + beta) / (1 + 2 beta) / sharpness

    The flows have no such limit.

    **Arguments**: `sharpness`: positive; `beta`: the coefficient of the last step, not negative; `method`:
    `"heavy_ball"` or `"nesterov"`.

    **Raises** `ValueError` for numbers outside these ranges, and an unknown method.

    >>> import gradflow as gf
    >>> gf.theory.stable_step(2.0, 1.0, "heavy_ball")
    2.0
    """
    check_positive("sharpness", sharpness)
    check_not_negative("beta", beta)
    check_choice("method", method, ("heavy_ball", "nesterov"))
    return 2 * (1 + beta) / sharpness / (1 if method == "heavy_ball" else 1 + 2 * beta)
