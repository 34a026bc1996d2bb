"""ReLU networks, whose gradient field jumps: what does an accuracy cost, unsmoothed, smoothed and extrapolated?

Two problems, each up to an earlier and a later time. "two directions": three copies of one input, one of another at an
angle of 0.6, labels +1 and -1, exponential loss, four neurons; first the negative neurons, then the positive ones slide
along a kink. The reference is Filippov's solution, from one smooth piece to the next by event location (Piiroinen &
Kuznetsov 2008). "digits": 80 digits, ten classes, square loss, 16 neurons; the reference is brute force, descent with a
step of 0.002, from which the unsmoothed flow at `rtol=1e-7` differs by 6e-5 at `t = 30`. Errors are distances between
parameters over the distance travelled, the largest over the run and that at the end; of the loss, relative and the
largest over the run. Descent takes steps as small as that needs. "unsmoothed" is the default solver. Smoothed runs have
a tolerance of a tenth of the smoothing. Counts of gradients are independent of the machine; wall times are of the
second of two runs.

    python benchmarks/nonsmooth.py [--quick] [--out FOLDER]
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from scipy.integrate import solve_ivp

jax.config.update("jax_enable_x64", True)

from support import records  # noqa: E402

import gradflow as gf  # noqa: E402
from gradflow.plot._style import STYLE, figure, label_decades, save  # noqa: E402

OFF, ON, SLIDING = 0, 1, 2
ACCURACY = 2e-3
DESCENT = "gradient descent"


class Events:
    """Filippov's solution of `f(x) = sum_j a_j relu(w_j . x)`, loss `sum_i c_i l(f(x_i), y_i)`, by event location.

    Each neuron is off, on, or sliding on each sample. Between events the field is smooth. Sliding neurons take the
    average of the fields on both sides that keeps `w_j . x_i` at zero; they leave when its share `s` reaches 0 or 1.
    """

    def __init__(self, x, weights, slope, width):
        self.x, self.weights, self.slope, self.width = x, weights, slope, width

    def field(self, y, mode):
        """Time derivative, shares `(neurons, samples)`, and rates of `w_j . x_i`."""
        size = self.x.shape[1]
        w, a = y[: self.width * size].reshape(self.width, size), y[self.width * size :]
        on, z = mode == ON, w @ self.x.T
        force = -self.weights * self.slope(a @ (z * on))
        fraction = on.astype(float)
        for j, i in enumerate(mode == SLIDING):
            if i.any():
                others = (fraction[j] * force) @ self.x
                fraction[j, i] = np.linalg.solve((self.x[i] @ self.x[i].T) * force[i], -self.x[i] @ others)
        speed = a[:, None] * ((fraction * force) @ self.x)
        return np.concatenate([speed.ravel(), (on * z) @ force]), fraction, speed @ self.x.T

    def event(self, j, i, mode, bound=None):
        """Falls through zero when neuron `j` reaches the kink of sample `i`, or its share the bound while sliding."""
        size = self.x.shape[1]
        if bound is None:
            sign = 1 if mode[j, i] == ON else -1
            fn = lambda t, y: sign * (y[j * size : (j + 1) * size] @ self.x[i])  # noqa: E731
        else:
            fn = lambda t, y: (1 - 2 * bound) * (self.field(y, mode)[1][j, i] - bound)  # noqa: E731
        fn.terminal, fn.direction = True, -1
        return fn

    def solve(self, weight, output, ts, rtol=1e-11):
        """States `(T, ...)` at the save times and the events `(t, neuron, sample, mode)`."""
        ts, y, t = np.asarray(ts), np.concatenate([weight.ravel(), output]), 0.0
        mode, rows, log = np.where(weight @ self.x.T > 0, ON, OFF), [], []
        while True:
            crossings = [
                (j, i, bound) for (j, i), m in np.ndenumerate(mode) for bound in ((0, 1) if m == SLIDING else (None,))
            ]
            events = [self.event(j, i, mode, bound) for j, i, bound in crossings]
            piece = solve_ivp(
                lambda _, y, mode=mode: self.field(y, mode)[0],
                (t, ts[-1]),
                y,
                method="DOP853",
                rtol=rtol,
                atol=1e-13,
                events=events,
                dense_output=True,
            )
            rows += [piece.sol(s) for s in ts[len(rows) :] if s <= piece.t[-1]]
            if piece.status == 0:
                return np.array(rows), log
            t, y = piece.t[-1], piece.y[:, -1]
            j, i, bound = crossings[next(k for k, event in enumerate(piece.t_events) if len(event))]
            mode = self.after(y, mode, j, i, bound)
            log.append((float(t), j, i, int(mode[j, i])))

    def after(self, y, mode, j, i, bound):
        """The modes after an event: sliding if both sides drive towards the kink, across it or off it otherwise."""
        sides = [mode.copy(), mode.copy(), mode.copy()]
        for status, side in enumerate(sides):
            side[j, i] = status
        if bound is not None:
            return sides[bound]
        rates = [self.field(y, side)[2][j, i] for side in sides[:2]]
        return sides[SLIDING] if rates[OFF] > 0 > rates[ON] else sides[1 - mode[j, i]]


def two_directions(horizon=60.0):
    """Problem, model, save times and Filippov's solution `(T, parameters)` with its events."""
    x, y = np.array([[1.0, 0.0], [np.cos(0.6), np.sin(0.6)]]), np.array([1.0, -1.0])
    weight = 0.1 * np.array([[0.7, 0.5], [0.2, 0.9], [0.9, 0.2], [0.1, 1.0]])
    output = np.array([0.5, 0.5, -0.5, -0.5])
    ts = np.linspace(0, horizon, 61)
    events = Events(x, np.array([0.75, 0.25]), lambda p: -y * np.exp(-y * p), 4)
    reference, log = events.solve(weight, output, ts)
    model = gf.models.TwoLayer(2, 4, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: (m.weight, m.output), model, (jnp.asarray(weight), jnp.asarray(output)))
    problem = gf.EmpiricalRisk(np.repeat(x, [3, 1], axis=0), np.repeat(y, [3, 1]), gf.losses.exponential)
    return problem, model, ts, reference, log


