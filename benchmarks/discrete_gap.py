"""Gradient descent against gradient flow on digits: what does an accuracy cost, in gradients?

An MLP 64-64-64-10 with tanh and square loss on 500 digits. Gradient descent runs at learning rates from 1.8 / sharpness
down; the flow runs at tolerances from 1e-2 down; the reference is the flow at 1e-10. Errors are distances between
parameters, the largest over the run, divided by the distance travelled. Ratios of gradient evaluations are
independent of the machine; wall times are medians of three runs after one that compiles.

    python benchmarks/discrete_gap.py [--quick] [--out FOLDER]
"""

import statistics
import time

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

from support import records  # noqa: E402

import gradflow as gf  # noqa: E402
from gradflow import plot, studies  # noqa: E402


def timed(run, fresh, repeats=3):
    """Median run time in seconds; with `fresh`, compile time as well, from caches emptied first."""
    if fresh:
        jax.clear_caches()
    spans = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(run().final)
        spans.append(time.perf_counter() - began)
    median = statistics.median(spans[1:])
    return {"run": median} | ({"compile": spans[0] - median} if fresh else {})


def measure(quick):
    size = {"width": 16, "depth": 1, "horizon": 5.0, "rates": 3} if quick else {"rates": 7}
    samples = 100 if quick else 500
    dataset = gf.data.digits(n=samples, centre=True, labels="onehot")
    ds = studies.discrete_gap(dataset, **size, rtol=1e-10, progress=False)

    width, depth, horizon = int(ds.attrs["width"]), int(ds.attrs["depth"]), float(ds.attrs["horizon"])
    problem = gf.EmpiricalRisk(*dataset, gf.losses.square)
    model = gf.models.MLP(dataset.x.shape[1], width, 10, depth=depth, key=jax.random.key(0))
    flow = gf.GradientFlow(problem)
    rows = []
    for rate, gap, cost in zip(ds.learning_rate.values, ds.gap.values[:, 0], ds.steps.values, strict=True):
        rule = gf.GradientDescent(problem, float(rate))
        wall = timed(lambda rule=rule, cost=cost: gf.iterate(rule, model, int(cost)), fresh=not rows)
        rows.append({"method": f"gradient descent, rate {rate:.3g}", "error": gap, "gradients": int(cost), **wall})
    for rtol, error, cost in zip(
        ds.flow_rtol.values, ds.flow_error.values, ds.loose_flow_gradient_evaluations.values, strict=True
    ):
        first = rtol == ds.flow_rtol.values[0]
        wall = timed(lambda rtol=rtol: gf.solve(flow, model, np.linspace(0, horizon, 51), rtol=float(rtol)), first)
        rows.append({"method": f"flow, rtol {rtol:.0e}", "error": error, "gradients": int(cost), **wall})
        rows[-1]["descent steps to match"] = studies.steps_to_match(ds, float(error))
    return ds, rows


def table(rows):
    lines = [f"{'method':<32} {'error':>9} {'gradients':>10} {'run s':>8} {'compile s':>10} {'descent / flow':>15}"]
    for row in rows:
        cells = [f"{row['method']:<32} {row['error']:9.1e} {row['gradients']:10d} {row['run']:8.3f}"]
        cells.append(f"{row['compile']:10.2f}" if "compile" in row else " " * 10)
        if "descent steps to match" in row:
            cells.append(f"{row['descent steps to match'] / row['gradients']:15.1f}")
        lines.append(" ".join(cells))
    lines.append(
        "descent / flow: gradients that descent needs for the flow's error, by its measured order, over the flow's"
    )
    return "\n".join(lines)


def main():
    arguments = records.arguments(__doc__)
    ds, rows = measure(arguments.quick)
    print(table(rows))
    record = {
        "benchmark": "discrete_gap",
        "quick": arguments.quick,
        "sharpness": [float(ds.sharpness[0]), float(ds.sharpness[-1])],
        "measured order": float(ds.order[0]),
        "rows": rows,
        "comparisons": [
            records.comparison(
                f"tanh network, t = {ds.attrs['horizon']:g}, error {row['error']:.0e}",
                "gradient descent",
                row["descent steps to match"] / row["gradients"],
            )
            for row in rows
            if "descent steps to match" in row
        ],
    }
    target = records.write(record, arguments.out)
    figure = plot.save(plot.draw(ds), arguments.out / "discrete_gap.png")
    print(f"\nwritten: {target}, {figure}")


if __name__ == "__main__":
    main()
