"""Sweeps: members in flight against `vmap` over an adaptive solve, in gradients and in seconds.

Batches of bias-free two-layer tanh networks on handwritten digits 0 and 1, square loss, float64. "mixed": scales 1e-6
... 1, widths 8 ... 128, seeds; "uneven": the same up to scale 10, where training is lazy and stiff; "alike": one scale,
one width, seeds; "many": thousands of tiny ones on a circle of 16 points. Each runs in flight and as
`vmap(diffrax.diffeqsolve)` of equal solver, tolerances and save times, or, where diffrax does not have the solver, as
`vmap(gradflow.solve)`: "one vmap" over scales and widths at once, which takes padding every network with zeros to the
largest width (with one of the seeds, for time), and "by width", one program and one batch for each. "descent" is
gradient descent in flight, at 1.9 over the largest sharpness at both ends of runs of seed 0 at the largest scale. The
useful share is that of the gradients which members need by themselves in all that are evaluated, those that slots
evaluate while they wait for others included. (For `vmap` over the default solver that is an upper bound: its loops
within a step wait as well, which is not counted.) Seconds are medians of up to three runs, the ways in turn; they
contain stacking of the members, but neither compilation nor the drawing of the networks. "cpu" is processor time, of
all threads. "first result" is what a new process takes until its first segment has been computed, without and with a
filled compilation cache.

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
MOST_SECONDS = 10.0
"""Seconds after which a way is not run again."""
FLIGHT, BY_WIDTH, TOGETHER, DESCENT = "in flight", "by width", "one vmap", "descent"
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
    mixed = {"width": [4, 8] if quick else [8, 16, 32, 64, 128], "scale": scales, "seed": range(1 if quick else 7)}
    alike = {"width": [32], "scale": [1e-2], "seed": range(8 if quick else 64)}
    uneven = mixed | {"scale": np.geomspace(1e-6, 10.0, 8).tolist(), "seed": range(3)}
    many = {"width": [4], "scale": [0.5], "seed": range(64 if quick else 2000)}
    ts = np.linspace(0.0, 60.0, 61)
    batches = {"mixed": (near, mixed, ts), "alike": (near, alike, ts)}
    batches |= {"many": (tiny, many, ts[:11]), "uneven": (near, uneven, ts)}
    return {name: batches[name] for name in ("mixed", "many")} if quick else batches


def builder(problem, spans=None, rate=None):
    """Makes members, by gradient descent if there is a `rate`; adds the seconds that each takes to `spans`."""

    def build(width, scale, seed):
        began, size = time.perf_counter(), problem.x.shape[1]
        model = gf.models.TwoLayer(size, width, activation=jnp.tanh, init_scale=scale, key=jax.random.key(seed))
        if spans is not None:
            spans.append(time.perf_counter() - began)
        return gf.GradientFlow(problem) if rate is None else gf.GradientDescent(problem, rate), model

    return build


def stable_rate(problem, axes, ts):
    """1.9 over the largest sharpness at both ends of runs of seed 0 at the largest scale."""
    build, sharpness = builder(problem), gf.observables.Sharpness(problem)
    ends = [gf.solve(*build(w, max(axes["scale"]), 0), ts[-1:], rtol=RTOL).final for w in axes["width"]]
    starts = [build(w, max(axes["scale"]), 0)[1] for w in axes["width"]]
    return 1.9 / max(float(sharpness(params)) for params in ends + starts)


def in_flight(problem, axes, ts, solver, batch=None, rate=None):
    """A function that runs the sweep once: seconds without those in which networks are drawn, and what was spent."""
    spans = []
    build = builder(problem, spans, rate)
    options = {"observe": {"risk": problem}, "solver": solver, "rtol": RTOL, "progress": False, "batch": batch}
    gf.sweep(build, axes, ts, **options)

    def run():
        spans.clear()
        began, worked = time.perf_counter(), time.process_time()
        ds = gf.sweep(build, axes, ts, **options)
        drawn = sum(spans)
        seconds, cpu = time.perf_counter() - began - drawn, time.process_time() - worked - drawn
        products = 2 * int(ds.hessian_vector_products.sum())
        counts = {
            "needed": int(ds.gradient_evaluations.sum()) + products,
            "spent": ds.attrs["evaluations_spent"] + products,
        }
        return {"seconds": seconds, "cpu": cpu, "failed": int((ds.status != 0).sum())} | counts

    return run


def padded(model, width):
    """The network with neurons of weight zero up to a width: it computes the same, and these stay at zero."""
    more = width - model.weight.shape[0]
    weights = jnp.pad(model.weight, ((0, more), (0, 0))), jnp.pad(model.output, (0, more))
    return eqx.tree_at(lambda m: (m.weight, m.output), model, weights)


def lockstep(problem, ts, solver, model):
    """The observed risk and the gradient evaluations of one member, to be mapped over a batch."""
    flow = gf.GradientFlow(problem)
    if solver is None:
        sol = gf.solve(flow, model, ts, observe={"risk": problem}, rtol=RTOL, save_params=False, throw=False)
        return sol.observed["risk"], sol.stats["gradient_evaluations"]
    trainable, static = eqx.partition(model, eqx.is_inexact_array)
    field = lambda t, y, args: jax.tree_util.tree_map(  # noqa: E731
        jnp.negative, jax.grad(lambda p: problem(eqx.combine(p, static)))(y)
    )
    save = diffrax.SaveAt(ts=jnp.asarray(ts), fn=lambda t, y, args: problem(eqx.combine(y, static)))
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


def in_lockstep(problem, axes, ts, solver, together):
    """A function that runs all members once by `vmap`, where each evaluates as often as the slowest of its batch.

    `together`: in one batch, padded to the largest width; otherwise one batch for each width.
    """
    build = builder(problem)
    batches = [[build(w, scale, seed)[1] for scale in axes["scale"] for seed in axes["seed"]] for w in axes["width"]]
    if together:
        batches = [[padded(model, max(axes["width"])) for batch in batches for model in batch]]
    stacked = lambda models: jax.tree_util.tree_map(lambda *leaves: np.stack(leaves), *models)  # noqa: E731
    step = eqx.filter_jit(eqx.filter_vmap(functools.partial(lockstep, problem, ts, solver)))
    programs = [step.lower(stacked(batch)).compile() for batch in batches]

    def run():
        began, worked, needed, evaluated = time.perf_counter(), time.process_time(), 0, 0
        for program, batch in zip(programs, batches, strict=True):
            _, counts = jax.device_get(program(jax.tree_util.tree_map(jnp.asarray, stacked(batch))))
            needed, evaluated = needed + int(counts.sum()), evaluated + int(counts.max()) * counts.size
        seconds, cpu = time.perf_counter() - began, time.process_time() - worked
        return {"seconds": seconds, "cpu": cpu, "needed": needed, "spent": evaluated, "failed": 0}

    return run


def in_turn(runs):
    """Medians of up to three runs of each way, one way after another; fewer of those that take long."""
    results = {how: [] for how in runs}
    for _ in range(3):
        for how, run in runs.items():
            if sum(one["seconds"] for one in results[how]) < MOST_SECONDS:
                results[how].append(run())
    return {
        how: rows[-1] | {key: float(np.median([row[key] for row in rows])) for key in ("seconds", "cpu")}
        for how, rows in results.items()
    }


HEADER = (
    f"{'batch':<7} {'solver':<8} {'how':<10} {'flows':>5} {'needed':>9} {'useful':>7} {'seconds':>8} {'cpu':>8}"
    f" {'flows/s':>8} {'failed':>7}"
)


def line(row):
    fraction = row["needed"] / row["spent"]
    cells = (
        f"{row['batch']:<7} {row['solver']:<8} {row['how']:<10} {row['flows']:5d} {row['needed']:9d} {fraction:7.0%}"
    )
    return f"{cells} {row['seconds']:8.2f} {row['cpu']:8.2f} {row['flows'] / row['seconds']:8.1f} {row['failed']:7d}"


def measure(quick):
    rows = []
    print(HEADER)
    for batch, (problem, axes, ts) in cases(quick).items():
        flows = int(np.prod([len(values) for values in axes.values()]))
        for name, solver in list(SOLVERS.items())[1 if quick else 0 :]:
            runs = {FLIGHT: in_flight(problem, axes, ts, solver)}
            runs[BY_WIDTH] = in_lockstep(problem, axes, ts, solver, together=False)
            if len(axes["width"]) > 1:
                # Minutes for all seeds; a CPU is as busy with one.
                few = axes | {"seed": axes["seed"][:1]}
                runs[TOGETHER] = in_lockstep(problem, few, ts, solver, together=True)
            if solver is not None:
                runs[DESCENT] = in_flight(problem, axes, ts, None, rate=stable_rate(problem, axes, ts))
            for how, numbers in in_turn(runs).items():
                count = flows // len(axes["seed"]) if how == TOGETHER else flows
                label = "-" if how == DESCENT else name
                rows.append({"batch": batch, "solver": label, "how": how, "flows": count} | numbers)
                print(line(rows[-1]), flush=True)
    return rows


def slots(quick):
    """Flows per second against the number of slots, on the device at hand."""
    problem, axes, ts = cases(quick)["mixed" if quick else "alike"]
    rows = []
    counts = (1, 8) if quick else (1, 4, 16, 64) if jax.default_backend() == "cpu" else (16, 64, 256, 1024)
    axes = axes | {"seed": range(4 * counts[-1])} if jax.default_backend() != "cpu" else axes
    for count in counts:
        numbers = in_flight(problem, axes, ts, SOLVERS["Tsit5"], batch=count)()
        flows = int(np.prod([len(values) for values in axes.values()]))
        rows.append({"slots": count, "flows_per_second": flows / numbers["seconds"]} | numbers)
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
from gradflow.sweeps import _scheduler
problem = gf.EmpiricalRisk(*gf.data.circle(16), gf.losses.square)
def build(seed):
    return gf.GradientFlow(problem), gf.models.TwoLayer(2, 8, activation=jnp.tanh, key=jax.random.key(seed))
imported, real, spans = time.perf_counter(), _scheduler.run_segment, []
def watched(*arguments):
    start = time.perf_counter()
    found = jax.block_until_ready(real(*arguments))
    spans.append((time.perf_counter() - start, time.perf_counter() - imported))
    return found
_scheduler.run_segment = watched
gf.sweep(build, {"seed": range(4)}, [0.0, 1.0], progress=False)
print(imported - began, *spans[0])
"""


