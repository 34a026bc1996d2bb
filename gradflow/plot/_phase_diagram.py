"""The figure of the phase diagram of one-pass SGD."""

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.plot._legends import clear_legends
from gradflow.plot._style import STYLE, figure, label_decades, shades


def phase_diagram(ds: xr.Dataset) -> Figure:
    """SGD beside its equations in each region; plateaus, uninformed starts, the price in samples; both maps.

    **Arguments**: `ds`: what `gradflow.studies.phase_diagram` returned. **Returns** a matplotlib figure; see `save`.
    """
    with matplotlib.rc_context(STYLE):
        columns = max(ds.sizes["exponent"], 3)
        drawn = figure(figsize=(2.9 * columns, 10.4))
        axes = drawn.subplots(4, columns, squeeze=False)
        for i in range(columns):
            if i < ds.sizes["exponent"]:
                _region(axes[0, i], ds, i)
            else:
                axes[0, i].axis("off")
        _over_noise(axes[1, 0], ds)
        _over_dim(axes[1, 1], ds)
        _starts(axes[1, 2], ds)
        _samples(axes[2, 0], ds)
        _map(drawn, axes[2, 1], ds, "final_risk", f"risk at $t$ = {float(ds.time[-1]):.0e}")
        _map(drawn, axes[2, 2], ds, "learning_time", "time at which it has learnt")
        _exponents(drawn, axes[3, 0], ds, "final_risk", f"risk at $t$ = {float(ds.time[-1]):.0e}")
        _exponents(drawn, axes[3, 1], ds, "learning_samples", "samples / $d$ until it has learnt")
        _exponents(drawn, axes[3, 2], ds, "plateau_length", "length in $t$ of the plateau before")
        for row in axes[1:]:
            for ax in row[3:]:
                ax.axis("off")
        return clear_legends(drawn)


def _region(ax: Axes, ds: xr.Dataset, i: int) -> None:
    part = ds.isel(exponent=i)
    for j, colour in enumerate(shades(ds.sizes["dim"])):
        t, dim = part.t.values[j], int(part.dim[j])
        ax.plot(t[1:], part.risk_full.values[j, 1:], color=colour, label=f"full, $d$ = {dim}")
        ax.plot(t[1:], part.risk_truncated.values[j, 1:], color=colour, linestyle=":", linewidth=1)
        runs = part.risk_sgd.values[j]
        spread = np.std(runs, axis=0, ddof=1)[1:]
        ax.errorbar(t[1:], np.mean(runs, axis=0)[1:], spread, fmt="o", color=colour, markersize=2.5, elinewidth=0.8)
    ax.plot([], [], "k:", linewidth=1, label="leading terms, infinite $d$")
    ax.plot([], [], "ko", markersize=2.5, label="SGD, mean and spread")
    name, exponent = str(part.region.values), float(part.exponent)
    ax.set(xscale="log", yscale="log", xlabel=r"$t$ = steps $\cdot\,\gamma / (p d)$", ylabel="risk" if i == 0 else "")
    ax.set_title(rf"{name}: $\kappa + \delta$ = {exponent:g}, noise {ds.attrs['noise']:g}")
    _room_below(ax)
    ax.legend(loc="lower left", fontsize=5.5)


def _room_below(ax: Axes) -> None:
    low, high = ax.get_ylim()
    ax.set_ylim(low * (low / high) ** 0.6, high)
    label_decades(ax)


def _over_noise(ax: Axes, ds: xr.Dataset) -> None:
    rows = np.unique(np.linspace(0, ds.sizes["rate"] - 1, 4).astype(int))
    for row, colour in zip(rows, shades(len(rows)), strict=True):
        label = rf"$\gamma/p$ = {float(ds.rate[row]):.2g}"
        ax.loglog(ds.noise, ds.settled_risk.values[row], "o", color=colour, markersize=3, label=label)
        ax.loglog(ds.noise, ds.predicted_settled_risk.values[row], "-", color=colour, linewidth=0.8)
    ax.plot([], [], "k-", linewidth=0.8, label="predicted")
    ax.set(xlabel=r"noise $\Delta$", ylabel="risk at the end", title="plateau against noise, informed start")
    label_decades(ax)
    ax.legend(loc="upper left", fontsize=5.5)


def _over_dim(ax: Axes, ds: xr.Dataset) -> None:
    column = int(np.argmin(np.abs(np.log(np.maximum(ds.noise.values, 1e-300) / 1e-3))))
    dims = ds.rate.values**-2.0
    large = dims >= 10
    ax.loglog(dims[large], ds.settled_risk.values[large, column], "ko", markersize=3, label="full system")
    ax.loglog(
        dims[large], ds.predicted_settled_risk.values[large, column], "-", color="0.5", linewidth=0.8, label="predicted"
    )
    if np.count_nonzero(large) > 1:
        slope = np.polyfit(np.log(dims[large]), np.log(ds.settled_risk.values[large, column]), 1)[0]
        ax.plot([], [], " ", label=f"slope {slope:.3f}")
    title = rf"green plateau, $\kappa+\delta$ = 1/2, noise {float(ds.noise[column]):.0e}"
    ax.set(xlabel=r"inputs $d = (\gamma/p)^{-2}$", title=title)
    label_decades(ax)
    ax.legend(loc="upper right")


