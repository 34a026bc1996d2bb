"""How far is a discrete rule from its flow? `compare`, and the study of gradient descent on digits."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, PyTree

from gradflow import _checks
from gradflow._captured import fresh_jit
from gradflow._solution import Status, moving
from gradflow.flows import AbstractFlow, GradientFlow
from gradflow.models import MLP
from gradflow.observables import Loss, Sharpness
from gradflow.problems import EmpiricalRisk, losses
from gradflow.rules import AbstractRule, GradientDescent, HeavyBall, Nesterov
from gradflow.runs._iterate import iterate_to
from gradflow.runs._solve import solve


def compare(
    rule: AbstractRule,
    params: PyTree,
    learning_rates: Sequence[float],
    horizon: float,
    flows: Mapping[str, Callable[[Any], AbstractFlow]] | None = None,
    *,
    rtol: float = 1e-8,
    saves: int = 50,
    solver: Any = None,
    after: float = 0.0,
    progress: bool = False,
    trainable: Any = None,
) -> xr.Dataset:
    """The gap between a rule and its flows over learning rates.

    On a fixed horizon of flow time:

        gap = max_k |theta_k - X(t_k)| / max_k |X(t_k) - X(0)|,       t_k = rule.time(k) <= horizon

    A flow of order `p` has a gap of order `eta^p`.

    **Arguments**

    - `rule`: its own learning rate does not matter. `learning_rates`: distinct, positive.
    - `horizon`: flow time, at least one step of the largest learning rate. Every rule runs as many whole steps as fit.
    - `flows`: name -> function `rule -> flow`; by default what `rule.limits()` names.
    - `rtol`: tolerance of the flows, to be far below the gaps. `saves`: number of times compared at the most.
    - `after`: flow time before which distances are not counted. Momentum of a fixed coefficient has a transient of some
      `1/(1 - momentum)` steps, during which it is a first-order distance away from every flow without one.
    - `trainable`: as for `solve`.

    **Returns** an `xarray.Dataset` over `learning_rate` (decreasing) and `flow`: `gap`, `local_order` (slope between
    neighbouring learning rates), `order` (the slope between the two smallest), `distance` and `t` over `save`, `steps`,
    `gradient_evaluations` and `status` of the rule, `flow_gradient_evaluations` and `flow_status`. A rule that
    diverges has the gap NaN.

    **Raises** `ValueError` for bad input and for a rule without a known limit.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.GradientDescent(lambda w: 0.5 * jnp.sum(jnp.array([1.0, 3.0]) * w**2), learning_rate=0.1)
    >>> ds = gf.compare(rule, jnp.ones(2), [0.02, 0.01, 0.005], 1.0, rtol=1e-5)
    >>> round(float(ds.order[0]), 1)
    1.0
    """
    if not isinstance(rule, AbstractRule):
        raise _checks.fail("rule", "be a gradflow rule", f"of type {type(rule).__name__}")
    rates = np.ravel(np.asarray(learning_rates, float))
    rates = np.sort(rates)[::-1]
    if rates.size < 1 or len(np.unique(rates)) != rates.size:
        raise _checks.fail("learning_rates", "be distinct numbers, at least one", repr(learning_rates))
    _checks.check_positive("learning_rates", rates)
    _checks.check_positive("horizon", horizon)
    _checks.check_count("saves", saves)
    if not 0 <= after < horizon:
        raise _checks.fail("after", "lie between 0 and the horizon", f"{after:g}")
    if flows is None:
        flows = {name: lambda r, name=name: r.limits()[name] for name in rule.limits()}
    if not flows:
        actual = "None for a rule without a known continuous limit"
        raise _checks.fail("flows", "name at least one flow", actual, "Pass {'name': lambda rule: flow}.")
    tuned = [rule.with_learning_rate(float(rate)) for rate in rates]
    counts = [int(np.floor(horizon / float(r.time(1) - r.time(0)) * (1 + 1e-9))) for r in tuned]
    if min(counts) < 1:
        actual = f"{horizon:g}, shorter than one step at learning rate {rates[int(np.argmin(counts))]:g}"
        raise _checks.fail("horizon", "hold at least one step of every learning rate", actual)
    rows = min(saves, *counts)

    from tqdm import tqdm

    shape = (rates.size, len(flows))
    found = {
        "gap": np.full(shape, np.nan),
        "distance": np.full((*shape, rows + 1), np.nan),
        "flow_gradient_evaluations": np.zeros(shape, np.int64),
        "flow_status": np.zeros(shape, np.int8),
    }
    of_rule = {name: np.zeros(rates.size, np.int64) for name in ("steps", "gradient_evaluations", "status")}
    times = np.zeros((rates.size, rows + 1))
    bar = tqdm(tuned, desc="learning rates", unit="run", disable=not progress)
    for i, (current, count) in enumerate(zip(bar, counts, strict=True)):
        ks = np.round(np.linspace(0, count, rows + 1)).astype(int)
        discrete = iterate_to(current, params, ks, throw=False, trainable=trainable)
        times[i] = np.asarray(discrete.ts)
        of_rule["steps"][i] = int(discrete.stats["steps"])
        of_rule["gradient_evaluations"][i] = int(discrete.stats["gradient_evaluations"])
        of_rule["status"][i] = int(discrete.code)
        for j, make in enumerate(flows.values()):
            flow = make(current)
            how: Any = {"rtol": rtol, "solver": solver, "throw": False, "max_steps": 1_000_000, "trainable": trainable}
            exact = solve(flow, params, times[i], **how)
            distance, travelled = run_distance(*(moving(sol.params, sol.held) for sol in (discrete, exact)))
            found["distance"][i, j] = np.asarray(distance)
            found["gap"][i, j] = float(jnp.max(distance[times[i] >= after]) / travelled)
            found["flow_gradient_evaluations"][i, j] = int(exact.stats["gradient_evaluations"])
            found["flow_status"][i, j] = int(exact.code)

    local = np.full(shape, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        local[1:] = np.diff(np.log(found["gap"]), axis=0) / np.diff(np.log(rates))[:, None]
    across, per_flow = ("learning_rate", "flow"), ("learning_rate", "flow", "save")
    codes = {"flag_values": list(range(len(Status.labels()))), "flag_meanings": " ".join(Status.labels())}
    return xr.Dataset(
        {
            "gap": (across, found["gap"], {"long_name": "largest distance over distance travelled", "units": "1"}),
            "local_order": (across, local, {"long_name": "slope of the gap between neighbouring learning rates"}),
            "order": ("flow", local[-1], {"long_name": "measured order in the learning rate"}),
            "distance": (per_flow, found["distance"], {"long_name": "distance between iterate and flow"}),
            "t": (("learning_rate", "save"), times, {"long_name": "flow time", "units": "1"}),
            "steps": ("learning_rate", of_rule["steps"], {"long_name": "steps of the rule"}),
            "gradient_evaluations": ("learning_rate", of_rule["gradient_evaluations"]),
            "status": ("learning_rate", of_rule["status"].astype(np.int8), codes),
            "flow_gradient_evaluations": (across, found["flow_gradient_evaluations"]),
            "flow_status": (across, found["flow_status"], codes),
        },
        {"learning_rate": rates, "flow": list(flows)},
        {
            "study": "compare",
            "rule": type(rule).__name__,
            "horizon": float(horizon),
            "rtol": float(rtol),
            "after": float(after),
        },
    )


def steps_to_match(ds: xr.Dataset, error: float, flow: int = 0) -> float:
    """Steps that a rule would need to come within an error of its flow.

    From the last measured gap and order.

    `ds` comes from `compare`, `error` is a gap. Extrapolated unless `error` lies within the gaps measured; NaN if the
    rule diverged at the smallest learning rates.

    **Raises** `ValueError` for an error that is not positive.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.GradientDescent(lambda w: 0.5 * w**2, learning_rate=0.1)
    >>> ds = gf.compare(rule, jnp.array(1.0), [0.02, 0.01], 1.0, rtol=1e-5)
    >>> 1e4 < gf.studies.steps_to_match(ds, 1e-5) < 5e4
    True
    """
    _checks.check_positive("error", error)
    return extrapolate_steps(float(ds.steps[-1]), float(ds.gap[-1, flow]), float(ds.order[flow]), error)


def extrapolate_steps(steps: float, gap: float, order: float, error: float) -> float:
    """Steps for `error` when `steps` of them have this gap, and the gap is of this order in their size."""
    known = np.isfinite(gap) and order > 0 and error > 0
    return steps * (gap / error) ** (1 / order) if known else float("nan")


RULES: dict[str, Callable[[Any, float], AbstractRule]] = {
    "gradient_descent": GradientDescent,
    "heavy_ball": lambda problem, rate: HeavyBall(problem, rate, momentum=MOMENTUM),
    "nesterov": lambda problem, rate: Nesterov(problem, rate, momentum=MOMENTUM),
}
MOMENTUM = 0.9


def discrete_gap(
    dataset: Any,
    *,
    rule: str = "gradient_descent",
    width: int = 64,
    depth: int = 2,
    activation: Callable[[Any], Any] = jax.nn.tanh,
    loss: Callable[..., Any] = losses.square,
    horizon: float = 50.0,
    rates: int = 6,
    rtol: float = 1e-8,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """`compare` for gradient descent or momentum on an MLP.

    Learning rates go from just below `2 / sharpness` down by halves.

    Momentum methods have the fixed coefficient 0.9 and learning rates a hundredth of these: at larger ones, though
    stable, they oscillate, and follow no first-order flow. The first quarter of the run, with their transient, is not
    counted; it has to hold some 70 steps.

    **Arguments**: `dataset`: with `x (n, d)` and targets `y (n, k)`, as `gradflow.data.digits(labels="onehot")`;
    `rule`: `"gradient_descent"`, held against gradient flow and the modified flow of order 2, `"heavy_ball"` or
    `"nesterov"`, held against these and the second-order flow; the network; `horizon` of flow time; `rates`: number of
    learning rates.

    **Returns** what `compare` does, with the `sharpness` and the `loss` along the flow, over `time`, and the cost and
    error of flows at looser tolerances, over `flow_rtol`: what the flow costs for the accuracy that descent has.

    **Raises** `ValueError` for bad input, `SolveError` if the flow itself fails.

    >>> import gradflow as gf
    >>> data = gf.data.digits(n=40, labels="onehot")
    >>> ds = gf.studies.discrete_gap(data, width=4, depth=1, horizon=2.0, rates=2, rtol=1e-5, progress=False)
    >>> sorted(ds.sizes)
    ['flow', 'flow_rtol', 'learning_rate', 'save', 'time']
    """
    _checks.check_positive("horizon", horizon)
    _checks.check_count("rates", rates)
    rule = rule.replace("-", "_")
    _checks.check_choice("rule", rule, RULES)
    x, y = dataset
    problem = EmpiricalRisk(x, y, loss)
    out_size = None if np.ndim(y) == 1 else y.shape[1]
    model = MLP(x.shape[1], width, out_size, depth=depth, activation=activation, key=jax.random.key(seed))
    descent = rule == "gradient_descent"
    method, gradient_flow = RULES[rule](problem, 1.0), GradientFlow(problem)
    times = np.linspace(0, horizon, 51)
    exact = solve(gradient_flow, model, times, rtol=rtol)
    # Evaluated after the run: within the loop, the Lanczos iteration would double the time that compilation takes.
    sharpness, risk = _along(exact.params, Sharpness(problem, iterations=50), Loss(problem))
    learning_rates = 1.8 / float(np.max(sharpness)) * 0.5 ** np.arange(rates)
    learning_rates *= 1 if descent else (1 - MOMENTUM) ** 2
    options: dict[str, Any] = {"rtol": rtol, "progress": progress, "after": 0.0 if descent else horizon / 4}
    flows = {f"order {order}": lambda r, order=order: r.flow(order) for order in (1, 2)} if descent else None
    ds = compare(method, model, list(learning_rates), horizon, flows, **options)
    tolerances = [tol for tol in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6) if tol > 20 * rtol]
    costs, gaps = [], []
    for tol in tolerances:
        loose = solve(gradient_flow, model, times, rtol=tol, throw=False)
        distance, travelled = run_distance(loose.params, exact.params)
        costs.append(int(loose.stats["gradient_evaluations"]))
        gaps.append(float(jnp.max(distance) / travelled))
    own = {
        "flow_error": ("flow_rtol", np.array(gaps), {"long_name": "error of the flow over distance travelled"}),
        "loose_flow_gradient_evaluations": (
            "flow_rtol",
            np.array(costs),
            {"long_name": "gradients evaluated by the flow"},
        ),
        "sharpness": ("time", np.asarray(sharpness), {"long_name": "largest Hessian eigenvalue"}),
        "loss": ("time", np.asarray(risk), {"long_name": "training loss"}),
    }
    extra = xr.Dataset(own, {"flow_rtol": tolerances, "time": times})
    merged = ds.merge(extra)
    merged.attrs = {**ds.attrs, "data": str(getattr(dataset, "name", "unnamed")), "width": width, "depth": depth}
    return merged


def compare_table(ds: xr.Dataset) -> str:
    """What `compare` found, as text: one line per learning rate, and one per tolerance of the flow if there are any.

    A dash stands for what could not be measured, such as the gap of a rule that diverged.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.GradientDescent(lambda w: 0.5 * w**2, learning_rate=0.1)
    >>> print(gf.studies.compare_table(gf.compare(rule, jnp.array(1.0), [0.1], 1.0)).splitlines()[0].split()[:2])
    ['learning', 'rate']
    """
    columns = [f"gap to {name}" for name in ds.flow.values]
    widths = [max(16, len(column)) for column in columns]
    rule, horizon = ds.attrs["rule"], ds.attrs["horizon"]

    def row(values: Any, digits: str) -> str:
        shown = (f"{value:{digits}}" if np.isfinite(value) else "-" for value in values)
        return "".join(f" {text:>{width}}" for text, width in zip(shown, widths, strict=True))

    header = "".join(f" {column:>{width}}" for column, width in zip(columns, widths, strict=True))
    lines = [f"{'learning rate':>14} {'gradients':>10} {'status':>10}{header}"]
    for i, rate in enumerate(ds.learning_rate.values):
        cost, status = int(ds.gradient_evaluations[i]), Status(int(ds.status[i])).label
        lines.append(f"{rate:14.4g} {cost:10d} {status:>10}{row(ds.gap.values[i], '.3e')}")
    lines.append(f"{'measured order':>36}{row(ds.order.values, '.3f')}")
    lines.append(f"gap: largest distance from {rule} to the flow at equal times, over the distance the flow travels")
    since = f"from flow time {ds.attrs['after']:g} " if ds.attrs.get("after") else ""
    span = f"{since}until flow time {horizon:g}"
    lines.append(f"     {span}; its order is the slope between the two smallest learning rates")
    if "flow_rtol" in ds.coords:
        lines += ["", f"{'flow, rtol':>14} {'gradients':>10} {'error':>10} {'steps to match':>16}"]
        for tol, cost, error in zip(
            ds.flow_rtol.values, ds.loose_flow_gradient_evaluations.values, ds.flow_error.values, strict=True
        ):
            steps = extrapolate_steps(float(ds.steps[-1]), float(ds.gap[-1, 0]), float(ds.order[0]), float(error))
            needed = f"{steps:,.0f}" if np.isfinite(steps) else "-"
            lines.append(f"{tol:14.0e} {int(cost):10d} {error:10.1e} {needed:>16}")
        lines.append(f"error: of the flow, measured like the gap; reference: the flow at rtol {ds.attrs['rtol']:.0e}")
        lines.append(f"steps to match: of {rule}, for a gap as small, extrapolated with the measured order")
    return "\n".join(lines)


@fresh_jit
def _along(params: PyTree, *observables: Callable[[Any], Any]) -> tuple[Float[Array, " rows"], ...]:
    """Observables along a run, from its saved parameters."""
    rows, rest = eqx.partition(params, eqx.is_inexact_array)
    return jax.lax.map(lambda row: tuple(observable(eqx.combine(row, rest)) for observable in observables), rows)


@fresh_jit
def run_distance(a: PyTree, b: PyTree) -> tuple[Float[Array, " rows"], Float[Array, ""]]:
    """Distances row by row between two runs, and how far the second went."""
    first, second = (eqx.filter(tree, eqx.is_inexact_array) for tree in (a, b))

    def norm(difference: PyTree) -> Float[Array, " rows"]:
        leaves = jax.tree_util.tree_leaves(difference)
        return jnp.sqrt(sum(jnp.sum(leaf.reshape(leaf.shape[0], -1) ** 2, axis=1) for leaf in leaves))

    travelled = jax.tree_util.tree_map(lambda leaf: leaf - leaf[:1], second)
    return norm(jax.tree_util.tree_map(jnp.subtract, first, second)), jnp.max(norm(travelled))
