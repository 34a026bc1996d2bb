"""Width infinity against finite networks: what the limit of two hidden layers costs, and how many neurons it is worth.

Tanh, inputs of two entries, 20 samples, to t = 5. The limit is refined to an accuracy of 1e-6, all of its runs counted,
against one network of width 512 at the tolerance 1e-6, and by gradient descent; in compiled form, compilation apart.
Costs: wall time, and multiplications, which are those of the entries between layers times evaluations of the field. The
deviation of networks of growing width from the limit gives a slope, and so the width at which a network drawn at random
is as accurate.

    python benchmarks/mean_field.py [--quick] [--out FOLDER]
"""

import statistics
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)

import matplotlib  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from support import curves, records  # noqa: E402

import gradflow as gf  # noqa: E402
from gradflow.models.nodes import GaussLegendre, Uniform  # noqa: E402

HORIZON = 5.0


def setting(samples=20):
    line = np.linspace(-1, 1, samples)
    problem = gf.EmpiricalRisk(np.stack([line, np.ones(samples)], axis=1), np.sin(np.pi * line), gf.losses.square)
    laws = {"first": Uniform(-2, 2), "middle": [Uniform(0, 2)], "output": Uniform(-1, 2)}
    return problem, gf.models.MeanFieldStart(2, **laws)


def run(problem, nodes, rtol):
    flow = gf.MeanFieldFlow(problem, nodes.weights)
    options = {"observe": {"g": flow.predictions}, "save_params": False, "solver": gf.solvers.Dopri8()}
    return gf.solve(flow, nodes.net, [HORIZON / 2, HORIZON], rtol=rtol, **options)


def timed(go, repeats):
    """Median run time, compile time, and the result."""
    spans = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        result = jax.block_until_ready(go())
        spans.append(time.perf_counter() - began)
    median = statistics.median(spans[1:])
    return result, {"run": median, "compile": spans[0] - median}


def products(nodes, sol):
    """Entries between the layers times evaluations: what everything costs, up to the factor of samples."""
    n, m = nodes.net.widths
    return n * m * int(sol.stats["gradient_evaluations"])


def measure(quick):
    problem, start = setting()
    repeats = 1 if quick else 5
    levels = (8, 12) if quick else (12, 18, 27)
    limit, before, rows, total = None, None, [], {"run": 0.0, "compile": 0.0, "products": 0}
    for n in levels:
        nodes = start.nodes(GaussLegendre(n))
        sol, wall = timed(lambda nodes=nodes: run(problem, nodes, 1e-8), repeats)
        limit, before = np.asarray(sol.observed["g"]), limit
        cost = products(nodes, sol)
        total = {"run": total["run"] + wall["run"], "compile": total["compile"] + wall["compile"]} | {
            "products": total["products"] + cost
        }
        gap = np.nan if before is None else float(np.max(np.abs(limit - before)))
        rows.append({"what": f"{nodes.net.widths[0]} x {n} nodes", "gap": gap, "products": cost, **wall})
        if gap <= 1e-6:
            break
    rows.append({"what": "the limit, all of these", "gap": rows[-1]["gap"], **total})
    width = 64 if quick else 512
    nodes = start.draw(width, jax.random.key(0))
    sol, wall = timed(lambda: run(problem, nodes, 1e-6), repeats)
    off = float(np.max(np.abs(np.asarray(sol.observed["g"]) - limit)))
    rows.append({"what": f"a network of width {width}", "gap": off, "products": products(nodes, sol), **wall})
    rows.append(descent(problem, nodes, limit, repeats))
    return limit, rows