def _starts(ax: Axes, ds: xr.Dataset) -> None:
    for i, colour in enumerate(shades(ds.sizes["start"])):
        ax.loglog(ds.time, ds.risk_start.values[i], color=colour, label=f"$d$ = {int(ds.start[i]):,}")
    ax.set(xlabel="$t$", ylabel="risk", title=r"uninformed starts, $\gamma/p$ = 1")
    label_decades(ax)
    ax.legend(loc="lower left")


def _samples(ax: Axes, ds: xr.Dataset) -> None:
    column = int(np.argmin(np.abs(np.log(np.maximum(ds.noise.values, 1e-300) / 1e-3))))
    rows = np.flatnonzero(ds.rate.values <= 2)
    rows = rows[np.unique(np.linspace(0, rows.size - 1, 5).astype(int))]
    for row, colour in zip(rows, shades(len(rows)), strict=True):
        rate = float(ds.rate[row])
        label = rf"$\gamma/p$ = {rate:.2g}"
        ax.loglog(ds.time / rate, ds.risk.values[row, column], color=colour, label=label)
    ax.set(xlabel="samples / $d$", ylabel="risk", title=f"risk against samples, noise {float(ds.noise[column]):.0e}")
    label_decades(ax)
    ax.legend(loc="lower left", fontsize=5.5)


def _map(drawn: Figure, ax: Axes, ds: xr.Dataset, name: str, title: str) -> None:
    values = np.log10(ds[name].values.T)
    corners = _corners(ds.rate.values), _corners(ds.noise.values)
    mesh = ax.pcolormesh(*corners, np.ma.masked_invalid(values), cmap="viridis")
    drawn.colorbar(mesh, ax=ax, label=rf"$\log_{{10}}$ {'risk' if name == 'final_risk' else '$t$'}")
    ax.set_facecolor("0.85")
    missing = " (grey: not by the end)" if not np.all(np.isfinite(values)) else ""
    ax.set(xscale="log", yscale="log", xlabel=r"$\gamma / p$", ylabel=r"noise $\Delta$", title=title + missing)
    ax.grid(visible=False)


def _exponents(drawn: Figure, ax: Axes, ds: xr.Dataset, name: str, title: str) -> None:
    """A map over both exponents, with the regions of theory: the grid is sheared, for its rows have one sum each."""
    kappas, sums = (_edges(ds[axis].values) for axis in ("kappa", "kappa_plus_delta"))
    values = np.log10(ds[f"{name}_exponents"].values.T)
    x = np.broadcast_to(kappas[None, :], (sums.size, kappas.size))
    y = sums[:, None] - kappas[None, :]
    mesh = ax.pcolormesh(x, y, np.ma.masked_invalid(values), cmap="viridis")
    what = {"final_risk": "risk", "learning_samples": "samples / $d$", "plateau_length": "$t$"}[name]
    drawn.colorbar(mesh, ax=ax, label=rf"$\log_{{10}}$ {what}")
    left, right = kappas[0], kappas[-1]
    for level, colour in ((0.0, "tab:blue"), (-0.5, "tab:red")):
        ax.plot([left, right], [level - left, level - right], color=colour, linewidth=1.5)
    bottom = -0.5 - right - 0.15
    ax.fill_between([left, right], [-0.5 - left, -0.5 - right], bottom, color="tab:red", alpha=0.25, linewidth=0)
    at = left + 0.05 * (right - left)
    plate = {"facecolor": "w", "alpha": 0.75, "linewidth": 0, "pad": 1}
    for label, level in (("green", sums[-1] / 2), ("blue", 0.0), ("orange", -0.25), ("red: no equation", -0.72)):
        ax.text(at, level - at, label, fontsize=6, va="center", bbox=plate, zorder=5)
    # Grey only where a point of the grid has no value.
    missing = not np.all(np.isfinite(values))
    if missing:
        ax.pcolormesh(x, y, np.where(np.isfinite(values), np.nan, 0.85), cmap="gray", vmin=0, vmax=1)
    ax.set(xlim=(left, right), ylim=(bottom, sums[-1] - left), xlabel=r"$\kappa$: $p \sim d^\kappa$")
    ax.set(ylabel=r"$\delta$: $\gamma \sim d^{-\delta}$", title=title + (" (grey: none)" if missing else ""))
    ax.grid(visible=False)


def _edges(values: np.ndarray) -> np.ndarray:
    """Edges of cells around values, midway between neighbours."""
    if values.size == 1:
        return np.array([values[0] - 0.05, values[0] + 0.05])
    middle = (values[1:] + values[:-1]) / 2
    return np.concatenate([[2 * values[0] - middle[0]], middle, [2 * values[-1] - middle[-1]]])


def _corners(values: np.ndarray) -> np.ndarray:
    """Edges of cells around positive values, midway between neighbours in the logarithm."""
    return np.exp(_edges(np.log(values)))
