"""How far is gradient descent, or momentum, from its flows on a network? `compare` for an MLP."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, PyTree

from gradflow import _checks
from gradflow.data import Dataset
from gradflow.data._dataset import InputsAndTargets
from gradflow.data._load import load_some
from gradflow.flows import GradientFlow
from gradflow.models import MLP
from gradflow.observables import Loss, Sharpness
from gradflow.problems import EmpiricalRisk, losses
from gradflow.programs import fresh_jit
from gradflow.rules import AbstractRule, GradientDescent, HeavyBall, Nesterov
from gradflow.runs._solve import solve
from gradflow.studies._compare import compare, run_distance

RULES: dict[str, Callable[[EmpiricalRisk, float], AbstractRule]] = {
    "gradient_descent": GradientDescent,
    "heavy_ball": lambda problem, rate: HeavyBall(problem, rate, momentum=MOMENTUM),
    "nesterov": lambda problem, rate: Nesterov(problem, rate, momentum=MOMENTUM),
}
MOMENTUM = 0.9


def discrete_gap(
    dataset: InputsAndTargets,
    *,
    rule: str = "gradient_descent",
    width: int = 64,
    depth: int = 2,
    activation: Callable[[Array], Array] = jax.nn.tanh,
    loss: Callable[[Array, Array], Array] = losses.square,
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
    after = 0.0 if descent else horizon / 4
    flows = {f"order {order}": lambda r, order=order: r.flow(order) for order in (1, 2)} if descent else None
    ds = compare(method, model, list(learning_rates), horizon, flows, rtol=rtol, after=after, progress=progress)
    tolerances = [tol for tol in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6) if tol > 20 * rtol]
    costs, gaps = [], []
    for tol in tolerances:
        loose = solve(gradient_flow, model, times, rtol=tol, throw=False)
        distance, travelled = run_distance(loose.params, exact.params)
        costs.append(int(loose.stats["gradient_evaluations"]))
        gaps.append(float(jnp.max(distance) / travelled))
    defaults = {
        "flow_error": ("flow_rtol", np.array(gaps), {"long_name": "error of the flow over distance travelled"}),
        "loose_flow_gradient_evaluations": (
            "flow_rtol",
            np.array(costs),
            {"long_name": "gradients evaluated by the flow"},
        ),
        "sharpness": ("time", np.asarray(sharpness), {"long_name": "largest Hessian eigenvalue"}),
        "loss": ("time", np.asarray(risk), {"long_name": "training loss"}),
    }
    extra = xr.Dataset(defaults, {"flow_rtol": tolerances, "time": times})
    merged = ds.merge(extra)
    merged.attrs = {**ds.attrs, "data": str(getattr(dataset, "name", "unnamed")), "width": width, "depth": depth}
    return merged


def quick(rule: str = "gradient_descent") -> dict[str, int | float]:
    """Arguments of `discrete_gap` that take about 20 seconds, on 100 samples."""
    few: dict[str, int | float] = {"width": 16, "depth": 1, "rates": 4}
    # The transient of momentum takes its time.
    return few | ({"horizon": 10.0} if rule == "gradient_descent" else {})


def load_data(
    name: str = "digits", *, path: str | None = None, samples: int | None = None, quick: bool = False
) -> Dataset:
    """A data set by name as `discrete_gap` takes it: all classes, one output each, centred."""
    samples = 100 if quick and samples is None else samples
    return load_some(name, path=path, samples=samples, centre=True, labels="onehot")


@fresh_jit
def _along(params: PyTree, *observables: Callable[[PyTree], Array]) -> tuple[Float[Array, " rows"], ...]:
    """Observables along a run, from its saved parameters."""
    rows, static = eqx.partition(params, eqx.is_inexact_array)
    return jax.lax.map(lambda row: tuple(observable(eqx.combine(row, static)) for observable in observables), rows)
