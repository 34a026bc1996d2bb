"""Runs as they go: paths through parameter space and curves over time, as an animated GIF or a page of HTML."""

import base64
import io
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import PyTree
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gradflow._checks import check_count, check_positive, fail
from gradflow._solution import Solution
from gradflow.plot._curves import scale_time, spans_decades, time_label
from gradflow.plot._phase import check_runs, colours_of, draw_path, frame
from gradflow.plot._plane import path_of, plane_of
from gradflow.plot._solution import observed_arrays
from gradflow.plot._style import STYLE, Colour, figure

DPI = 90
"""Pixels per inch of a frame."""

BEHIND = 0.25
"""Opacity of the whole path, on which a run advances."""

KINDS = (".gif", ".html")


class _Growing(NamedTuple):
    """A line of which a part is shown: all rows up to a time."""

    line: Line2D
    ts: np.ndarray
    points: np.ndarray


def animate(
    sols: Solution | Sequence[Solution],
    path: str | os.PathLike[str],
    *,
    directions: tuple[PyTree, PyTree] | None = None,
    labels: Sequence[str] | None = None,
    frames: int = 60,
    seconds: float = 6.0,
) -> pathlib.Path:
    """Writes runs as they go, on one clock: their paths as in `gradflow.plot.phase`, and their first scalar observable.

    Frames follow the save times of the first run, so that times in a geometric progression are shown at one pace. The
    ending of the path decides on the format: an animated GIF, or a page of HTML that holds its frames and a slider.

    **Time unit**: that of the flows and rules, in the title of every frame.

    **Arguments**

    - `sols`, `directions`, `labels`: as for `gradflow.plot.phase`. Runs have to share what they are drawn by: a scalar
      observable of one name, loss first, is drawn beside the paths if there is one.
    - `path`: where to write, `.gif` or `.html`. `frames`: at most as many. `seconds`: how long all of them take.

    **Returns** the path. **Raises** `ValueError` for another ending, and for what `gradflow.plot.phase` refuses.

    >>> import gradflow as gf, jax.numpy as jnp, numpy as np, pathlib, tempfile
    >>> problem = lambda w: 0.5 * (w[0] ** 2 + 10 * w[1] ** 2)
    >>> ts = np.linspace(0, 2, 5)
    >>> sol = gf.solve(gf.GradientFlow(problem), jnp.ones(2), ts, observe={"loss": problem})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     gf.animate(sol, pathlib.Path(folder) / "flow.gif").name
    'flow.gif'
    """
    target = pathlib.Path(path)
    if target.suffix.lower() not in KINDS:
        raise fail("path", f"end with {' or '.join(KINDS)}", repr(str(target)))
    check_count("frames", frames)
    check_positive("seconds", seconds)
    runs, names = check_runs(sols, labels)
    times = np.asarray(runs[0].ts, float)[runs[0].reached]
    times = times[np.unique(np.linspace(0, len(times) - 1, frames).astype(int))]
    with matplotlib.rc_context(STYLE):
        drawn, growing = _stage(runs, names, directions)
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")  # every frame keeps the places of the first
        target.parent.mkdir(parents=True, exist_ok=True)
        show = _shower(drawn, growing, runs[0].time_unit)
        write = _write_gif if target.suffix.lower() == ".gif" else _write_html
        write(drawn, show, times, seconds, target)
    return target


def _stage(
    runs: Sequence[Solution], names: Sequence[str], directions: tuple[PyTree, PyTree] | None
) -> tuple[Figure, list[_Growing]]:
    """The figure with all paths pale, and the lines that grow on them."""
    paths = [path_of(sol) for sol in runs]
    plane, curve = plane_of(paths, directions, runs[0].held), _common_curve(runs)
    drawn = figure(figsize=(8.4 if curve else 4.8, 4.2))
    axes = np.ravel(drawn.subplots(1, 2 if curve else 1, squeeze=False))
    growing: list[_Growing] = []
    for i, (sol, colour) in enumerate(zip(runs, colours_of(runs), strict=True)):
        ts = np.asarray(sol.ts, float)[sol.reached]
        growing += _on(axes[0], sol, ts, plane.coordinates(paths[i]), names[i], colour)
        if curve:
            values = observed_arrays(sol)[curve][sol.reached]
            growing += _on(axes[1], sol, ts, np.stack([ts, values], axis=1), "", colour)
    frame(axes[0], plane)
    if curve:
        _label_curve(axes[1], curve, runs)
    drawn.suptitle(" ", fontsize=9)
    drawn.legend(handles=[each.line for each in growing if each.line.axes is axes[0]], loc="outside lower center")
    return drawn, growing


