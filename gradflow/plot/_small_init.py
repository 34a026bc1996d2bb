"""The figure of the small-initialisation study."""

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.plot._legends import clear_legends
from gradflow.plot._style import STYLE, figure, shades


def small_init(ds: xr.Dataset) -> Figure:
    """Loss, weight norm, neuron angles and escape times, one row per loss.

    Curves are of the middle width and the first seed, one shade per scale (darker is smaller); beside the loss, the
    saddles predicted for the smallest scale. Angles are those of every neuron at the smallest scale to the direction
    predicted for positive output weights. The last column shows every member, the fitted lines and what is predicted:
    dashed from the start, mean over widths and seeds, dotted to leading order, without the time that alignment takes.

    **Arguments**: `ds`: what `gradflow.studies.small_init` returned. **Returns** a matplotlib figure; see `save`.
    """
    with matplotlib.rc_context(STYLE):
        rows = ds.sizes["loss"]
        drawn = figure(figsize=(10, 2.4 * rows + 0.3))
        axes = np.asarray(drawn.subplots(rows, 4, squeeze=False))
        width = ds.width.values[ds.sizes["width"] // 2]
        for row, loss in zip(axes, ds.loss.values, strict=True):
            part = ds.sel(loss=loss)
            member = part.sel(width=width).isel(seed=0)
            _curves(row[0], member, "risk", f"{loss} loss", "training loss", log=False)
            _saddles(row[0], part)
            _curves(row[1], member, "norm", f"norm of the weights, width {width}", r"$\|\theta\|$", log=True)
            _angles(row[2], member)
            _escape(row[3], part)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels), title="initial scale")
        return clear_legends(drawn)


def _curves(ax: Axes, member: xr.Dataset, name: str, title: str, label: str, *, log: bool) -> None:
    for scale, colour in zip(member.scale.values, shades(member.sizes["scale"]), strict=True):
        ax.plot(member.time, member[name].sel(scale=scale), color=colour, label=f"{scale:.0e}")
    ax.set(title=title, xlabel="flow time $t$", ylabel=label)
    if log:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)


def _saddles(ax: Axes, part: xr.Dataset) -> None:
    times = part.saddle_time.values
    shown = np.isfinite(times) & (times <= float(part.time[-1]))
    ax.plot(times[shown], part.saddle_loss.values[shown], "k_", markersize=9, label="_predicted saddle")
    ax.legend(ax.lines[-1:], ["predicted saddle"], loc="upper right")


def _angles(ax: Axes, member: xr.Dataset) -> None:
    smallest = member.isel(scale=int(np.argmin(member.scale.values)))
    degrees = np.rad2deg(smallest.angle.values)
    ax.plot(smallest.time, degrees, color="0.35", linewidth=0.6, alpha=0.7)
    escape = smallest.escape_time.values
    if np.isfinite(escape):
        ax.axvline(float(escape), color="black", linestyle=":", linewidth=1, label="escape")
        ax.legend(loc="center right")
    scale = float(smallest.scale)
    ax.set(title=f"angle to the prediction, scale {scale:.0e}", xlabel="flow time $t$", ylabel="degrees")
    ax.set(ylim=(0, 180), yticks=[0, 45, 90, 135, 180])


def _escape(ax: Axes, part: xr.Dataset) -> None:
    x = np.log(1 / part.scale.values)
    markers = ["o", "s", "^", "D", "v", "P"]
    for i, (width, colour) in enumerate(zip(part.width.values, shades(part.sizes["width"]), strict=True)):
        times = part.escape_time.sel(width=width)
        style = {"color": colour, "marker": markers[i % len(markers)]}
        for seed in part.seed.values:
            ax.plot(x, times.sel(seed=seed), linestyle="none", markersize=3, **style)
        mean = times.mean("seed").values
        if "slope" in part and np.isfinite(part.slope.sel(width=width)):
            slope = float(part.slope.sel(width=width))
            ax.plot(x, np.nanmean(mean) + slope * (x - np.mean(x[np.isfinite(mean)])), color=colour, linewidth=0.8)
            ax.plot([], [], label=f"width {width}, slope {slope:.2f}", markersize=3, linewidth=0.8, **style)
    if "predicted_time_from_start" in part:
        ax.plot(x, part.predicted_time_from_start.mean(("width", "seed")), "k--", linewidth=0.8, label="predicted")
    leading = part.predicted_time.mean(("width", "seed"))
    ax.plot(x, leading, "k:", linewidth=0.8, label=f"leading order, slope {float(part.predicted_slope):.2f}")
    ax.set(title="escape: loss reduced by a tenth", xlabel=r"$\ln(1/\mathrm{scale})$", ylabel="flow time $t$")
    entries = len(ax.get_legend_handles_labels()[0])
    if entries:
        # The lines rise from corner to corner: above them there has to be room for the legend.
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.18 * entries * (high - low))
        ax.legend(loc="upper left", handlelength=1.5)
