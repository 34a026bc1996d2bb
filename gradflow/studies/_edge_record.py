"""What the study of the edge of stability records of its runs, and the data set that it returns."""

from typing import Any

import numpy as np
import xarray as xr

from gradflow._solution import Status
from gradflow._tree import split
from gradflow.studies._edge_flows import REASONS, WARM_UP, Case, stops_being_valid
from gradflow.studies._edge_runs import RuleRuns, Setting, follow, leading_eigenvalues, refusal, started, unit_of_time

DEPARTED = 0.05
"""Distance over distance travelled from which on a flow has left the rule."""

RULE, RUN, FLOW = ("rule", "share"), ("rule", "share", "seed"), ("case", "share", "seed")
VARIABLES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "learning_rate": (RULE, "learning rate", "flow time per step"),
    "threshold": (RULE, "sharpness beyond which the rule is unstable", "1 / flow time"),
    "travelled": (RUN, "distance of the last midpoint from the start", "parameters"),
    "late_loss": (RUN, "loss averaged over the second half", "1"),
    "loss": ((*RUN, "save"), "loss, averaged as midpoints are", "1"),
    "rule_eigenvalue": ((*RUN, "save", "pair"), "largest eigenvalues at the midpoints", "1 / flow time"),
    "distance": ((*FLOW, "save"), "distance of the flow from the midpoint", "parameters"),
    "predicted_loss": ((*FLOW, "save"), "mean loss that the flow predicts", "1"),
    "eigenvalue": ((*FLOW, "save", "pair"), "largest eigenvalues along the flow", "1 / flow time"),
    "mean_distance": (FLOW, "distance over distance travelled, mean over steps", "1"),
    "last_distance": (FLOW, "distance over distance travelled, last step", "1"),
    "loss_error": (FLOW, "relative error of the predicted mean loss, second half", "1"),
    "sharpness_error": (FLOW, "relative error of the mean sharpness, second half", "1"),
    "gradients": (FLOW, "gradients that the flow takes", "1 / step"),
    "products": (FLOW, "products with the Hessian that the flow takes", "1 / step"),
    "delay": (FLOW, "delay of the oscillation of the rule that the central flow does not have", "steps"),
    "departure": (FLOW, "first saved step at which the distance is a twentieth of that travelled", "step"),
    "valid_until": (FLOW, "step at which the flow stops being valid", "step"),
}
Record = dict[str, np.ndarray]


def blank(setting: Setting, several: dict[str, tuple[Any, ...]], cases: int) -> Record:
    """Arrays to be filled in."""
    sizes = {"case": cases, "rule": len(several["rules"]), "share": len(several["shares"])}
    sizes |= {"seed": len(several["seeds"]), "save": setting.ks.size, "pair": 2}
    record = {name: np.full([sizes[dim] for dim in over], np.nan) for name, (over, *_) in VARIABLES.items()}
    shape = [sizes[dim] for dim in FLOW]
    return record | {"status": np.full(shape, -1, np.int8), "reason": np.full(shape, "", "<U16")}


def note_rule(record: Record, at: tuple[int, int], setting: Setting, runs: RuleRuns) -> None:
    """Fills in what a rule does at one learning rate."""
    late = runs.losses.shape[1] // 2
    record["learning_rate"][at], record["threshold"][at] = float(runs.rule.learning_rate), runs.threshold
    record["travelled"][at], record["late_loss"][at] = runs.travelled, runs.losses[:, late:].mean(axis=1)
    record["loss"][at] = runs.losses[:, runs.ks - 1]
    for i, model in enumerate(runs.models):
        paths = runs.midpoints[i], runs.roots[i]
        record["rule_eigenvalue"][at][i] = np.asarray(leading_eigenvalues(setting.problem, model, *paths))


def note_flow(
    record: Record,
    at: tuple[tuple[int, int], tuple[int, int]],
    setting: Setting,
    runs: RuleRuns,
    case: Case,
    part: tuple[Any, bool],
) -> None:
    """Fills in what a flow does at one learning rate; `at` is where its rule stands, and where it stands itself."""
    of_rule, of_flow = at
    chosen = []
    for i in range(len(runs.models)):
        reason = refusal(case, runs, i)
        if reason:
            record["valid_until"][of_flow][i], record["reason"][of_flow][i] = 0.0, reason
        else:
            chosen.append(i)
    if not chosen:
        return
    ds = follow(case, runs, chosen, setting.rtol, *part)
    for row, i in enumerate(chosen):
        one, here = ds.isel(start=row), (*of_flow, i)
        _note_path(record, here, setting, runs, one)
        steps = runs.ks[-1] - (WARM_UP if case.remembers else 0)
        record["gradients"][here] = int(one.gradient_evaluations) / steps
        record["products"][here] = int(one.hessian_vector_products) / steps
        record["status"][here] = int(one.status)
        if "error_delay" in one:
            record["delay"][here] = float(one.error_delay) / unit_of_time(runs.rule)
        _sum_up(record, (*of_rule, i), here, runs)
        _judge(record, here, runs, case, i)


