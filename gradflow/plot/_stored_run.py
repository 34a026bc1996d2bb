"""The figure of a run that `solve` or `iterate` keeps in a store."""

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow._checks import fail
from gradflow.plot._style import STYLE, figure, shades

PANELS = 6
"""Variables that are drawn, at most."""
LINES = 8
"""Entries of a variable that are drawn, at most."""
DECADES = 100.0
"""Range of positive values from which on they are drawn on a logarithmic axis."""


def stored_run(ds: xr.Dataset) -> Figure:
    """What a stored run has observed over time, so far if it is still running; without observables, its parameters.

    **Arguments**: `ds`: the store of a run, opened with `gradflow.sweeps.open_store`.

    **Returns** a matplotlib figure; see `save`. **Raises** `ValueError` for a run that has saved nothing.
    """
    timed = [str(name) for name in ds.data_vars if "time" in ds[name].dims]
    observed = [name for name in timed if name.split("_")[0] != "params"]
    names = (observed or timed)[:PANELS]
    if not names:
        advice = "Pass observe={...} to the run."
        raise fail("ds", "hold observables or parameters of a run", "without both", advice)
    ended = dict(zip(ds.status.attrs["flag_values"], ds.status.attrs["flag_meanings"].split(), strict=True))
    with matplotlib.rc_context(STYLE):
        columns = min(3, len(names))
        rows = -(-len(names) // columns)
        drawn = figure(figsize=(0.4 + 2.6 * columns, 0.4 + 2.1 * rows))
        axes = np.ravel(drawn.subplots(rows, columns, squeeze=False))
        for ax, name in zip(axes, names, strict=False):
            _panel(ax, ds, name)
        for ax in axes[len(names) :]:
            ax.axis("off")
        about = f"{ds.attrs['run']}, {ds.attrs['method']}: {ended[int(ds.status)]} at $t$ = {float(ds.t_final):.4g}"
        drawn.suptitle(about, fontsize=8)
        return drawn


def _panel(ax: Axes, ds: xr.Dataset, name: str) -> None:
    reached = ds.time.values <= float(ds.t_final)
    values = np.reshape(ds[name].values, (ds.sizes["time"], -1))[reached]
    shown = values[:, :LINES].astype(float)
    colours = shades(shown.shape[1]) if shown.shape[1] > 1 else ["black"]
    for line, colour in zip(shown.T, colours, strict=True):
        ax.plot(ds.time.values[reached], line, color=colour, marker="." if len(line) < 3 else None)
    some = f" (first {LINES} of {values.shape[1]})" if values.shape[1] > LINES else ""
    ax.set(title=f"{name}{some}", xlabel="time $t$")
    if shown.size and shown.min() > 0 and shown.max() > DECADES * shown.min():
        ax.set_yscale("log")
