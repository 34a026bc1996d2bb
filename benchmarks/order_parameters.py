"""Order parameters of one-pass SGD: adaptive steps against Euler's method, and the time that a phase map takes.

Eight erf students, four orthogonal teachers, `gamma / p = 1`, noise 1e-3, an informed start: the blue region up to
`t = 1000`. One run of the SGD that the equations describe, in 100 dimensions, is a row of its own. Existing codes take
Euler steps of 1e-3 or less; here these run as one compiled loop over the same vector field, on the same machine in the
same run. The error is that of the risk at the end, relative to a reference by scipy's DOP853 at a tolerance of 1e-11.
The map solves the full system over learning rates and noises from an uninformed start, on one core; its error is that
of the risk along some of its runs, against DOP853 again.

    python benchmarks/order_parameters.py [--quick] [--out FOLDER]
"""

import math
import statistics
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import scipy.integrate
from jax.flatten_util import ravel_pytree

jax.config.update("jax_enable_x64", True)

from support import records  # noqa: E402

import gradflow as gf  # noqa: E402
from gradflow import plot, studies  # noqa: E402
from gradflow.plot._style import STYLE, figure, label_decades  # noqa: E402

LADDER = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
SOLVERS = {"Tsit5": gf.solvers.Tsit5, "Dopri8": gf.solvers.Dopri8, "RKC2": gf.solvers.RKC2, "NDF": gf.solvers.NDF}
TARGET = 1e-6


def timed(run, repeats=3):
    """Seconds of the first call beyond the others, which is compilation, and their median; the last result."""
    spans, result = [], None
    for _ in range(repeats + 1):
        began = time.perf_counter()
        result = jax.block_until_ready(run())
        spans.append(time.perf_counter() - began)
    median = statistics.median(spans[1:])
    return max(spans[0] - median, 0.0), median, result


def euler(flow, state, dt, steps):
    @jax.jit
    def run(state, dt, steps):
        def step(_, y):
            return jax.tree_util.tree_map(lambda a, b: a + dt * b, y, flow.vector_field(dt, y, None))

        return jax.lax.fori_loop(0, steps, step, state)

    return timed(lambda: run(state, jnp.asarray(dt), jnp.asarray(steps)), repeats=1)


def reference(field, y0, ts):
    sol = scipy.integrate.solve_ivp(
        lambda t, y: field(y), (0, ts[-1]), np.asarray(y0), method="DOP853", t_eval=ts, rtol=1e-11, atol=1e-14
    )
    return sol.y.T


def measure(quick):
    units, width, horizon, dt = (2, 4, 20.0, 1e-3) if quick else (4, 8, 1000.0, 1e-3)
    problem = gf.TeacherStudent.orthogonal(1000, units, noise=1e-3)
    start = problem.order_parameters(problem.informed(width, jax.random.key(0)))
    flow = gf.OrderParameterFlow(problem, gamma_over_p=1.0)
    state = flow.init(start, None)
    y0, unflatten = ravel_pytree(state)
    field = jax.jit(lambda y: ravel_pytree(flow.vector_field(jnp.zeros(()), unflatten(y), None))[0])
    best = reference(lambda y: np.asarray(field(jnp.asarray(y))), y0, [horizon])
    exact = float(flow.loss(unflatten(jnp.asarray(best[-1])), None))
    rows = []

    def row(method, setting, evaluations, compiling, run, risk):
        rows.append(
            {"method": method, "setting": setting, "evaluations": evaluations, "compile": compiling, "run": run}
        )
        rows[-1] |= {"risk": risk, "error": abs(risk / exact - 1)}
        print(line(rows[-1]), flush=True)

    print(f"risk at t = {horizon:g}: {exact:.9e}\n{HEADER}")
    for name in ("Tsit5", "RKC2") if quick else SOLVERS:
        for rtol in LADDER[:2] if quick else LADDER:
            solver, ts = SOLVERS[name](), [horizon]
            compiling, run, sol = timed(
                lambda solver=solver, rtol=rtol, ts=ts: gf.solve(
                    flow, start, ts, solver=solver, rtol=rtol, save_params=False
                )
            )
            cost = int(sol.stats["gradient_evaluations"])
            row(name, f"rtol {rtol:.0e}", cost, compiling, run, float(flow.risk(sol.final)))
    steps = round(horizon / dt)
    compiling, run, final = euler(flow, state, dt, steps)
    row("Euler, compiled loop", f"dt {dt:.0e}", steps, compiling, run, float(flow.loss(final, None)))
    small = gf.TeacherStudent.orthogonal(100, units, noise=1e-3)
    steps, weights = round(horizon * small.dim), small.informed(width, jax.random.key(0))
    rule = gf.OnePassSGD(small, gamma_over_p=1.0, key=jax.random.key(1))
    options = {"save_every": steps, "save_params": False, "observe": {"risk": small}}
    compiling, run, sgd = timed(lambda: gf.iterate(rule, weights, steps, **options), repeats=1)
    row("SGD, one run", f"d {small.dim}", steps, compiling, run, float(sgd.observed["risk"][-1]))
    return exact, rows


