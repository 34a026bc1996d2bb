"""KKT points of the neural correlation function on the unit sphere, from many random starts."""

from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray, PyTree

from gradflow._checks import check_count, check_positive, fail
from gradflow._tree import in_double, join, split
from gradflow.models._polar import neuron_rows
from gradflow.problems import NeuralCorrelation
from gradflow.problems._clarke import has_kinks
from gradflow.theory._ascent import WholeCorrelation, ascend
from gradflow.theory._kinks import Settled, on_kinks, settle_on_kinks, stationary

CERTAIN = 1e-6
"""Relative residual at which a point counts as one."""


COPY_RESIDUALS = 2.0
"""Times the distance from a settled point that the residual of a row tells, to first order: within, it is a copy."""
FARTHEST_COPY = 0.1
"""Distance from which on the residual tells nothing of the kind."""


class KKTPoints(NamedTuple):
    """KKT points, best first: directions that a network may take while it is small.

    - `directions (k, size)`: unit vectors; `params(i)`: one of them as parameters.
    - `values (k,)`: `N`; only positive ones are listed. `found (k,)`: the starts that led there.
    - `residuals (k,)`: `|grad N - degree N u|`, and on kinks of a single two-layer ReLU neuron the distance of
      `degree N u` from the Clarke subdifferential. `settled`: whether it vanishes, to a millionth, or the ascent has
      come to rest at kinks of another model. `kinks (k,)`: samples on whose kinks a single two-layer neuron lies.
    - `curvatures (k,)`: the largest tangential eigenvalue `mu` of the Hessian of `N`; `rates = degree N - mu`, at which
      directions nearby converge to the point. Where `N` rises from a kink to both sides they are `inf` and `-inf`.
    - `kinds`: `"maximum"`, `"saddle"` or `"minimum"` of `N` on the sphere, by the signs of all tangential eigenvalues
      less `degree N`, and of the jumps at kinks; `"degenerate"` where one vanishes: then there is a family of such
      points, and which one is reached the start decides.
    - `dead`: starts that ended where `N` and its gradient vanish, as for neurons that see no sample.
    """

    directions: Float[np.ndarray, "k size"]
    values: Float[np.ndarray, " k"]
    found: Int[np.ndarray, " k"]
    residuals: Float[np.ndarray, " k"]
    settled: Bool[np.ndarray, " k"]
    kinks: Int[np.ndarray, " k"]
    curvatures: Float[np.ndarray, " k"]
    rates: Float[np.ndarray, " k"]
    kinds: tuple[str, ...]
    dead: int
    model: PyTree

    def params(self, index: int = 0) -> PyTree:
        """The point as parameters, of length one."""
        trainable, frozen = split(self.model)
        flat, unflatten = jax.flatten_util.ravel_pytree(trainable)
        return join(unflatten(jnp.asarray(self.directions[index], flat.dtype)), frozen)

    @property
    def ties(self) -> int:
        """Points that share the largest value, to a millionth; more than one, and the first feature is not unique."""
        return int(np.sum(self.values >= self.values[0] * (1 - 1e-6)))


class Table(NamedTuple):
    """As `Settled`, on the host, one row for each point."""

    units: Float[np.ndarray, "rows size"]
    values: Float[np.ndarray, " rows"]
    residuals: Float[np.ndarray, " rows"]
    spectra: Float[np.ndarray, "rows eigenvalues"]
    kinks: Int[np.ndarray, " rows"]
    rising: Int[np.ndarray, " rows"]


