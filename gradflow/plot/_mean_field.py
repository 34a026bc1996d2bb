"""The figure of the study of infinite width."""

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.plot._legends import clear_legends
from gradflow.plot._style import STYLE, figure, label_decades, shades

MARKERS = ["o", "s", "^", "D"]


def mean_field(ds: xr.Dataset) -> Figure:
    """Risk by width, deviation and bias, depth, rules of nodes, test particles, and predictions with their band.

    **Arguments**: `ds`: what `gradflow.studies.mean_field` returned. **Returns** a matplotlib figure; see `save`.
    """
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(10, 5.6))
        axes = np.asarray(drawn.subplots(2, 3))
        _risk(axes[0, 0], ds)
        _deviation(axes[0, 1], ds)
        _depth(axes[0, 2], ds)
        _rules(axes[1, 0], ds)
        _particles(axes[1, 1], ds)
        _predictions(axes[1, 2], ds)
        return clear_legends(drawn)


def _risk(ax: Axes, ds: xr.Dataset) -> None:
    row = ds.sel(depth=2)
    for colour, width in zip(shades(ds.sizes["width"] + 1), ds.width.values, strict=False):
        ax.plot(ds.time, row.risk.sel(width=width), color=colour, linewidth=0.9, label=f"{width}")
    ax.plot(ds.time, row.limit_risk, "k--", linewidth=1.6, label=r"$\infty$")
    ax.set(title="training loss by width, two hidden layers", xlabel="flow time $t$", ylabel="loss")
    ax.legend(ncols=2, title="width")


def _deviation(ax: Axes, ds: xr.Dataset) -> None:
    row, colours = ds.sel(depth=2), shades(3)
    ax.loglog(ds.width, row.deviation, "o", color=colours[2], markersize=4, label=_label_with_slope("flow", row.slope))
    ax.loglog(ds.width, ds.predicted_deviation, "_-", color=colours[2], linewidth=0.9, label="flow, predicted")
    ax.loglog(
        ds.sgd_width,
        ds.sgd_deviation,
        "^",
        color=colours[1],
        markersize=4,
        label=_label_with_slope("SGD", ds.sgd_slope),
    )
    resolved = (row.bias > 3 * row.bias_noise).values
    if resolved.any():
        ax.loglog(ds.width[resolved], row.bias[resolved], "s", color=colours[0], markersize=4, label="bias of the mean")
        middle = np.exp(np.mean(np.log(row.bias.values[resolved] * ds.width.values[resolved])))
        ax.loglog(ds.width, middle / ds.width, ":", color="0.4", linewidth=0.9, label="slope $-1$")
    ax.set(title="distance from the limit", xlabel="width $N$", ylabel="r.m.s. over inputs, times, seeds")
    label_decades(ax)
    ax.legend()


def _label_with_slope(name: str, slope: xr.DataArray) -> str:
    """A name and its fitted slope, if there is one."""
    return f"{name}: {float(slope):+.2f}" if np.isfinite(float(slope)) else name


def _depth(ax: Axes, ds: xr.Dataset) -> None:
    for i, (colour, depth) in enumerate(zip(shades(ds.sizes["depth"]), ds.depth.values, strict=True)):
        row = ds.sel(depth=depth)
        label = _label_with_slope(f"{depth} hidden layers", row.slope)
        ax.loglog(ds.width, row.deviation, MARKERS[i % 4] + "-", color=colour, markersize=4, label=label)
    width = ds.width.values.astype(float)
    line = float(ds.deviation.max()) * (width / width[0]) ** -0.5
    ax.loglog(width, 1.4 * line, "k--", linewidth=0.8, label="$N^{-1/2}$")
    ax.set(title="depth: limits with collapsed interior", xlabel="width $N$", ylabel="r.m.s. deviation")
    label_decades(ax)
    ax.legend()


def _rules(ax: Axes, ds: xr.Dataset) -> None:
    if not ds.sizes["node_count"]:
        ax.text(0.5, 0.5, "rules of nodes: not compared\nin the quick form", ha="center", transform=ax.transAxes)
        ax.set_axis_off()
        return
    for i, (colour, rule) in enumerate(zip(shades(ds.sizes["rule"]), ds.rule.values, strict=True)):
        row = ds.sel(rule=rule)
        ax.loglog(row.nodes_used, row.node_error, MARKERS[i] + "-", color=colour, markersize=4, label=str(rule))
    ax.axhline(float(ds.limit_error), color="0.5", linestyle=":", linewidth=0.9, label="estimate of the reference")
    ax.set(title="width infinity: error by rule", xlabel="nodes of the first layer", ylabel="largest error")
    label_decades(ax)
    ax.legend()


def _particles(ax: Axes, ds: xr.Dataset) -> None:
    for path in ds.particle_path.values:
        ax.plot(path[:, 0], path[:, 1], color=shades(1)[0], linewidth=1)
        ax.plot(*path[0], "o", color="0.5", markersize=3)
        ax.plot(*path[-1], ">", color="black", markersize=3)
    ax.plot([], [], "o", color="0.5", markersize=3, label="start")
    ax.plot([], [], ">", color="black", markersize=3, label=f"$t = {float(ds.time[-1]):g}$")
    ax.set(title="test particles along the limit", xlabel="first weight", ylabel="second weight")
    ax.margins(y=0.25)
    ax.legend(loc="upper center", ncols=2)


def _predictions(ax: Axes, ds: xr.Dataset) -> None:
    """Against the first input where the second is constant, otherwise in the order of the limit."""
    flat = bool(np.ptp(ds.x.values[:, 1]) == 0)
    limit, width = ds.limit.values[-1], int(ds.width.values[min(2, ds.sizes["width"] - 1)])
    order = np.argsort(ds.x.values[:, 0] if flat else limit)
    place = ds.x.values[order, 0] if flat else np.arange(order.size)
    band = 2 * ds.predicted_std.values[-1][order] / width**0.5
    style = {"color": shades(2)[0], "alpha": 0.35, "linewidth": 0}
    ax.fill_between(place, limit[order] - band, limit[order] + band, **style, label="predicted, 2 std")
    for g in ds.some_g.sel(width=width).values:
        ax.plot(place, g[order], color=shades(2)[1], linewidth=0.7)
    ax.plot([], [], color=shades(2)[1], linewidth=0.7, label=f"networks of width {width}")
    ax.plot(place, limit[order], "k--", label=r"width $\infty$")
    ax.plot(place, ds.y.values[order], ".", color="tab:red", markersize=3, label="targets")
    ax.set(title=f"predictions at $t = {float(ds.time[-1]):g}$", ylabel="prediction")
    ax.set_xlabel("input" if flat else "sample, in the order of the limit")
    ax.legend()
