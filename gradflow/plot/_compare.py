"""The figure of a comparison between a rule and its flows."""

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.plot._legends import clear_legends
from gradflow.plot._style import STYLE, figure, label_decades, shades


def compare(ds: xr.Dataset) -> Figure:
    """The gap against the learning rate with its measured order, and against the gradients spent.

    **Arguments**: `ds`: what `gradflow.studies.compare` returned. **Returns** a matplotlib figure; see `save`.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.GradientDescent(lambda w: 0.5 * w**2, learning_rate=0.1)
    >>> ds = gf.compare(rule, jnp.array(1.0), [0.2, 0.1], 1.0, rtol=1e-5)
    >>> [ax.get_title() for ax in gf.plot.compare(ds).axes][0]
    'GradientDescent against its flow'
    """
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(7, 2.9))
        left, right = drawn.subplots(1, 2)
        _against_rate(left, ds)
        _against_cost(right, ds)
        return clear_legends(drawn)


def _against_rate(ax: Axes, ds: xr.Dataset) -> None:
    for j, (name, colour) in enumerate(zip(ds.flow.values, shades(ds.sizes["flow"] + 1)[1:], strict=True)):
        order = float(ds.order[j])
        label = f"gap to {name}, slope {order:.2f}" if np.isfinite(order) else f"gap to {name}"
        ax.loglog(ds.learning_rate, ds.gap[:, j], "o-", color=colour, markersize=3, label=label)
    _mark_diverged(ax, ds)
    ax.set(xlabel="learning rate", ylabel="gap / distance travelled", title=f"{ds.attrs['rule']} against its flow")
    label_decades(ax)
    ax.legend(loc="upper left")


def _against_cost(ax: Axes, ds: xr.Dataset) -> None:
    for j, (name, colour) in enumerate(zip(ds.flow.values, shades(ds.sizes["flow"] + 1)[1:], strict=True)):
        label = f"{ds.attrs['rule']}, gap to {name}"
        ax.loglog(ds.gradient_evaluations, ds.gap[:, j], "o-", color=colour, markersize=3, label=label)
    if "flow_rtol" in ds.coords:
        ax.loglog(
            ds.loose_flow_gradient_evaluations,
            ds.flow_error,
            "s--",
            color="black",
            markersize=3,
            label="the flow, by tolerance",
        )
    ax.set(xlabel="gradient evaluations", ylabel="error / distance travelled", title="cost of accuracy")
    label_decades(ax)
    ax.legend(loc="upper right")


def _mark_diverged(ax: Axes, ds: xr.Dataset) -> None:
    for rate, status in zip(ds.learning_rate.values, ds.status.values, strict=True):
        if status != 0:
            ax.axvline(rate, color="0.5", linestyle=":", linewidth=0.8)
            ax.annotate(
                "diverged", (rate, 0.5), xycoords=("data", "axes fraction"), rotation=90, fontsize=6, ha="right"
            )
