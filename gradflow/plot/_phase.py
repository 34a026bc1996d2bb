"""The phase portrait of runs: two directions of the space of parameters."""

from collections.abc import Callable, Sequence

import jax
import matplotlib
import numpy as np
from jaxtyping import Array, Float, PyTree
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gradflow._checks import check_callable, check_count, fail
from gradflow._solution import DISCRETE, Solution, moving
from gradflow.plot._curves import caption, spans_decades
from gradflow.plot._legends import legend_below
from gradflow.plot._plane import Plane, loss_on, path_of, plane_of
from gradflow.plot._solution import check_solution
from gradflow.plot._style import STYLE, Colour, figure, shades

ROOM = 0.15
"""Of the width and height of the paths, what is left around them."""

LONGER = 5.0
"""Ratio of width and height of the paths up to which both axes have one scale."""

SLIM = 1.3
"""Ratio of width and height of axes of one scale, at most: what is slimmer is seen with more around it."""

LEVELS = 14
"""Levels of the loss."""


def phase(
    sols: Solution | Sequence[Solution],
    *,
    directions: tuple[PyTree, PyTree] | None = None,
    loss: Callable[[PyTree], Array] | None = None,
    labels: Sequence[str] | None = None,
    resolution: int = 41,
) -> Figure:
    """Paths of runs through two directions of the space of parameters: flows as lines, iterates of rules as dots.

    A path `theta(t)` is drawn at `(e1 . (theta - c), e2 . (theta - c))` with orthonormal `e1, e2`: the principal
    components of the saved parameters of all runs together and their mean `c`; or given directions, of which the first
    keeps its own, and the end of the first run. Two parameters are drawn as they are. A ring is the start of a run, a
    square its end; both axes have one scale, unless one is more than five times as long as the other. The caption says
    how far the paths leave the plane: the loss that is drawn is that on the plane, not along the paths.

    **Arguments**

    - `sols`: what `solve` or `iterate` returned with `save_params=True`, or a sequence of such, of one model.
    - `directions`: a pair of pytrees like the parameters, or of vectors `(size,)` of all that flow, leaf by leaf.
    - `loss`: function of the parameters; drawn as levels, at `resolution` points along each axis.
    - `labels`: one for each run; by default the names of flows and rules.

    **Returns** a matplotlib figure; see `save`. **Raises** `ValueError` for runs without saved parameters, batches,
    runs of different models, of fewer than two parameters, or at rest; for directions that span no plane, and a `loss`
    that is not a scalar.

    >>> import gradflow as gf, jax.numpy as jnp, numpy as np
    >>> problem = lambda w: 0.5 * (w[0] ** 2 + 10 * w[1] ** 2)
    >>> sol = gf.solve(gf.GradientFlow(problem), jnp.ones(2), np.linspace(0, 2, 21))
    >>> descent = gf.iterate(gf.GradientDescent(problem, 0.15), jnp.ones(2), 13, save_every=1)
    >>> ax = gf.plot.phase([sol, descent], loss=problem).axes[0]
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('first parameter', 'second parameter')
    """
    runs, names = check_runs(sols, labels)
    check_count("resolution", resolution, least=2)
    if loss is not None:
        check_callable("loss", loss, "loss(params) -> scalar")
    paths = [path_of(sol) for sol in runs]
    plane = plane_of(paths, directions, runs[0].held)
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(5.2, 4.6))
        ax = drawn.subplots()
        for sol, path, name, colour in zip(runs, paths, names, colours_of(runs), strict=True):
            draw_path(ax, sol, plane.coordinates(path), name, colour)
        frame(ax, plane)
        if loss is not None:
            _draw_loss(drawn, ax, plane, loss, runs[0], resolution)
        legend_below(ax, ncols=min(len(runs), 3))
        away = f"leave this plane by {100 * plane.far:.2g} % of their extent" if plane.far > 1e-12 else "lie in it"
        caption(drawn, [f"ring: start, square: end; the paths {away}"])
        return drawn


