"""Work against precision: what does an error cost, in gradients and in seconds, by which method?

A fixed set of flows: networks on digits, a deep linear network, an escape from a saddle, a matrix factorisation, the
equations of order parameters, a stiff quadratic. The error is `|y(T) - ref| / |ref - y(0)|`; that of the loss is
`|L - L_ref| / |L_ref|`. References are exact, or come from explicit Runge-Kutta methods at tight tolerances; their own
error is the difference of two of them. An evaluation of the gradient counts 1, and so does a Hessian-vector product
that is a difference of gradients; an exact one counts 2. Libraries that are not installed are skipped, by name.

    python benchmarks/work_precision.py [--quick] [--full] [--fine N] [--cases WORD ...] [--methods WORD ...]

`pip install -e ".[benchmarks]"` installs the other libraries; all of them from Python 3.12 on.
"""

import argparse
import dataclasses
import math
import pathlib
import time

import jax
import matplotlib
import numpy as np

jax.config.update("jax_enable_x64", True)

from support import cases, curves, methods, records  # noqa: E402

from gradflow import plot  # noqa: E402
from gradflow.plot._style import STYLE, figure, label_decades, shades  # noqa: E402

TARGETS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def measure_case(case, chosen, budget, store, limit):
    """Rows of one case: every method at every tolerance of its ladder, until one costs more than `limit` seconds."""
    began = time.perf_counter()
    best, trust = cases.reference(case, store)
    start = case.start
    distance = np.linalg.norm(best - start)
    loss = float(case.loss(best))
    about = {
        "case": case.name,
        "parameters": start.size,
        "reference error": trust,
        "loss": [float(case.loss(start)), loss],
    }
    print(f"\n{case.name}: {start.size} parameters, reference good to {trust:.0e}, {time.perf_counter() - began:.0f} s")
    rows = []
    for method in chosen:
        if not method.suits(case):
            continue
        left, before = list(method.ladder), math.nan
        while left:
            rtol = left.pop(0)
            outcome = run_safely(method, case, rtol, budget)
            row = {"case": case.name, "method": method.name, "rtol": rtol if math.isfinite(rtol) else None}
            row |= {"status": outcome.status, "gradients": outcome.gradients, "products": outcome.products}
            row |= {"equivalents": outcome.equivalents, "run": outcome.run, "compile": outcome.compiling}
            row |= {"error": math.nan, "loss error": math.nan}
            if outcome.status == "ok":
                row["error"] = float(np.linalg.norm(outcome.final - best) / distance)
                row["loss error"] = abs(float(case.loss(outcome.final)) - loss) / abs(loss)
            rows.append(row)
            print(line(row), flush=True)
            if outcome.run > limit if outcome.status == "ok" else rtol <= 1e-4:
                break  # a tighter tolerance costs as much or more, though loose ones fail where tight ones do not
            if outcome.run > 3 and abs(outcome.equivalents / before - 1) < 0.05:
                left = left[-1:]  # stability, not accuracy, sets the steps: the tightest tells the rest
            before = outcome.equivalents or math.nan
    return about, rows


def run_safely(method, case, rtol, budget):
    """A failure of one method is a result, not the end of the benchmark."""
    try:
        return method.run(case, rtol, budget)
    except Exception as error:
        return methods.Outcome(None, 0, status=f"{type(error).__name__}: {str(error).splitlines()[0][:60]}")


def line(row):
    rtol = f"{row['rtol']:.0e}" if row["rtol"] else ""
    cells = f"{row['method']:<30} {rtol:>6} {row['equivalents']:>8} {row['error']:>9.1e} {row['loss error']:>10.1e}"
    compiling = f"{row['compile']:>9.2f}" if row["compile"] is not None else " " * 9
    return f"{cells} {row['run']:>8.3f} {compiling}  {row['status'] if row['status'] != 'ok' else ''}".rstrip()


HEADER = f"{'method':<30} {'rtol':>6} {'grad-eq':>8} {'error':>9} {'loss error':>10} {'run s':>8} {'compile s':>9}"


def summarise(abouts, rows):
    """Case -> method -> cost at every target, whether it is a bound, and its ratio to the default's."""
    summary = []
    for about in abouts:
        mine = [row for row in rows if row["case"] == about["case"] and row["status"] == "ok"]
        names = list(dict.fromkeys(row["method"] for row in mine))
        costs = {}
        for name in names:
            points = [row for row in mine if row["method"] == name]
            x, y = [row["equivalents"] for row in points], [row["error"] for row in points]
            costs[name] = [curves.cost_at(target, x, y) for target in TARGETS]
        base = costs.get("default", [(math.nan, False)] * len(TARGETS))
        for name in names:
            entry = {"case": about["case"], "method": name}
            entry["equivalents"] = [cost if math.isfinite(cost) else None for cost, _ in costs[name]]
            entry["upper bound"] = [bound for _, bound in costs[name]]
            ratios = [cost / reference for (cost, _), (reference, _) in zip(costs[name], base, strict=True)]
            entry["ratio to default"] = [ratio if math.isfinite(ratio) else None for ratio in ratios]
            summary.append(entry)
    return summary


def table(summary):
    titles = [f"{f'at {target:.0e}':>16}" for target in TARGETS]
    lines = [f"{'gradient equivalents (ratio to default)':<40}" + "".join(titles)]
    case = None
    for entry in summary:
        if entry["case"] != case:
            case = entry["case"]
            lines += ["", case]
        cells = []
        for cost, bound, ratio in zip(
            entry["equivalents"], entry["upper bound"], entry["ratio to default"], strict=True
        ):
            text = "-" if cost is None else f"{'<' if bound else ''}{cost:,.0f}"
            cells.append(f"{text + (f' ({ratio:.2f})' if ratio is not None else ''):>16}")
        lines.append(f"  {entry['method']:<38}" + "".join(cells))
    lines.append("\n-: not reached; <: the cheapest run was already better by a factor of two")
    return "\n".join(lines)


