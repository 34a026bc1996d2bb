"""The figures of the study of early training, and of two nearby directions."""

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.plot._style import STYLE, figure, label_decades, shades

MARKERS = ["o", "s", "^", "D", "v"]
PARTS = {"true-living": "tab:green", "true-dead": "#b7e0b7", "false-living": "tab:red", "false-dead": "#f3c1c1"}


def early_stage(ds: xr.Dataset) -> Figure:
    """Loss drop, samples deserted, switches that theory forbids, late phase.

    The drop over widths, rates and batches; over time the partition, the bound on the gradient, and `t * loss`.

    **Arguments**: `ds`: what `gradflow.studies.early_stage` returned. **Returns** a matplotlib figure; see `save`.
    """
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(12.5, 5.2))
        panels = drawn.subplots(2, 4).ravel()
        _drop(panels[0], ds, "width", "width $m$")
        _drop(panels[1], ds, "rate", r"learning rate $\eta$")
        _batches(panels[2], ds)
        _deserted(panels[3], ds)
        _partition(panels[4], ds)
        _violations(panels[5], ds)
        _bound(panels[6], ds)
        _late(panels[7], ds)
        return drawn


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


def _deserted(ax: Axes, ds: xr.Dataset) -> None:
    for i, name in enumerate(ds.loss.values):
        row = ds.deserted.sel(loss=name)
        style = {"marker": MARKERS[i % 5], "markersize": max(8 - 2 * i, 3), "color": shades(ds.sizes["loss"])[i]}
        ax.plot(ds.width, row, label=name, **style)
    ax.set(xscale="log", title="samples deserted by their class, $t = 1$", xlabel="width $m$", ylabel="samples")
    ax.set_ylim(-0.03 * float(ds.deserted.max()) - 0.01, 1.2 * float(ds.deserted.max()) + 0.1)
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
    shares = [ds.partition.sel(part=part).values[1:] for part in PARTS]
    ax.stackplot(t, shares, labels=list(PARTS), colors=list(PARTS.values()), linewidth=0)
    ax.set(xscale="log", title=f"partition along the flow, width {ds.attrs['middle_width']}", xlabel="flow time $t$")
    ax.set(ylabel="share of pairs (neuron, sample)", ylim=(0, 1), xlim=(t[0], t[-1]))
    ax.legend(loc="center right", frameon=True, framealpha=0.8)


def _violations(ax: Axes, ds: xr.Dataset) -> None:
    share = (ds.violations / np.maximum(ds.events, 1)).values
    place = np.arange(ds.sizes["path"])
    for i, name in enumerate(ds["data"].values):
        bars = ax.bar(place + 0.4 * (i - 0.5), share[i], 0.36, color=shades(2)[i], label=str(name))
        ax.bar_label(bars, [str(int(v)) for v in ds.violations.values[i]], fontsize=7)
    ax.set(title="switches out of true-living or false-dead, $t < 3$", ylabel="share of all switches")
    ax.set_xticks(place, [str(p) for p in ds.path.values])
    ax.set_ylim(0, max(0.1, 1.5 * float(share.max())))
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
        other.set(yticks=[], ylabel="not told apart: no margin")
    ax.legend(loc="lower center")


def two_directions(ds: xr.Dataset) -> Figure:
    """Loss over time for every angle, in units of the inverse squared angle; escape times; sliding; descent stuck.

    **Arguments**: `ds`: what `gradflow.studies.two_directions` returned. **Returns** a matplotlib figure; see `save`.
    """
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(10, 2.9))
        losses, times, phases, stuck = drawn.subplots(1, 4)
        colours = shades(ds.sizes["angle"])
        plateau = 2 * ds.attrs["ratio"] ** 0.5 / (1 + ds.attrs["ratio"])
        for i, angle in enumerate(ds.angle.values):
            row = ds.sel(angle=angle)
            shown = row.scaled_time.values > 1e-4
            losses.plot(row.scaled_time[shown], row.risk[shown], color=colours[i], label=f"$D={angle:g}$")
        last = ds.isel(angle=-1)
        shown = last.scaled_time.values > 1e-2
        law = last.predicted_risk[shown]
        losses.plot(last.scaled_time[shown], law, "k:", label="predicted")
        losses.axhline(plateau, color="0.5", linewidth=0.8, linestyle="--")
        losses.set(xscale="log", yscale="log", title="loss of the flow", xlabel=r"$D^2 t$", ylabel="loss")
        losses.legend(loc="lower left")

        ends = ds.phase_end
        times.loglog(ds.angle, ends.sel(phase="plateau"), "o", color="black", markersize=4, label="escape")
        times.loglog(ds.angle, ds.predicted_escape_time, "-", color="0.5", label="predicted")
        for phase, mark, label in (("condensation", "s", "plateau begins"), ("escape", "^", "told apart")):
            times.loglog(ds.angle, ends.sel(phase=phase), mark, color="0.4", markersize=4, label=label)
        times.set(title="ends of the phases", xlabel="angle $D$", ylabel="flow time $t$")
        times.set_ylim(top=30 * float(ends.max()))
        label_decades(times)
        times.legend()
        _phases(phases, ds)
        _stuck(stuck, ds, plateau)
        return drawn


def _phases(ax: Axes, ds: xr.Dataset) -> None:
    """Sliding neurons and KKT residuals of the smallest angle, with the phases shaded."""
    row = ds.isel(angle=-1)
    t = row.scaled_time.values / float(row.angle) ** 2
    edges = [t[1], *[float(end) for end in row.phase_end], t[-1]]
    names = ["condensation", "plateau", "escape", "late"]
    for i, name in enumerate(names):
        ax.axvspan(edges[i], edges[i + 1], color=str(0.97 - 0.07 * (i % 2) - 0.03 * i), linewidth=0)
        middle = np.sqrt(edges[i] * edges[i + 1])
        ax.text(middle, 0.5, name, rotation=90, ha="center", va="center", transform=ax.get_xaxis_transform())
    ax.plot(t[1:], row.sliding[1:], color="tab:red", label="negative neurons that slide")
    ax.set(xscale="log", title=f"phases, $D={float(row.angle):g}$", xlabel="flow time $t$", ylabel="neurons")
    ax.set(xlim=(t[1], t[-1]), ylim=(0, 1.35 * float(row.sliding.max()) + 1))
    ax.legend(loc="upper left")


def _stuck(ax: Axes, ds: xr.Dataset, plateau: float) -> None:
    t = ds.descent_time.values[1:]
    ax.plot(t, ds.descent_risk[1:], color="tab:red", label=f"descent, step {ds.attrs['learning_rate']:g}")
    ax.plot(t, ds.flow_risk[1:], color="black", label="flow")
    ax.axhline(plateau, color="0.5", linewidth=0.8, linestyle="--")
    ax.axhline(1 / (1 + ds.attrs["ratio"]), color="0.5", linewidth=0.8, linestyle=":", label="$1/(1+p)$")
    ax.set(xscale="log", yscale="log", title=f"large steps kill what slides, $D={float(ds.angle[0]):g}$")
    ax.set(xlabel="flow time $t$", ylabel="loss")
    label_decades(ax)
    ax.legend(loc="lower left")
