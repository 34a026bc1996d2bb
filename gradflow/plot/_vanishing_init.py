"""The figure of the study of vanishing initialisation."""

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.plot._legends import clear_legends
from gradflow.plot._style import STYLE, figure, shades

MARKERS = ["o", "s", "^", "D", "v", "P"]


def vanishing_init(ds: xr.Dataset) -> Figure:
    """Escape times beside the prediction, how far they are off, angles of neurons, and the loss with its saddles.

    Angles and the loss are those of the full runs: angles of the widest network and the first seed, the loss of the
    first width and seed, where dotted lines are the saddles that alternating gradient flow predicts.

    **Arguments**: `ds`: what `gradflow.studies.vanishing_init` returned. **Returns** a matplotlib figure; see `save`.
    """
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(10, 2.7))
        times, off, angles, loss = drawn.subplots(1, 4)
        _times(times, ds)
        _off(off, ds)
        _angles(angles, ds)
        _staircase(loss, ds)
        return clear_legends(drawn)


def _logs(ds: xr.Dataset) -> np.ndarray:
    return np.log(10) * ds.exponent.values


def _times(ax: Axes, ds: xr.Dataset) -> None:
    x = _logs(ds)
    for i, width in enumerate(ds.width.values):
        colour = shades(ds.sizes["width"])[i]
        for seed in ds.seed.values:
            row = ds.sel(width=width, seed=seed)
            ax.plot(x, row.escape_time, MARKERS[i % 6], color=colour, markersize=4)
            ax.plot(x, row.predicted_time, color=colour, linewidth=0.8)
        ax.plot([], [], MARKERS[i % 6], color=colour, markersize=4, label=f"width {width}")
    ax.plot([], [], color="black", linewidth=0.8, label="predicted")
    ax.set(xscale="log", yscale="log", title=r"escape: $\|w\|=10^{-2}$", xlabel=r"$\ln(1/\delta)$")
    ax.set_ylabel("flow time $t$")
    ax.legend(loc="upper left")


def _off(ax: Axes, ds: xr.Dataset) -> None:
    x = _logs(ds)
    for i, width in enumerate(ds.width.values):
        colour = shades(ds.sizes["width"])[i]
        for seed in ds.seed.values:
            row = ds.sel(width=width, seed=seed)
            ax.plot(x, row.escape_time / row.predicted_time - 1, MARKERS[i % 6] + "-", color=colour, markersize=3)
    plain = ds.cartesian_time / ds.escape_time - 1
    shown = np.isfinite(plain.values).any(axis=(0, 1))
    if shown.any():
        values = np.nanmax(np.abs(plain.values[:, :, shown]), axis=(0, 1))
        ax.plot(x[shown], values, "rx--", markersize=5, label="plain, fixed tolerances:\nagainst the polar flow")
        ax.legend()
    ax.set(xscale="log", yscale="log", title="time / leading order $-$ 1", xlabel=r"$\ln(1/\delta)$")
    ax.set_ylabel("relative")


def _angles(ax: Axes, ds: xr.Dataset) -> None:
    row = ds.isel(width=int(np.argmax(ds.width.values)), seed=0)
    ax.plot(ds.time, np.rad2deg(row.neuron_angle.values), color="0.35", linewidth=0.6)
    exponent = -float(ds.log) / np.log(10)
    nearest = int(np.argmin(np.abs(ds.exponent.values - exponent)))
    escape = float(row.escape_time.values[nearest])
    ax.axvline(escape, color="black", linestyle=":", linewidth=1, label="escape")
    title = rf"angles to the predictions, $\delta=10^{{-{exponent:g}}}$"
    ax.set(title=title, xlabel="flow time $t$", ylabel="degrees", ylim=(0, 180), yticks=[0, 45, 90, 135, 180])
    ax.legend(loc="upper right")


def _staircase(ax: Axes, ds: xr.Dataset) -> None:
    row = ds.isel(width=0, seed=0)
    ax.plot(ds.time, row.risk, color=shades(1)[0])
    for time, value in zip(ds.saddle_time.values, ds.saddle_loss.values, strict=True):
        if time <= float(ds.time[-1]):
            ax.axvline(time, color="0.5", linestyle=":", linewidth=1)
            ax.plot([time], [value], "k_", markersize=9)
    ax.plot([], [], "k_", markersize=9, label="predicted saddle")
    ax.set(title=f"loss, width {int(row.width)}", xlabel="flow time $t$", ylabel="training loss")
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper right")
