"""Momentum flows beside the methods they describe: what does the flow cost, over the horizon of the discrete run?

Heavy ball, Nesterov's method and gradient descent run for a fixed number of steps on a quadratic whose eigenvalues span
four decades, all modes excited alike (the hardest case: no mode is small), and on a tanh network on digits; step sizes
from the largest at which theory knows the methods to be stable down. The flows run to the same time at several
tolerances. Errors are distances between parameters, the largest over the run, over the distance travelled; the
reference is the flow at 1e-11.

    python benchmarks/momentum.py [--quick] [--out FOLDER]
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

jax.config.update("jax_enable_x64", True)

from support import curves, records  # noqa: E402

import gradflow as gf  # noqa: E402
from gradflow import plot  # noqa: E402
from gradflow.plot._momentum import LABELS  # noqa: E402
from gradflow.plot._style import STYLE, figure, label_decades, shades  # noqa: E402
from gradflow.studies._compare import run_distance  # noqa: E402

METHODS = {
    "heavy_ball": (lambda problem, s, mu: gf.HeavyBall(problem, s, mu=mu), gf.HeavyBallFlow),
    "nesterov": (lambda problem, s, mu: gf.Nesterov(problem, s, mu=mu), gf.NesterovFlow),
    "gradient_descent": (
        lambda problem, s, mu: gf.GradientDescent(problem, s),
        lambda problem, mu, s: gf.GradientFlow(problem),
    ),
}
CONDITION = 1e-3
"""The methods' strong-convexity parameter over the sharpness."""


class Quadratic(eqx.Module):
    """`sum_i h_i w_i^2 / 2`."""

    h: jax.Array

    def __call__(self, w):
        return 0.5 * jnp.sum(self.h * w**2)


def cases(quick):
    """Name -> problem, start and sharpness at the start."""
    problems = {"quadratic": (Quadratic(jnp.geomspace(1e-4, 1, 40)), jnp.ones(40), 1.0)}
    if not quick:
        problem = gf.EmpiricalRisk(*gf.data.digits(n=100, centre=True, labels="onehot"), gf.losses.square)
        model = gf.models.MLP(64, 32, 10, key=jax.random.key(0))
        problems["tanh net, digits"] = (problem, model, float(gf.observables.Sharpness(problem)(model)))
    return problems


def limits(sharpness, mu):
    """The largest stable step of each method, a little below: `s` enters the coefficient too, so by bisection."""
    bounds = {}
    for method in ("heavy_ball", "nesterov"):
        low, high = 1 / sharpness, 4 / sharpness
        for _ in range(60):
            s = 0.5 * (low + high)
            beta = (1 - np.sqrt(mu * s)) / (1 + np.sqrt(mu * s))
            stable = s < gf.theory.stable_step(sharpness, beta, method)
            low, high = (s, high) if stable else (low, s)
        bounds[method] = 0.95 * low
    return bounds | {"gradient_descent": 0.95 * 2 / sharpness}


