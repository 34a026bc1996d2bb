"""What an escape from a start of norm delta costs, and whether it comes out right, in three kinds of coordinates.

A linear network on four modes (3, 2, 1.4 and 1), width 6, from delta = 1e-4 down to 1e-300: gradients evaluated and
error of the time at which the norm reaches 0.1, against the polar flow at a tolerance of 1e-10. Compared are the polar
flow, the shortcut `first_escape`, gradient flow with tolerances scaled to the state, Tsit5 with tolerances fixed at
1e-3 and 1e-6, and gradient descent near the largest learning rate and at a hundredth of it. A second table has the jump
times of all four modes from 1e-12, against DOP853 of scipy. Counts do not depend on the machine.

    python benchmarks/small_init.py [--quick] [--out FOLDER]
"""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from scipy.integrate import solve_ivp

jax.config.update("jax_enable_x64", True)

from support import records  # noqa: E402

import gradflow as gf  # noqa: E402
from gradflow import plot  # noqa: E402
from gradflow.plot._style import STYLE, figure  # noqa: E402

MODES = np.array([3.0, 2.0, 1.4, 1.0])
NORM = 0.1


def identity(z):
    return z


def network():
    problem = gf.EmpiricalRisk(np.eye(4), np.diag(MODES), gf.losses.square, reduction="sum")
    return problem, gf.models.TwoLayer(4, 6, 4, activation=identity, key=jax.random.key(1))


def escapes(exponents):
    """Rows (method, exponent, time, gradients, error)."""
    problem, model = network()
    until = gf.Until(gf.observables.LogNorm(), above=np.log(NORM))
    explicit = gf.solvers.Tsit5()
    polar, plain = gf.PolarFlow(problem), gf.GradientFlow(problem)
    methods = {
        "polar": (polar, {}),
        "polar, float32": (polar, {}),
        "scaled Cartesian": (plain, {"solver": explicit}),
        "Cartesian, rtol 1e-3, atol 1e-6": (plain, {"solver": explicit, "rtol": 1e-3, "atol": 1e-6}),
    }
    rows = []
    for exponent in exponents:
        start = gf.Polar(model, -exponent * np.log(10))
        exact = gf.solve(polar, start, [1e5], until=until, rtol=1e-10, save_params=False, max_steps=10**6).t_final
        for name, (flow, options) in methods.items():
            single = name == "polar, float32"
            if (flow is plain and exponent > 150) or (single and exponent > 30):
                continue
            begin = single_precision(start) if single else (start.ordinary() if flow is plain else start)
            used = single_precision(polar) if single else flow
            sol = gf.solve(used, begin, [1e5], until=until, save_params=False, throw=False, **options)
            rows.append(row(name, exponent, sol.t_final, sol.stats["gradient_evaluations"], exact))
        # The curvature at the end of training is twice the largest mode.
        for rate in (1.9, 0.019) if exponent <= 150 else ():
            learning_rate = rate / (2 * MODES[0])
            rule, steps = gf.GradientDescent(problem, learning_rate), int(3 * float(exact) / learning_rate)
            run = gf.iterate(rule, start.ordinary(), steps, save_every=1, until=until, save_params=False)
            name = f"gradient descent, {rate:g} / sharpness"
            rows.append(row(name, exponent, run.t_final, run.stats["gradient_evaluations"], exact))
        shortcut = gf.first_escape(problem, start, norm=1e-2)
        reference = gf.solve(
            polar,
            start,
            [1e5],
            until=gf.Until(gf.observables.LogNorm(), above=np.log(1e-2)),
            rtol=1e-10,
            save_params=False,
            max_steps=10**6,
        ).t_final
        rows.append(row("first_escape", exponent, shortcut.time, shortcut.gradient_evaluations, reference))
    return rows


def row(name, exponent, time, cost, exact):
    error = abs(float(time) / float(exact) - 1)
    return {"method": name, "exponent": exponent, "time": float(time), "gradients": int(cost), "error": error}


def single_precision(tree):
    return jax.tree_util.tree_map(
        lambda leaf: leaf.astype(jnp.float32) if hasattr(leaf, "dtype") and leaf.dtype == jnp.float64 else leaf, tree
    )


