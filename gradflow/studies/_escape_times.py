"""Escape times of the small-initialisation study: those measured, and those predicted."""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr
from jaxtyping import Array, PyTree

from gradflow.flows import GradientFlow
from gradflow.limits._alignment import align
from gradflow.limits._small_start import SmallStartPrediction
from gradflow.models import TwoLayer
from gradflow.solvers import Tsit5
from gradflow.sweeps import sweep

ESCAPED = 0.1
"""Share of the initial loss whose disappearance counts as the escape."""

ALIGNED = 0.1
"""Angle to a predicted direction within which a neuron counts as aligned."""

DEPARTURE = 1e-6
"""Share of what counts as the escape at which the loss begins to take part: it is wrong by as much before."""


Build = Callable[[str, int, float, int], tuple[GradientFlow, TwoLayer]]
"""Flow and start, from loss, width, scale and seed."""
Observe = Callable[[GradientFlow], Mapping[str, Callable[[PyTree], Array]]]
"""What is observed along a flow."""


def escape_times(ds: xr.Dataset) -> xr.Dataset:
    """Times of escape, and their slopes against `ln(1/scale)`."""
    decrease = 1 - ds.risk.values / ds.risk.values[..., :1]
    ts = ds.time.values
    times = np.full(decrease.shape[:-1], np.nan)
    for index in np.ndindex(times.shape):
        times[index] = _crossing(ts, decrease[index], ESCAPED)
    escape = xr.DataArray(times, dims=("loss", "width", "scale", "seed"), coords={k: ds[k] for k in ds.risk.dims[:-1]})
    escape.attrs = {"long_name": "time at which the loss has fallen by a tenth", "units": "1"}
    result = xr.Dataset({"escape_time": escape})
    if ds.sizes["scale"] > 1:
        small = np.log(1 / ds.scale.values)
        mean = escape.mean("seed").values
        slopes = np.array([[_slope(small, row) for row in rows] for rows in mean])
        about = {"long_name": "slope of the escape time against ln(1/scale)", "units": "1"}
        result["slope"] = (("loss", "width"), slopes, about)
    return result


def leading_order(
    ds: xr.Dataset, escapes: np.ndarray, predicted: dict[str, SmallStartPrediction], build: Build
) -> xr.Dataset:
    """Predicted escape times of every member, neurons that point where predicted, and the saddles of one member."""
    dims = ("loss", "width", "scale", "seed")
    times, aligned = np.full(escapes.shape, np.nan), np.full(escapes.shape, np.nan)
    near = np.fmin(ds.angle.values, ds.angle_negative.values) < ALIGNED
    for index in np.ndindex(escapes.shape):
        loss, width, scale, seed = (ds[name].values[k] for name, k in zip(dims, index, strict=True))
        drop = ESCAPED * float(ds.risk.values[index][0])
        times[index] = predicted[str(loss)].time(build(str(loss), int(width), float(scale), int(seed))[1], drop)
        if np.isfinite(escapes[index]):
            row = min(int(np.searchsorted(ds.time.values, escapes[index])), ds.sizes["time"] - 1)
            aligned[index] = np.mean(near[index][row][: int(width)])
    width, scale, seed = ds.width.values[ds.sizes["width"] // 2], float(np.min(ds.scale.values)), ds.seed.values[0]
    sequences = [fore.saddles(build(loss, int(width), scale, int(seed))[1]) for loss, fore in predicted.items()]
    num_saddles = max(len(times) for times, _ in sequences)
    # Fewer saddles of one loss than of another are followed by nothing.
    saddles = np.array(
        [[np.pad(row, (0, num_saddles - len(row)), constant_values=np.nan) for row in pair] for pair in sequences]
    )
    about = {"width": int(width), "scale": scale, "seed": int(seed)}
    return xr.Dataset(
        {
            "predicted_time": (dims, times, {"long_name": "predicted escape time, to leading order", "units": "1"}),
            "aligned": (
                dims,
                aligned,
                {"long_name": "fraction of neurons within 0.1 of a predicted direction at the escape"},
            ),
            "saddle_time": (("loss", "saddle"), saddles[:, 0], {"long_name": "predicted arrival at a saddle", **about}),
            "saddle_loss": (("loss", "saddle"), saddles[:, 1], {"long_name": "predicted loss of a saddle", **about}),
        },
        {name: ds[name] for name in dims},
    )


def from_start(
    ds: xr.Dataset,
    predicted: dict[str, SmallStartPrediction],
    build: Build,
    observe: Observe,
    rtol: float,
    progress: bool,
) -> xr.Dataset:
    """Escape times of every member from the flow of the correlation, and from one departure from what it leads to."""
    dims, saves = ("loss", "width", "seed"), ds.sizes["time"]
    axes = {name: list(ds[name].values) for name in dims}
    aligned, drops = {}, {name: ESCAPED * fore.loss_at_zero() for name, fore in predicted.items()}
    for loss, width, seed in itertools.product(*axes.values()):
        fore = predicted[str(loss)]
        model = build(str(loss), int(width), 1.0, int(seed))[1]
        aligned[loss, width, seed] = align(fore.problem, model, fore.escape.slope, saves=saves, rtol=rtol)

    def departing(loss: str, width: int, seed: int) -> tuple[GradientFlow, TwoLayer]:
        flow, _ = build(str(loss), int(width), 1.0, int(seed))
        return flow, aligned[loss, width, seed].at(DEPARTURE * drops[str(loss)])

    # Twice the time it would take if the loss did not take part.
    longest = max(2 * np.log(1 / DEPARTURE) / alignment.rate for alignment in aligned.values())
    options = {"solver": Tsit5(), "rtol": rtol, "max_steps": 200_000, "progress": progress}
    runs = sweep(departing, axes, np.linspace(0, longest, saves), observe=observe, **options)
    times = np.full([ds.sizes[name] for name in (*dims, "scale")], np.nan)
    for index, (key, alignment) in zip(np.ndindex(times.shape[:-1]), aligned.items(), strict=True):
        drop = drops[str(key[0])]
        fallen = 1 - runs.risk.values[index] / predicted[str(key[0])].loss_at_zero()
        late = _crossing(runs.time.values, fallen, ESCAPED) - np.log(1 / DEPARTURE) / alignment.rate
        times[index] = [alignment.time(drop, float(scale)) + late for scale in ds.scale.values]
    about = {"long_name": "predicted escape time, from the start", "units": "1"}
    coordinates = {name: ds[name] for name in (*dims, "scale")}
    from_start = xr.DataArray(times, coordinates, dims=(*dims, "scale"), attrs=about)
    return xr.Dataset({"predicted_time_from_start": from_start.transpose("loss", "width", "scale", "seed")})


def _crossing(ts: np.ndarray, decrease: np.ndarray, level: float) -> float:
    """First time at which `lost` reaches the level; it grows exponentially there, so its logarithm is interpolated."""
    above = np.flatnonzero(decrease >= level)
    if above.size == 0:
        return float("nan")
    k = int(above[0])
    if k == 0 or decrease[k - 1] <= 0:
        return float(ts[k])
    low, high = np.log(decrease[k - 1]), np.log(decrease[k])
    return float(ts[k - 1] + (ts[k] - ts[k - 1]) * (np.log(level) - low) / (high - low))


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    good = np.isfinite(y)
    return float(np.polyfit(x[good], y[good], 1)[0]) if np.count_nonzero(good) > 1 else float("nan")