def first_result():
    """Import, compilation of the driver, and time to the first segment; with an empty cache, and with a full one."""
    seconds = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            done = subprocess.run(
                [sys.executable, "-c", FIRST, cache], capture_output=True, text=True, check=True, env=dict(os.environ)
            )
            numbers = [float(word) for word in done.stdout.split()]
            seconds[name] = dict(zip(("import", "first_segment", "first_result"), numbers, strict=True))
    ratio = seconds["warm"]["first_segment"] / seconds["cold"]["first_segment"]
    print(f"first segment: {seconds['cold']['first_segment']:.2f} s, with a filled cache {ratio:.2f} of that")
    return seconds | {"ratio": ratio}


MEMORY = """
import pathlib, resource, sys
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
try:  # Linux; what getrusage tells there contains the peak of the parent
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    print(next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)
except (OSError, StopIteration):
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
        drawn = figure(figsize=(7.2, 3.2))
        left, right = drawn.subplots(1, 2)
        cases = list(dict.fromkeys((row["batch"], row["solver"]) for row in rows if row["how"] != DESCENT))
        by_case = {(row["batch"], row["solver"], row["how"]): row for row in rows}
        shades = {
            FLIGHT: ("0.2", "gf.sweep"),
            BY_WIDTH: ("0.55", "vmap by width"),
            TOGETHER: ("0.8", "one vmap, padded"),
        }
        for shift, (how, (shade, label)) in enumerate(shades.items(), -1):
            here = [(place, by_case[*case, how]) for place, case in enumerate(cases) if (*case, how) in by_case]
            positions = [place + 0.27 * shift for place, _ in here]
            left.bar(positions, [100 * r["needed"] / r["spent"] for _, r in here], 0.25, color=shade, label=label)
            right.bar(positions, [r["flows"] / r["seconds"] for _, r in here], 0.25, color=shade)
        for ax in (left, right):
            ax.set_xticks(range(len(cases)), [f"{batch}\n{solver}" for batch, solver in cases], fontsize=6)
        left.set(ylabel="useful gradients (%)", ylim=(0, 130), title="gradients that members need")
        left.legend(loc="upper center", ncols=3, fontsize=6)
        right.set(ylabel="flows per second", yscale="log", title="throughput, compiled")
        label_decades(right)
        return drawn


def compare(rows):
    """How many times the seconds of `gf.sweep` each other way takes for a flow."""
    mine = {(row["batch"], row["solver"]): row for row in rows if row["how"] == FLIGHT}
    entries = []
    for row in (row for row in rows if row["how"] != FLIGHT):
        if row["how"] == DESCENT:
            ours = min((one for one in mine.values() if one["batch"] == row["batch"]), key=lambda one: one["needed"])
            peer = "gradient descent, swept too, at 1.9 / the largest sharpness and its error"
            entries.append(records.comparison(f"sweep, {row['batch']}", peer, row["needed"] / ours["needed"]))
            continue
        ours = mine[row["batch"], row["solver"]]
        fraction = ours["flows"] / row["flows"]
        ratio, cpu = fraction * row["seconds"] / ours["seconds"], fraction * row["cpu"] / ours["cpu"]
        print(f"{row['batch']}, {row['solver']}: {row['how']} takes {ratio:.2f} times the seconds, {cpu:.2f} the cpu")
        peer = f"vmap over a solve, {row['how']}"
        entries.append(records.comparison(f"sweep, {row['batch']}, {row['solver']}", peer, ratio, "seconds"))
    return entries


def main():
    arguments = records.arguments(__doc__)
    rows = measure(arguments.quick)
    entries = compare(rows)
    record = {"benchmark": "sweep", "quick": arguments.quick, "rows": rows, "slots": slots(arguments.quick)}
    record |= {"comparisons": entries, "first_result": first_result(), "memory": memory(arguments.quick)}
    target = records.write(record, arguments.out)
    print(f"\nwritten: {target}, {plot.save(draw(rows), arguments.out / 'sweep.png')}")


if __name__ == "__main__":
    main()