def kkt_points(
    correlation: NeuralCorrelation,
    model: PyTree,
    *,
    every: bool = False,
    starts: int = 64,
    iterations: int = 400,
    tolerance: float = 1e-4,
    key: PRNGKeyArray | None = None,
) -> KKTPoints:
    """KKT points of the neural correlation function: where small neurons turn.

    Those of `N` on the unit sphere, with `N > 0`, that are found from random starts.

    Gradient ascent with steps that grow on success and shrink on failure, then Newton's method on `grad N = degree N u`
    where that lowers the residual. Flows go to maxima, and by default these are looked for. With `every`, the residual
    is made least from the same starts as well (Levenberg and Marquardt), which comes to rest at saddles and minima too.

    The kinks of ReLU: a single neuron of a two-layer network may have its KKT points on them, in the sense of Clarke.
    Such an end is moved to the critical point within the kinks it is close to, and certified by the smallest element of
    `(sum of the subdifferentials of the samples) - degree N u`. With `every`, the same is done from the random starts,
    with up to three of the nearest kinks. Other ReLU models are reported with the gradient as it is.

    All is computed in float64, for models of any type.

    **Arguments**

    - `correlation`: `gradflow.NeuralCorrelation(problem)`, or that of a saddle. It may be called with any number of
      neurons: with one, the points are the features themselves; a wide network has families of points, made of copies
      of one neuron, which are reported as `"degenerate"`.
    - `model`: parameters of the kind wanted, such as `TwoLayer(in_size, 1, key=key)`; only shapes count.
    - `every`: saddles and minima as well as maxima. Random starts may miss some: more `starts` miss fewer.
    - `starts`, `iterations`: of the ascent. `tolerance`: distance below which two points count as one.
    - `key`: of the random starts.

    **Returns** the `KKTPoints`.

    **Raises** `ValueError` for anything but a `NeuralCorrelation`, for one that is positive nowhere, for counts below
    one, and a tolerance that is not positive.

    Source: A. Kumar and J. Haupt (2024), arXiv 2402.09226, for the part that these points play.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([3.0, -1.0]), gf.losses.square, reduction="sum")
    >>> neuron = gf.models.TwoLayer(2, 1, key=jax.random.key(0))
    >>> points = gf.theory.kkt_points(gf.NeuralCorrelation(problem), neuron)
    >>> [round(float(value), 4) for value in points.values]  # relu: |y| / 2 for each sign
    [1.5, 0.5]
    """
    if not isinstance(correlation, NeuralCorrelation):
        advice = "Make one of a problem: gradflow.NeuralCorrelation(problem)."
        raise fail("correlation", "be a gradflow.NeuralCorrelation", f"of type {type(correlation).__name__}", advice)
    check_count("starts", starts)
    check_count("iterations", iterations)
    check_positive("tolerance", tolerance)
    # What lies on a kink, and which points are one, takes more digits than single precision has.
    with jax.enable_x64(True):
        wide, net = in_double((correlation, model))
        points = _kkt_points(wide, net, every, starts, iterations, tolerance, key)
    return points._replace(model=model)


def _kkt_points(
    correlation: NeuralCorrelation,
    model: PyTree,
    every: bool,
    starts: int,
    iterations: int,
    tolerance: float,
    key: PRNGKeyArray | None,
) -> KKTPoints:
    trainable, frozen = split(model)
    flat = jax.flatten_util.ravel_pytree(trainable)[0]
    key = jax.random.key(0) if key is None else key
    drawn = jax.random.normal(key, (starts, flat.size), flat.dtype)
    scale = jnp.linalg.norm(correlation.labels).astype(flat.dtype)
    target, degree = WholeCorrelation(correlation, trainable, frozen), correlation.degree
    ends, *others = ascend(target, drawn, scale, degree, iterations)
    values, residuals, lengths, spectra = (np.asarray(part) for part in others)
    resting, none = lengths < 1e-8, np.zeros(starts, int)
    table = Table(np.asarray(ends), values, residuals, spectra, none, none)
    nonsmooth = has_kinks(correlation.problem, model) and len(neuron_rows(model)) == 1
    if nonsmooth:
        # The residual at a kink depends on which side rounding leaves the end of an ascent.
        near = np.asarray(on_kinks(correlation, trainable, frozen, ends))
        nonsmooth = every or bool(
            np.any((near | (residuals > CERTAIN * degree * np.abs(values))) & (values > _floor(values)))
        )
    if nonsmooth:
        table = _first(settle_on_kinks(correlation, trainable, frozen, ends))
        resting = np.zeros(starts, bool)
    dead = int(np.sum((table.values <= _floor(table.values)) & (table.residuals <= CERTAIN * float(scale))))
    if every and nonsmooth:
        # An ascent may jam at a kink, short of a KKT point.
        table = _with(_certain(table, degree), settle_on_kinks(correlation, trainable, frozen, drawn), degree)
        resting = np.zeros(0, bool)
    elif every:
        table = _with(table, stationary(target, degree, drawn, 80), degree)
    resting = np.append(resting, np.zeros(len(table.values) - len(resting), bool))
    settled = (table.residuals <= CERTAIN * degree * table.values) | resting
    chosen, hits = _distinct(table, settled, degree, tolerance)
    if not chosen.size:
        raise fail("correlation", "be positive somewhere", f"not in {starts} starts", "Are there starts enough?")
    units, values, residuals, spectra, kinks, rising = (part[chosen] for part in table)
    size = degree * values
    top = np.max(np.where(np.isfinite(spectra), spectra, -np.inf), axis=1)
    curvatures = np.where(rising > 0, np.inf, top)
    classes = tuple(_kind(*row) for row in zip(spectra, size, kinks, rising, strict=True))
    rates = size - curvatures
    return KKTPoints(units, values, hits, residuals, settled[chosen], kinks, curvatures, rates, classes, dead, model)


