"""Rules for nodes: Gauss-Legendre on a tensor grid, scrambled Sobol points, Monte Carlo.

All nodes follow the limit; how many there are decides about the error alone. For smooth laws and activations it falls
geometrically with the nodes per dimension (`GaussLegendre`), somewhat faster than `1 / n` (`Sobol`), or like `n^-1/2`
(`MonteCarlo`, no better than a finite network of `n` neurons).
"""

import abc
import warnings
from collections.abc import Sequence
from typing import ClassVar

import equinox as eqx
import numpy as np
from jaxtyping import Float

from gradflow._checks import check_count, fail
from gradflow.models.nodes._laws import AbstractLaw

MOST_NODES = 100_000
"""Nodes of a tensor grid beyond which Sobol points take its place."""
TENSOR_DIMENSION = 3
"""Continuous dimensions up to which a tensor grid is the default."""

Nodes = Float[np.ndarray, "n d"]
Weights = Float[np.ndarray, " n"]


class AbstractNodeRule(eqx.Module):
    """Nodes and weights for independent numbers of given laws. `random`: error bars come from replicates."""

    random: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, laws: Sequence[AbstractLaw]) -> tuple[Nodes, Weights]:
        """Nodes `(n, d)` and weights `(n,)` of sum one, for `d` laws."""

    @abc.abstractmethod
    def refined(self) -> "AbstractNodeRule":
        """A rule with more nodes."""

    def replicate(self, number: int) -> "AbstractNodeRule":
        """The same rule with other random numbers."""
        return self

    def coarsened(self) -> "AbstractNodeRule":
        """A rule with fewer nodes, or the same where there is none."""
        return self

    def fits(self, laws: Sequence[AbstractLaw]) -> bool:
        """Whether these laws get nodes of this rule, and not of one that takes its place."""
        return True


class GaussLegendre(AbstractNodeRule):
    """Gauss-Legendre nodes on a tensor grid, `n` in each dimension.

    A discrete law has its own values for nodes.

    Grids of over 100,000 nodes are refused with a warning, and `Sobol(4096)` takes their place.

    **Raises** `ValueError` for `n` below one.

    >>> import numpy as np
    >>> from gradflow.models.nodes import GaussLegendre, Uniform
    >>> x, w = GaussLegendre(12)([Uniform(-1, 1), Uniform(-1, 1)])
    >>> x.shape, round(float(w @ np.cos(x[:, 0] + x[:, 1])), 12) == round(float(np.sin(1.0) ** 2), 12)
    ((144, 2), True)
    """

    n: int

    def __init__(self, n: int = 12):
        check_count("n", n)
        self.n = int(n)

    def __call__(self, laws: Sequence[AbstractLaw]) -> tuple[Nodes, Weights]:
        if not self.fits(laws):
            warnings.warn(
                f"A tensor grid of {self.n} nodes in each of {len(laws)} dimensions has {self._size(laws):.1e} nodes:"
                " taking Sobol(4096), whose error falls more slowly.",
                stacklevel=2,
            )
            return Sobol(4096)(laws)
        return _tensor([law.legendre(self.n) for law in laws])

    def refined(self) -> "GaussLegendre":
        return GaussLegendre(self.n + max(1, self.n // 2))

    def coarsened(self) -> "GaussLegendre":
        return GaussLegendre(max(1, 2 * self.n // 3))

    def fits(self, laws: Sequence[AbstractLaw]) -> bool:
        return self._size(laws) <= MOST_NODES

    def _size(self, laws: Sequence[AbstractLaw]) -> float:
        return float(np.prod([float(law.atoms or self.n) for law in laws]))


class Sobol(AbstractNodeRule):
    """Scrambled Sobol points, through the quantiles of the laws.

    `n` of them, a power of two, with equal weights. Replicate `r` is scrambled independently, from seed
    `seed + 7919 r`.

    **Raises** `ValueError` for `n` that is no power of two, and a negative seed.

    >>> from gradflow.models.nodes import Gaussian, Sobol
    >>> x, w = Sobol(1024)([Gaussian()] * 5)
    >>> x.shape, bool(abs(w @ x**2 - 1).max() < 0.02)
    ((1024, 5), True)
    """

    n: int
    seed: int
    random: ClassVar[bool] = True

    def __init__(self, n: int = 256, seed: int = 0):
        check_count("n", n)
        if n & (n - 1):
            raise fail("n", "be a power of two", f"{n}", "Sobol points are balanced in such numbers.")
        check_count("seed", seed, least=0)
        self.n, self.seed = int(n), int(seed)

    def __call__(self, laws: Sequence[AbstractLaw]) -> tuple[Nodes, Weights]:
        from scipy.stats import qmc

        points = qmc.Sobol(len(laws), rng=np.random.default_rng(self.seed)).random(self.n)
        return _through(laws, points), np.full(self.n, 1 / self.n)

    def refined(self) -> "Sobol":
        return Sobol(4 * self.n, self.seed)

    def replicate(self, number: int) -> "Sobol":
        return Sobol(self.n, self.seed + 7919 * number)


class MonteCarlo(AbstractNodeRule):
    """`n` independent draws with equal weights.

    **Raises** `ValueError` for `n` below one, and a negative seed.

    >>> from gradflow.models.nodes import MonteCarlo, Uniform
    >>> MonteCarlo(10)([Uniform(0, 1)])[0].shape
    (10, 1)
    """

    n: int
    seed: int
    random: ClassVar[bool] = True

    def __init__(self, n: int = 256, seed: int = 0):
        check_count("n", n)
        check_count("seed", seed, least=0)
        self.n, self.seed = int(n), int(seed)

    def __call__(self, laws: Sequence[AbstractLaw]) -> tuple[Nodes, Weights]:
        points = np.random.default_rng(self.seed).random((self.n, len(laws)))
        return _through(laws, points), np.full(self.n, 1 / self.n)

    def refined(self) -> "MonteCarlo":
        return MonteCarlo(4 * self.n, self.seed)

    def replicate(self, number: int) -> "MonteCarlo":
        return MonteCarlo(self.n, self.seed + 7919 * number)


def default_rule(laws: Sequence[AbstractLaw]) -> AbstractNodeRule:
    """The rule of nodes that suits some laws.

    `GaussLegendre(12)` in up to three continuous dimensions (16 for Gaussian laws), else `Sobol(256)`.

    >>> from gradflow.models.nodes import Uniform, default_rule
    >>> type(default_rule([Uniform(-1, 1)] * 3)).__name__, type(default_rule([Uniform(-1, 1)] * 4)).__name__
    ('GaussLegendre', 'Sobol')
    """
    continuous = [law for law in laws if law.atoms is None]
    grid = np.prod([float(law.atoms or 1) for law in laws])
    if len(continuous) <= TENSOR_DIMENSION and grid <= 64:
        return GaussLegendre(12 if all(law.bounded for law in laws) else 16)
    return Sobol(256)


def _through(laws: Sequence[AbstractLaw], points: Nodes) -> Nodes:
    inside = np.clip(points, 2.0**-53, 1 - 2.0**-53)
    return np.stack([law.quantile(inside[:, i]) for i, law in enumerate(laws)], axis=1)


def _tensor(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Nodes, Weights]:
    nodes = np.stack(np.meshgrid(*(x for x, _ in parts), indexing="ij"), axis=-1).reshape(-1, len(parts))
    weights = np.ones(1)
    for _, w in parts:
        weights = np.multiply.outer(weights, w).ravel()
    return nodes, weights