def time_map(quick):
    """Seconds for the map, compilation included, how many runs failed, and how far off some of them are."""
    sizes = {"rates": np.geomspace(0.05, 4, 40).tolist(), "noises": np.geomspace(1e-6, 1e-1, 25).tolist()}
    if quick:
        sizes = {"rates": [0.3, 1.0], "noises": [1e-4, 1e-3], "units": 2, "width": 4, "horizon": 100.0, "saves": 21}
    began, busy = time.perf_counter(), time.process_time()
    ds = studies.phase_map(**sizes, progress=False)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    record = {"points": int(ds.final_risk.size), "seconds": seconds, "cpu_seconds": busy}
    return record | {"failed": int(np.count_nonzero(ds.status.values)), "errors": map_errors(ds, 1 if quick else 12)}


def map_errors(ds, count):
    """Relative error of the risk of `count` points, spread over the map: at the end, and the largest over time."""
    problem = gf.TeacherStudent.orthogonal(ds.attrs["dim"], ds.attrs["units"])
    start = problem.order_parameters(problem.uninformed(ds.attrs["width"], jax.random.key(0)))
    flow = gf.OrderParameterFlow(problem.P, gamma_over_p=1.0)
    y0, unflatten = ravel_pytree(flow.init(start, None))

    @jax.jit
    def field(y, g, noise):
        mine = gf.OrderParameterFlow(problem.P, gamma_over_p=g, noise=noise)
        return ravel_pytree(mine.vector_field(jnp.zeros(()), unflatten(y), None))[0]

    risk = jax.jit(jax.vmap(lambda y: flow.loss(unflatten(y), None)))
    errors = []
    for index in np.linspace(0, ds.final_risk.size - 1, count).astype(int):
        i, j = np.unravel_index(index, ds.final_risk.shape)
        g, noise = float(ds.rate[i]), float(ds.noise[j])
        best = reference(lambda y, g=g, noise=noise: np.asarray(field(y, g, noise)), y0, ds.time.values)
        off = np.abs(ds.risk.values[i, j] / np.asarray(risk(jnp.asarray(best))) - 1)
        errors.append({"rate": g, "noise": noise, "end": float(off[-1]), "largest": float(np.max(off))})
    return errors


HEADER = f"{'method':<22} {'setting':>11} {'fields':>9} {'compile s':>10} {'run s':>9} {'error of risk':>14}"


def line(row):
    cells = f"{row['method']:<22} {row['setting']:>11} {row['evaluations']:9d} {row['compile']:10.2f} {row['run']:9.4f}"
    return f"{cells} {row['error']:14.1e}"


def best_of(rows):
    """The quickest adaptive run that meets the target, and how many times as long Euler's method takes."""
    ours = [row for row in rows if row["method"] in SOLVERS and row["error"] <= TARGET]
    theirs = next(row for row in rows if "Euler" in row["method"])
    if not ours:
        return None, math.nan
    quickest = min(ours, key=lambda row: row["run"])
    return quickest, theirs["run"] / quickest["run"]


def draw(rows):
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(4.2, 3))
        ax = drawn.subplots()
        for name, marker in zip(dict.fromkeys(row["method"] for row in rows), "os^vDx", strict=False):
            mine = [row for row in rows if row["method"] == name]
            ax.loglog(
                [row["run"] for row in mine], [row["error"] for row in mine], f"{marker}-", markersize=4, label=name
            )
        ax.set(xlabel="seconds, compiled", ylabel="relative error of the risk", title="blue region, risk at the end")
        label_decades(ax)
        ax.legend()
        return drawn


def main():
    arguments = records.arguments(__doc__)
    exact, rows = measure(arguments.quick)
    quickest, ratio = best_of(rows)
    if quickest is not None:
        print(
            f"\n{quickest['method']}, {quickest['setting']}: error below {TARGET:.0e} in 1/{ratio:.0f} of Euler's time"
        )
    mapped = time_map(arguments.quick)
    duration = f"{mapped['seconds']:.1f} s ({mapped['cpu_seconds']:.1f} s of processor time), compilation included"
    print(f"map: {mapped['points']} points in {duration}; {mapped['failed']} failed")
    last, largest = (max(row[name] for row in mapped["errors"]) for name in ("end", "largest"))
    print(f"     risk off by at most {last:.1e} at the end, {largest:.1e} at any time ({len(mapped['errors'])} points)")
    record = {"benchmark": "order_parameters", "quick": arguments.quick, "risk": exact, "rows": rows}
    record |= {"euler_over_best": ratio, "map": mapped}
    what = f"order parameters, error of the risk {TARGET:.0e}"
    record["comparisons"] = [records.comparison(what, "Euler's method", ratio, "seconds")]
    target = records.write(record, arguments.out)
    print(f"\nwritten: {target}, {plot.save(draw(rows), arguments.out / 'order_parameters.png')}")


if __name__ == "__main__":
    main()