def _floor(values: np.ndarray) -> float:
    return 1e-10 * float(np.max(np.abs(values), initial=0.0, where=np.isfinite(values)))


def _distinct(table: Table, settled: np.ndarray, degree: int, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of distinct points of positive value, best first, and how many rows share each.

    Where both are there, a point is represented by a row that has settled. One that has not is a poor copy of a settled
    one if it is as close to it as its residual says: `|grad N - degree N u| = |(Hessian - degree N) (u - v)|` near `v`.
    """
    units, values = np.asarray(table.units), np.asarray(table.values)
    candidates = np.flatnonzero(np.isfinite(values) & (values > _floor(values)))
    chosen: list[int] = []
    hits: list[int] = []
    reach: list[float] = []  # from a settled row, over the residual of a poor copy of it
    for row in candidates[np.lexsort((-values[candidates], ~settled[candidates]))]:
        distances = np.linalg.norm(units[chosen] - units[row], axis=1)
        copies = np.minimum(COPY_RESIDUALS * table.residuals[row] * np.array(reach), FARTHEST_COPY)
        near = np.flatnonzero(distances < (tolerance if settled[row] else np.maximum(tolerance, copies)))
        if near.size:
            hits[near[np.argmin(distances[near])]] += 1
            continue
        gaps = np.abs(table.spectra[row] - degree * values[row])
        min_gap = np.min(gaps, initial=np.inf, where=np.isfinite(gaps))
        separate = settled[row] and np.isfinite(min_gap) and min_gap > CERTAIN * degree * values[row]
        chosen.append(int(row))
        hits.append(1)
        reach.append(float(1 / min_gap) if separate else 0.0)
    order = np.argsort(-values[chosen], kind="stable")
    return np.array(chosen, int)[order], np.array(hits, int)[order]


def _kind(spectrum: np.ndarray, size: float, kinks: np.integer, rising: np.integer) -> str:
    """The type of a point by its tangential eigenvalues and by the kinks that `N` rises and falls away from."""
    gaps = spectrum[np.isfinite(spectrum)] - size
    if np.any(np.abs(gaps) <= 1e-6 * size):
        return "degenerate"
    if rising == 0 and np.all(gaps < 0):
        return "maximum"
    return "minimum" if rising == kinks and np.all(gaps > 0) else "saddle"


def _first(settled: Settled) -> Table:
    """Of what was tried from each start, the one of least residual that has not lost height on the way."""
    columns = [np.asarray(part) for part in settled]
    values, residuals = columns[1], columns[2]
    good = np.isfinite(residuals) & (values >= values[:, :1] - 1e-3 * np.abs(values[:, :1]))
    best = np.argmin(np.where(good, residuals, np.inf), axis=1)
    return Table(*(part[np.arange(len(best)), best] for part in columns))


def _with(table: Table, more: Settled, degree: int) -> Table:
    """The table, and those of the other points that are certain."""
    columns = [np.asarray(part) for part in more]
    batch = columns[1].ndim
    rows = _certain(Table(*(part.reshape(-1, *part.shape[batch:]) for part in columns)), degree)
    return Table(*(np.concatenate(pair) for pair in zip(table, rows, strict=True)))


def _certain(table: Table, degree: int) -> Table:
    """The rows whose residual vanishes."""
    certain = table.residuals <= CERTAIN * degree * np.abs(table.values)
    return Table(*(part[certain] for part in table))
