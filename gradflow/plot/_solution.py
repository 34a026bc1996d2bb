"""The figure of a run: the loss and every observable over time."""

import math

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow._checks import check_count, fail, is_concrete
from gradflow._solution import DISCRETE, Solution
from gradflow.plot._curves import DOTS, beside, caption, draw_lines, scale_time, time_label
from gradflow.plot._style import STYLE, figure, shades

LOSSES = ("loss", "risk")
"""Names under which the loss is observed; it is drawn first."""

IN_CAPTION = ("method", "status", "drift", "errors", "steps")
"""Lines of `print(sol)` that stand below the figure."""


def solution(sol: Solution, *, columns: int = 3) -> Figure:
    """The loss and every observable of a run over flow time, with status, drift and cost below.

    One panel for each observable, and for each array of one that is a pytree; the entries of an array, and the members
    of a batch, are lines from light to dark, and of more than 64 lines median, quartiles and extremes are shown. Where
    the loss was not observed, its first and last value are. A band is an error that the run estimates; a dotted line is
    where a run ended before its last save time. Values over two decades get a logarithmic axis, and so do times.

    **Time unit**: that of the flow or the rule, on the axis. **Arguments**: `sol`: what `solve`, `iterate` or
    `infinite_width` returned, also a batch from `jax.vmap`. `columns`: panels in a row.

    **Returns** a matplotlib figure; see `save`. **Raises** `ValueError` for anything else, a run that is traced, and
    fewer than one column.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> loss = lambda w: 0.5 * jnp.sum(w**2)
    >>> observe = {"loss": loss, "weights": lambda w: w}
    >>> sol = gf.solve(gf.GradientFlow(loss), jnp.ones(2), [0.0, 0.5, 1.0], observe=observe)
    >>> drawn = gf.plot.solution(sol)
    >>> [ax.get_ylabel() for ax in drawn.axes], drawn.axes[0].get_xlabel()
    (['loss', 'weights'], 'flow time t = k * learning_rate')
    """
    check_solution("sol", sol)
    check_count("columns", columns)
    panels = _panels(sol)
    with matplotlib.rc_context(STYLE):
        across = min(columns, max(len(panels), 1))
        down = math.ceil(max(len(panels), 1) / across)
        drawn = figure(figsize=(max(3.3 * across, 5.0), 2.3 * down + 1.1))
        axes = np.ravel(drawn.subplots(down, across, squeeze=False))
        for ax, (name, values) in zip(axes, panels.items(), strict=False):
            _panel(ax, sol, name, values)
        if not panels:
            _ends(axes[0], sol)
        for ax in axes[max(len(panels), 1) :]:
            ax.set_axis_off()
        summary = dict(sol.describe())
        drawn.suptitle(summary["run"], fontsize=9)
        caption(drawn, [f"{name}: {summary[name]}" for name in IN_CAPTION if name in summary])
        return drawn


def check_solution(argument: str, sol: Solution) -> None:
    """Refuses what is no result of a run, or one that has not been computed yet."""
    if not isinstance(sol, Solution):
        must = "be what gradflow.solve or gradflow.iterate returned"
        raise fail(argument, must, f"of type {type(sol).__name__}", "The figure of a study: gradflow.plot.draw.")
    if not is_concrete(sol):
        raise fail(argument, "be concrete", "traced", "Draw it outside of jax.jit and jax.vmap.")


def observed_arrays(sol: Solution) -> dict[str, np.ndarray]:
    """Observables as arrays `(*batch, T, ...)`, each of a pytree by itself; the loss first, unreached rows NaN."""
    return {name: _reached_part(leaf, sol) for name, leaf in _leaves(sol).items()}


def _leaves(sol: Solution) -> dict[str, np.ndarray]:
    arrays = {}
    for name, value in sorted(sol.observed.items(), key=lambda item: item[0] not in LOSSES):
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            place = jax.tree_util.keystr(path, simple=True, separator="_")
            arrays[f"{name}_{place}" if place else name] = np.asarray(leaf)
    return arrays


def _reached_part(leaf: np.ndarray, sol: Solution) -> np.ndarray:
    reached = sol.reached.reshape(*sol.reached.shape, *(1,) * (leaf.ndim - sol.reached.ndim))
    return np.where(reached, leaf.astype(float), np.nan)


def _panels(sol: Solution) -> dict[str, np.ndarray]:
    """Lines `(lines, T)` of every panel: members outside, entries inside; of Booleans the share that is true."""
    lead = sol.reached.ndim
    arrays = {}
    for name, leaf in _leaves(sol).items():
        label, values, entries = name, _reached_part(leaf, sol), math.prod(leaf.shape[lead:])
        if leaf.dtype == bool and entries > 1:
            label, values = f"{name}: share of {entries}", values.mean(axis=tuple(range(lead, leaf.ndim)))
        rows = np.moveaxis(values, lead - 1, -1)
        if rows.size:
            arrays[label] = rows.reshape(-1, rows.shape[-1])
    return arrays


def _panel(ax: Axes, sol: Solution, name: str, rows: np.ndarray) -> None:
    ts = np.asarray(sol.ts, float)
    members = ts.reshape(-1, ts.shape[-1])
    dots = sol.method == DISCRETE and ts.shape[-1] <= DOTS
    style = {"marker": ".", "markersize": 3, "linestyle": "none"} if dots else {}
    if ts.shape[-1] == 1:
        style = {"marker": "o", "markersize": 3}
    draw_lines(ax, np.repeat(members, len(rows) // len(members), axis=0), rows, name, **style)
    error = (sol.errors or {}).get(name)
    if error is not None and len(rows) == 1:
        band = float(np.max(error))
        ax.fill_between(ts, rows[0] - band, rows[0] + band, color=shades(2)[1], alpha=0.25, linewidth=0)
    _axis_of_time(ax, sol)


def _axis_of_time(ax: Axes, sol: Solution) -> None:
    ts = np.asarray(sol.ts, float)
    ax.set_xlabel(time_label(sol.time_unit))
    scale_time(ax, ts.ravel())
    ended = np.unique(np.asarray(sol.t_final)[~sol.reached[..., -1]])
    for time in ended[ended > 0]:
        ax.axvline(float(time), color="black", linestyle=":", linewidth=0.8)


def _ends(ax: Axes, sol: Solution) -> None:
    """What is known of a loss that was not observed."""
    ax.set(xlabel=time_label(sol.time_unit), ylabel="loss")
    if sol.loss is None:
        ax.text(0.5, 0.5, "nothing was observed", ha="center", va="center", transform=ax.transAxes)
        return
    first, last = (np.ravel(np.asarray(value, float)) for value in sol.loss)
    for value in np.unique(first):
        ax.axhline(value, color=shades(2)[0], linestyle="--", linewidth=0.8, label="at the start")
    ax.plot(np.ravel(np.asarray(sol.t_final, float)), last, "s", color=shades(2)[1], markersize=4, label="at the end")
    ax.set_title("the loss was not observed: its two ends")
    ax.set_xlim(min(0.0, float(np.min(np.asarray(sol.ts)))), 1.05 * float(np.max(np.asarray(sol.t_final))) or 1.0)
    if np.all(first > 0) and np.all(last > 0) and max(first.max(), last.max()) > 100 * min(first.min(), last.min()):
        ax.set_yscale("log")
    handles, labels = ax.get_legend_handles_labels()
    beside(ax, dict(zip(labels, handles, strict=True)))
