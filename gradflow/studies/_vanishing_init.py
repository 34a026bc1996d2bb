"""Initialisation down to sizes that no float holds: predicted and measured escapes, directions, and saddles."""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array

from gradflow import _checks
from gradflow.data import Dataset, Options, gaussian_teacher, orthogonal_inputs
from gradflow.data._dataset import InputsAndTargets
from gradflow.data._load import load_some
from gradflow.flows import GradientFlow, NeuronPolarFlow, PolarFlow
from gradflow.limits._alternating_flow import alternating_flow, nearest_points
from gradflow.models import Smoothed, TwoLayer
from gradflow.models._polar import Polar, neuron_rows, unit_rows, with_rows
from gradflow.observables import KKTResidual, LogNorm, Loss, ParameterNorm
from gradflow.problems import EmpiricalRisk, NeuralCorrelation, losses
from gradflow.runs._solve import solve
from gradflow.runs._until import Until
from gradflow.solvers import Tsit5
from gradflow.studies._options import SweepOptions
from gradflow.sweeps import sweep

QUESTION = "What happens from weights of norm 1e-4 down to 1e-300, and what does theory predict?"
"""What the study asks; the heading of its report."""

ESCAPED = 1e-2
"""Norm of the weights at which a network counts as escaped: the loss takes part in a ten-thousandth of the rate."""

HORIZON = 1e6
"""Flow time by which a network has escaped, or counts as one that does not."""

QUICK: dict[str, object] = {"exponents": (4, 12, 300), "widths": (4,), "seeds": (0,), "saves": 101, "rounds": 1}
"""Arguments of `vanishing_init` that take about 20 seconds, on 60 samples."""

Axes = dict[str, list[int] | list[float]]
"""Name -> values: width, seed, exponent."""
Model = Callable[[int, int], TwoLayer]
"""The network of a width and a seed."""


class _Member:
    """Predictions for one network: the direction and the correlation of the basin that each neuron starts in."""

    def __init__(self, problem: EmpiricalRisk, correlation: NeuralCorrelation, model: TwoLayer):
        rows, sizes = unit_rows(neuron_rows(model))
        self.directions, self.values = nearest_points(correlation, model, rows)
        self.logs = np.log(np.asarray(sizes) / np.linalg.norm(np.asarray(neuron_rows(model))))

    def leading_order(self, log_norm: float) -> float:
        """When the first neuron reaches the norm of the escape, if it grew at its final rate from the start."""
        rates = 2 * np.where(self.values > 0, self.values, np.nan)
        return float(np.nanmin((np.log(ESCAPED) - log_norm - self.logs) / rates))


Members = Mapping[tuple[int, int], _Member]
"""By the positions of width and seed."""