def digits(horizon=30.0, samples=80, width=16):
    dataset = gf.data.digits(n=samples, centre=True, unit_norm=True, labels="onehot")
    model = gf.models.TwoLayer(64, width, 10, key=jax.random.key(0))
    ts = np.linspace(0, horizon, 31)
    problem = gf.EmpiricalRisk(*dataset, gf.losses.square)
    return problem, model, ts, history(descend(problem, model, ts, 0.002).params)


def descend(problem, model, ts, step):
    """Descent with a step that divides the spacing of the save times and is at most `step`."""
    every = int(np.ceil((ts[1] - ts[0]) / step - 1e-9))
    rule = gf.GradientDescent(problem, (ts[1] - ts[0]) / every)
    return gf.iterate(rule, model, every * (len(ts) - 1), save_every=every)


def history(params):
    """Parameters at all save times as rows."""
    leaves = [np.asarray(leaf) for leaf in jax.tree_util.tree_leaves(params)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def smoothed(problem):
    """The function from a smoothing to the flow of the smoothed problem."""
    x, y, loss = problem.x, problem.y, problem.loss
    return lambda s: gf.GradientFlow(gf.EmpiricalRisk(x, y, loss, predict=gf.models.Smoothed(s)))


def measure(problem, model, ts, reference, steps, tolerances, widths, solvers):
    """A row for every way of integrating; `solvers` are those of the smoothed flow."""
    travelled = np.linalg.norm(reference[-1] - reference[0])
    leaves, structure = jax.tree_util.tree_flatten(model)
    splits = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def loss(row):
        parts = [part.reshape(leaf.shape) for part, leaf in zip(jnp.split(row, splits), leaves, strict=True)]
        return problem(jax.tree_util.tree_unflatten(structure, parts))

    losses = jax.jit(jax.vmap(loss))
    exact = losses(jnp.asarray(reference))
    ways = [(DESCENT, step, lambda step=step: descend(problem, model, ts, step)) for step in steps]
    build, budget = smoothed(problem), {"max_steps": 1_000_000}
    for name, solver in (("unsmoothed", None), ("unsmoothed, Tsit5", gf.solvers.Tsit5())):
        options = budget | {"solver": solver}
        ways += [
            (name, rtol, lambda rtol=rtol, o=options: gf.solve(gf.GradientFlow(problem), model, ts, rtol=rtol, **o))
            for rtol in tolerances
        ]
    for solver in solvers:
        name, options = f"smoothed, {type(solver).__name__}", budget | {"solver": solver}
        ways += [(name, s, lambda s=s, o=options: gf.solve(build(s), model, ts, rtol=s / 10, **o)) for s in widths]
    options = budget | {"solver": gf.solvers.Bosh3()}
    ways += [
        ("extrapolated", s, lambda s=s: gf.filippov(build, model, ts, smoothing=s, rtol=s / 300, **options))
        for s in widths
    ]
    rows = []
    for method, setting, run in ways:
        jax.block_until_ready(run().final)
        began = time.perf_counter()
        result = jax.block_until_ready(run())
        wall = time.perf_counter() - began
        path = history(result.params)
        gap = np.linalg.norm(path - reference, axis=1) / travelled
        row = {
            "method": method,
            "setting": setting,
            "gradients": int(result.stats["gradient_evaluations"]),
            "error": float(gap.max()),
            "error at the end": float(gap[-1]),
            "error of the loss": float(jnp.max(jnp.abs(losses(jnp.asarray(path)) / exact - 1))),
            "run": wall,
        }
        if method == "extrapolated":
            row |= {"estimate at the end": float(result.error[-1]) / travelled, "order": float(result.order[-1])}
        elif method != DESCENT:
            row["energy drift"] = float(result.drift["energy"])
        rows.append(row)
    return rows


def cost(rows, method, error=ACCURACY):
    """Gradients for an error over the run, between the two settings on either side of it; infinite if none reaches it.

    Coarser settings than the last one that misses the error do not count: they may meet it by luck.
    """
    rows_of_method = sorted((row["gradients"], row["error"]) for row in rows if row["method"] == method)
    missed = [i for i, (_, err) in enumerate(rows_of_method) if err > error]
    if not missed or missed[-1] == len(rows_of_method) - 1:
        return float(rows_of_method[0][0]) if not missed else np.inf
    (g0, e0), (g1, e1) = rows_of_method[missed[-1]], rows_of_method[missed[-1] + 1]
    fraction = np.log(e0 / error) / np.log(e0 / e1)
    return float(np.exp(np.log(g0) + fraction * np.log(g1 / g0)))


def comparison(results):
    """What the accuracy costs in every case, and how many times less than descent takes."""
    methods = list(dict.fromkeys(row["method"] for rows in results.values() for row in rows))
    lines = [f"gradients for an error of {ACCURACY:g} over the run", f"{'':<28}" + "".join(f"{m:>18}" for m in methods)]
    costs = {}
    for name, rows in results.items():
        costs[name] = {method: cost(rows, method) for method in methods}
        best = min(value for method, value in costs[name].items() if method != DESCENT)
        costs[name]["descent / best"] = costs[name][DESCENT] / best
        cells = "".join(f"{costs[name][m]:18.0f}" for m in methods)
        lines.append(f"{name:<28}{cells}   descent takes {costs[name]['descent / best']:.2f} times the best")
    return costs, "\n".join(lines)


def stiffness(problem, model, ts, widths=(1e-2, 1e-3, 1e-4)):
    """Gradients that an explicit and an implicit solver take, by width of the smoothing."""
    build = smoothed(problem)
    rows = {}
    for solver in (gf.solvers.Tsit5(), gf.solvers.NDF()):
        runs = [gf.solve(build(s), model, ts, rtol=1e-6, solver=solver) for s in widths]
        costs = [int(run.stats["gradient_evaluations"]) for run in runs]
        rows[type(solver).__name__] = {f"{s:g}": cost for s, cost in zip(widths, costs, strict=True)}
    return rows


def table(rows):
    lines = [
        f"{'method':<17} {'step, rtol, width':>17} {'gradients':>10} {'error':>8} {'at end':>8} {'of loss':>8}"
        f" {'run s':>8} {'drift':>8} {'estimate':>9} {'order':>6}"
    ]
    for row in rows:
        text = f"{row['method']:<17} {row['setting']:17.3g} {row['gradients']:10d} {row['error']:8.1e}"
        text += f" {row['error at the end']:8.1e} {row['error of the loss']:8.1e} {row['run']:8.3f}"
        if "order" in row:
            text += f" {'':>8} {row['estimate at the end']:9.1e} {row['order']:6.2f}"
        elif "energy drift" in row:
            text += f" {row['energy drift']:8.1e}"
        lines.append(text)
    return "\n".join(lines)


def draw(results):
    """The largest error over the run against gradients, one panel per case."""
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(2.9 * len(results), 2.9))
        panels = np.ravel(drawn.subplots(1, len(results), sharey=True))
        marks = {DESCENT: ("D", "black"), "unsmoothed": ("o", "0.4"), "unsmoothed, Tsit5": ("x", "0.6")}
        marks |= {"smoothed, Bosh3": ("s", "C0")}
        marks |= {"smoothed, NDF": ("v", "C2"), "extrapolated": ("^", "C3")}
        for ax, (name, rows) in zip(panels, results.items(), strict=True):
            present = {row["method"] for row in rows}
            for method, (mark, colour) in ((m, style) for m, style in marks.items() if m in present):
                selected = [row for row in rows if row["method"] == method]
                steps, error = [row["gradients"] for row in selected], [row["error"] for row in selected]
                ax.loglog(steps, error, marker=mark, markersize=4, color=colour, label=method)
            ax.axhline(ACCURACY, color="0.7", linewidth=0.8, linestyle=":")
            ax.set(title=name, xlabel="gradient evaluations")
            label_decades(ax)
        panels[0].set_ylabel("error over the run / distance travelled")
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
        return drawn


