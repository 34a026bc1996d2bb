"""Legends that lie on no curve: looked at where they are drawn, moved where they cover something."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.path import Path
from matplotlib.transforms import Bbox, ScaledTranslation

BELOW = 4.0
"""Points from the labels of an axis down to a legend below them."""

PASSES = 6
"""Rounds of looking and moving, at most: a legend moved out of its axes makes others smaller."""

MARGIN = 3.0
"""Points that a legend is kept away from curves, since axes still change a little when the figure is written."""


def clear_legends(drawn: Figure) -> Figure:
    """The figure, with legends that lay on a curve moved to where they do not: within their axes, or else below them.

    >>> import numpy as np
    >>> from matplotlib.figure import Figure
    >>> from gradflow.plot._legends import clear_legends, covering
    >>> drawn = Figure(figsize=(3, 2), layout="constrained")
    >>> ax = drawn.subplots()
    >>> x = np.linspace(0, 1, 300)
    >>> _ = ax.plot(x, np.sin(60 * x), label="a curve that is everywhere")
    >>> _ = ax.legend(loc="center")
    >>> before = len(covering(drawn))
    >>> before, len(covering(clear_legends(drawn)))
    (1, 0)
    """
    for _ in range(PASSES):
        covered = covering(drawn, MARGIN)
        if not covered:
            break
        for ax, legend in covered:
            legend.set_loc("best")
            if _covers(ax, legend, MARGIN):
                _move_below(ax, legend)
    return drawn


def legend_below(ax: Axes, *entries: Any, **options: Any) -> None:
    """A legend under the labels of the axes, for those that curves or areas fill."""
    labels = ax.xaxis.get_tightbbox()
    depth = 0.0 if labels is None else ax.get_window_extent().y0 - labels.y0
    place = ax.transAxes + ScaledTranslation(0, -BELOW / 72 - depth / ax.figure.dpi, ax.figure.dpi_scale_trans)
    ax.legend(*entries, loc="upper center", bbox_to_anchor=(0.5, 0.0), bbox_transform=place, borderaxespad=0, **options)


def _move_below(ax: Axes, legend: Legend) -> None:
    texts = legend.get_texts()
    options: dict[str, Any] = {"fontsize": texts[0].get_fontsize(), "title": legend.get_title().get_text() or None}
    options["ncols"] = 2 if 2 * legend.get_window_extent().width < ax.get_window_extent().width else 1
    legend_below(ax, legend.legend_handles, [text.get_text() for text in texts], **options)


def covering(drawn: Figure, margin: float = 0.0) -> list[tuple[Axes, Legend]]:
    """Legends that lie on a curve, on points or on bars of their axes, or within a margin in points of one."""
    if not isinstance(drawn.canvas, FigureCanvasAgg):
        FigureCanvasAgg(drawn)  # which measures without a window
    drawn.draw_without_rendering()
    legends = [(ax, ax.get_legend()) for ax in drawn.axes]
    return [(ax, legend) for ax, legend in legends if legend is not None and _covers(ax, legend, margin)]


def _covers(ax: Axes, legend: Legend, margin: float) -> bool:
    box = legend.get_window_extent().padded(margin / 72 * ax.figure.dpi)
    # Two axes in one place, as of `twinx`, share their curves.
    there = [other for other in ax.figure.axes if other.get_position().bounds == ax.get_position().bounds]
    return any(_on_lines(other, box) or _on_shapes(other, box) for other in there)


def _on_lines(ax: Axes, box: Bbox) -> bool:
    for line in ax.lines:
        path = line.get_transform().transform_path(line.get_path())
        if line.get_linestyle() not in ("None", "none", "", " ") and _crosses(path, box):
            return True
        if line.get_marker() not in ("None", "none", "", " ", None) and box.count_contains(_finite(path)):
            return True
    return False


def _on_shapes(ax: Axes, box: Bbox) -> bool:
    for drawn in ax.collections:
        if isinstance(drawn, LineCollection):
            paths = [drawn.get_transform().transform_path(path) for path in drawn.get_paths()]
            if any(_crosses(path, box) for path in paths):
                return True
        elif isinstance(drawn, PathCollection):
            offsets = np.asarray(drawn.get_offset_transform().transform(drawn.get_offsets()))
            if box.count_contains(offsets):
                return True
    bars = [bar for container in ax.containers if isinstance(container, BarContainer) for bar in container]
    return any(bar.get_height() and bar.get_window_extent().overlaps(box) for bar in bars)


def _crosses(path: Path, box: Bbox) -> bool:
    return len(np.asarray(path.vertices)) > 1 and bool(path.intersects_bbox(box, filled=False))


def _finite(path: Path) -> np.ndarray:
    vertices = np.asarray(path.vertices)
    return vertices[np.isfinite(vertices).all(axis=1)]
