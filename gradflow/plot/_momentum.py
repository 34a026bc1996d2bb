"""The figure of the momentum study."""

from typing import Literal

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.plot._legends import clear_legends
from gradflow.plot._style import STYLE, Colour, figure, label_decades, shades
from gradflow.theory import momentum_rates

MARKERS = {"gradient_descent": "^", "heavy_ball": "o", "nesterov": "s"}
LABELS = {"gradient_descent": "gradient descent", "heavy_ball": "heavy ball", "nesterov": "Nesterov"}


def momentum(ds: xr.Dataset) -> Figure:
    """Losses, gaps to the flows, rates per mode, who is faster, movement and linearisation error against width.

    **Arguments**: `ds`: what `gradflow.studies.momentum` returned. **Returns** a matplotlib figure; see `save`.
    """
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(10, 6.2))
        axes = np.asarray(drawn.subplots(2, 3))
        colours = dict(zip(MARKERS, shades(3), strict=True))
        middle = ds.isel(ratio=ds.sizes["ratio"] // 2)
        _losses(axes[0, 0], middle, colours)
        _gaps(axes[0, 1], middle, colours)
        _rates(axes[0, 2], middle, colours)
        _winners(axes[1, 0], ds, colours)
        _against_width(axes[1, 1], middle, "movement", "largest movement of a neuron", colours)
        _against_width(axes[1, 2], middle, "linear_error", "distance from the\nlinearised flow / $|D(0)|$", colours)
        drawn.suptitle(f"{ds.attrs['data']}, {ds.attrs['samples']} samples, two-layer ReLU", fontsize=9)
        return clear_legends(drawn)


def _losses(ax: Axes, ds: xr.Dataset, colours: dict[str, Colour]) -> None:
    for name, colour in colours.items():
        ax.semilogy(ds.iteration, ds.loss.sel(rule=name).isel(width=-1), color=colour, label=LABELS[name])
    title = rf"width {ds.width.values[-1]}, $\mu = {float(ds.ratio):g}\,\lambda_{{\min}}$"
    ax.set(xlabel="iteration", ylabel="training loss", title=title)
    ax.legend()


def _gaps(ax: Axes, ds: xr.Dataset, colours: dict[str, Colour]) -> None:
    for name in ds.momentum.values:
        for resolution, line in (("low", ":"), ("high", "-")):
            gap = ds.flow_gap.sel(momentum=name, resolution=resolution)
            ax.semilogy(ds.t[1:], gap[1:], line, color=colours[name], label=f"{LABELS[name]}, {resolution}")
    ax.set(xlabel=r"flow time $t = k\sqrt{s}$", ylabel="distance / distance travelled")
    ax.set_title(f"from the method to its flow, width {ds.width.values[0]}")
    ax.legend()


def _rates(ax: Axes, ds: xr.Dataset, colours: dict[str, Colour]) -> None:
    for name in ds.momentum.values:
        predicted, measured = ds.predicted_rate.sel(momentum=name), ds.measured_rate.sel(momentum=name)
        ax.semilogx(ds.eigenvalue, predicted, "-", color=colours[name], label=f"{LABELS[name]}, predicted")
        style = {"color": colours[name], "marker": MARKERS[name], "markersize": 2.5, "linestyle": "none"}
        ax.semilogx(ds.eigenvalue, measured, label=f"{LABELS[name]}, measured", **style)
    top = float(np.nanmax(ds.predicted_rate))
    ax.set(xlabel="eigenvalue of the tangent kernel", ylabel="rate per unit of $t$", title="decay of each mode")
    ax.set_ylim(0, 1.5 * top)
    ax.legend(loc="upper left")


def _winners(ax: Axes, ds: xr.Dataset, colours: dict[str, Colour]) -> None:
    values, s = ds.eigenvalue.values, ds.attrs["learning_rate"]
    ratios = np.geomspace(ds.ratio.values[0], ds.ratio.values[-1], 200)
    methods: tuple[Literal["heavy_ball", "nesterov"], ...] = ("heavy_ball", "nesterov")
    top = float(np.nanmax(ds.final_rate))
    for name in methods:
        slowest = np.min(momentum_rates(values, values[0] * ratios[:, None], s, name, "discrete"), axis=1)
        top = max(top, float(np.max(slowest)))
        ax.semilogx(ratios, slowest, "-", color=colours[name])
        style = {"color": colours[name], "marker": MARKERS[name], "markersize": 4, "linestyle": "none"}
        ax.semilogx(ds.ratio, ds.final_rate.sel(momentum=name), label=f"{LABELS[name]}, measured", **style)
    ax.axvline(1, color="0.5", linestyle=":", linewidth=0.8)
    lines = [
        f"{ratio:g}: {LABELS.get(name, name)}" for ratio, name in zip(ds.ratio.values, ds.winner.values, strict=True)
    ]
    ax.set(xlabel=r"$\mu / \lambda_{\min}$", ylabel="rate of the residuals", title="faster at " + ", ".join(lines))
    ax.plot([], [], "-", color="black", label="predicted")
    ax.set_ylim(0, 1.1 * top)
    ax.legend(loc="upper left")


def _against_width(ax: Axes, ds: xr.Dataset, variable: str, label: str, colours: dict[str, Colour]) -> None:
    for name, colour in colours.items():
        values = ds[variable].sel(rule=name)
        ax.loglog(ds.width, values, MARKERS[name] + "-", color=colour, markersize=3, label=LABELS[name])
    middle = float(np.exp(np.log(ds[variable]).mean()))
    width = ds.width.values.astype(float)
    line = middle * (width / np.exp(np.log(width).mean())) ** -0.5
    ax.loglog(width, line, "k--", linewidth=0.8, label="width$^{-1/2}$")
    ax.set(xlabel="width", ylabel=label, title=rf"$\mu = {float(ds.ratio):g}\,\lambda_{{\min}}$")
    label_decades(ax)
    ax.legend()
