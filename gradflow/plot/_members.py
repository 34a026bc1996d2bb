"""The figure of a plain sweep, which no study has drawn: every member over time, or what is left of it at the end."""

import json
import math

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gradflow._checks import fail
from gradflow.plot._curves import draw_lines, scale_time, spans_decades, time_label
from gradflow.plot._solution import LOSSES
from gradflow.plot._style import STYLE, figure, shades

MOST_PANELS = 6
"""Variables that are drawn, at most."""

NAMED_VALUES = 10
"""Values of the first axis that a legend names, at most."""

BESIDES = ("saved_time", "params")
"""Variables over time that say how a run went, not what it found."""


def members(ds: xr.Dataset) -> Figure:
    """Every member of a sweep: each scalar observable over time, coloured by the first axis with several values.

    Without observables, the first and the last loss of every member. At most six variables are drawn; `ds[name].plot()`
    of xarray draws any other.

    **Arguments**: `ds`: what `gradflow.sweep` returned, or its store opened.

    **Returns** a matplotlib figure; see `save`. **Raises** `ValueError` for a data set with nothing of the kind.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow, norm = gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2)), gf.observables.ParameterNorm()
    >>> build = lambda scale: (flow, scale * jnp.ones(2))
    >>> ds = gf.sweep(build, {"scale": [1.0, 2.0]}, [0.0, 0.5, 1.0], observe={"norm": norm}, progress=False)
    >>> [ax.get_ylabel() for ax in gf.plot.members(ds).axes]
    ['norm']
    """
    grid = grid_of(ds)
    names = [str(name) for name, value in ds.data_vars.items() if set(value.dims) == {*grid, "time"}]
    names = [name for name in names if name not in BESIDES and ds[name].dtype.kind in "biuf"]
    names = sorted(names, key=lambda name: name not in LOSSES)[:MOST_PANELS]
    if not names and "loss_last" not in ds:
        advice = "`ds[name].plot()` of xarray draws a variable of any kind."
        raise fail("ds", "hold a sweep with an observable over time, or with a loss", "without either", advice)
    shade = next((axis for axis in grid if ds.sizes[axis] > 1), None)
    with matplotlib.rc_context(STYLE):
        across = min(max(len(names), 1), 3)
        down = math.ceil(max(len(names), 1) / across)
        drawn = figure(figsize=(max(3.3 * across, 5.0), 2.4 * down + 0.9))
        axes = np.ravel(drawn.subplots(down, across, squeeze=False))
        for ax, name in zip(axes, names, strict=False):
            _over_time(ax, ds, name, grid, shade)
        if not names:
            _ends(axes[0], ds)
        for ax in axes[max(len(names), 1) :]:
            ax.set_axis_off()
        sizes = ", ".join(f"{ds.sizes[axis]} {axis}" for axis in grid)
        drawn.suptitle(f"{ds.attrs.get('flow', 'sweep')}: {sizes}", fontsize=9)
        if names and shade is not None:
            _name_shades(drawn, ds, shade)
        return drawn


def grid_of(ds: xr.Dataset) -> tuple[str, ...]:
    """The axes of a sweep, in their order; of another data set those of its status, if it has one."""
    if "config" in ds.attrs:
        return tuple(json.loads(ds.attrs["config"])["axes"])
    return tuple(str(dim) for dim in ds["status"].dims) if "status" in ds else ()


def _over_time(ax: Axes, ds: xr.Dataset, name: str, grid: tuple[str, ...], shade: str | None) -> None:
    order = tuple(axis for axis in (shade, *grid) if axis is not None)
    order = tuple(dict.fromkeys(order))
    rows = ds[name].transpose(*order, "time").values.reshape(-1, ds.sizes["time"])
    ts = np.asarray(ds.time.values, float)
    draw_lines(ax, np.broadcast_to(ts, rows.shape), rows, name, legend=False)
    if shade is not None and len(rows) == len(ax.lines):
        colours = np.repeat(np.arange(ds.sizes[shade]), len(rows) // ds.sizes[shade])
        for line, at in zip(ax.lines, colours, strict=True):
            line.set(color=shades(ds.sizes[shade])[at], linewidth=0.9)
        ax.set_ylabel(name)
    scale_time(ax, ts)
    ax.set_xlabel(time_label(ds.attrs.get("time_unit", "")))


def _name_shades(drawn: Figure, ds: xr.Dataset, shade: str) -> None:
    values = ds[shade].values
    shown = np.unique(np.linspace(0, len(values) - 1, NAMED_VALUES).astype(int))
    handles: list[Artist] = [Line2D([], [], color=shades(len(values))[i]) for i in shown]
    labels = [f"{values[i]:g}" if values.dtype.kind == "f" else str(values[i]) for i in shown]
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(len(shown), 5), title=shade)


def _ends(ax: Axes, ds: xr.Dataset) -> None:
    first, last = (np.ravel(ds[name].values) for name in ("loss_first", "loss_last"))
    place = np.arange(first.size)
    ax.plot(place, first, "o", color=shades(2)[0], markersize=3, label="first")
    ax.plot(place, last, "s", color=shades(2)[1], markersize=3, label="last")
    ax.set(xlabel="member, in the order of the grid", ylabel="loss")
    if spans_decades(np.concatenate([first, last])):
        ax.set_yscale("log")
    ax.figure.legend(loc="outside lower center", ncols=2)