def draw_case(ax, case, names, rows, x):
    """Error against `x`, one line per method."""
    others = [name for name in names if name != "default"]
    looks = dict(zip(others, zip(shades(len(others)), "osv^D<>pP*Xdh8H" * 3, strict=False), strict=True))
    looks["default"] = ("black", "o")
    for name in names:
        points = [row for row in rows if row["case"] == case and row["method"] == name and row["status"] == "ok"]
        points = [row for row in points if row[x] is not None and math.isfinite(row[x])]
        colour, marker = looks[name]
        style = {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 2.0 if name == "default" else 0.9}
        ax.loglog([row[x] for row in points], [row["error"] for row in points], label=name, **style)
    ax.set_ylabel("error / distance travelled")
    label_decades(ax)


def draw(abouts, rows, x, label):
    """One panel per case: error against `x`."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    columns = min(3, len(abouts))
    height = -(-len(abouts) // columns)
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(3.2 * columns, 2.5 * height + 0.3 + 0.17 * -(-len(names) // columns)))
        grid = drawn.subplots(height, columns, squeeze=False)
        for ax, about in zip(grid.flat, abouts, strict=False):
            draw_case(ax, about["case"], names, rows, x)
            ax.set(title=about["case"], xlabel=label)
        for ax in list(grid.flat)[len(abouts) :]:
            ax.set_visible(False)
        drawn.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)
        return drawn


def write(out, quick, abouts, rows, skipped, figures):
    summary = summarise(abouts, rows)
    record = {
        "benchmark": "work_precision",
        "quick": quick,
        "cases": abouts,
        "rows": rows,
        "summary": {"targets": TARGETS, "entries": summary},
        "skipped": skipped,
        "comparisons": [
            records.comparison(f"{entry['case']}, error {target:.0e}", entry["method"], ratio)
            for entry in summary
            for target, ratio in zip(TARGETS, entry["ratio to default"], strict=True)
            if target in (1e-2, 1e-5) and ratio is not None and entry["method"] != "default"
        ],
    }
    paths = [records.write(record, out)]
    for x, label in (("equivalents", "gradient equivalents"), ("run", "seconds")) if figures else ():
        paths.append(plot.save(draw(abouts, rows, x, label), out / f"work_precision_{x}.png"))
    return summary, paths


def refined(ladder, parts):
    """Tolerances between those of a ladder, evenly spaced in the logarithm."""
    steps = np.arange(parts * (len(ladder) - 1) + 1) / parts
    return tuple(float(10**x) for x in np.interp(steps, np.arange(len(ladder)), np.log10(ladder)))


def chosen_by(words, name):
    return not words or any(word.lower() in name.lower() for word in words)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="toy size, seconds")
    parser.add_argument("--full", action="store_true", help="also T = 20000, and every explicit method")
    parser.add_argument("--cases", nargs="*", default=[], help="words, of which the name of a case has one")
    parser.add_argument("--methods", nargs="*", default=[], help="likewise for methods; the default always runs")
    parser.add_argument("--fine", type=int, default=1, help="tolerances for every one of the usual ladders")
    parser.add_argument("--budget", type=int, help="gradient equivalents a run may cost")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds above which no tighter tolerance follows")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    arguments = parser.parse_args()
    budget = arguments.budget or (20_000 if arguments.quick else 600_000 if arguments.full else 70_000)

    steep = {}
    store = arguments.out / "references.npz"

    def steepness(case):
        if case.name not in steep:
            steep[case.name] = methods.sharpness(case, cases.reference(case, store)[0])
        return steep[case.name]

    chosen, skipped = methods.every_method(arguments.quick, arguments.full, steepness)
    chosen = [m for m in chosen if m.name == "default" or chosen_by(arguments.methods, m.name)]
    if arguments.fine > 1:
        chosen = [dataclasses.replace(m, ladder=refined(m.ladder, arguments.fine)) for m in chosen]
    if arguments.quick:
        chosen = [m for m in chosen if not any(word in m.name for word in ("GMRES", "Kvaerno5", "Dopri8"))]
        chosen = [dataclasses.replace(m, ladder=m.ladder[1:4:2] or m.ladder) for m in chosen]
        # Compiled once, for that takes long.
        once = [
            dataclasses.replace(m, suits=lambda case: case.exact is not None) for m in chosen if "Kvaerno" in m.name
        ]
        chosen = [m for m in chosen if "Kvaerno" not in m.name] + once
    for name, why in skipped.items():
        print(f"skipped: {name} ({why})")
    print(f"\n{HEADER}")
    abouts, rows = [], []
    for build in cases.every_case(arguments.quick, arguments.full):
        case = build()
        if not chosen_by(arguments.cases, case.name):
            continue
        about, new = measure_case(case, chosen, budget, store, arguments.limit)
        about["sharpness"] = steep.get(case.name)
        abouts.append(about)
        rows += new
        write(arguments.out, arguments.quick, abouts, rows, skipped, figures=False)
    if not abouts:
        raise SystemExit(f"no case has a name with one of {arguments.cases} in it")
    summary, paths = write(arguments.out, arguments.quick, abouts, rows, skipped, figures=True)
    print(f"\n{table(summary)}")
    print(f"\nwritten: {', '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