def descent(problem, nodes, limit, repeats, steps=50):
    """The same network by gradient descent: every layer at its own rate, which makes it Euler's method on the flow."""
    flow = gf.MeanFieldFlow(problem, nodes.weights)
    moving, frozen = eqx.partition(nodes.net, eqx.is_inexact_array)
    dt = HORIZON / steps

    @jax.jit
    def go(state):
        def step(state, _):
            rate = flow.vector_field(jnp.zeros(()), state, frozen)
            state = jax.tree_util.tree_map(lambda w, r: w + dt * r, state, rate)
            return state, flow.predictions(eqx.combine(flow.params(state), frozen))

        return jax.lax.scan(step, state, length=steps)[1]

    path, wall = timed(lambda: go(flow.init(moving, frozen)), repeats)
    off = float(jnp.max(jnp.abs(path[jnp.asarray([steps // 2 - 1, steps - 1])] - limit)))
    n, m = nodes.net.widths
    return {"what": f"  by gradient descent, {steps} steps", "gap": off, "products": n * m * steps, **wall}


def deviations(limit, quick):
    """Root mean square over seeds of the largest deviation."""
    problem, start = setting()
    widths, seeds = ((8, 16), 6) if quick else ((16, 32, 64, 128, 256), 24)
    rows = []
    for width in widths:
        off = []
        for seed in range(seeds):
            sol = run(problem, start.draw(width, jax.random.key(seed)), 1e-5)
            off.append(float(np.max(np.abs(np.asarray(sol.observed["g"]) - limit))))
        rows.append(float(np.sqrt(np.mean(np.square(off)))))
    return {"widths": list(widths), "deviations": rows, "slope": curves.slope(widths, rows)}


def table(rows, random, worth):
    lines = [f"{'what':<28} {'gap':>9} {'products':>11} {'run s':>9} {'compile s':>10}"]
    for row in rows:
        lines.append(
            f"{row['what']:<28} {row['gap']:9.1e} {row['products']:11.2e} {row['run']:9.4f} {row['compile']:10.2f}"
        )
    lines.append("gap: to the rule before, which bounds the error of the limit; of the network, to the limit")
    lines.append(f"deviation of networks: slope {random['slope']:+.3f} in the width")
    lines.append(f"a network drawn at random as accurate as the limit has {worth:.1e} neurons in each layer")
    return "\n".join(lines)


def draw(random, gap, worth, target):
    with matplotlib.rc_context({"font.size": 8, "figure.constrained_layout.use": True}):
        figure = Figure(figsize=(4.2, 3))
        ax = figure.subplots()
        ax.loglog(random["widths"], random["deviations"], "o", label=f"networks: slope {random['slope']:+.2f}")
        line = np.array([random["widths"][-1], worth])
        ax.loglog(line, [random["deviations"][-1], gap], "--", color="0.5", label="extrapolated")
        ax.axhline(gap, color="black", label="width infinity, by its estimate")
        ax.set(xlabel="width", ylabel="largest deviation", title="neurons that width infinity is worth")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
        figure.savefig(target, dpi=160)


def main():
    arguments = records.arguments(__doc__)
    limit, rows = measure(arguments.quick)
    random = deviations(limit, arguments.quick)
    gap = rows[-3]["gap"]
    # By the slope measured, or -1/2 where that is steeper, which makes for fewer neurons.
    power = min(random["slope"], -0.5)
    worth = random["widths"][-1] * (random["deviations"][-1] / gap) ** (-1 / power)
    print(table(rows, random, worth))
    record = {"benchmark": "mean_field", "quick": arguments.quick, "rows": rows, "random": random, "worth": worth}
    ours, *others = rows[-3:]
    what = f"two hidden layers at width infinity, to {gap:.0e}"
    record["comparisons"] = [
        records.comparison(what, f"{other['what'].strip()}, off by {other['gap']:.0e}", other[name] / ours[name], of)
        for other in others
        for name, of in (("products", "products"), ("run", "seconds"))
    ]
    target = records.write(record, arguments.out)
    draw(random, gap, worth, arguments.out / "mean_field.png")
    print(f"\nwritten: {target}, {arguments.out / 'mean_field.png'}")


if __name__ == "__main__":
    main()
