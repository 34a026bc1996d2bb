"""The figure of the study of two nearby directions."""

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.plot._legends import clear_legends
from gradflow.plot._style import STYLE, figure, label_decades, shades


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
        losses.axhline(plateau, color="0.5", linewidth=0.8, linestyle="--", label="plateau")
        losses.set(xscale="log", yscale="log", title="loss of the flow", xlabel=r"$D^2 t$", ylabel="loss")
        losses.legend(loc="lower left")

        ends = ds.phase_end
        times.loglog(ds.angle, ends.sel(phase="plateau"), "o", color="black", markersize=4, label="escape")
        times.loglog(ds.angle, ds.predicted_escape_time, "-", color="0.5", label="predicted")
        for phase, mark, label in (("condensation", "s", "plateau begins"), ("escape", "^", "separated")):
            times.loglog(ds.angle, ends.sel(phase=phase), mark, color="0.4", markersize=4, label=label)
        times.set(title="ends of the phases", xlabel="angle $D$", ylabel="flow time $t$")
        times.set_ylim(top=30 * float(ends.max()))
        label_decades(times)
        times.legend()
        _phases(phases, ds)
        _stuck(stuck, ds, plateau)
        return clear_legends(drawn)


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
    ax.axhline(plateau, color="0.5", linewidth=0.8, linestyle="--", label="plateau")
    ax.axhline(1 / (1 + ds.attrs["ratio"]), color="0.5", linewidth=0.8, linestyle=":", label="$1/(1+p)$")
    ax.set(xscale="log", yscale="log", title=f"large steps kill sliding neurons, $D={float(ds.angle[0]):g}$")
    ax.set(xlabel="flow time $t$", ylabel="loss")
    label_decades(ax)
    ax.legend(loc="lower left")
