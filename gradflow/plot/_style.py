"""What all figures share: sizes, colours that stay apart in grey, and how they are written."""

import os
import pathlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}


Colour = tuple[float, float, float, float]
"""Red, green, blue and opacity."""


def shades(count: int) -> list[Colour]:
    """Colours from light to dark in one order, so that a figure printed in grey keeps its meaning."""
    import matplotlib

    palette = matplotlib.colormaps["viridis_r"]
    return [palette(0.15 + 0.85 * i / max(count - 1, 1)) for i in range(count)]


def label_decades(ax: Axes) -> None:
    """Ticks of logarithmic axes with labels that do not run into one another, however short the axis is."""
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        if high < 100 * low:
            # Over less than a factor of five, three marks in a decade may leave a single one on the axis.
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(4))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def figure(figsize: tuple[float, float]) -> Figure:
    """A figure that belongs to no window: nothing global is opened or kept."""
    return Figure(figsize=figsize)


def save(drawn: Figure, path: str | os.PathLike[str]) -> pathlib.Path:
    """Writes a figure; the ending of the path decides on the format.

    Folders that the path names are made. **Returns** the path.

    >>> import gradflow as gf, pathlib, tempfile
    >>> from gradflow import plot
    >>> rule = gf.GradientDescent(lambda w: 0.5 * w**2, learning_rate=0.1)
    >>> ds = gf.compare(rule, gf.models.DiagonalLinear(1).u[0], [0.2, 0.1], 1.0, rtol=1e-5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot.save(plot.compare(ds), pathlib.Path(folder) / "gap.png").name
    'gap.png'
    """
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(target)
    return target