def _on(ax: Axes, sol: Solution, ts: np.ndarray, points: np.ndarray, name: str, colour: Colour) -> list[_Growing]:
    before = len(ax.lines)
    draw_path(ax, sol, points, "_whole", colour)
    for line in ax.lines[before:]:
        line.set_alpha(BEHIND)
    line = draw_path(ax, sol, points, name, colour)
    for mark in ax.lines[-2:]:
        mark.remove()
    return [_Growing(line, ts, points)]


def _common_curve(runs: Sequence[Solution]) -> str | None:
    """The first scalar observable that all runs have."""
    names_of_runs = [[name for name, values in observed_arrays(sol).items() if values.ndim == 1] for sol in runs]
    return next((name for name in names_of_runs[0] if all(name in names for names in names_of_runs)), None)


def _label_curve(ax: Axes, curve: str, runs: Sequence[Solution]) -> None:
    units = {sol.time_unit for sol in runs}
    ax.set(xlabel=time_label(units.pop() if len(units) == 1 else ""), ylabel=curve)
    scale_time(ax, np.asarray(runs[0].ts, float))
    if spans_decades(np.concatenate([observed_arrays(sol)[curve] for sol in runs])):
        ax.set_yscale("log")


def _shower(drawn: Figure, growing: Sequence[_Growing], unit: str) -> Callable[[float], None]:
    unit_text = f" ({unit})" if unit else ""

    def show(time: float) -> None:
        for line, ts, points in growing:
            line.set_data(*points[: np.searchsorted(ts, time, side="right")].T)
        drawn.suptitle(f"$t$ = {time:.4g}{unit_text}", fontsize=9)

    return show


def _write_gif(
    drawn: Figure, show: Callable[[float], None], times: np.ndarray, seconds: float, target: pathlib.Path
) -> None:
    fps: Any = len(times) / seconds  # any number will do, whatever the annotation says
    writer = PillowWriter(fps=fps)
    with writer.saving(drawn, str(target), DPI):
        for time in times:
            show(float(time))
            writer.grab_frame()


def _write_html(
    drawn: Figure, show: Callable[[float], None], times: np.ndarray, seconds: float, target: pathlib.Path
) -> None:
    images = []
    for time in times:
        show(float(time))
        image = io.BytesIO()
        drawn.savefig(image, format="webp", dpi=DPI, pil_kwargs={"lossless": True})
        images.append(base64.b64encode(image.getvalue()).decode())
    listed = ",\n".join(f'"data:image/webp;base64,{image}"' for image in images)
    target.write_text(PAGE % {"frames": listed, "delay": round(1000 * seconds / len(times))}, encoding="utf-8")


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gradflow: animation</title>
<style>
body { margin: 1rem auto; max-width: 60rem; font: 1rem/1.5 system-ui, sans-serif; color-scheme: light dark; }
img { width: 100%%; background: white; }
div { display: flex; gap: 0.75rem; align-items: center; }
input { flex: 1; }
</style>
</head>
<body>
<img id="frame" alt="runs over time">
<div><button id="play">pause</button><input id="at" type="range" min="0" value="0" aria-label="frame"></div>
<script>
const frames = [%(frames)s];
const [image, play, at] = ["frame", "play", "at"].map(id => document.getElementById(id));
let running = true;
at.max = frames.length - 1;
function show(i) { at.value = i; image.src = frames[i]; }
function pause() { running = false; play.textContent = "play"; }
at.oninput = () => { pause(); show(+at.value); };
play.onclick = () => { if (running) pause(); else { running = true; play.textContent = "pause"; } };
setInterval(() => { if (running) show((+at.value + 1) %% frames.length); }, %(delay)d);
show(0);
</script>
</body>
</html>
"""