def main():
    arguments = records.arguments(__doc__)
    quick = arguments.quick
    widths = [0.1, 0.02] if quick else [0.03, 0.01, 0.003, 0.001, 0.0003]
    steps = [0.1, 0.02] if quick else [0.5, 0.2, 0.1, 0.05, 0.02]
    tolerances = [1e-2, 1e-3] if quick else [1e-2, 1e-3, 1e-4, 1e-5]
    solvers = [gf.solvers.Bosh3()] if quick else [gf.solvers.Bosh3(), gf.solvers.NDF()]
    results = {}
    for horizon in (20.0,) if quick else (6000.0, 600.0, 60.0):
        *case, log = two_directions(horizon)
        results[f"two directions, t = {horizon:g}"] = measure(*case, steps, tolerances, widths, solvers)
    for horizon in (5.0,) if quick else (30.0, 300.0):
        several = digits(horizon, *((30, 8) if quick else ()))
        results[f"digits, t = {horizon:g}"] = measure(*several, steps, tolerances, widths, solvers)
    for name, rows in results.items():
        print(f"{name}\n{table(rows)}\n")
    costs, missed = comparison(results)
    print(f"{missed}\n")
    slid = sum(event == SLIDING for *_, event in log)
    print(f"two directions: {slid} neurons began to slide in the reference, the first at t = {log[0][0]:.3g}")
    stiff = {} if quick else stiffness(*case[:3])
    for solver, counts in stiff.items():
        print(f"two directions, {solver}, gradients by smoothing: {counts}")
    record = {"benchmark": "nonsmooth", "quick": quick, "events": log, "rows": results, "costs": costs}
    record["comparisons"] = [
        records.comparison(f"ReLU, {name}, error {ACCURACY:g}", "gradient descent", entry["descent / best"])
        for name, entry in costs.items()
    ]
    target = records.write(record | {"gradients by smoothing": stiff}, arguments.out)
    print(f"\nwritten: {target}, {save(draw(results), arguments.out / 'nonsmooth.png')}")


if __name__ == "__main__":
    main()
