"""Stochastic flows with stiff drift: what does an accuracy of means and variances cost, by method?

The diffusion of SGD on least squares with one unknown per direction, curvatures from 1 to 10,000 and noise in the
targets: an Ornstein-Uhlenbeck process. Steps are affine there, so the first two moments of every scheme follow exactly
from the solver's own step, and those of the process from closed forms: no Monte Carlo. Errors at `t = 1`, relative: of
the mean and of the standard deviation of the slowest direction, and of the mean loss over its minimum, to which the
noise of every direction contributes in proportion to its curvature. The start is off the minimum in the slowest
direction. SGD itself, at the learning rate of the process, has a row of its own, billed by full gradients of which a
step takes one sample; it diverges in the stiff directions.

    python benchmarks/stochastic.py [--quick] [--out FOLDER]
"""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

jax.config.update("jax_enable_x64", True)

from support import records  # noqa: E402

import gradflow as gf  # noqa: E402
from gradflow.plot._style import STYLE, figure, label_decades, save  # noqa: E402

SAMPLES, LEARNING_RATE, HORIZON = 40, 0.05, 1.0
MARKS = {"EulerMaruyama": ("s", "0.4"), "SmallNoise": ("o", "C0"), "SKROCK": ("^", "C3")}
ERRORS = {"mean": "mean, slowest", "deviation": "deviation, slowest", "loss": "mean loss"}


def process(directions, stiffness):
    """The flow, its curvatures, and the variance per time of its noise in every direction."""
    curvature = np.geomspace(1, stiffness, directions)
    root, targets = jnp.sqrt(curvature), np.random.default_rng(0).normal(size=(SAMPLES, directions))
    targets -= targets.mean(axis=0)
    predict = lambda w, x: x[:, :1] * (root * w)  # noqa: E731
    problem = gf.EmpiricalRisk(np.ones((SAMPLES, 1)), targets, gf.losses.square, predict=predict)
    flow = gf.SGDFlow(problem, LEARNING_RATE, 1)
    return flow, curvature, LEARNING_RATE * curvature * targets.var(axis=0)


def exact(curvature, noise):
    """Mean and variance at the horizon, from a start of one in the slowest direction."""
    mean = np.where(curvature == curvature.min(), np.exp(-curvature * HORIZON), 0)
    return mean, noise * -np.expm1(-2 * curvature * HORIZON) / (2 * curvature)


def moments(flow, solver, dt):
    """The same for a scheme, from its affine step."""
    size = jnp.zeros(flow.problem.y.shape[1])
    step = jax.jit(lambda w, dw: solver.step(flow, None, jnp.zeros(()), jnp.asarray(dt), w, dw))
    shift = step(size, jnp.zeros(SAMPLES))
    factor = np.asarray(step(size + 1, jnp.zeros(SAMPLES)) - shift)
    increments = jax.vmap(lambda e: step(size, jnp.sqrt(dt) * e) - shift)(jnp.eye(SAMPLES))
    added, steps = np.sum(np.asarray(increments) ** 2, axis=0), round(HORIZON / dt)
    start = np.arange(len(factor)) == 0
    return start * factor**steps, added * (1 - factor ** (2 * steps)) / (1 - factor**2)


def measure(flow, curvature, noise, ways):
    """A row for every way `(name, solver, dt)`."""
    mean, variance = exact(curvature, noise)
    expected_loss = lambda m, v: np.sum(curvature * (m**2 + v))  # noqa: E731
    rows = []
    for name, solver, dt in ways:
        m, v = moments(flow, solver, dt)
        rows.append(
            {
                "method": name,
                "dt": dt,
                "gradients": solver.evaluations(flow)[0] * round(HORIZON / dt),
                "mean": float(abs(m[0] / mean[0] - 1)),
                "deviation": float(abs(np.sqrt(v[0] / variance[0]) - 1)),
                "loss": float(abs(expected_loss(m, v) / expected_loss(mean, variance) - 1)),
            }
        )
    return rows


def table(rows):
    lines = [f"{'method':<15} {'dt':>9} {'gradients':>10}" + "".join(f"{label:>20}" for label in ERRORS.values())]
    for row in rows:
        cells = "".join(f"{row[name]:20.1e}" for name in ERRORS)
        lines.append(f"{row['method']:<15} {row['dt']:9.2g} {row['gradients']:10d}{cells}")
    return "\n".join(lines)


def comparison(rows, error=1e-2):
    """The fewest gradients, by method, that keep an error."""
    lines = [f"fewest gradients for an error of {error:g}"]
    for name, label in ERRORS.items():
        entries = {}
        for row in rows:
            if row[name] <= error:
                entries[row["method"]] = min(row["gradients"], entries.get(row["method"], np.inf))
        lines.append(f"{label:<20}" + ", ".join(f"{k} {entries.get(k, 'none')}" for k in MARKS))
    return "\n".join(lines)


def draw(rows):
    """Errors against gradients."""
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(8.4, 2.7))
        for ax, (error, label) in zip(drawn.subplots(1, 3), ERRORS.items(), strict=True):
            for method, (mark, colour) in MARKS.items():
                selected = [row for row in rows if row["method"] == method]
                cost, gap = [row["gradients"] for row in selected], [row[error] for row in selected]
                ax.loglog(cost, gap, marker=mark, markersize=4, color=colour, label=method)
            ax.set(title=label, xlabel="gradient evaluations", ylabel="relative error")
            label_decades(ax)
        ax.legend()
        return drawn


def main():
    arguments = records.arguments(__doc__)
    stiffness = 1e3 if arguments.quick else 1e4
    flow, curvature, noise = process(4 if arguments.quick else 25, stiffness)
    longest = [0.2, 0.05] if arguments.quick else [0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001]
    ways = [("SKROCK", gf.solvers.SKROCK(dt, spectral_radius=stiffness), dt) for dt in longest]
    # As long as is stable, with an equal number of steps, and shorter.
    for factor in (1, 2) if arguments.quick else (1, 2, 4, 10):
        dt = 1 / (factor * round(stiffness / 1.9))
        ways += [(name, getattr(gf.solvers, name)(), dt) for name in ("EulerMaruyama", "SmallNoise")]
    # A step of SGD has the mean and the covariance of an Euler step as long as the learning rate.
    ways += [("SGD itself", gf.solvers.EulerMaruyama(), LEARNING_RATE)]
    rows = measure(flow, curvature, noise, ways)
    print(f"{table(rows)}\n\n{comparison(rows)}")
    results = []
    for name, label in ERRORS.items():
        cheapest = {}
        for method in ("SKROCK", "EulerMaruyama"):
            costs = [row["gradients"] for row in rows if row["method"] == method and row[name] <= 1e-2]
            cheapest[method] = min(costs, default=np.nan)
        times = cheapest["EulerMaruyama"] / cheapest["SKROCK"]
        results.append(records.comparison(f"stiff SGD flow, {label} to 1e-2, SKROCK", "Euler-Maruyama", times))
    record = {"benchmark": "stochastic", "quick": arguments.quick, "rows": rows, "comparisons": results}
    target = records.write(record, arguments.out)
    print(f"\nwritten: {target}, {save(draw(rows), arguments.out / 'stochastic.png')}")


if __name__ == "__main__":
    main()
