"""What theory says of two nearby directions of opposite labels: the plateau, and how the loss leaves it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from gradflow._checks import check_positive, fail


class TwoDirections(NamedTuple):
    """`plateau`: the loss while the network cannot tell the directions apart; `rate`: at which it learns to.

    >>> import gradflow as gf
    >>> theory = gf.theory.two_directions(ratio=3.0, angle=0.1, share=0.375)
    >>> round(theory.plateau, 4), round(theory.escape_time(0.1), 1)
    (0.866, 137.0)
    """

    plateau: float
    rate: float

    def loss(self, t: Float[np.ndarray, "*times"]) -> Float[np.ndarray, "*times"]:
        """The loss at times counted from the beginning of the plateau."""
        return np.asarray(self.plateau / (1 + self.rate * np.asarray(t, float)))

    def escape_time(self, drop: float = 0.1) -> float:
        """When the loss has fallen below the plateau by the fraction `drop`.

        **Raises** `ValueError` for a drop outside `(0, 1)`.
        """
        if not 0 < drop < 1:
            raise fail("drop", "lie between 0 and 1", f"{drop:g}", "It is a fraction of the plateau.")
        return drop / (1 - drop) / self.rate


def two_directions(ratio: float | int, angle: float, share: float) -> TwoDirections:
    """Plateau, and the escape from it, on two nearby inputs of opposite labels.

    For exponential loss (a mean) and trained input weights `w_k`, `a_k` fixed:

        plateau = 2 sqrt(p) / (1 + p),        L(t) = plateau / (1 + rate t)
        rate = (share / 2) sqrt(p) / (1 + p) (2 sin(D/2))^2

    `p` is the number of copies of the one input over that of the other, `D` their angle. While the network has one
    output `c` for both, the best is the plateau, with equal residuals `r = sqrt(p) / (1 + p)` of both sides. Neurons of
    positive sign that see both inputs, and those of negative sign that slide along the kink of the first, drive the
    outputs apart: `d' = share r |x+ - x-|^2 exp(-d/2)`, `L = plateau exp(-d/2)`. Times to escape go like
    `D^-2 (1 + p) / sqrt(p)`. The loss ends like `4 / (share D^2 t)`.

    The law holds to `O(D^2)`: with `P` and `N` the parts of the share that belong to the positive and to the sliding
    negative neurons, the loss ends above it by `(N / P) D^2 / 4`, relatively. For `N = 3 P` that is 12 % at `D = 0.4`,
    0.75 % at 0.1 and 0.05 % at 0.025. It is for as long as these neurons do not change what they see.

    **Arguments**: `ratio`: `p`; `angle`: `D` in radians, small; `share`: the sum of `a_k^2` over these neurons, for
    `a_k = +-1 / sqrt(m)` their fraction.

    **Returns** a `TwoDirections`.

    **Raises** `ValueError` for arguments that are not positive.

    Source: M. Wang and C. Ma (2023), arXiv 2305.12467, for the plateau and the scaling; the law of the loss is worked
    out here, and confirmed by the flow.

    >>> import gradflow as gf
    >>> round(gf.theory.two_directions(1.0, 0.1, 1.0).plateau, 6)
    1.0
    """
    for name, value in (("ratio", ratio), ("angle", angle), ("share", share)):
        check_positive(name, value)
    slope = float(np.sqrt(ratio) / (1 + ratio))
    return TwoDirections(2 * slope, float(share / 2 * slope * (2 * np.sin(angle / 2)) ** 2))