def vanishing_init(
    dataset: InputsAndTargets,
    *,
    loss: str = "square",
    exponents: Sequence[float] = (4, 10, 30, 100, 300),
    widths: Sequence[int] = (4, 16),
    seeds: Sequence[int] = (0, 1, 2),
    smoothing: float = 0.01,
    rtol: float = 1e-4,
    saves: int = 401,
    rounds: int = 6,
    store: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> xr.Dataset:
    """Escape from weights of norm 1e-4 to 1e-300, beside what theory predicts.

    Two-layer ReLU networks from weights of norm `10^-exponent`, in polar coordinates.

    Before any training, every neuron is followed up the neural correlation function to the KKT point of its basin, of
    value `N_j`. The best of them, `N`, predicts the slope `1 / (2 N)` of the escape time against `ln(1/delta)`, and
    all of them the direction in which each neuron will point. Alternating gradient flow predicts the later saddles.

    **Arguments**

    - `dataset`: inputs `(n, d)`, targets `(n,)` or one-hot `(n, k)`.
    - `loss`: `"square"`, or `"logistic"` for targets of +1 and -1; mean over samples.
    - `exponents`: decimal, positive, of the norms `delta`; `widths`, `seeds`.
    - `smoothing`: of ReLU, homogeneous, see `gradflow.models.Smoothed`. `rtol`: of all runs.
    - `saves`: save times of the full runs, at the exponent nearest to 12. `rounds`: of alternating gradient flow.
    - `store`, `resume`, `progress`: as for `sweep`; the store holds the escape times, and a second one beside it, named
      `...-paths`, the full runs. An interrupted study goes on where it was.

    **Returns** an `xarray.Dataset`:

    - over `(width, seed, exponent)`: `escape_time` (the norm reaches 1e-2), its leading order `predicted_time`,
      `gradient_evaluations`, `status`, and for the first width and seed down to 1e-12 `cartesian_time`: plain
      coordinates with the tolerances 1e-3 and 1e-6 that are common defaults;
    - over `(width, seed)`: `correlation`, `slope` between the two smallest starts, `predicted_slope`; at the escape of
      the full run `residual` (relative KKT residual), `angle` (largest over neurons that carry a tenth of the norm, to
      the predicted direction), `aligned` (neurons that have grown and turned within 0.1 of it), `collapsed` (those that
      have shrunk or stayed, as seen from the growth of the largest);
    - over `(width, seed, time)`: `risk`, and by neuron `neuron_angle`; `log`, the log-norm of these runs at the start;
    - for the first width and seed: `saddle_time`, `saddle_loss` of alternating gradient flow.

    **Raises** `ValueError` for targets of another shape, or other than +1 and -1 for logistic loss; for another loss,
    exponents that are not positive, fewer than two save times, and what `sweep` refuses.

    >>> import gradflow as gf
    >>> data = gf.data.orthogonal_inputs(4, 4, y=[1.0, 2.0, -1.0, 0.5])
    >>> few = {"exponents": [30, 300], "widths": [2], "seeds": [0], "saves": 41, "rounds": 1}
    >>> ds = gf.studies.vanishing_init(data, **few, progress=False)
    >>> bool(abs(ds.slope / ds.predicted_slope - 1).max() < 1e-3)
    True
    >>> print(gf.tables.vanishing_init(ds).splitlines()[0])
    data: orthogonal-inputs; square loss; ReLU smoothed over 0.01
    >>> len(gf.plot.vanishing_init(ds).axes)
    4
    """
    problem = _problem(dataset, loss, smoothing)
    logs = {float(e): -float(e) * np.log(10) for e in exponents}
    _checks.check_positive("exponents", np.asarray(list(logs), float), "10^-exponent is the norm at the start.")
    _checks.check_count("saves", saves, least=2)
    in_size, outputs = problem.x.shape[1], None if problem.y.ndim == 1 else problem.y.shape[1]

    def model(width: int, seed: int) -> TwoLayer:
        return TwoLayer(in_size, int(width), outputs, key=jax.random.key(int(seed)))

    axes: Axes = {"width": list(widths), "seed": list(seeds), "exponent": list(logs)}
    options = SweepOptions(rtol=rtol, resume=resume, progress=progress)
    times = _escapes(problem, model, axes, logs, store, options)
    correlation = NeuralCorrelation(problem)
    members = {
        (i, j): _Member(problem, correlation, model(width, seed))
        for i, width in enumerate(widths)
        for j, seed in enumerate(seeds)
    }
    ds = _with_predictions(times, members, axes, logs)
    ds["cartesian_time"] = (tuple(axes), _cartesian(problem, model, axes, logs, HORIZON))
    paths_store = None if store is None else pathlib.Path(store).with_name(f"{pathlib.Path(store).stem}-paths.zarr")
    chosen = min(logs, key=lambda e: abs(e - 12))
    escapes = ds.escape_time.sel(exponent=chosen).values
    ts = np.linspace(0, 2.5 * float(np.nanmax(escapes)), saves)
    paths = _paths(problem, model, axes, logs[chosen], ts, paths_store, options)
    ds = ds.merge(_at_the_escape(paths, members, escapes, logs[chosen]))
    ds = ds.merge(_limit(problem, model(widths[0], seeds[0]), float(ds.log), rounds))
    about = {"study": "vanishing-init", "data": str(getattr(dataset, "name", "unnamed"))}
    about |= {"loss": loss, "smoothing": smoothing}
    return ds.assign_attrs({**times.attrs, **about})


def _problem(dataset: InputsAndTargets, loss: str, smoothing: float) -> EmpiricalRisk:
    """The problem; raises `ValueError` for bad input."""
    x, y = (np.asarray(part) for part in dataset)
    if y.ndim not in (1, 2) or y.dtype.kind != "f":
        advice = 'Load it with labels="pm1" or labels="onehot".'
        raise _checks.fail("dataset", "have targets of floats, (n,) or (n, k)", f"{y.dtype} of shape {y.shape}", advice)
    by_name = {"square": losses.square, "logistic": losses.logistic}
    _checks.check_choice("loss", loss, by_name)
    if loss == "logistic" and not np.all(np.isin(y, (-1, 1))):
        advice = 'Load it with labels="pm1" and two classes.'
        raise _checks.fail("dataset", "have targets +1 and -1 for logistic loss", f"with {np.ravel(y)[:3]}", advice)
    return EmpiricalRisk(x, y, by_name[loss], predict=Smoothed(smoothing))


def _escapes(
    problem: EmpiricalRisk,
    model: Model,
    axes: Axes,
    logs: Mapping[float, float],
    store: str | os.PathLike[str] | None,
    options: SweepOptions,
) -> xr.Dataset:
    """Runs of all members from the start to the escape."""
    flow = PolarFlow(problem)

    def build(width: int, seed: int, exponent: float) -> tuple[PolarFlow, Polar]:
        return flow, Polar(model(width, seed), logs[float(exponent)])

    until = Until(LogNorm(), above=float(np.log(ESCAPED)))
    return sweep(build, axes, [HORIZON], solver=Tsit5(), until=until, max_steps=1_000_000, store=store, **options)


def _with_predictions(times: xr.Dataset, members: Members, axes: Axes, logs: Mapping[float, float]) -> xr.Dataset:
    """Escape times and their slopes, measured and predicted."""
    shape = tuple(len(values) for values in axes.values())
    predicted, correlations = np.full(shape, np.nan), np.full(shape[:2], np.nan)
    for (i, j), member in members.items():
        correlations[i, j] = np.max(member.values)
        predicted[i, j] = [member.leading_order(log) for log in logs.values()]
    ds = xr.Dataset(
        {
            "escape_time": (tuple(axes), np.where(times.status == 1, times.t_final, np.nan)),
            "predicted_time": (tuple(axes), predicted),
            "gradient_evaluations": (tuple(axes), times.gradient_evaluations.values),
            "status": (tuple(axes), times.status.values, times.status.attrs),
            "correlation": (("width", "seed"), correlations),
            "predicted_slope": (("width", "seed"), 1 / (2 * correlations)),
        },
        axes,
    )
    order = np.argsort(list(logs))[-2:]
    if len(logs) > 1:
        steps = -np.diff([list(logs.values())[k] for k in order])
        ds["slope"] = (("width", "seed"), np.diff(ds.escape_time.values[:, :, order])[..., 0] / steps[0])
    return ds


def _paths(
    problem: EmpiricalRisk,
    model: Model,
    axes: Axes,
    log: float,
    ts: np.ndarray,
    store: pathlib.Path | None,
    options: SweepOptions,
) -> xr.Dataset:
    """Runs past the escape, with every neuron in its own coordinates."""

    def begin(width: int, seed: int) -> tuple[NeuronPolarFlow, Polar]:
        start = Polar(model(width, seed), log)
        return NeuronPolarFlow(problem), Polar(start.direction, _neuron_logs(start))

    observe = {
        "risk": Loss(problem),
        "residual": KKTResidual(problem),
        "logs": LogNorm(),
        "directions": _Directions(),
    }
    pairs = {name: axes[name] for name in ("width", "seed")}
    return sweep(begin, pairs, ts, observe=observe, solver=Tsit5(), max_steps=300_000, store=store, **options)


def load_data(
    name: str = "digits",
    *,
    path: str | None = None,
    samples: int | None = None,
    classes: tuple[int, int] | None = (0, 1),
    quick: bool = False,
) -> Dataset:
    """Data as `vanishing_init` takes them: `teacher`, `orthogonal`, or a data set by name, centred, of norm one.

    Two classes are distinguished by signs; with `None`, all classes have one output each.
    """
    samples = 60 if quick and samples is None else samples
    if name == "teacher":
        return gaussian_teacher(100 if samples is None else samples, 10, 3)
    if name == "orthogonal":
        count = 8 if samples is None else samples
        return orthogonal_inputs(count, count)
    options: Options = {"centre": True, "unit_norm": True, "labels": "onehot"}
    if classes is not None:
        options |= {"classes": classes, "labels": "pm1"}
    return load_some(name, path=path, samples=samples, **options)


def _cartesian(
    problem: EmpiricalRisk, model: Model, axes: Axes, logs: Mapping[float, float], horizon: float
) -> np.ndarray:
    """Escape times with tolerances fixed in advance, of the first width and seed, where floats allow it."""
    times = np.full(tuple(len(values) for values in axes.values()), np.nan)
    until = Until(ParameterNorm(), above=ESCAPED)
    within = functools.partial(solve, until=until, rtol=1e-3, atol=1e-6, solver=Tsit5(), throw=False, save_params=False)
    for k, log in enumerate(logs.values()):
        if log < -12.1 * np.log(10):
            continue
        start = Polar(model(int(axes["width"][0]), int(axes["seed"][0])), log).ordinary()
        sol = within(GradientFlow(problem), start, [horizon])
        times[0, 0, k] = float(sol.t_final) if sol.status == "stopped" else np.nan
    return times


class _Directions(eqx.Module):
    """Directions of all neurons, in coordinates neuron by neuron."""

    sees_coordinates: ClassVar[bool] = True

    def __call__(self, params: Polar) -> Array:
        return neuron_rows(params.direction)


def _neuron_logs(start: Polar) -> Array:
    """Log-norms of the neurons of a start in coordinates of the whole; none underflows."""
    return start.log_norm + jnp.log(unit_rows(neuron_rows(start.direction))[1])


def _at_the_escape(paths: xr.Dataset, members: Members, escapes: np.ndarray, log: float) -> xr.Dataset:
    """What runs past the escape, with every neuron in its own coordinates, say of the predicted directions."""
    ts, dims = paths.time.values, ("width", "seed")
    shape, widest = escapes.shape, paths.logs.shape[-1]
    angles = np.full((*shape, ts.size, widest), np.nan)
    residual, worst = np.full(shape, np.nan), np.full(shape, np.nan)
    aligned, collapsed = np.zeros(shape, int), np.zeros(shape, int)
    for (i, j), member in members.items():
        width = len(member.values)
        directions, norms = paths.directions.values[i, j, :, :width], paths.logs.values[i, j, :, :width]
        angle = np.arccos(np.clip(np.einsum("tjk,jk->tj", directions, member.directions), -1, 1))
        angles[i, j, :, :width] = angle
        row = min(int(np.searchsorted(ts, escapes[i, j])), ts.size - 1)
        residual[i, j] = paths.residual.values[i, j, row]
        carrying = norms[row] > np.max(norms[row]) - np.log(10)
        worst[i, j] = np.max(angle[row][carrying]) if carrying.any() else np.nan
        grown = norms[row] - norms[0]
        stayed = grown < 0.01 * np.max(grown)
        aligned[i, j], collapsed[i, j] = int(np.sum(~stayed & (angle[row] < 0.1))), int(np.sum(stayed))
    return xr.Dataset(
        {
            "risk": ((*dims, "time"), paths.risk.values),
            "neuron_angle": ((*dims, "time", "neuron"), angles),
            "residual": (dims, residual),
            "angle": (dims, worst),
            "aligned": (dims, aligned),
            "collapsed": (dims, collapsed),
            "log": log,
        },
        {"time": ts},
    )


def _limit(problem: EmpiricalRisk, model: TwoLayer, log: float, rounds: int) -> xr.Dataset:
    """Saddles predicted by alternating gradient flow, for one network."""
    rows, sizes = unit_rows(neuron_rows(model))
    logs = log + np.log(np.asarray(sizes) / np.linalg.norm(np.asarray(neuron_rows(model))))
    options = {"tolerance": 1e-3, "horizon": 1e4, "rtol": 1e-4, "solver": Tsit5()}
    limit = alternating_flow(problem, with_rows(model, rows), logs, rounds=rounds, **options)
    return xr.Dataset({"saddle_time": ("saddle", limit.times), "saddle_loss": ("saddle", limit.losses)})
