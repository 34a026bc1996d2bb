"""Infinite width: networks of growing width beside their limit, its error, and what theory predicts of the gap."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float

from gradflow import _checks
from gradflow._solution import Solution
from gradflow.data import Dataset, principal_components, sine
from gradflow.data._dataset import InputsAndTargets
from gradflow.data._load import load_some
from gradflow.flows import MeanFieldFlow
from gradflow.limits._infinite_width import infinite_width
from gradflow.limits._width_fluctuations import width_fluctuations
from gradflow.models import MeanFieldNet, MeanFieldNodes, MeanFieldStart
from gradflow.models.nodes import AbstractNodeRule, GaussLegendre, MonteCarlo, Sobol, Uniform
from gradflow.problems import EmpiricalRisk, losses
from gradflow.rules import MeanFieldSGD
from gradflow.runs._solve import solve
from gradflow.studies._options import SweepOptions
from gradflow.sweeps import sweep

QUESTION = "What becomes of networks as their width grows, and how accurate is width infinity?"
"""What the study asks; the heading of its report."""

RULES = ("Gauss-Legendre", "Sobol", "Monte Carlo")
PARTICLES = np.stack(np.meshgrid([-0.9, -0.3, 0.3, 0.9], [-0.8, 0.8], indexing="ij"), axis=-1).reshape(-1, 2)
"""Labels of the test particles, in units of the half-width of the law of the first layer."""


QUICK: dict[str, object] = {
    "widths": (16,),
    "depths": (2,),
    "sgd_widths": (16,),
    "seeds": 8,
    "more": 1,
    "horizon": 3.0,
    "saves": 6,
    "nodes": 4,
    "node_counts": (),
    "accuracy": 1e-3,
}
"""Arguments of `mean_field` that take about 20 seconds."""


def mean_field(
    dataset: InputsAndTargets,
    *,
    widths: Sequence[int] = (8, 16, 32, 64, 128, 256, 512, 1024),
    seeds: int = 16,
    more: int = 16,
    depths: Sequence[int] = (2, 3, 4),
    sgd_widths: Sequence[int] = (8, 16, 32, 64, 128, 256),
    horizon: float = 5.0,
    saves: int = 11,
    nodes: int = 12,
    node_counts: Sequence[int] = (16, 64, 256, 1024),
    scale: float = 2.0,
    accuracy: float = 1e-6,
    rtol: float = 1e-5,
    store: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> xr.Dataset:
    """Tanh networks of finite widths beside width infinity, on one data set.

    In mean-field scaling.

    Laws: first layer uniform on `[-scale, scale]`, between layers on `[0, 2]`, output on `[-1, 2]`.

    **Arguments**

    - `dataset`: inputs `(n, 2)`, targets `(n,)`.
    - `widths`, `seeds` (a number), `depths`: of networks under gradient flow; narrow ones take more seeds, up to `more`
      times as many, so that the bias of their mean shows. `sgd_widths`: of two hidden layers under SGD.
    - `horizon`: flow time. `saves`: save times. `rtol`: of the networks.
    - `nodes`: per dimension of the first layer, for width infinity in the sweep; `accuracy`: of width infinity for
      two hidden layers, by refinement.
    - `node_counts`: nodes of the first layer when rules are compared; none, for no comparison.
    - `store`, `resume`, `progress`: as for `sweep`; SGD has a store beside it, named `...-sgd`.

    **Returns** an `xarray.Dataset`:

    - over `(depth, width)`: `deviation` of a network from the limit, root mean square over seeds, inputs and times;
      `bias`, that of the mean over seeds, and `bias_noise`, what scatter alone would make of it; `predicted_deviation`,
      by `gradflow.width_fluctuations` (two layers); `sgd_deviation` over `sgd_width`;
    - over `(depth, time)`: `limit_risk`; over `(depth, width, time)`: `risk` of the first seed; `drift` of the energy;
    - `limit (time, sample)` for two layers with `limit_error`, its estimate, and `limit_converged`, whether that is
      within `accuracy`; `predicted_std` at width one;
    - over `(rule, node_count)`: `node_error`, with `nodes_used`; `particle_path (particle, time, entry)`.

    **Raises** `ValueError` for data of another shape, fewer than two seeds or save times, depths without 2 or below it,
    and what `sweep` refuses.

    >>> import gradflow as gf
    >>> few = {"widths": [4, 8], "seeds": 2, "depths": [2], "sgd_widths": [4, 8], "node_counts": [16], "nodes": 4}
    >>> ds = gf.studies.mean_field(gf.data.circle(6), **few, saves=3, progress=False, accuracy=1e-2, horizon=1.0)
    >>> dict(ds.deviation.sizes)
    {'depth': 1, 'width': 2}
    >>> print(gf.tables.mean_field(ds).splitlines()[0])
    data: circle, 6 samples; tanh, mean-field scaling, to t = 1
    >>> len(gf.plot.mean_field(ds).axes)
    6
    """
    x, y = (np.asarray(part, float) for part in dataset)
    if x.ndim != 2 or x.shape[1] != 2 or y.shape != x.shape[:1]:
        raise _checks.fail("dataset", "have inputs (n, 2) and targets (n,)", f"{x.shape} and {y.shape}")
    _checks.check_count("seeds", seeds, 2, "The scatter over seeds is what is measured.")
    _checks.check_positive("horizon", horizon)
    _checks.check_count("saves", saves, 2)
    if 2 not in depths or min(depths) < 2:
        raise _checks.fail("depths", "hold 2, and nothing less", f"{tuple(depths)}", "Rates are predicted for it.")
    problem = EmpiricalRisk(x, y, losses.square)
    ts = np.linspace(0, horizon, saves)
    starts = {int(depth): _start(int(depth), scale) for depth in depths}
    options = SweepOptions(rtol=rtol, progress=progress, resume=resume)

    counts = {width: _seeds(width, widths, seeds, more) for width in [*map(float, widths), np.inf]}
    runs = _networks(problem, starts, counts, nodes, ts, store, options)
    exact, error = _width_infinity(problem, starts[2], ts, nodes, scale, accuracy)
    ds = _deviations(runs, list(starts), widths, counts)
    predicted = width_fluctuations(problem, starts[2], ts, rule=GaussLegendre(min(nodes, 6)))
    per_node = float(jnp.sqrt(jnp.mean(predicted.std(1) ** 2)))
    ds["predicted_deviation"] = ("width", per_node / np.sqrt(np.asarray(widths, float)))
    ds["predicted_std"] = (("time", "sample"), np.asarray(predicted.std(1)))
    # The refined run, of which `limit_error` is the error: that of the sweep has fewer nodes and a looser tolerance.
    ds["limit"] = (("time", "sample"), np.asarray(exact.observed["predictions"]))
    sgd_store = None if store is None else pathlib.Path(store).with_name(f"{pathlib.Path(store).stem}-sgd.zarr")
    ds["sgd_deviation"] = _descent(problem, starts[2], sgd_widths, seeds, ts, ds.limit.values, sgd_store, options)
    ds = ds.merge(_rules(problem, starts[2], node_counts, ts, np.asarray(exact.observed["predictions"])[1:]))
    rows = np.asarray(exact.observed["rows"])
    ds["particle_path"] = (("particle", "time", "entry"), rows.transpose(1, 0, 2))
    ds["limit_error"] = error
    ds["limit_converged"] = exact.status == "ok"
    ds["x"], ds["y"] = (("sample", "entry"), x), ("sample", y)
    ds["slope"] = ("depth", [power_of_width(ds.width.values, row) for row in ds.deviation.values])
    ds["sgd_slope"] = power_of_width(ds.sgd_width.values, ds.sgd_deviation.values)
    about = {"study": "mean-field", "data": str(getattr(dataset, "name", "unnamed")), "seeds": seeds, "scale": scale}
    return ds.assign_attrs({**runs.attrs, **about})


def load_data(
    name: str = "sine",
    *,
    path: str | None = None,
    samples: int | None = None,
    classes: tuple[int, int] = (0, 1),
) -> Dataset:
    """Inputs of two entries as `mean_field` takes them: `sine`, or two principal components of two classes."""
    if name == "sine":
        return sine(20 if samples is None else samples)
    samples = 100 if samples is None else samples
    whole = load_some(name, path=path, samples=samples, classes=classes, centre=True, labels="pm1")
    return dataclasses.replace(principal_components(whole), name=f"{name}, two components")


def _start(depth: int, scale: float) -> MeanFieldStart:
    middle = [Uniform(0, 2)] * (depth - 1)
    return MeanFieldStart(2, first=Uniform(-scale, scale), middle=middle, output=Uniform(-1, 2))


def _width_infinity(
    problem: EmpiricalRisk, start: MeanFieldStart, ts: np.ndarray, nodes: int, scale: float, accuracy: float
) -> tuple[Solution, float]:
    """Width infinity with the test particles, and the error of its predictions, by refinement."""
    exact = infinite_width(
        problem,
        start,
        ts,
        accuracy=accuracy,
        rule=GaussLegendre(max(nodes, 6)),
        particles={"first": scale * PARTICLES},
        observe=lambda flow: {"rows": _last_rows},
        save_params=False,
    )
    assert exact.errors is not None
    return exact, float(exact.errors["predictions"])


def _networks(
    problem: EmpiricalRisk,
    starts: Mapping[int, MeanFieldStart],
    counts: Mapping[float, int],
    nodes: int,
    ts: np.ndarray,
    store: str | os.PathLike[str] | None,
    options: SweepOptions,
) -> xr.Dataset:
    """All widths, infinity among them; one sweep for each number of seeds."""

    def build(depth: int, width: float, seed: int) -> tuple[MeanFieldFlow, MeanFieldNet]:
        key = jax.random.key(1000 * int(seed) + int(depth))
        net, weights = starts[int(depth)].at(
            width, key, [GaussLegendre(nodes)] * (int(depth) - 1) + [GaussLegendre(16)]
        )
        return MeanFieldFlow(problem, weights), net

    parts: list[xr.Dataset] = []
    for number in sorted(set(counts.values())):
        group = [width for width, count in counts.items() if count == number]
        path = None if store is None else pathlib.Path(store).with_name(f"{pathlib.Path(store).stem}-{number}.zarr")
        axes = {"depth": list(starts), "width": group, "seed": range(number)}
        parts.append(
            sweep(
                build,
                axes,
                ts,
                observe=lambda flow: {"g": flow.predictions, "risk": flow.risk},
                solver=diffrax.Tsit5(),
                store=path,
                **options,
            )
        )
    return xr.concat(parts, "width", join="outer", combine_attrs="override")


def _seeds(width: float, widths: Sequence[int], seeds: int, more: int) -> int:
    """Seeds of a width: so many more for a narrow one as keeps them at most about as expensive as the widest."""
    if np.isinf(width):
        return 1 if more > 1 else seeds
    return seeds * int(min(more, max(1, max(widths) / width)))


def _last_rows(net: MeanFieldNet) -> Float[Array, "particles entries"]:
    """Incoming weights of the test particles, which are the last nodes of the first layer."""
    return net.layers[0][-len(PARTICLES) :]


def _deviations(
    runs: xr.Dataset, depths: Sequence[int], widths: Sequence[int], counts: Mapping[float, int]
) -> xr.Dataset:
    limit = runs.g.sel(width=np.inf, seed=0)
    finite = runs.sel(width=[float(width) for width in widths])
    off = finite.g - limit
    seeds = xr.DataArray([counts[float(width)] for width in widths], dims="width")
    inner = ["time", "g_0"]
    scatter = (finite.g.var("seed", ddof=1) / seeds).mean(inner)
    dims = ("depth", "width")
    return xr.Dataset(
        {
            "deviation": (dims, np.sqrt((off**2).mean(["seed", *inner])).transpose(*dims).values),
            "bias": (dims, np.sqrt((off.mean("seed") ** 2).mean(inner)).transpose(*dims).values),
            "bias_noise": (dims, np.sqrt(scatter).transpose(*dims).values),
            "risk": ((*dims, "time"), finite.risk.sel(seed=0).transpose(*dims, "time").values),
            "limit_risk": (("depth", "time"), runs.risk.sel(width=np.inf, seed=0).values),
            "drift": (dims, finite.drift_energy.max("seed").transpose(*dims).values),
            "some_g": (("width", "some", "sample"), _some(finite)),
        },
        {"depth": list(depths), "width": list(widths), "time": runs.time.values},
    )


def _some(finite: xr.Dataset) -> np.ndarray:
    """Predictions at the end of the first two networks of each width, of two layers."""
    return finite.g.sel(depth=2, seed=[0, 1]).isel(time=-1).transpose("width", "seed", "g_0").values


def _descent(
    problem: EmpiricalRisk,
    start: MeanFieldStart,
    widths: Sequence[int],
    seeds: int,
    ts: np.ndarray,
    limit: np.ndarray,
    store: pathlib.Path | None,
    options: SweepOptions,
) -> xr.DataArray:
    """Deviation of SGD, one sample at a time, from the limit."""

    def build(sgd_width: int, seed: int) -> tuple[MeanFieldSGD, MeanFieldNet]:
        first, second = jax.random.split(jax.random.key(int(seed)))
        net, weights = start.draw(int(sgd_width), first)
        return MeanFieldSGD(problem, weights, key=second), net

    runs = sweep(
        build,
        {"sgd_width": list(widths), "seed": range(seeds)},
        ts,
        observe=lambda rule: {"g": rule.flow().predictions},
        store=store,
        **options,
    )
    off = runs.g - xr.DataArray(limit, dims=("time", "g_0"))
    deviation = np.sqrt((off**2).mean(["seed", "time", "g_0"]))
    return xr.DataArray(deviation.values, {"sgd_width": list(widths)}, ("sgd_width",))


def _rules(
    problem: EmpiricalRisk, start: MeanFieldStart, counts: Sequence[int], ts: np.ndarray, exact: np.ndarray
) -> xr.Dataset:
    """Errors of the predictions by rule and number of nodes of the first layer, the largest over inputs and times."""

    if not len(counts):
        empty = np.zeros((len(RULES), 0))
        values = {"node_error": (("rule", "node_count"), empty), "nodes_used": (("rule", "node_count"), empty)}
        return xr.Dataset(values, {"rule": list(RULES), "node_count": np.zeros(0, int)})

    @eqx.filter_jit
    @eqx.filter_vmap
    def predictions(nodes: MeanFieldNodes) -> Float[Array, "times n"]:
        flow = MeanFieldFlow(problem, nodes.weights)
        observe = {"g": flow.predictions}
        solver = diffrax.Tsit5()
        run = solve(flow, nodes.net, ts[1:], observe=observe, rtol=1e-8, solver=solver, save_params=False, throw=False)
        return run.observed["g"]

    chosen = [[_rule(name, int(count), 8 * r) for r in range(4)] for name in RULES for count in counts]
    drawn = [start.nodes((rule, GaussLegendre(12))) for row in chosen for rule in row]
    widest = max(nodes.net.widths[0] for nodes in drawn)
    stacked = jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *(n.padded((widest, 12)) for n in drawn))
    errors = np.max(np.abs(np.asarray(predictions(stacked)) - exact[None]), axis=(1, 2)).reshape(len(RULES), -1, 4)
    used = np.array([nodes.net.widths[0] for nodes in drawn]).reshape(len(RULES), -1, 4)[..., 0]
    dims = ("rule", "node_count")
    values = {"node_error": (dims, np.sqrt(np.mean(errors**2, axis=2))), "nodes_used": (dims, used)}
    return xr.Dataset(values, {"rule": list(RULES), "node_count": list(counts)})


def _rule(name: str, count: int, seed: int) -> AbstractNodeRule:
    if name == "Gauss-Legendre":
        return GaussLegendre(max(2, round(count**0.5)))
    return Sobol(count, seed) if name == "Sobol" else MonteCarlo(count, seed)


def power_of_width(widths: np.ndarray, values: np.ndarray) -> float:
    """The power of the width that values follow; NaN for fewer than two widths."""
    if len(widths) < 2:
        return float("nan")
    return float(np.polyfit(np.log(np.asarray(widths, float)), np.log(values), 1)[0])
