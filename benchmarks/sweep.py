"""Sweeps: members in flight against `vmap` over an adaptive solve, in gradients and in seconds.

Batches of bias-free two-layer tanh networks on handwritten digits 0 and 1, square loss, float64. "mixed": scales
1e-6 ... 1, widths 8 ... 128, seeds; "uneven": the same up to scale 10, where training is lazy and stiff; "alike": one
scale, one width, seeds; "many": thousands of tiny ones on a circle of 16 points. Each runs in flight and as
`vmap(diffrax.diffeqsolve)` of equal solver, tolerances and save times, or, where diffrax does not have the solver, as
`vmap(gradflow.solve)`; one program per width there. The useful share is that of the gradients which members need by
themselves in all that are evaluated, those that slots evaluate while they wait for others included. Seconds contain no
compilation: all is run twice, and the second time counts; nor the drawing of the networks. "first result" is what a new
process takes until its first segment has been computed, without and with a filled compilation cache.

    python benchmarks/sweep.py [--quick] [--out FOLDER]
"""

import functools
import os
import subprocess
import sys
import tempfile
import time

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

jax.config.update("jax_enable_x64", True)

from support import records  # noqa: E402

import gradflow as gf  # noqa: E402
from gradflow import plot  # noqa: E402
from gradflow.plot._style import STYLE, figure, label_decades  # noqa: E402

RTOL = 1e-4
SOLVERS = {"default": None, "Tsit5": gf.solvers.Tsit5()}


def digits(samples):
    data = gf.data.digits(classes=(0, 1), centre=True, unit_norm=True, labels="pm1")
    return gf.EmpiricalRisk(data.x[:samples], data.y[:samples], gf.losses.square)


def cases(quick):
    """Name -> problem, axes, save times."""
    near = digits(60 if quick else 360)
    tiny = gf.EmpiricalRisk(*gf.data.circle(16), gf.losses.square)
    scales = np.geomspace(1e-6, 1.0, 4 if quick else 8).tolist()
    # 280 members in full size.
    mixed = {"width": [8] if quick else [8, 16, 32, 64, 128], "scale": scales, "seed": range(1 if quick else 7)}
    alike = {"width": [32], "scale": [1e-2], "seed": range(8 if quick else 64)}
    uneven = mixed | {"scale": np.geomspace(1e-6, 10.0, 8).tolist(), "seed": range(3)}
    many = {"width": [4], "scale": [0.5], "seed": range(64 if quick else 2000)}
    ts = np.linspace(0.0, 60.0, 61)
    found = {"mixed": (near, mixed, ts), "uneven": (near, uneven, ts), "alike": (near, alike, ts)}
    found["many"] = tiny, many, ts[:11]
    return {name: found[name] for name in ("mixed", "many")} if quick else found


def builder(problem, spans=None):
    """Makes members; adds the seconds that each takes to `spans`."""

    def build(width, scale, seed):
        began, size = time.perf_counter(), problem.x.shape[1]
        model = gf.models.TwoLayer(size, width, activation=jnp.tanh, init_scale=scale, key=jax.random.key(seed))
        if spans is not None:
            spans.append(time.perf_counter() - began)
        return gf.GradientFlow(problem), model

    return build


def in_flight(problem, axes, ts, solver, batch=None):
    """Seconds of the second run, without those in which networks are drawn, and what was spent."""
    spans = []
    run = functools.partial(
        gf.sweep, builder(problem, spans), axes, ts, observe={"risk": problem}, solver=solver, rtol=RTOL, progress=False
    )
    run(batch=batch)
    spans.clear()
    began = time.perf_counter()
    ds = run(batch=batch)
    seconds = time.perf_counter() - began - sum(spans)
    needed = int(ds.gradient_evaluations.sum()) + 2 * int(ds.hessian_vector_products.sum())
    spent = ds.attrs["evaluations_spent"] + 2 * int(ds.hessian_vector_products.sum())
    return {"seconds": seconds, "needed": needed, "spent": spent, "failed": int((ds.status != 0).sum())}, ds


