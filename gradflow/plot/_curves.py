"""Curves over time, as figures of runs and of sweeps share them: lines of an array, scales, the label of the axis."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.plot._style import shades

NAMED_LINES = 6
"""Lines in a panel that get a legend, at most; more are shaded in their order, which the axis says."""

MOST_LINES = 64
"""Lines in a panel, at most: of more, median, quartiles and extremes are shown."""

DECADES = 2.0
"""Decades that positive values span where an axis is logarithmic."""

DOTS = 200
"""Iterates of a rule that are drawn as dots, at most: more would run into a line anyway."""

CAPTION_CHARACTERS = 18
"""Characters of a caption in an inch of a figure, at its size of 7 points."""


def time_label(unit: str) -> str:
    """The label of an axis of flow time, with how it counts iterations where that is known.

    >>> from gradflow.plot._curves import time_label
    >>> time_label("t = k * learning_rate")
    'flow time t = k * learning_rate'
    """
    return f"flow time {unit or 't'}"


def spans_decades(values: Shaped[np.ndarray, "..."]) -> bool:
    """Whether a logarithmic axis suits: every finite value is positive, and they span two decades."""
    finite = values[np.isfinite(values)]
    return finite.size > 1 and bool(finite.min() > 0) and bool(np.log10(finite.max() / finite.min()) >= DECADES)


def geometric(ts: Float[np.ndarray, " T"]) -> bool:
    """Whether times are spread over decades, so that a linear axis would crowd most of them at its beginning."""
    later = ts[ts > 0]
    return later.size > 2 and spans_decades(later) and bool(np.median(later) < 0.2 * later.max())


def scale_time(ax: Axes, ts: Float[np.ndarray, " T"]) -> None:
    """A logarithmic axis of time where the times are spread over decades; time zero is left out of it."""
    if geometric(ts):
        ax.set_xscale("log", nonpositive="mask")


def draw_lines(
    ax: Axes,
    ts: Float[np.ndarray, "lines T"],
    rows: Shaped[np.ndarray, "lines T"],
    label: str,
    legend: bool = True,
    **style: Any,
) -> None:
    """All rows as lines over their times, shaded from light to dark in their order; few of them with a legend.

    The legend, of the numbers of lines, stands beside the axes, where no curve runs.
    """
    rows = rows.astype(float)
    count = len(rows)
    if count > MOST_LINES:
        _spread(ax, ts[0], rows)
        ax.set_ylabel(f"{label}\n{count} lines: median, quartiles, extremes")
    else:
        for i, colour in enumerate(shades(count) if count > 1 else shades(2)[1:]):
            ax.plot(ts[i], rows[i], color=colour, label=str(i), **style)
        more = f"\n{count} lines, light to dark" if count > NAMED_LINES else ""
        ax.set_ylabel(label + more)
    if legend and 1 < count <= NAMED_LINES:
        beside(ax)
    if spans_decades(rows):
        ax.set_yscale("log")


def beside(ax: Axes, entries: Mapping[str, Artist] | None = None) -> None:
    """A legend to the right of the axes, of these handles by label or of all there are."""
    shown = () if entries is None else (list(entries.values()), list(entries))
    ax.legend(*shown, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, handlelength=1.2)


def _spread(ax: Axes, ts: Float[np.ndarray, " T"], rows: Float[np.ndarray, "lines T"]) -> None:
    seen = np.isfinite(rows).any(axis=0)
    low, first, middle, third, high = np.nanquantile(rows[:, seen], [0, 0.25, 0.5, 0.75, 1], axis=0)
    colour = shades(2)[1]
    ax.fill_between(ts[seen], low, high, color=colour, alpha=0.15, linewidth=0)
    ax.fill_between(ts[seen], first, third, color=colour, alpha=0.3, linewidth=0)
    ax.plot(ts[seen], middle, color=colour)


def caption(drawn: Figure, lines: Sequence[str]) -> None:
    """Text below a figure, wrapped to its width; the layout keeps the room for it."""
    width = int(CAPTION_CHARACTERS * drawn.get_size_inches()[0])
    text = "\n".join(part for line in lines for part in textwrap.wrap(line, width, subsequent_indent="    "))
    drawn.supxlabel(text, x=0.01, ha="left", fontsize=7, linespacing=1.4)
