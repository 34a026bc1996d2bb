"""Gradient descent at the edge of stability and beyond it: how far is each flow from it, and what does it cost?

Networks with two hidden layers on digits, full batches. `2 / learning_rate` is 70 % of the sharpness that gradient flow
reaches, so that descent comes to the edge and stays there, or 70 % of that at the start, a catapult. Distances are
those of the flow at step `k` from the midpoint `(w_{k-1} + 2 w_k + w_{k+1}) / 4` of the iterates, averaged over all
steps. Predicted mean losses are compared over the second half. Costs are those of the flow at a given error, the
largest or the mean over the run, over the distance travelled; the reference is the same flow at 1e-6.

Five seeds of each; data, parameters and learning rates are arguments of the compiled programs, which seeds share.

    python benchmarks/edge.py [--quick] [--out FOLDER]
"""

import functools
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

jax.config.update("jax_enable_x64", True)

from support import curves, records  # noqa: E402

import gradflow as gf  # noqa: E402
from gradflow import plot  # noqa: E402
from gradflow.plot._style import STYLE, figure, shades  # noqa: E402

FLOWS = {
    "gradient flow": lambda problem, eta: gf.GradientFlow(problem),
    "modified, order 2": gf.ModifiedFlow,
    "rod": gf.RodFlow,
    "edge": gf.EdgeFlow,
    "descent-ascent 1": functools.partial(gf.DescentAscentFlow, order=1),
    "descent-ascent 2": functools.partial(gf.DescentAscentFlow, order=2),
    "descent-ascent 3": functools.partial(gf.DescentAscentFlow, order=3),
}
PREDICTING = ("rod", "edge", "descent-ascent 1", "descent-ascent 2", "descent-ascent 3")
EDGE = 0.7
"""`2 / learning_rate` over the sharpness that gradient flow reaches, or that at the start."""
SEEDS = (0, 1, 2, 3, 4)
CASES = {
    "tanh, edge": ("tanh", "edge", 600, 1e-3),
    "GELU, edge": ("GELU", "edge", 600, 1e-3),
    "tanh, catapult": ("tanh", "catapult", 150, 1e-3),
    "ReLU, edge": ("ReLU", "edge", 150, 1e-2),
    "convolutional, edge": ("convolutional", "edge", 300, 1e-3),
}
"""Network, start, steps of descent, tolerance: on ReLU the models are a hundred tolerances apart."""
MAX_STEPS_PER_STEP = 20
"""Attempted steps of a flow, per step of descent, after which a run is given up."""
HORIZON = 250.0
"""Time in which gradient flow reaches the sharpness that counts."""


