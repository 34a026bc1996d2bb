"""The figure of the study of early training."""

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.plot._legends import clear_legends, legend_below
from gradflow.plot._style import STYLE, figure, label_decades, shades

MARKERS = ["o", "s", "^", "D", "v"]
PARTS = {"true-living": "tab:green", "true-dead": "#b7e0b7", "false-living": "tab:red", "false-dead": "#f3c1c1"}


def early_stage(ds: xr.Dataset) -> Figure:
    """Loss drop, samples uncovered, switches that theory forbids, late phase.

    The drop over widths, rates and batches; over time the partition, the bound on the gradient, and `t * loss`.

    **Arguments**: `ds`: what `gradflow.studies.early_stage` returned. **Returns** a matplotlib figure; see `save`.
    """
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(12.5, 5.2))
        panels = drawn.subplots(2, 4).ravel()
        _drop(panels[0], ds, "width", "width $m$")
        _drop(panels[1], ds, "rate", r"learning rate $\eta$")
        _batches(panels[2], ds)
        _uncovered(panels[3], ds)
        _partition(panels[4], ds)
        _violations(panels[5], ds)
        _bound(panels[6], ds)
        _late(panels[7], ds)
        return clear_legends(drawn)


def _drop(ax: Axes, ds: xr.Dataset, dim: str, label: str) -> None:
    for i, name in enumerate(ds.loss.values):
        row = ds.sel(loss=name)
        values, spread = row[f"drop_{dim}"].values, row[f"drop_{dim}_spread"].values
        colour = shades(ds.sizes["loss"])[i]
        error = spread / max(ds.attrs["runs"] - 1, 1) ** 0.5
        style = {"marker": MARKERS[i % 5], "markersize": max(8 - 2 * i, 3), "color": colour, "capsize": 2}
        ax.errorbar(row[dim], values, error, label=name, **style)
    ax.set(xscale="log", title=r"loss drop within $1/\eta$ steps of descent", xlabel=label, ylabel="loss drop")
    ax.set_ylim(bottom=0, top=1.3 * float(ds[f"drop_{dim}"].max()))
    label_decades(ax)
    ax.legend(ncols=2, loc="upper right")


def _batches(ax: Axes, ds: xr.Dataset) -> None:
    full = ds.drop_rate.sel(rate=ds.attrs["middle_rate"])
    for i, name in enumerate(ds.loss.values):
        ratio = ds.drop_batch.sel(loss=name) / full.sel(loss=name)
        error = ds.drop_batch_spread.sel(loss=name) / full.sel(loss=name) / max(ds.attrs["runs"] - 1, 1) ** 0.5
        colour = shades(ds.sizes["loss"])[i]
        ax.errorbar(ds.batch, ratio, error, marker=MARKERS[i % 5], markersize=4, color=colour, capsize=2, label=name)
    ax.axhline(1, color="0.5", linewidth=0.8, linestyle=":")
    ax.set(title="loss drop of SGD / of descent", xlabel="batch size $B$", ylabel="ratio", xticks=ds.batch.values)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.95), max(high, 1.05))
    ax.legend()


def _uncovered(ax: Axes, ds: xr.Dataset) -> None:
    for i, name in enumerate(ds.loss.values):
        row = ds.uncovered.sel(loss=name)
        style = {"marker": MARKERS[i % 5], "markersize": max(8 - 2 * i, 3), "color": shades(ds.sizes["loss"])[i]}
        ax.plot(ds.width, row, label=name, **style)
    ax.set(xscale="log", title="samples uncovered by their class, $t = 1$", xlabel="width $m$", ylabel="samples")
    ax.set_ylim(-0.03 * float(ds.uncovered.max()) - 0.01, 1.2 * float(ds.uncovered.max()) + 0.1)
    label_decades(ax)
    ax.legend()


def _bound(ax: Axes, ds: xr.Dataset) -> None:
    t = ds.late_time.values[1:]
    ax.set(xscale="log", yscale="log", title="gradient norm and its lower bound", xlabel="flow time $t$")
    if not np.any(np.isfinite(ds.norm)):
        ax.text(0.5, 0.5, "for two classes only", ha="center", va="center", transform=ax.transAxes)
        ax.set(xlim=(t[0], t[-1]), yticks=[])
        return
    for i, name in enumerate(ds.late_loss.values):
        row, colour = ds.sel(late_loss=name).isel(late_time=slice(1, None)), shades(max(ds.sizes["late_loss"], 2))[i]
        ax.plot(t, row.norm, color=colour, label=f"{name}, norm")
        some = bool(np.any(row.bound > 0))
        bound = np.where(row.bound > 0, row.bound, np.nan)
        ax.plot(t, bound, color=colour, linestyle="--", label="bound" if some else "bound (zero)")
    ax.set_ylabel(r"$|\nabla L|$")
    ax.legend(loc="lower left")


def _partition(ax: Axes, ds: xr.Dataset) -> None:
    t = ds.late_time.values[1:]
    fractions = [ds.partition.sel(part=part).values[1:] for part in PARTS]
    ax.stackplot(t, fractions, labels=list(PARTS), colors=list(PARTS.values()), linewidth=0)
    ax.set(xscale="log", title=f"partition along the flow, width {ds.attrs['middle_width']}", xlabel="flow time $t$")
    ax.set(ylabel="fraction of pairs (neuron, sample)", ylim=(0, 1), xlim=(t[0], t[-1]))
    legend_below(ax, ncols=2)


def _violations(ax: Axes, ds: xr.Dataset) -> None:
    fraction = (ds.violations / np.maximum(ds.events, 1)).values
    place = np.arange(ds.sizes["path"])
    for i, name in enumerate(ds["data"].values):
        bars = ax.bar(place + 0.4 * (i - 0.5), fraction[i], 0.36, color=shades(2)[i], label=str(name))
        ax.bar_label(bars, [str(int(v)) for v in ds.violations.values[i]], fontsize=7)
    ax.set(title="switches out of true-living or false-dead, $t < 3$", ylabel="fraction of all switches")
    ax.set_xticks(place, [str(p) for p in ds.path.values])
    ax.set_ylim(0, max(0.1, 1.5 * float(fraction.max())))
    ax.legend(loc="upper right")


def _late(ax: Axes, ds: xr.Dataset) -> None:
    t = ds.late_time.values[1:]
    other, separated = ax.twinx(), False
    for i, name in enumerate(ds.late_loss.values):
        row, colour = ds.sel(late_loss=name).isel(late_time=slice(1, None)), shades(max(ds.sizes["late_loss"], 2))[i]
        ax.plot(t, t * row.risk, color=colour, label=str(name))
        margin = np.where(row.margin > 0, row.margin, np.nan)
        other.plot(t, margin, color=colour, linestyle="--")
        separated |= bool(np.any(row.margin > 0))
    ax.set(
        xscale="log",
        yscale="log",
        title="late phase, $t L(t)$ and margin",
        xlabel="flow time $t$",
        ylabel=r"$t \cdot$ loss (solid)",
    )
    other.grid(False)
    if separated:
        other.set_ylabel("normalised margin (dashed)")
    else:
        other.set(yticks=[], ylabel="not separated: no margin")
    ax.legend(loc="lower center")
