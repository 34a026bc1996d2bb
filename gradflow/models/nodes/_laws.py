"""Laws of single numbers, with what quadrature asks of them: mean, quantiles, and Gauss-Legendre nodes."""

import abc
import math
from collections.abc import Sequence
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Key

from gradflow._checks import check_count, check_finite, check_positive, fail


class AbstractLaw(eqx.Module):
    """A law of one number; independent numbers have a sequence of laws.

    `bounded` tells whether its support is, as the theorems on mean-field limits ask.
    """

    bounded: ClassVar[bool] = True

    @property
    @abc.abstractmethod
    def mean(self) -> float:
        """The expectation."""

    @property
    def atoms(self) -> int | None:
        """Number of values it takes, or `None` for a continuous law."""
        return None

    @abc.abstractmethod
    def quantile(self, u: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """The inverse of the distribution function, for `0 < u < 1`."""

    @abc.abstractmethod
    def legendre(self, n: int) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
        """Nodes and weights of sum one; for the expectation of a smooth function the error falls geometrically."""

    @abc.abstractmethod
    def draw(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """Independent draws; may be traced."""


class Uniform(AbstractLaw):
    """Uniform on `[low, high]`.

    **Raises** `ValueError` for ends that are not finite, or in the wrong order.

    >>> from gradflow.models.nodes import Uniform
    >>> law = Uniform(0.0, 2.0)
    >>> x, w = law.legendre(3)
    >>> law.mean, round(float(w @ x**4), 12)
    (1.0, 3.2)
    """

    low: float
    high: float

    def __init__(self, low: ArrayLike, high: ArrayLike):
        self.low, self.high = _number("low", low), _number("high", high)
        if self.low >= self.high:
            advice = "A single value is Discrete([value])."
            raise fail("high", f"be above low = {self.low:g}", f"{self.high:g}", advice)

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2

    def quantile(self, u: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        return self.low + (self.high - self.low) * u

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        return jax.random.uniform(key, shape, _float(dtype), self.low, self.high)

    def legendre(self, n: int) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
        x, w = np.polynomial.legendre.leggauss(n)
        return self.quantile((x + 1) / 2), w / 2


class Gaussian(AbstractLaw):
    """Normal law. Its Gauss-Legendre nodes lie within a number of standard deviations that grows with their number.

    The weights carry the density. Gauss-Hermite nodes, which reach out like `sqrt(2 n)`, converge slowly for
    activations that saturate.

    **Raises** `ValueError` for a mean that is not finite and a standard deviation that is not positive.

    >>> from gradflow.models.nodes import Gaussian
    >>> x, w = Gaussian(1.0, 0.5).legendre(32)
    >>> round(float(w @ x**2), 6)
    1.25
    """

    location: float
    std: float
    bounded: ClassVar[bool] = False

    def __init__(self, mean: ArrayLike = 0.0, std: ArrayLike = 1.0):
        self.location, self.std = _number("mean", mean), _number("std", std)
        check_positive("std", self.std, "A single value is Discrete([value]).")

    @property
    def mean(self) -> float:
        return self.location

    def quantile(self, u: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        from scipy.special import ndtri

        return self.location + self.std * ndtri(u)

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        return self.location + self.std * jax.random.normal(key, shape, _float(dtype))

    def legendre(self, n: int) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
        x, w = np.polynomial.legendre.leggauss(n)
        extent = min(8.0, 1.1 * np.sqrt(n))
        mass = w * np.exp(-((extent * x) ** 2) / 2)
        return self.location + self.std * extent * x, mass / np.sum(mass)


class Radius(AbstractLaw):
    """Law of the length of a vector of independent Gaussian entries.

    It is `std` times chi with `dim` degrees of freedom.

    **Raises** `ValueError` for a dimension below one, and a standard deviation that is not positive.

    >>> from gradflow.models.nodes import Radius
    >>> x, w = Radius(5).legendre(40)
    >>> round(float(w @ x**2), 9)
    5.0
    """

    dim: int
    std: float
    bounded: ClassVar[bool] = False

    def __init__(self, dim: int, std: ArrayLike = 1.0):
        check_count("dim", dim)
        self.dim, self.std = int(dim), _number("std", std)
        check_positive("std", self.std)

    @property
    def mean(self) -> float:
        return self.std * math.sqrt(2) * math.exp(math.lgamma((self.dim + 1) / 2) - math.lgamma(self.dim / 2))

    def quantile(self, u: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        from scipy.special import gammaincinv

        return self.std * np.sqrt(2 * gammaincinv(self.dim / 2, u))

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        return self.std * jnp.sqrt(jax.random.chisquare(key, self.dim, shape=shape, dtype=_float(dtype)))

    def legendre(self, n: int) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
        x, w = np.polynomial.legendre.leggauss(n)
        extent, middle = min(8.0, 1.1 * np.sqrt(n)), np.sqrt(max(self.dim - 1, 0))
        low = max(0.0, middle - extent)
        r = low + (middle + extent - low) * (x + 1) / 2
        logs = (self.dim - 1) * np.log(r) - r**2 / 2
        mass = w * np.exp(logs - np.max(logs))
        return self.std * r, mass / np.sum(mass)


class Discrete(AbstractLaw):
    """A few values with probabilities; a single value is a constant.

    Probabilities are equal by default.

    **Raises** `ValueError` for values that are not finite, and for probabilities that are not positive or do not fit.

    >>> from gradflow.models.nodes import Discrete
    >>> Discrete([-1.0, 1.0], [0.25, 0.75]).mean
    0.5
    """

    values: Float[np.ndarray, " k"]
    probabilities: Float[np.ndarray, " k"]

    def __init__(self, values: ArrayLike | Sequence[ArrayLike], probabilities: Sequence[float] | None = None):
        points = np.atleast_1d(np.asarray(values, float))
        if points.ndim != 1 or points.size == 0:
            raise fail("values", "be a sequence of numbers", f"of shape {points.shape}")
        check_finite("values", points)
        weights = np.ones(points.size) if probabilities is None else np.asarray(probabilities, float)
        if weights.shape != points.shape:
            raise fail("probabilities", f"have shape {points.shape}", f"of shape {weights.shape}")
        check_positive("probabilities", weights)
        order = np.argsort(points)
        self.values, self.probabilities = points[order], weights[order] / np.sum(weights)

    @property
    def mean(self) -> float:
        return float(self.probabilities @ self.values)

    @property
    def atoms(self) -> int | None:
        return self.values.size

    def quantile(self, u: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        steps = np.cumsum(self.probabilities)[:-1]
        return self.values[np.searchsorted(steps, u, side="right")]

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        values = jnp.asarray(self.values, _float(dtype))
        return jax.random.choice(key, values, shape, p=jnp.asarray(self.probabilities))

    def legendre(self, n: int) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
        return self.values, self.probabilities


def _float(dtype: DTypeLike | None) -> DTypeLike:
    return jnp.result_type(float) if dtype is None else dtype


def _number(argument: str, value: ArrayLike) -> float:
    check_finite(argument, value)
    if np.ndim(value) != 0:
        advice = "Independent numbers have a sequence of laws."
        raise fail(argument, "be a number", f"of shape {np.shape(value)}", advice)
    return float(np.asarray(value))