def measure(quick):
    rows = []
    steps = 40 if quick else 200
    solvers = {"default": None} | ({} if quick else {name: getattr(gf.solvers, name)() for name in ("Bosh3", "Dopri8")})
    for case, (problem, start, sharpness) in cases(quick).items():
        mu = CONDITION * sharpness
        limit = limits(sharpness, mu)
        for name, (rule, flow) in METHODS.items():
            largest = limit[name] * sharpness
            sizes = (1.0,) if quick else (largest, *(size for size in (2.0, 1.0, 0.5, 0.1, 0.01) if size < largest))
            for size in sizes:
                s = size / sharpness
                method = rule(problem, s, mu)
                ts = np.linspace(0, float(method.time(jnp.asarray(steps))), 21)
                field = flow(problem, mu, s)
                exact = gf.solve(field, start, ts, rtol=1e-11, solver=gf.solvers.Dopri8())
                discrete = gf.iterate(method, start, steps, save_every=steps // 20, throw=False)
                distance, travelled = run_distance(discrete.params, exact.params)
                row = {"case": case, "method": name, "s sharpness": size, "steps": steps, "status": discrete.status}
                row["gap"] = float(jnp.max(distance) / travelled)
                for solver, chosen in solvers.items():
                    costs, errors = [], []
                    for rtol in (1e-2, 1e-3, 1e-4) if quick else (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6):
                        run = gf.solve(field, start, ts, rtol=rtol, solver=chosen, throw=False)
                        away, length = run_distance(run.params, exact.params)
                        costs.append(int(run.stats["gradient_evaluations"]))
                        errors.append(float(jnp.max(away) / length))
                    row[solver] = {"gradients": costs, "errors": errors}
                    row[solver] |= {f"{e:.0e}": curves.cost_at(e, costs, errors)[0] / steps for e in (1e-2, 1e-3, 1e-5)}
                rows.append(row)
    return rows


def table(rows):
    lines = [
        f"{'case':<18} {'method':<16} {'s sharpness':>11} {'gap':>8}  gradients per step of the method for an error of"
    ]
    lines.append(f"{'':<18} {'':<16} {'':>11} {'':>8}  {'solver':<8} {'1e-2':>7} {'1e-3':>7} {'1e-5':>7}")
    for row in rows:
        gap = f"{row['gap']:8.1e}" if row["status"] == "ok" else f"{row['status']:>8}"
        head = f"{row['case']:<18} {row['method']:<16} {row['s sharpness']:11.3g} {gap}"
        for solver in ("default", "Bosh3", "Dopri8"):
            if solver in row:
                cells = " ".join(f"{row[solver][key]:7.2f}" for key in ("1e-02", "1e-03", "1e-05"))
                lines.append(f"{head}  {solver:<8} {cells}")
                head = " " * len(head)
    lines.append("gap: from the method to its flow; the method takes one gradient per step")
    return "\n".join(lines)


def draw(rows):
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(7, 3.4))
        ax = drawn.subplots()
        drawn_as = list(dict.fromkeys((row["case"], row["method"]) for row in rows))
        colours = shades(len(drawn_as))
        for i, (case, method) in enumerate(drawn_as):
            part = [row for row in rows if (row["case"], row["method"]) == (case, method)]
            x, y = [row["s sharpness"] for row in part], [row["default"]["1e-03"] for row in part]
            marker = "os^D"[i % 4]
            ax.loglog(x, y, marker + "-", markersize=4, color=colours[i], label=f"{LABELS[method]}, {case}")
            failed = [row["status"] != "ok" for row in part]
            ax.loglog(np.array(x)[failed], np.array(y)[failed], marker, markersize=4, color=colours[i], mfc="white")
        ax.axhline(2, color="0.5", linestyle=":", linewidth=0.8, label="two per step")
        ax.set(xlabel="step size times sharpness", ylabel="gradients of the flow per step of the method")
        ax.set_title("cost of the flow at a relative error of 1e-3 (hollow: the method itself diverges)")
        label_decades(ax)
        ax.legend()
        return drawn


def main():
    arguments = records.arguments(__doc__)
    rows = measure(arguments.quick)
    print(table(rows))
    comparison = [
        records.comparison(
            f"flow, {row['case']}, step x sharpness = {row['s sharpness']:.3g}, error 1e-3",
            f"{LABELS[row['method']]}, which deviates by {row['gap']:.0e}",
            1 / row["default"]["1e-03"],
        )
        for row in rows
        if row["status"] == "ok"
    ]
    record = {"benchmark": "momentum", "quick": arguments.quick, "rows": rows, "comparisons": comparison}
    target = records.write(record, arguments.out)
    print(f"\nwritten: {target}, {plot.save(draw(rows), arguments.out / 'momentum.png')}")


if __name__ == "__main__":
    main()
