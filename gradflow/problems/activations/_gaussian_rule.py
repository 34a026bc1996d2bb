"""Nodes for expectations over Gaussian fields, as many as an accuracy takes, and interpolation in between."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gradflow.programs import captured

Entries = Float[Array, "..."]
Numbers = TypeVar("Numbers", np.ndarray, Array)

MOST = 256
"""Nodes per field, at most: what smooth activations do not need and nonsmooth ones do not profit from."""

FARTHEST = 30.0
"""Standard deviations beyond which nothing is looked at: the density is `1e-196` there."""

BEYOND = 0.01
"""Share of the accuracy that may be lost beyond the outermost nodes, of which the estimated error knows nothing."""


class Rule(NamedTuple):
    """Equidistant nodes `h (i + 1/2)` up to `extent` standard deviations, weighted by the density.

    For integrands analytic in a strip about the real axis the error is exponential in the width of the strip over `h`,
    also where they saturate, which polynomials do not follow. No node is at zero, where many activations have kinks.
    """

    extent: float
    nodes: int
    finer: int  # points of a table over nodes in the same range

    @property
    def spacing(self) -> float:
        return 2 * self.extent / self.nodes

    @property
    def places(self) -> np.ndarray:
        return self.spacing * (np.arange(self.nodes) - self.nodes / 2 + 0.5)

    def points(self, dtype: DTypeLike) -> tuple[Entries, Entries]:
        """Nodes and weights."""
        return jnp.asarray(self.places, dtype), jnp.asarray(self.spacing * _density(self.places), dtype)


def finer(accuracy: float) -> int:
    """Points of a table for every node, between which polynomials of degree five are as good as the rule.

    The rule is off by `exp(-2 pi a / h)` for a function analytic to `a` from the axis, and such polynomials by about
    `(h / (finer a))^6`. The factor leaves a third of the accuracy, and room for the constant: it gives 6 for 1e-5.
    """
    strip = max(np.log(1 / accuracy), 1.0) / (2 * np.pi)
    return int(np.ceil(1.3 * (3 / accuracy) ** (1 / 6) / strip))


UNKNOWN = Rule(6.5, 128, finer(1e-6))
"""For functions that cannot be looked at: what tanh takes for 1e-6 at variance 9."""


class Choice(NamedTuple):
    """A rule, with the accuracy it has at the variance it was chosen for."""

    rule: Rule
    error: float
    nonsmooth: bool
    jumps: bool


def choose(fn: Callable[[Array], Array], accuracy: float, variance: float) -> Choice | None:
    """The rule for a function; `None` without moments. Under a trace that the function depends on, a fine one for all
    functions, of which nothing is known."""
    try:
        if _hashable(fn):
            return _known(fn, accuracy, variance, captured(fn))
        return _choose(fn, accuracy, variance)
    except jax.errors.JAXTypeError:
        return Choice(UNKNOWN, accuracy, False, False)


def _hashable(fn: Callable[[Array], Array]) -> bool:
    """Not so are modules that hold arrays."""
    try:
        hash(fn)
    except TypeError:
        return False
    return True


@functools.lru_cache(maxsize=64)
def _known(fn: Callable[[Array], Array], accuracy: float, variance: float, code: str) -> Choice | None:
    return _choose(fn, accuracy, variance)


def _choose(fn: Callable[[Array], Array], accuracy: float, variance: float) -> Choice | None:
    """The rule with the fewest nodes that meets the accuracy at variances up to this one; `None` without moments.

    What is looked at are `E s s`, `E s' s'`, `E x s' s` and `E s' s' s s` of coincident fields, which are the hardest:
    poles add up. The error is that of nodes against nodes moved by half their distance, of opposite error.
    """
    variances = variance * 0.25 ** np.arange(4)
    with jax.ensure_compile_time_eval():
        z = np.linspace(-FARTHEST, FARTHEST, 6001)
        parts = _parts(fn, (np.sqrt(variances)[:, None] * z).ravel()).reshape(-1, z.size) * _density(z)
        if not np.all(np.isfinite(parts)):
            return None
        # The share that lies beyond each of the points on the positive half axis.
        folded = np.abs(parts[:, 3000:] + parts[:, 3000::-1])
        beyond = np.cumsum(folded[:, ::-1], axis=1)[:, ::-1]
        near = np.all(beyond <= BEYOND * accuracy * beyond[:, :1], axis=0)
        extent = max(2.0, float(z[3000:][np.argmax(near)])) if near.any() else FARTHEST
        rules = [Rule(extent, int(2 * round(count / 2)), finer(accuracy)) for count in np.geomspace(8, MOST, 33)]
        grids = [_differences_at(rule) for rule in rules]
        # One array of points for all of them, so that the function is compiled once.
        at = np.sqrt(variances)[:, None] * np.concatenate([nodes for nodes, _ in grids])
        values = _parts(fn, at.ravel()).reshape(4, *at.shape)
    start, errors = 0, []
    for nodes, weights in grids:
        errors.append(float(np.max(_relative(values[..., start : start + nodes.size], weights))))
        start += nodes.size
    # The next one is asked as well, for one may be right by chance.
    good = [index for index in range(len(rules) - 1) if max(errors[index : index + 2]) <= accuracy / 2]
    best = good[0] if good else len(rules) - 1
    jumps, kinks = _breaks(fn, rules[best], accuracy, variance)
    if kinks:
        best = len(rules) - 1
    error = max(errors[best], at_kinks(rules[best])) if kinks else errors[best]
    return Choice(rules[best], error, kinks, jumps)


def at_kinks(rule: Rule) -> float:
    """Error of expectations of a function that jumps by one somewhere: half a distance of nodes in the middle."""
    return 0.5 * rule.spacing * float(_density(np.zeros(1))[0])


def _breaks(fn: Callable[[Array], Array], rule: Rule, accuracy: float, variance: float) -> tuple[bool, bool]:
    """Whether `s'` is not all of the derivative of `s`, since that jumps, and the same of `s''` and `s'`.

    Integration by parts, of expectations over one field, knows of jumps what derivatives do not.
    """

    def slope(x: Entries) -> Entries:
        return jax.jvp(fn, (x,), (jnp.ones_like(x),))[1]

    with jax.ensure_compile_time_eval():
        z, w = rule.points(jnp.result_type(float))
        x = variance**0.5 * z
        s, (d, curved) = fn(x), jax.jvp(slope, (x,), (jnp.ones_like(x),))
        unit = jnp.sqrt((d * d) @ w) + jnp.sqrt((s * s) @ w / variance)
        first = jnp.stack([d - x * s / variance, 2 * s * d - x * s * s / variance]) @ w
        jumps = jnp.abs(first) > 0.1 * unit * jnp.stack([jnp.ones_like(unit), jnp.sqrt((s * s) @ w)])
        second = jnp.stack([curved - x * d / variance, curved * s + d * d - x * s * d / variance]) @ w
        kinks = jnp.abs(second) > 10 * accuracy * jnp.stack([unit, unit * unit])
        return bool(jnp.any(jumps)), bool(jnp.any(kinks))


def difference(
    fn: Callable[[Array], Array], slope: Callable[[Array], Array], rule: Rule, variances: Float[Array, " fields"]
) -> Float[Array, ""]:
    """Relative error of the expectations over coincident fields of these variances, the largest of them."""
    nodes, weights = _differences_at(rule)
    z, w = jnp.asarray(nodes, variances.dtype), jnp.asarray(weights, variances.dtype)
    x = jnp.sqrt(variances)[:, None] * z[None, :]
    s, d = fn(x), slope(x)
    parts = jnp.stack(_products(x, s, d))
    total, size = jnp.abs(parts @ w), jnp.abs(parts) @ jnp.abs(w) / 2
    return jnp.max(total / jnp.where(size > 0, size, 1))


def _differences_at(rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Nodes of the rule and of the one moved by half their distance, the latter with negative weights."""
    shifts = rule.spacing * (np.arange(rule.nodes + 1) - rule.nodes / 2)
    weights = rule.spacing * np.concatenate([_density(rule.places), -_density(shifts)])
    return np.concatenate([rule.places, shifts]), weights