def _note_path(record: Record, here: tuple[int, int, int], setting: Setting, runs: RuleRuns, one: xr.Dataset) -> None:
    """Fills in what is known at the save times of a flow, which are the last ones of the study."""
    rows = slice(runs.ks.size - one.sizes["time"], None)
    points = one.params.values
    record["distance"][here][rows] = np.linalg.norm(points - runs.midpoints[here[-1]][rows], axis=1)
    record["predicted_loss"][here][rows] = one.predicted_loss.values
    roots = one.root.values if "root" in one else np.ones_like(points)
    finite = np.all(np.isfinite(points), axis=1) & np.all(np.isfinite(roots), axis=1)
    if finite.any():
        # Rows that are not known repeat the last one that is: one program for all runs.
        index = np.where(finite, np.arange(len(points)), int(np.flatnonzero(finite)[-1]))
        values = leading_eigenvalues(setting.problem, runs.models[here[-1]], points[index], roots[index])
        record["eigenvalue"][here][rows][finite] = np.asarray(values)[finite]


def _sum_up(record: Record, of_rule: tuple[int, int, int], here: tuple[int, int, int], runs: RuleRuns) -> None:
    """Fills in the numbers that sum up a run of a flow."""
    relative = record["distance"][here] / record["travelled"][of_rule]
    left, late = np.flatnonzero(relative > DEPARTED), runs.ks > runs.ks[-1] / 2
    reached = relative[np.isfinite(relative)]
    record["mean_distance"][here] = reached.mean() if reached.size else np.nan
    record["last_distance"][here] = relative[-1]
    record["departure"][here] = runs.ks[left[0]] if left.size else np.nan
    predicted = np.mean(record["predicted_loss"][here][late])
    record["loss_error"][here] = predicted / record["late_loss"][of_rule] - 1
    measured = np.mean(record["rule_eigenvalue"][of_rule][late, 0])
    record["sharpness_error"][here] = np.mean(record["eigenvalue"][here][late, 0]) / measured - 1


def _judge(record: Record, here: tuple[int, int, int], runs: RuleRuns, case: Case, i: int) -> None:
    """Fills in where a flow stops being valid."""
    flow, params = started(case, runs, i)
    kinks = bool(flow.kinks(*split(params)))
    numbers = runs.threshold, int(record["status"][here]), float(np.nan_to_num(record["delay"][here])), kinks
    until, reason = stops_being_valid(case, runs.ks, record["eigenvalue"][here], *numbers)
    record["valid_until"][here], record["reason"][here] = until, reason


def collected(
    record: Record, setting: Setting, several: dict[str, tuple[Any, ...]], cases: list[tuple[str, str]], data: str
) -> xr.Dataset:
    """The data set of the study."""
    variables: dict[str, Any] = {}
    for name, (over, text, units) in VARIABLES.items():
        variables[name] = (over, record[name], {"long_name": text, "units": units})
    codes = {"flag_values": list(range(len(Status.labels()))), "flag_meanings": " ".join(Status.labels())}
    variables["status"] = (FLOW, record["status"], {"long_name": "how the run ended; -1: refused to start"} | codes)
    about = {"long_name": "why the flow stops being valid"} | {f"reason_{name}": text for name, text in REASONS.items()}
    variables["reason"] = (FLOW, record["reason"], about)
    names = [list(names) for names in zip(*cases, strict=True)]
    coordinates = {"rule": list(several["rules"]), "share": list(several["shares"]), "seed": list(several["seeds"])}
    coordinates |= {"of_rule": ("case", names[0]), "flow": ("case", names[1]), "step": ("save", setting.ks)}
    attributes = {"study": "edge", "data": data, "rtol": setting.rtol, "departed": DEPARTED, **setting.about}
    return xr.Dataset(variables, coordinates, attributes)