def in_lockstep(problem, axes, ts, solver):
    """`vmap` over all members of a width. Each evaluates as often as the slowest of its batch."""
    build = builder(problem)

    @eqx.filter_jit
    @eqx.filter_vmap
    def run(model):
        flow = gf.GradientFlow(problem)
        if solver is None:
            sol = gf.solve(flow, model, ts, observe={"risk": problem}, rtol=RTOL, save_params=False, throw=False)
            return sol.observed["risk"], sol.stats["gradient_evaluations"]
        trainable, rest = eqx.partition(model, eqx.is_inexact_array)
        field = lambda t, y, args: jax.tree_util.tree_map(  # noqa: E731
            jnp.negative, jax.grad(lambda p: problem(eqx.combine(p, rest)))(y)
        )
        save = diffrax.SaveAt(ts=jnp.asarray(ts), fn=lambda t, y, args: problem(eqx.combine(y, rest)))
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            ts[0],
            ts[-1],
            None,
            trainable,
            saveat=save,
            stepsize_controller=diffrax.PIDController(rtol=RTOL, atol=RTOL * 1e-6),
            max_steps=100_000,
            throw=False,
        )
        return sol.ys, 6 * sol.stats["num_steps"] + 2

    seconds, spent, needed = 0.0, 0, 0
    for width in axes["width"]:
        models = [build(width, scale, seed)[1] for scale in axes["scale"] for seed in axes["seed"]]
        batch = jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *models)
        jax.block_until_ready(run(batch))
        began = time.perf_counter()
        _, counts = jax.block_until_ready(run(batch))
        seconds += time.perf_counter() - began
        counts = np.asarray(counts)
        needed, spent = needed + int(counts.sum()), spent + int(counts.max()) * counts.size
    return {"seconds": seconds, "needed": needed, "spent": spent, "failed": 0}


HEADER = (
    f"{'batch':<8} {'solver':<9} {'how':<12} {'flows':>6} {'needed':>10} {'useful':>7} {'seconds':>9} {'flows/s':>8}"
)


def line(row):
    share = row["needed"] / row["spent"]
    cells = f"{row['batch']:<8} {row['solver']:<9} {row['how']:<12} {row['flows']:6d} {row['needed']:10d} {share:7.0%}"
    return f"{cells} {row['seconds']:9.2f} {row['flows'] / row['seconds']:8.1f}"


def measure(quick):
    rows = []
    print(HEADER)
    for batch, (problem, axes, ts) in cases(quick).items():
        flows = int(np.prod([len(values) for values in axes.values()]))
        for name, solver in list(SOLVERS.items())[1 if quick else 0 :]:
            found = {"in flight": in_flight(problem, axes, ts, solver)[0]}
            # All at once would need the memory of all.
            few = axes | {"seed": range(min(len(axes["seed"]), 64))}
            found["lockstep"] = in_lockstep(problem, few, ts, solver)
            for how, numbers in found.items():
                counted = flows if how == "in flight" else int(np.prod([len(values) for values in few.values()]))
                rows.append({"batch": batch, "solver": name, "how": how, "flows": counted} | numbers)
                print(line(rows[-1]), flush=True)
    return rows


def slots(quick):
    """Flows per second against the number of slots, on whatever device this is."""
    problem, axes, ts = cases(quick)["mixed" if quick else "alike"]
    rows = []
    counts = (1, 8) if quick else (1, 4, 16, 64) if jax.default_backend() == "cpu" else (16, 64, 256, 1024)
    axes = axes | {"seed": range(4 * counts[-1])} if jax.default_backend() != "cpu" else axes
    for count in counts:
        numbers, ds = in_flight(problem, axes, ts, SOLVERS["Tsit5"], batch=count)
        rows.append({"slots": count, "flows_per_second": ds.status.size / numbers["seconds"]} | numbers)
        print(f"{count:6d} slots: {rows[-1]['flows_per_second']:8.1f} flows/s")
    return rows


FIRST = """
import sys, time
began = time.perf_counter()
import jax, jax.numpy as jnp
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
import gradflow as gf
from gradflow.sweeps import _queue
problem = gf.EmpiricalRisk(*gf.data.circle(16), gf.losses.square)
def build(seed):
    return gf.GradientFlow(problem), gf.models.TwoLayer(2, 8, activation=jnp.tanh, key=jax.random.key(seed))
imported, real, spans = time.perf_counter(), _queue.fly, []
def watched(*arguments):
    start = time.perf_counter()
    found = jax.block_until_ready(real(*arguments))
    spans.append((time.perf_counter() - start, time.perf_counter() - imported))
    return found
_queue.fly = watched
gf.sweep(build, {"seed": range(4)}, [0.0, 1.0], progress=False)
print(imported - began, *spans[0])
"""


