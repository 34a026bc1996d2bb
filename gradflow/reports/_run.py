"""The report of a run, and what a notebook shows of it."""

import jax
import numpy as np

from gradflow._solution import Solution, Status
from gradflow.plot import solution
from gradflow.plot._solution import observed_arrays
from gradflow.reports._html import and_error, drawing, escape, inline_svg, number, page, pairs, section, table, versions
from gradflow.stores._installation import installation

MOST_OBSERVED = 64
"""Entries of observables that a report lists, at most."""

SETTINGS = ("method", "held fixed:", "observed")
"""Lines of `print(sol)` that are known before a run."""

NOTEBOOK = "text-align: left; white-space: normal; max-width: 60em;"


def run_page(sol: Solution) -> str:
    """The page of a run: what was run, the figure, first and last values with errors, how it ended, what it cost."""
    summary = dict(sol.describe())
    title = f"Run of {summary['run']}"
    ended = {name: summary[name] for name in ("status", "drift", "errors", "loss") if name in summary}
    return page(
        title,
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">gradflow; time: {escape(sol.time_unit or "t")}</p>',
        section("Figure", drawing(solution(sol), title)),
        section("Results", pairs(ended.items()), _observed(sol)),
        section("Runs that failed", _failures(sol)),
        section("Cost", pairs((name, number(np.sum(value))) for name, value in sol.stats.items())),
        section("Settings", pairs((name, summary[name]) for name in SETTINGS if name in summary)),
        # Of this process: a solution does not tell which one computed it.
        section("Versions that wrote this page", versions(installation())),
    )


def fragment(sol: Solution) -> str:
    """What a notebook shows of a run: what `print` does, as a table, and the figure if there is a curve in it.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> loss = lambda w: 0.5 * w**2
    >>> sol = gf.solve(gf.GradientFlow(loss), jnp.array(1.0), [0.0, 1.0], observe={"loss": loss})
    >>> gf.reports.fragment(sol) == sol._repr_html_(), "<svg" in sol._repr_html_()
    (True, True)
    """
    cell = f'style="{NOTEBOOK}"'
    rows = "\n".join(
        f"<tr><th {cell}>{escape(name)}</th><td {cell}>{escape(value)}</td></tr>" for name, value in sol.describe()
    )
    drawn = inline_svg(solution(sol)) if jax.tree_util.tree_leaves(sol.observed) else ""
    return f"<div><table>\n{rows}\n</table>\n{drawn}</div>"


def _observed(sol: Solution) -> str:
    """First and last values of observables, entry by entry; of a batch, by member."""
    lead = sol.reached.ndim - 1
    rows = []
    for name, values in observed_arrays(sol).items():
        error = np.asarray((sol.errors or {}).get(name, np.nan), float)
        lines = np.moveaxis(values, lead, -1)
        for index in np.ndindex(lines.shape[:-1]):
            seen = lines[index][np.isfinite(lines[index])]
            called = f"{name}[{', '.join(map(str, index))}]" if index else name
            error_of_member = error[index[:lead]] if error.ndim == lead else np.nan
            ends = (seen[0], seen[-1]) if seen.size else (np.nan, np.nan)
            rows.append((called, *(and_error(value, error_of_member) for value in ends)))
    more = f"<p>{len(rows) - MOST_OBSERVED} more entries are in the solution.</p>" if len(rows) > MOST_OBSERVED else ""
    return table(("observable", "first", "last"), rows[:MOST_OBSERVED], text=("observable",)) + more if rows else ""


def _failures(sol: Solution) -> str:
    codes, ends = np.atleast_1d(np.asarray(sol.code)), np.atleast_1d(np.asarray(sol.t_final, float))
    bad = [index for index in np.ndindex(codes.shape) if codes[index] > Status.STOPPED]
    rows = []
    for index in bad:
        status = Status(int(codes[index]))
        rows.append((", ".join(map(str, index)), status.label, number(ends[index]), status.remedy))
    names = ("member", "status", "until t", "what it means, and what helps")
    return f"<p>{len(bad) or 'None'} of {codes.size}.</p>" + (table(names, rows, text=names) if rows else "")
