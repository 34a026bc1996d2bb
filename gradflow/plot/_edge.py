"""The figure of the study of the edge of stability."""

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.plot._style import STYLE, figure, shades

DASHES = ("-", "--", ":", "-.")


def edge(ds: xr.Dataset) -> Figure:
    """For every rule the sharpness under its threshold, the loss, and the distance of every flow, over steps.

    At the first of the shares; lines of flows are medians over seeds.

    **Arguments**: `ds`: what `gradflow.studies.edge` returned. **Returns** a matplotlib figure; see `save`.
    """
    with matplotlib.rc_context(STYLE):
        rules = ds.rule.values
        drawn = figure(figsize=(10, 2.6 * len(rules) + 0.3))
        axes = np.asarray(drawn.subplots(len(rules), 3, squeeze=False))
        for row, rule in zip(axes, rules, strict=True):
            part = ds.isel(share=0, case=np.flatnonzero(ds.of_rule.values == rule)).sel(rule=rule)
            colours = shades(part.sizes["case"])
            styles = [{"color": c, "linestyle": DASHES[i % len(DASHES)]} for i, c in enumerate(colours)]
            _sharpness(row[0], part, styles, str(rule))
            _losses(row[1], part, styles)
            _distances(row[2], part, styles)
        for ax in axes[-1]:
            ax.set_xlabel("step of the rule")
        seeds = ds.sizes["seed"]
        drawn.suptitle(
            f"{ds.attrs['data']}, {ds.attrs['samples']} samples, {ds.attrs['activation']},"
            f" width {ds.attrs['width']}, share {ds.share.values[0]:g}, median of {seeds} seed{'s' * (seeds > 1)}",
            fontsize=9,
        )
        return drawn


def _sharpness(ax: Axes, ds: xr.Dataset, styles: list[dict], rule: str) -> None:
    threshold = float(ds.threshold)
    ax.axhline(threshold, color="tab:red", linewidth=0.9)
    ax.plot(ds.step, ds.rule_eigenvalue.isel(pair=0).median("seed"), color="0.6", linewidth=3, zorder=0)
    for i, style in enumerate(styles):
        ax.plot(ds.step, ds.eigenvalue.isel(case=i, pair=0).median("seed"), **style)
    ax.set_ylim(0, 1.8 * threshold)
    name = "sharpness" if "rmsprop" not in rule else "sharpness of $D^{-1/2} H D^{-1/2}$"
    ax.set(
        ylabel=f"{name} (1 / flow time)", title=f"{rule.replace('_', ' ')}, learning rate {float(ds.learning_rate):.3g}"
    )
    ax.text(0.02, threshold, "threshold", color="tab:red", va="bottom", transform=ax.get_yaxis_transform())


def _losses(ax: Axes, ds: xr.Dataset, styles: list[dict]) -> None:
    ax.plot(ds.step, ds.loss.median("seed"), color="0.6", linewidth=3, zorder=0)
    for i, style in enumerate(styles):
        ax.plot(ds.step, ds.predicted_loss.isel(case=i).median("seed"), **style)
    ax.set_yscale("log")
    ax.set(ylabel="mean loss", title="averaged and predicted")


def _distances(ax: Axes, ds: xr.Dataset, styles: list[dict]) -> None:
    relative = ds.distance / ds.travelled
    for i, style in enumerate(styles):
        ax.semilogy(ds.step, relative.isel(case=i).median("seed"), label=str(ds.flow.values[i]), **style)
    ax.plot([], [], color="0.6", linewidth=3, label="midpoints of the rule")
    ax.set(ylabel="distance / distance travelled", title="from the flow to the midpoints")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
