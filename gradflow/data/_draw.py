"""What the synthetic generators share: Haar-distributed frames, noise, and its check."""

import math
from typing import TypeGuard

import numpy as np
from jaxtyping import Float

from gradflow._checks import fail


def orthonormal_columns(rng: np.random.Generator, rows: int, columns: int) -> Float[np.ndarray, "rows columns"]:
    """A uniformly (Haar) distributed frame of `columns <= rows` orthonormal columns.

    Source: F. Mezzadri (2006), *How to generate random matrices from the classical compact groups*, math-ph/0609050.
    """
    q, r = np.linalg.qr(rng.standard_normal((rows, columns)))
    # The factorisation fixes signs in its own way; with the signs of r undone the law is uniform.
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def add_noise(rng: np.random.Generator, y: Float[np.ndarray, "n *k"], noise: float) -> Float[np.ndarray, "n *k"]:
    """`y` plus independent normal noise of standard deviation `noise`."""
    return y + noise * rng.standard_normal(y.shape)


def describe_noise(noise: float) -> str:
    """The end of a description: empty without noise."""
    return f" + {noise:g} N(0, 1)" if noise else ""


def check_noise(noise: object) -> float:
    """Refuses standard deviations that are negative or not finite."""
    if not is_number(noise) or not math.isfinite(noise) or noise < 0:
        raise fail("noise", "be a standard deviation, zero or positive", repr(noise), "Use 0.0 for none.")
    return float(noise)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a real scalar."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