def _relative(parts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total, size = np.abs(parts @ weights), np.abs(parts) @ np.abs(weights) / 2
    return total / np.where(size > 0, size, 1)


def _parts(fn: Callable[[Array], Array], x: np.ndarray) -> np.ndarray:
    """The products at these points, in double precision, for functions of any precision."""
    at = jnp.asarray(x, jnp.result_type(float))
    s, d = (np.asarray(value, float) for value in jax.jvp(fn, (at,), (jnp.ones_like(at),)))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.stack(_products(x, s, d))


def _products(x: Numbers, s: Numbers, d: Numbers) -> list[Numbers]:
    """What is integrated over coincident fields: `s s, s' s', x s' s, s' s' s s`."""
    return [s * s, d * d, x * d * s, d * d * s * s]


def _density(z: np.ndarray) -> np.ndarray:
    return np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)


def interpolate(table: Entries, low: Entries, spacing: Entries, at: Entries) -> Entries:
    """Values between those of a table `(E, points)` at `low + i spacing`, by polynomials of degree five.

    `low` and `spacing` are of shape `(E, 1)`, `at` of `(E, n)`; outside the table it is that of its ends.
    """
    last = table.shape[-1] - 1
    place = jnp.clip((at - low) / jnp.where(spacing > 0, spacing, 1), 0, last)
    first = jnp.clip(jnp.floor(place).astype(int) - 2, 0, last - 5)
    t = place - first.astype(place.dtype)
    total = jnp.zeros_like(at)
    for node in range(6):
        others = [other for other in range(6) if other != node]
        weight = functools.reduce(lambda product, other: product * (t - other), others, jnp.ones_like(t))
        weight = weight / float(np.prod([node - other for other in others]))
        total = total + weight * jnp.take_along_axis(table, first + node, axis=-1)
    return total