class Convolutional(eqx.Module):
    """Two convolutions of 3 x 3 on the 8 x 8 digits, tanh, one linear layer on the 4 x 4 x 4 values that are left."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    last: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(1, 4, 3, key=keys[0])
        self.second = eqx.nn.Conv2d(4, 4, 3, key=keys[1])
        self.last = eqx.nn.Linear(64, 10, key=keys[2])

    def __call__(self, x):
        hidden = jnp.tanh(self.first(x.reshape(1, 8, 8)))
        return self.last(jnp.tanh(self.second(hidden)).reshape(-1))


def network(activation, seed, quick):
    """A problem and a start; data and parameters are leaves, so that seeds share their programs."""
    samples, width = (30, 8) if quick else (100, 24)
    problem = gf.EmpiricalRisk(*gf.data.digits(n=samples, centre=True, labels="onehot"), gf.losses.square)
    if activation == "convolutional":
        return problem, Convolutional(jax.random.key(seed))
    function = {"tanh": jnp.tanh, "GELU": jax.nn.gelu, "ReLU": jax.nn.relu}[activation]
    return problem, gf.models.MLP(64, width, 10, depth=2, activation=function, key=jax.random.key(seed))


def sharpness(problem, model):
    """That of the start, and the largest that gradient flow reaches."""
    see = {"sharpness": gf.observables.Sharpness(problem)}
    ts = np.linspace(0, HORIZON, 11)
    sol = gf.solve(gf.GradientFlow(problem), model, ts, rtol=1e-3, observe=see, save_params=False)
    values = np.asarray(sol.observed["sharpness"])
    return float(values[0]), float(values.max())


def path(params, steps):
    """Parameters at all steps, as one matrix."""
    leaves = [np.asarray(leaf) for leaf in jax.tree_util.tree_leaves(params) if np.shape(leaf)[:1] == (steps + 1,)]
    return np.concatenate([leaf.reshape(steps + 1, -1) for leaf in leaves], axis=1)


def midpoints(values):
    return (values[:-2] + 2 * values[1:-1] + values[2:]) / 4


def descend(problem, model, eta, steps):
    """Midpoints of gradient descent, the losses averaged alike, and how far it went."""
    see = {"loss": gf.observables.Loss(problem)}
    run = gf.iterate(gf.GradientDescent(problem, eta), model, steps, save_every=1, observe=see, throw=False)
    iterates = path(run.params, steps)
    middle = midpoints(iterates)
    return middle, midpoints(np.asarray(run.observed["loss"])), float(np.linalg.norm(middle[-1] - iterates[0]))


def follow(name, problem, model, eta, steps, rtol, solver=None):
    see = {"loss": gf.observables.MeanLoss()} if name in PREDICTING else {}
    flow = FLOWS[name](problem, eta)
    ts = eta * np.arange(steps + 1)
    limits = {"throw": False, "max_steps": MAX_STEPS_PER_STEP * steps}
    return gf.solve(flow, model, ts, rtol=rtol, solver=solver, observe=see, **limits)


def gap(run, descent, steps):
    """Distances at every step, as far as a run came, and the row of the table."""
    middle, losses, travelled = descent
    reached = min(int(run.saved), steps) - 1
    distance = np.linalg.norm(path(run.params, steps)[1 : reached + 1] - middle[:reached], axis=1)
    row = {"status": run.status, "reached": reached + 1, "travelled": travelled}
    row |= {"mean": float(distance.mean()), "last": float(distance[-1])}
    row["gradients"] = float(run.stats["gradient_evaluations"] / steps)
    row["products"] = float(run.stats["hessian_vector_products"] / steps)
    if "loss" in run.observed and run.status == "ok":
        late = slice(steps // 2, None)
        predicted, mean = np.asarray(run.observed["loss"])[1:-1][late].mean(), losses[late].mean()
        row["mean loss off by"] = float(predicted / mean - 1)
    return distance, row


def measure_gaps(quick):
    """One row for each case, seed and flow, and the distances of the first seed of each case."""
    rows, drawn = [], {}
    for case, (activation, start, length, rtol) in list(CASES.items())[: 1 if quick else None]:
        for seed in SEEDS[: 1 if quick else None]:
            began = time.perf_counter()
            problem, model = network(activation, seed, quick)
            first, largest = sharpness(problem, model)
            eta = 2 / (EDGE * (largest if start == "edge" else first))
            steps = 40 if quick else length
            descent = descend(problem, model, eta, steps)
            about = {"case": case, "seed": seed, "steps": steps, "rtol": rtol, "learning_rate": eta}
            ways = {name: gap(follow(name, problem, model, eta, steps, rtol), descent, steps) for name in FLOWS}
            rows += [about | {"flow": name, "sharpness": [first, largest]} | row for name, (_, row) in ways.items()]
            if seed == SEEDS[0]:
                drawn[case] = {name: distance for name, (distance, _) in ways.items()}
            ratio = ways["descent-ascent 2"][1]["mean"] / ways["gradient flow"][1]["mean"]
            seconds = time.perf_counter() - began
            print(f"{case}, seed {seed}: order 2 over gradient flow {ratio:.3f}, {seconds:.0f} s", flush=True)
    return rows, drawn


def measure_costs(quick):
    """Gradients per step of descent at an error of 1e-2, for the default method and for `Hybrid`."""
    problem, model = network("tanh", 0, quick)
    steps, costs = 40 if quick else 600, []
    eta = 2 / (EDGE * sharpness(problem, model)[1])
    for order in (1, 2):
        name = f"descent-ascent {order}"
        exact = path(follow(name, problem, model, eta, steps, 1e-6).params, steps)
        travelled = np.linalg.norm(exact[-1] - exact[0])
        for method, solver in {"default": None, "Hybrid": gf.solvers.Hybrid()}.items():
            row = {"flow": name, "method": method, "gradients": [], "largest": [], "mean": []}
            for rtol in (1e-1, 1e-2) if quick else (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3):
                run = follow(name, problem, model, eta, steps, rtol, solver)
                error = np.linalg.norm(path(run.params, steps) - exact, axis=1) / travelled
                row["gradients"].append(float(run.stats["gradient_evaluations"] / steps))
                row["largest"].append(float(error.max()))
                row["mean"].append(float(error.mean()))
            for measure in ("largest", "mean"):
                row[f"at a {measure} error of 1e-2"] = float(curves.cost_at(1e-2, row["gradients"], row[measure])[0])
            costs.append(row)
    return costs


def table(rows, costs):
    lines = ["mean distance from the midpoints of descent, over that of gradient flow (median, range over seeds)"]
    for case in dict.fromkeys(row["case"] for row in rows):
        part = [row for row in rows if row["case"] == case]
        base = {row["seed"]: row["mean"] for row in part if row["flow"] == "gradient flow"}
        lines.append(f"\n{case}: {part[0]['steps']} steps, seeds {sorted(base)}, gradient flow {list(base.values())}")
        lines.append(
            f"{'flow':<18} {'ratio':>7} {'range':>15} {'mean loss':>10} {'gradients':>10} {'products':>9}  status"
        )
        for name in FLOWS:
            per_seed = [row for row in part if row["flow"] == name]
            ratio = [row["mean"] / base[row["seed"]] for row in per_seed]
            median = lambda key, per_seed=per_seed: float(np.median([row.get(key, np.nan) for row in per_seed]))  # noqa: E731
            ends = f"{min(ratio):.3f} ... {max(ratio):.3f}"
            early = [row["reached"] for row in per_seed if row["status"] != "ok"]
            states = sorted({row["status"] for row in per_seed})
            states += [f"as far as step {min(early)}"] if early else []
            off = f"{median('mean loss off by'):+.3f}"
            cost = f"{median('gradients'):10.2f} {median('products'):9.2f}"
            lines.append(f"{name:<18} {np.median(ratio):7.3f} {ends:>15} {off:>10} {cost}  {', '.join(states)}")
    lines.append("\ngradients per step of descent at an error of 1e-2 of the distance travelled, tanh, edge, seed 0")
    for row in costs:
        numbers = ", ".join(
            f"{row[f'at a {measure} error of 1e-2']:.2f} ({measure} error)" for measure in ("largest", "mean")
        )
        lines.append(f"{row['flow']:<18} {row['method']:<8} {numbers}")
    return "\n".join(lines)


def draw(drawn):
    with matplotlib.rc_context(STYLE):
        page = figure(figsize=(3.4 * len(drawn) + 1.2, 3.0))
        axes = np.atleast_1d(page.subplots(1, len(drawn)))
        for ax, (case, paths) in zip(axes, drawn.items(), strict=True):
            for colour, (name, distance) in zip(shades(len(paths)), paths.items(), strict=True):
                ax.semilogy(1 + np.arange(len(distance)), distance, color=colour, label=name)
            ax.set(title=case, xlabel="step")
        axes[0].set_ylabel("distance from the midpoints of descent")
        axes[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return page


def main():
    arguments = records.arguments(__doc__)
    rows, drawn = measure_gaps(arguments.quick)
    costs = measure_costs(arguments.quick)
    print(table(rows, costs))
    name = "descent-ascent 2"
    comparisons = []
    for case in drawn:
        mean = {
            flow: np.median([row["mean"] for row in rows if (row["case"], row["flow"]) == (case, flow)])
            for flow in FLOWS
        }
        comparisons.append(
            records.comparison(f"{name}, {case}", "gradient flow", mean["gradient flow"] / mean[name], "distance")
        )
    record = {"benchmark": "edge", "quick": arguments.quick, "rows": rows, "costs": costs, "comparisons": comparisons}
    target = records.write(record, arguments.out)
    print(f"\nwritten: {target}, {plot.save(draw(drawn), arguments.out / 'edge.png')}")


if __name__ == "__main__":
    main()