def first_result():
    """Import, compilation of the driver, and time to the first segment; with an empty cache, and with a full one."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            done = subprocess.run(
                [sys.executable, "-c", FIRST, cache], capture_output=True, text=True, check=True, env=dict(os.environ)
            )
            numbers = [float(word) for word in done.stdout.split()]
            found[name] = dict(zip(("import", "first_segment", "first_result"), numbers, strict=True))
    ratio = found["warm"]["first_segment"] / found["cold"]["first_segment"]
    print(f"first segment: {found['cold']['first_segment']:.2f} s, with a filled cache {ratio:.2f} of that")
    return found | {"ratio": ratio}


MEMORY = """
import resource, sys
import jax, jax.numpy as jnp
jax.config.update("jax_enable_x64", True)
import gradflow as gf
from gradflow.sweeps import _members
_members.KEPT = 2**20
problem = gf.EmpiricalRisk(*gf.data.circle(16), gf.losses.square)
def build(seed):
    return gf.GradientFlow(problem), gf.models.TwoLayer(2, 500, activation=jnp.tanh, key=jax.random.key(seed))
ds = gf.sweep(build, {"seed": range(int(sys.argv[1]))}, [0.0, 0.1], rtol=1e-2, solver=gf.solvers.Heun(), progress=False)
assert (ds.status == 0).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def memory(quick):
    """Peak of a process in MB, for few members and for many, of 12 kB each, no more than 1 MB of which are kept."""
    rows = []
    for members in (20,) if quick else (100, 10_000):
        done = subprocess.run([sys.executable, "-c", MEMORY, str(members)], capture_output=True, text=True, check=True)
        rows.append({"members": members, "peak_mb": float(done.stdout)})
        print(f"{members:6d} members of 1,500 weights: peak {rows[-1]['peak_mb']:.0f} MB")
    return rows


def draw(rows):
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(6.4, 3))
        left, right = drawn.subplots(1, 2)
        cases = list(dict.fromkeys((row["batch"], row["solver"]) for row in rows))
        places = np.arange(len(cases))
        for how, shade, shift in (("in flight", "0.25", -0.2), ("lockstep", "0.7", 0.2)):
            mine = [next(r for r in rows if (r["batch"], r["solver"]) == c and r["how"] == how) for c in cases]
            label = "members in flight" if how == "in flight" else "vmap over a solve"
            left.bar(places + shift, [100 * r["needed"] / r["spent"] for r in mine], 0.38, color=shade, label=label)
            right.bar(places + shift, [r["flows"] / r["seconds"] for r in mine], 0.38, color=shade)
        for ax in (left, right):
            ax.set_xticks(places, [f"{batch}\n{solver}" for batch, solver in cases], fontsize=6)
        left.set(ylabel="useful gradients (%)", ylim=(0, 130), title="gradients that members need")
        left.legend(loc="upper center", ncols=2, fontsize=6)
        right.set(ylabel="flows per second", yscale="log", title="throughput, compiled")
        label_decades(right)
        return drawn


def main():
    arguments = records.arguments(__doc__)
    rows = measure(arguments.quick)
    found = []
    for batch, solver in dict.fromkeys((row["batch"], row["solver"]) for row in rows):
        mine, theirs = (r for r in rows if (r["batch"], r["solver"]) == (batch, solver))
        ratio = mine["flows"] / mine["seconds"] / (theirs["flows"] / theirs["seconds"])
        print(f"{batch}, {solver}: {ratio:.2f} times the flows per second of lockstep")
        found.append(records.comparison(f"sweep, {batch}, {solver}", "vmap over a solve", ratio, "seconds"))
    record = {"benchmark": "sweep", "quick": arguments.quick, "rows": rows, "slots": slots(arguments.quick)}
    record |= {"comparisons": found, "first_result": first_result(), "memory": memory(arguments.quick)}
    target = records.write(record, arguments.out)
    print(f"\nwritten: {target}, {plot.save(draw(rows), arguments.out / 'sweep.png')}")


if __name__ == "__main__":
    main()
