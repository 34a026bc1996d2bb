"""How does the cost of a flow grow: with its length, the width of the network, the data, the tolerance?

The default solver on networks with tanh and square loss on handwritten digits; cost in gradient equivalents (an exact
Hessian-vector product counts 2). Beside it stands the cost of gradient descent at a learning rate of 1 / sharpness,
which takes `sharpness * T` steps for the time `T`, without regard to the error. The sharpness is the larger of those at
both ends. Slopes are least-squares fits on logarithms.

    python benchmarks/scaling.py [--quick] [--rtol RTOL] [--axes AXIS ...] [--budget GRADIENTS] [--out FOLDER]
"""

import argparse
import math
import pathlib

import jax
import matplotlib
import numpy as np

jax.config.update("jax_enable_x64", True)

from support import cases, curves, methods, records  # noqa: E402

from gradflow import plot  # noqa: E402
from gradflow.plot._style import STYLE, figure, label_decades  # noqa: E402

AXES = {
    "horizon": {"values": (200.0, 632.0, 2000.0, 6325.0, 20000.0), "fixed": {"samples": 100, "width": 64}},
    "width": {"values": (16, 32, 64, 128, 256), "fixed": {"samples": 500, "horizon": 200.0}},
    "samples": {"values": (50, 100, 200, 400, 800, 1600), "fixed": {"width": 64, "horizon": 200.0}},
    "rtol": {"values": methods.LADDER, "fixed": {"samples": 500, "width": 64, "horizon": 200.0}},
}
TOY = {
    "horizon": {"values": (5.0, 20.0), "fixed": {"samples": 40, "width": 8}},
    "width": {"values": (4, 8), "fixed": {"samples": 40, "horizon": 5.0}},
    "samples": {"values": (20, 40), "fixed": {"width": 8, "horizon": 5.0}},
    "rtol": {"values": (1e-3, 1e-5), "fixed": {"samples": 40, "width": 8, "horizon": 5.0, "smooth": False}},
}
TITLES = {"horizon": "sharpness x T", "width": "width", "samples": "samples", "rtol": "tolerance"}


def measure(axis, plan, rtol, budget, store):
    """Rows of one axis; the error is measured along the axis of tolerances, where the problem stays the same."""
    rows = []
    run = methods.ours(lambda: None, fresh=False)
    fixed = ", ".join(f"{name} = {value:g}" for name, value in plan["fixed"].items() if name != "smooth")
    print(f"\n{axis}, with {fixed}\n{HEADER}")
    for value in plan["values"]:
        varied = {} if axis == "rtol" else {axis: value}
        case = cases.network(**{**plan["fixed"], **varied})
        outcome = run(case, value if axis == "rtol" else rtol, budget)
        best = cases.reference(case, store)[0] if axis == "rtol" else outcome.final
        steep = methods.sharpness(case, best)
        row = {"axis": axis, "value": value, "status": outcome.status, "parameters": case.start.size}
        row |= {"sharpness": steep, "sharpness x T": steep * case.horizon, "gradients": outcome.gradients}
        row |= {"products": outcome.products, "equivalents": outcome.equivalents, "run": outcome.run}
        row |= {"compile": outcome.compiling, "error": math.nan}
        if axis == "rtol":
            row["error"] = float(np.linalg.norm(outcome.final - best) / np.linalg.norm(best - case.start))
        rows.append(row)
        print(line(row), flush=True)
    return rows


HEADER = (
    f"{'value':>9} {'sharpness':>9} {'sharp. x T':>10} {'grad-eq':>9} {'descent / flow':>14} {'run s':>8} "
    f"{'compile s':>9} {'error':>9}"
)


def line(row):
    cells = f"{row['value']:9.4g} {row['sharpness']:9.2f} {row['sharpness x T']:10.0f} {row['equivalents']:9d}"
    error = f"{row['error']:9.1e}" if math.isfinite(row["error"]) else ""
    ratio = f"{row['sharpness x T'] / row['equivalents']:14.2f}" if row["status"] == "ok" else ""
    cells += f" {ratio:>14} {row['run']:8.3f} {row['compile']:9.2f} {error}"
    return cells.rstrip() + (f"  {row['status']}" if row["status"] != "ok" else "")


def abscissa(axis, row):
    return row["sharpness x T"] if axis == "horizon" else row["value"]


def fits(rows):
    """Axis -> power of the cost, over the runs that reached their end."""
    exponents = {}
    for axis in dict.fromkeys(row["axis"] for row in rows):
        mine = [row for row in rows if row["axis"] == axis and row["status"] == "ok"]
        if len(mine) > 1:
            exponents[axis] = curves.slope([abscissa(axis, row) for row in mine], [row["equivalents"] for row in mine])
    return exponents


def draw(rows, slopes):
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(2.5 * len(axes), 2.6))
        for ax, axis in zip(drawn.subplots(1, len(axes), squeeze=False).flat, axes, strict=True):
            mine = [row for row in rows if row["axis"] == axis and row["status"] == "ok"]
            x = [abscissa(axis, row) for row in mine]
            label = f"flow, slope {slopes[axis]:.2f}" if axis in slopes else "flow"
            ax.loglog(x, [row["equivalents"] for row in mine], "o-", color="black", markersize=3.5, label=label)
            descent = [row["sharpness x T"] for row in mine]
            ax.loglog(x, descent, "s--", color="0.55", markersize=3.5, label="descent, 1 / sharpness")
            ax.set(xlabel=TITLES[axis], ylabel="gradient equivalents" if axis == axes[0] else "")
            low, high = ax.get_ylim()
            ax.set_ylim(low / 1.5, high * 3)  # room for the legend
            label_decades(ax)
            if axis in ("width", "samples"):
                ax.set_xticks(x, [f"{value:g}" for value in x])
                ax.minorticks_off()
            ax.legend(loc="upper left")
        return drawn


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="toy size, seconds")
    parser.add_argument("--rtol", type=float, default=1e-4, help="tolerance along all axes but its own")
    parser.add_argument("--axes", nargs="*", choices=list(AXES), default=list(AXES))
    parser.add_argument("--budget", type=int, default=700_000, help="gradient equivalents a run may cost")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    arguments = parser.parse_args()
    plans = TOY if arguments.quick else AXES
    rows = []
    for axis in arguments.axes:
        rows += measure(axis, plans[axis], arguments.rtol, arguments.budget, arguments.out / "references.npz")
    slopes = fits(rows)
    print("\ncost grows like " + ", ".join(f"({TITLES[axis]})^{power:.2f}" for axis, power in slopes.items()))
    record = {"benchmark": "scaling", "quick": arguments.quick, "rtol": arguments.rtol, "rows": rows, "slopes": slopes}
    record["comparisons"] = [
        records.comparison(
            f"tanh network, sharpness x t = {row['sharpness x T']:.0f}, rtol {arguments.rtol:.0e}",
            "gradient descent, 1 / sharpness",
            row["sharpness x T"] / row["equivalents"],
        )
        for row in rows
        if row["axis"] == "horizon" and row["status"] == "ok"
    ]
    target = records.write(record, arguments.out)
    path = plot.save(draw(rows, slopes), arguments.out / "scaling.png")
    print(f"\nwritten: {target}, {path}")


if __name__ == "__main__":
    main()