def check_runs(sols: Solution | Sequence[Solution], labels: Sequence[str] | None) -> tuple[list[Solution], list[str]]:
    """The runs and their names.

    **Raises** `ValueError` for what has no path in one space of parameters.
    """
    runs = [sols] if isinstance(sols, Solution) else list(sols)
    if not runs:
        raise fail("sols", "hold at least one run", "empty")
    for sol in runs:
        check_solution("sols", sol)
        if np.ndim(sol.code):
            advice = "Take a member of it: jax.tree_util.tree_map(lambda a: a[0], sol)."
            raise fail("sols", "be single runs", f"a batch of shape {np.shape(sol.code)}", advice)
        if sol.params is None:
            raise fail("sols", "hold parameters", "run with save_params=False", "Run with save_params=True.")
    shapes = [_shapes(sol) for sol in runs]
    if any(shape != shapes[0] for shape in shapes):
        raise fail("sols", "be runs of one model", "with parameters of different shapes")
    names = [sol.title for sol in runs] if labels is None else [str(label) for label in labels]
    if len(names) != len(runs):
        raise fail("labels", f"name each of {len(runs)} runs", f"of length {len(names)}")
    return runs, names


def _shapes(sol: Solution) -> list[tuple[str, tuple[int, ...]]]:
    leaves = jax.tree_util.tree_flatten_with_path(moving(sol.final, sol.held))[0]
    return [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in leaves]


def colours_of(runs: Sequence[Solution]) -> list[Colour]:
    """One colour a run, from light to dark; a single run is dark."""
    return shades(len(runs)) if len(runs) > 1 else shades(2)[1:]


def draw_path(ax: Axes, sol: Solution, path: Float[np.ndarray, "T 2"], name: str, colour: Colour) -> Line2D:
    """A path in the plane: iterates as dots, a flow as a line; its start as a ring, its end as a square."""
    (line,) = ax.plot(*path.T, color=colour, label=name, linestyle="-")
    if sol.method == DISCRETE:
        line.set(linestyle="none", marker=".", markersize=4)
    ax.plot(*path[:1].T, "o", color=colour, markersize=6, markerfacecolor="none")
    ax.plot(*path[-1:].T, "s", color=colour, markersize=4.5)
    return line


def frame(ax: Axes, plane: Plane) -> None:
    """Limits with room around what is drawn, one scale for both axes where that leaves a figure, and their names."""
    ax.set(xlabel=plane.names[0], ylabel=plane.names[1])
    bounds = ax.dataLim.intervalx, ax.dataLim.intervaly
    spans = [(1 + 2 * ROOM) * float(high - low) for low, high in bounds]
    if max(spans) <= LONGER * min(spans):
        spans = [max(span, max(spans) / SLIM) for span in spans]
        ax.set_aspect("equal", adjustable="box")
    middles = [float(low + high) / 2 for low, high in bounds]
    pairs = [(middle, span or 0.1 * max(abs(middle), 1.0)) for middle, span in zip(middles, spans, strict=True)]
    ax.set(**{f"{name}lim": (m - s / 2, m + s / 2) for name, (m, s) in zip("xy", pairs, strict=True)})


def _draw_loss(
    drawn: Figure, ax: Axes, plane: Plane, loss: Callable[[PyTree], Array], sol: Solution, resolution: int
) -> None:
    x, y = np.linspace(*ax.get_xlim(), resolution), np.linspace(*ax.get_ylim(), resolution)
    values = np.ma.masked_invalid(loss_on(plane, x, y, loss, sol))
    low, high = float(values.min()), float(values.max())
    if not low < high:  # flat, or nowhere finite
        return
    wide = spans_decades(np.asarray(values.compressed()))
    levels = np.geomspace(low, high, LEVELS) if wide else np.linspace(low, high, LEVELS)
    norm = LogNorm(low, high) if wide else None
    filled = ax.contourf(x, y, values, levels=levels, norm=norm, cmap="Greys", alpha=0.45, zorder=0)
    bar = drawn.colorbar(filled, cax=ax.inset_axes((1.03, 0, 0.04, 1)), label="loss on the plane")
    bar.set_ticks(list(levels[::3]), labels=[f"{level:.2g}" for level in levels[::3]])
    ax.grid(visible=False)
    ax.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
