"""Phase diagram of one-pass SGD on wide two-layer networks with many inputs, and the heights of its plateaus.

Learning rate `gamma = gamma0 d^-delta` and width `p = p0 d^kappa` for `d` inputs; all that counts is `g = gamma / p`,
of size `d^-(kappa + delta)`: the weight of the terms of second order in the step (Veiga, Stephan, Loureiro, Krzakala,
Zdeborova 2022, arXiv 2202.00293).
"""

import math
from typing import NamedTuple, SupportsFloat

from gradflow._checks import check_positive, fail, is_concrete

PLATEAU = 1 / (2 * math.pi * math.sqrt(3))
"""Share of `g noise` that stays as risk near a specialised minimum, for erf units and orthogonal teachers."""

GREEN_TAIL = -2.0
"""Power of time with which the risk of a wide enough student falls where there is no plateau."""

BOUNDARY = 1e-9
"""Distance from a boundary within which `kappa + delta` counts as on it."""


class PhaseRegion(NamedTuple):
    """A point of the phase diagram.

    - `name`: `"green"` (perfect learning), `"blue"` (plateau), `"orange"` (bad learning) or `"red"` (no equation).
    - `exponent`: `kappa + delta`; `title`: what happens there when `d` is infinite.
    - `clock`: steps of SGD per unit of the region's own time are `d^clock`. The flows of this package count
      `t = step * g / d` everywhere instead.
    - `fluctuations`: SGD deviates from its equation by `d^-fluctuations`. `neglected`: terms that the region drops are
      smaller by `d^-neglected`; zero where none is dropped. Both NaN in the red region.
    """

    name: str
    title: str
    exponent: float
    clock: float
    fluctuations: float
    neglected: float

    @property
    def terms(self) -> str:
        """Name of the terms that survive, for `gradflow.OrderParameterFlow(terms=...)`.

        **Raises** `ValueError` in the red region, where no differential equation describes SGD.
        """
        if self.name == "red":
            advice = "No differential equation describes SGD there: run gradflow.OnePassSGD."
            raise fail("kappa + delta", "be above -1/2", f"{self.exponent:g}", advice)
        return self.name

    def gamma_over_p(self, dim: float | int, ratio: float = 1.0) -> float:
        """Learning rate over width `ratio * dim^-(kappa + delta)` at a finite number of inputs."""
        return ratio * dim**-self.exponent


def phase_region(kappa: SupportsFloat, delta: SupportsFloat) -> PhaseRegion:
    """The region of the phase diagram of one-pass SGD.

    For width `p ~ d^kappa` and learning rate `gamma ~ d^-delta`:

    | region | condition | what happens when `d` is infinite |
    |---|---|---|
    | green | `kappa + delta > 0` | the risk goes to zero, noise or not |
    | blue | `kappa + delta = 0` | a plateau proportional to the noise (Saad and Solla at `kappa = delta = 0`) |
    | orange | `-1/2 < kappa + delta < 0` | nothing is learnt |
    | red | `kappa + delta <= -1/2` | steps are of the size of what they change |

    At finite `d` the terms dropped matter: the full system, with `g = gamma / p` as it is, holds in all three.

    **Arguments**: `kappa`, `delta`: the exponents. **Returns** a `PhaseRegion`.

    **Raises** `ValueError` for exponents that are not finite.

    Source: R. Veiga et al. (2022), arXiv 2202.00293.

    >>> import gradflow as gf
    >>> gf.theory.phase_region(0.3, 0.2).name, gf.theory.phase_region(0.0, 0.0).name
    ('green', 'blue')
    """
    exponent = float(kappa) + float(delta)
    if not math.isfinite(exponent):
        raise fail("kappa + delta", "be finite", f"{exponent}")
    if exponent > BOUNDARY:
        return PhaseRegion("green", "perfect learning", exponent, 1 + exponent, (1 + exponent) / 2, exponent)
    if exponent >= -BOUNDARY:
        return PhaseRegion("blue", "plateau", exponent, 1.0, 0.5, 0.0)
    if exponent > -0.5 + BOUNDARY:
        return PhaseRegion("orange", "bad learning", exponent, 1 + 2 * exponent, 0.5 + exponent, -exponent)
    return PhaseRegion("red", "no equation", exponent, math.nan, math.nan, math.nan)


def plateau(gamma_over_p: float, noise: float) -> float:
    """Risk at which one-pass SGD with label noise saturates:

        A g noise / (1 - 2 A g),        A = 1 / (2 pi sqrt 3),    g = gamma_over_p

    For erf units, normalised, and an orthogonal teacher (`P = I`) that the student has learnt, at any width. The
    leading term is derived, the next one is a fit: within 2 % for `g <= 1` and `noise <= 1e-3`, within 0.2 % for
    `g <= 0.1`. Too low for larger `g`; at larger noise the student leaves that state, and the risk drifts below it.

    **Raises** `ValueError` for a learning rate that is not positive, or at which no such state is stable,
    `g >= 1 / (2 A)`, and for negative noise.

    >>> import gradflow as gf
    >>> round(1e4 * gf.theory.plateau(1.0, 1e-3), 3)
    1.126
    """
    if is_concrete((gamma_over_p, noise)):
        check_positive("gamma_over_p", gamma_over_p)
        if gamma_over_p >= 1 / (2 * PLATEAU):
            raise fail(
                "gamma_over_p", f"be below {1 / (2 * PLATEAU):.4g}", f"{gamma_over_p:g}", "Nothing is stable there."
            )
        if not noise >= 0:
            raise fail("noise", "not be negative", f"{noise}")
    return PLATEAU * gamma_over_p * noise / (1 - 2 * PLATEAU * gamma_over_p)


def finite_dim_plateau(exponent: float, dim: float | int, noise: float, ratio: float = 1.0) -> float:
    """Plateau of the risk in the green region at a finite number of inputs.

    There `g = ratio * dim^-exponent` is not yet zero, and the plateau falls like `dim^-exponent`.

    **Arguments**: `exponent`: `kappa + delta`, positive; `dim`: the number of inputs `d`; `noise`: the variance of the
    label noise; `ratio`: `g` at exponent zero.

    **Raises** `ValueError` for a number of inputs that is not positive, and what `plateau` refuses.

    >>> import gradflow as gf
    >>> ratio = gf.theory.finite_dim_plateau(0.5, 1e6, 1e-3) / gf.theory.finite_dim_plateau(0.5, 1e4, 1e-3)
    >>> round(ratio, 2)
    0.1
    """
    check_positive("dim", dim)
    return plateau(ratio * dim**-exponent, noise)