def jumps():
    """Relative errors of the four jump times from 1e-12, and gradients, at default tolerances."""
    problem, model = network()
    start = gf.Polar(model, np.log(1e-12))
    plain, ts = start.ordinary(), np.linspace(0, 45, 4501)

    def field(_, flat):
        w, a = flat[:24].reshape(6, 4), flat[24:].reshape(4, 6)
        e = np.diag(MODES) - a @ w
        return np.concatenate([(a.T @ e).ravel(), (e @ w.T).ravel()])

    begin = np.concatenate([np.ravel(plain.weight), np.ravel(plain.output)])
    exact = solve_ivp(field, (0, 45), begin, method="DOP853", t_eval=ts, rtol=1e-11, atol=1e-26).y.T
    products = np.einsum("tij,tjk->tik", exact[:, 24:].reshape(-1, 4, 6), exact[:, :24].reshape(-1, 6, 4))
    reference = jump_times(ts, products)
    cases = {
        "polar": (gf.PolarFlow(problem), start, {}),
        "polar, no limit on steps": (gf.PolarFlow(problem, longest_step=None), start, {}),
        "polar, neuron by neuron": (gf.NeuronPolarFlow(problem), plain, {}),
        "scaled Cartesian": (gf.GradientFlow(problem), plain, {}),
        "Cartesian, rtol 1e-3, atol 1e-6": (
            gf.GradientFlow(problem),
            plain,
            {"solver": gf.solvers.Tsit5(), "rtol": 1e-3, "atol": 1e-6},
        ),
    }
    rows = []
    for name, (flow, state, options) in cases.items():
        sol = gf.solve(flow, state, ts, observe={"p": lambda m: m.output @ m.weight}, save_params=False, **options)
        errors = np.abs(jump_times(ts, np.asarray(sol.observed["p"])) / reference - 1)
        cost = int(sol.stats["gradient_evaluations"])
        rows.append({"method": name, "gradients": cost, "errors": [float(e) for e in errors]})
    return rows


def staircase():
    """The loss from 1e-12 over time, and the saddles that theory predicts for it."""
    problem, model = network()
    log_norm = np.log(1e-12)
    ts = np.linspace(0, 45, 451)
    start = gf.Polar(model, log_norm)
    sol = gf.solve(gf.PolarFlow(problem), start, ts, observe={"loss": problem}, save_params=False)
    saddles = gf.theory.linear_saddles(np.eye(4), np.diag(MODES), reduction="sum")
    return {
        "t": ts.tolist(),
        "loss": np.asarray(sol.observed["loss"]).tolist(),
        "saddle times": (-log_norm * saddles.times).tolist(),
        "saddle losses": saddles.losses.tolist(),
    }


def jump_times(ts, products):
    values = np.linalg.svd(products, compute_uv=False)
    times = []
    for k, s in enumerate(MODES):
        i = int(np.argmax(values[:, k] > s / 2))
        if i == 0:
            times.append(np.nan)
            continue
        low, high = values[i - 1, k], values[i, k]
        times.append(ts[i - 1] + (ts[i] - ts[i - 1]) * (s / 2 - low) / (high - low))
    return np.array(times)


def table(rows, later):
    lines = [f"{'method':<34} {'start':>8} {'escape time':>12} {'gradients':>10} {'error':>9}"]
    for r in rows:
        start = f"1e-{r['exponent']:g}"
        lines.append(f"{r['method']:<34} {start:>8} {r['time']:12.4f} {r['gradients']:10d} {r['error']:9.1e}")
    if later:
        lines += ["", f"{'jump times of four modes from 1e-12':<34} {'gradients':>10}   relative errors"]
        for r in later:
            errors = "  ".join(f"{e:.1e}" for e in r["errors"])
            lines.append(f"{r['method']:<36} {r['gradients']:8d}   {errors}")
    return "\n".join(lines)


def draw(rows):
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(7, 2.8))
        cost, error = drawn.subplots(1, 2)
        for name, marker in zip(dict.fromkeys(r["method"] for r in rows), "os^xDv+", strict=False):
            part = [r for r in rows if r["method"] == name]
            x = [r["exponent"] * np.log(10) for r in part]
            cost.plot(x, [r["gradients"] for r in part], marker + "-", markersize=4, label=name)
            error.plot(x, [max(r["error"], 1e-12) for r in part], marker + "-", markersize=4)
        for ax, title, label in (
            (cost, "what an escape costs", "gradients evaluated"),
            (error, "how far its time is off", "relative error"),
        ):
            ax.set(xscale="log", yscale="log", title=title, xlabel=r"$\ln(1/\delta)$", ylabel=label)
        drawn.legend(*cost.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return drawn


def main():
    arguments = records.arguments(__doc__)
    rows = escapes([4, 30] if arguments.quick else [4, 8, 12, 30, 100, 300])
    later = [] if arguments.quick else jumps()
    print(table(rows, later))
    base = {row["exponent"]: row["gradients"] for row in rows if row["method"] == "first_escape"}
    comparison = [
        records.comparison(
            f"escape from 1e-{row['exponent']:g}, first_escape",
            f"{row['method']}, off by {row['error']:.0e}",
            row["gradients"] / base[row["exponent"]],
        )
        for row in rows
        if row["method"] != "first_escape"
    ]
    record = {
        "benchmark": "small_init",
        "quick": arguments.quick,
        "escapes": rows,
        "jumps": later,
        "staircase": staircase(),
    }
    target = records.write(record | {"comparisons": comparison}, arguments.out)
    print(f"\nwritten: {target}, {plot.save(draw(rows), arguments.out / 'small_init.png')}")


if __name__ == "__main__":
    main()
