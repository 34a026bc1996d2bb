"""How far is a discrete rule from its flows? The gap over learning rates, its order, and the steps to a given error."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, PyTree

from gradflow import _checks
from gradflow._solution import Status, moving
from gradflow.flows import AbstractFlow
from gradflow.programs import fresh_jit
from gradflow.rules import AbstractRule
from gradflow.runs._iterate import iterate_to
from gradflow.runs._member import Solver
from gradflow.runs._progress import Bar
from gradflow.runs._solve import solve

QUESTION = "How far is a discrete rule from its flow, at which order, and what does an accuracy cost?"
"""What the study asks; the heading of its report."""


def compare(
    rule: AbstractRule,
    params: PyTree,
    learning_rates: Sequence[float],
    horizon: float,
    flows: Mapping[str, Callable[[AbstractRule], AbstractFlow]] | None = None,
    *,
    rtol: float = 1e-8,
    saves: int = 50,
    solver: Solver | None = None,
    after: float = 0.0,
    progress: bool = False,
    trainable: PyTree = None,
) -> xr.Dataset:
    """The gap between a rule and its flows over learning rates.

    On a fixed horizon of flow time:

        gap = max_k |theta_k - X(t_k)| / max_k |X(t_k) - X(0)|,       t_k = rule.time(k) <= horizon

    A flow of order `p` has a gap of order `eta^p`. One whose `t0` lies after 0 is compared from there on, with
    `X(t0)` in the place of `X(0)`; its distances before are NaN.

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

    **Raises** `ValueError` for bad input, for a rule without a known limit, and for a flow that starts after the
    horizon.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.GradientDescent(lambda w: 0.5 * jnp.sum(jnp.array([1.0, 3.0]) * w**2), learning_rate=0.1)
    >>> ds = gf.compare(rule, jnp.ones(2), [0.02, 0.01, 0.005], 1.0, rtol=1e-5)
    >>> round(float(ds.order[0]), 1)
    1.0
    """
    rates = _rates(rule, learning_rates)
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
    counts = _whole_steps(tuned, rates, horizon)
    rows = min(saves, *counts)

    how = _Solving(rtol, solver, trainable)
    columns = []
    with Bar("learning rates", len(tuned), unit="run", show=progress) as bar:
        for current, count in zip(tuned, counts, strict=True):
            ks = np.round(np.linspace(0, count, rows + 1)).astype(int)
            columns.append(_measure_gap(current, params, ks, flows, after, how))
            bar.advance()
    about = {"rule": type(rule).__name__, "horizon": float(horizon), "rtol": float(rtol), "after": float(after)}
    return _dataset({name: np.stack([one[name] for one in columns]) for name in columns[0]}, rates, list(flows), about)


class _Solving(NamedTuple):
    """How the flows are solved, and which parameters flow."""

    rtol: float
    solver: Solver | None
    trainable: PyTree


def _rates(rule: AbstractRule, learning_rates: Sequence[float]) -> np.ndarray:
    """The learning rates, the largest first."""
    if not isinstance(rule, AbstractRule):
        raise _checks.fail("rule", "be a gradflow rule", f"of type {type(rule).__name__}")
    rates = np.ravel(np.asarray(learning_rates, float))
    if rates.size < 1 or len(np.unique(rates)) != rates.size:
        raise _checks.fail("learning_rates", "be distinct numbers, at least one", repr(learning_rates))
    rates = np.sort(rates)[::-1]
    _checks.check_positive("learning_rates", rates)
    return rates


def _whole_steps(tuned: list[AbstractRule], rates: np.ndarray, horizon: float) -> list[int]:
    """How many steps of each rule fit into the horizon."""
    # A step that ends at the horizon up to rounding still fits.
    counts = [int(np.floor(horizon / float(r.time(1) - r.time(0)) * (1 + 1e-9))) for r in tuned]
    if min(counts) < 1:
        actual = f"{horizon:g}, shorter than one step at learning rate {rates[int(np.argmin(counts))]:g}"
        raise _checks.fail("horizon", "hold at least one step of every learning rate", actual)
    return counts


def _measure_gap(
    rule: AbstractRule,
    params: PyTree,
    ks: np.ndarray,
    flows: Mapping[str, Callable[[AbstractRule], AbstractFlow]],
    after: float,
    how: _Solving,
) -> dict[str, np.ndarray | np.integer]:
    """One run of a rule and those of its flows at the same times."""
    discrete = iterate_to(rule, params, ks, throw=False, trainable=how.trainable)
    times = np.asarray(discrete.ts, float)
    gaps, distances, costs, codes = [], [], [], []
    for name, make in flows.items():
        flow = make(rule)
        # A flow may start from what the rule has become after some steps.
        begun = times >= float(flow.t0)
        if not np.any(begun & (times >= after)):
            actual = f"{times[-1]:g}, while the flow {name!r} starts at {float(flow.t0):g}"
            raise _checks.fail("horizon", "lie beyond the start of every flow", actual)
        exact = solve(flow, params, times[begun], **how._asdict(), throw=False, max_steps=1_000_000)
        iterates = jax.tree_util.tree_map(lambda leaf, begun=begun: leaf[begun], moving(discrete.params, discrete.held))
        distance, travelled = run_distance(iterates, moving(exact.params, exact.held))
        distances.append(np.full(times.size, np.nan))
        distances[-1][begun] = np.asarray(distance, float)
        gaps.append(float(np.max(distances[-1][begun & (times >= after)]) / float(travelled)))
        costs.append(int(exact.stats["gradient_evaluations"]))
        codes.append(int(exact.code))
    return {
        "gap": np.array(gaps),
        "distance": np.stack(distances),
        "t": times,
        "steps": np.int64(int(discrete.stats["steps"])),
        "gradient_evaluations": np.int64(int(discrete.stats["gradient_evaluations"])),
        "status": np.int8(int(discrete.code)),
        "flow_gradient_evaluations": np.array(costs, np.int64),
        "flow_status": np.array(codes, np.int8),
    }


def _dataset(
    columns: dict[str, np.ndarray], rates: np.ndarray, flows: list[str], about: Mapping[str, object]
) -> xr.Dataset:
    local = np.full(columns["gap"].shape, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        local[1:] = np.diff(np.log(columns["gap"]), axis=0) / np.diff(np.log(rates))[:, None]
    across, per_flow = ("learning_rate", "flow"), ("learning_rate", "flow", "save")
    codes = {"flag_values": list(range(len(Status.labels()))), "flag_meanings": " ".join(Status.labels())}
    return xr.Dataset(
        {
            "gap": (across, columns["gap"], {"long_name": "largest distance over distance travelled", "units": "1"}),
            "local_order": (across, local, {"long_name": "slope of the gap between neighbouring learning rates"}),
            "order": ("flow", local[-1], {"long_name": "measured order in the learning rate"}),
            "distance": (per_flow, columns["distance"], {"long_name": "distance between iterate and flow"}),
            "t": (("learning_rate", "save"), columns["t"], {"long_name": "flow time", "units": "1"}),
            "steps": ("learning_rate", columns["steps"], {"long_name": "steps of the rule"}),
            "gradient_evaluations": ("learning_rate", columns["gradient_evaluations"]),
            "status": ("learning_rate", columns["status"], codes),
            "flow_gradient_evaluations": (across, columns["flow_gradient_evaluations"]),
            "flow_status": (across, columns["flow_status"], codes),
        },
        {"learning_rate": rates, "flow": flows},
        {"study": "compare", **about},
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
    valid = np.isfinite(gap) and order > 0 and error > 0
    return steps * (gap / error) ** (1 / order) if valid else float("nan")


@fresh_jit
def run_distance(a: PyTree, b: PyTree) -> tuple[Float[Array, " rows"], Float[Array, ""]]:
    """Distances row by row between two runs, and how far the second went."""
    first, second = (eqx.filter(tree, eqx.is_inexact_array) for tree in (a, b))

    def norm(difference: PyTree) -> Float[Array, " rows"]:
        leaves = jax.tree_util.tree_leaves(difference)
        return jnp.sqrt(sum(jnp.sum(leaf.reshape(leaf.shape[0], -1) ** 2, axis=1) for leaf in leaves))

    travelled = jax.tree_util.tree_map(lambda leaf: leaf - leaf[:1], second)
    return norm(jax.tree_util.tree_map(jnp.subtract, first, second)), jnp.max(norm(travelled))
