"""The report of a study or of a sweep."""

import json
from collections.abc import Hashable, Iterator

import numpy as np
import xarray as xr

from gradflow._solution import Status
from gradflow.plot import draw, members
from gradflow.plot._members import grid_of
from gradflow.reports._html import (
    PROVENANCE,
    and_error,
    drawing,
    escape,
    number,
    page,
    pairs,
    pre,
    section,
    table,
    versions,
)
from gradflow.studies._by_name import question_of
from gradflow.tables import text

MOST_ROWS = 256
"""Members that a table lists, at most; the store has them all."""

COST = ("wall_seconds", "evaluations_spent")
"""Attributes that tell what all runs have taken together."""

NOT_SETTINGS = {*PROVENANCE, *COST, "versions", "runs", "config", "command", "study", "format", "time_unit"}
"""Attributes that have a place of their own in a report, or none."""

MISSING = "missing", "has not been run yet: the same command goes on with it"


def dataset_page(ds: xr.Dataset) -> str:
    """The page of a study, or of a sweep that no study made."""
    study = bool(question_of(ds)) and _complete(ds)
    title = question_of(ds) or f"Sweep of {ds.attrs.get('flow', 'runs')} over {', '.join(grid_of(ds)) or 'a grid'}"
    about = f"gradflow, study {ds.attrs['study']}" if question_of(ds) else "gradflow, a sweep"
    return page(
        title,
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">{escape(about)}{_when(ds)}</p>',
        section("Command", _command(ds)),
        section("Figure", _figure(ds, study, title)),
        section("Results", pre(text(ds)) if study else _averages(ds)),
        section("Runs that failed", _failures(ds)),
        section("Runs", _members(ds)),
        section("Cost", _cost(ds)),
        section("Settings", _settings(ds)),
        section("Versions", _versions(ds)),
    )


def _complete(ds: xr.Dataset) -> bool:
    return "status" not in ds or bool(np.all(ds.status.values != -1))


def _when(ds: xr.Dataset) -> str:
    created = ds.attrs.get("created")
    return f", computed {escape(created)}" if created else ""


def _command(ds: xr.Dataset) -> str:
    if "command" in ds.attrs:
        return pre(str(ds.attrs["command"]))
    return "<p>Computed from Python; the settings are below.</p>"


def _figure(ds: xr.Dataset, study: bool, title: str) -> str:
    try:
        return drawing(draw(ds) if study else members(ds), title)
    except ValueError as error:  # a sweep without anything over time, or one of which parts are missing
        return f"<p>{escape(error)}</p>"


def statuses(ds: xr.Dataset) -> Iterator[xr.DataArray]:
    """The variables of a data set that tell how runs ended: of a study there may be several kinds of runs."""
    for name, value in ds.data_vars.items():
        if str(name) == "status" or str(name).endswith("_status") or str(name).startswith("status_"):
            yield value


def _failures(ds: xr.Dataset) -> str:
    """Every run that failed or is missing, with what its status means and what helps."""
    num_failed, parts = 0, []
    for status in statuses(ds):
        codes = status.values.astype(int)
        bad = [tuple(index) for index in np.argwhere((codes > Status.STOPPED) | (codes < 0))]
        num_failed += len(bad)
        if bad:
            names = [*(str(dim) for dim in status.dims), "status", "until t", "what it means, and what helps"]
            rows = [[*_place(status, index), *_ending(ds, status, index)] for index in bad[:MOST_ROWS]]
            parts.append(table(names, rows, text=names))
            parts += [f"<p>{len(bad) - MOST_ROWS} more are in the store.</p>"] if len(bad) > MOST_ROWS else []
    total = sum(status.size for status in statuses(ds))
    if not total:
        return "<p>The study keeps no status of its runs: one that failed would have ended it with an error.</p>"
    return "\n".join([f"<p>{num_failed or 'None'} of {total} runs.</p>", *parts])


def _place(value: xr.DataArray, index: tuple[int, ...]) -> list[str]:
    return [number(value[dim].values[i]) for dim, i in zip(value.dims, index, strict=True)]


def _ending(ds: xr.Dataset, status: xr.DataArray, index: tuple[int, ...]) -> list[str]:
    code = int(status.values[index])
    label, remedy = MISSING if code < 0 else (Status(code).label, Status(code).remedy)
    reached = str(status.name).replace("status", "t_final")
    available = reached in ds and ds[reached].dims == status.dims
    return [label, number(ds[reached].values[index]) if available else "", remedy]


def _members(ds: xr.Dataset) -> str:
    """One line for each run: where it is on the grid, what was found, with the error or the drift beside it."""
    if "status" not in ds or not ds.status.dims:
        return ""
    dims, codes = ds.status.dims, ds.status.values.astype(int)
    columns = [str(name) for name, value in ds.data_vars.items() if value.dims == dims and name != "status"]
    columns = sorted((name for name in columns if not name.startswith("error_")), key=_rank)
    columns = [name for name in columns if _rank(name) < 2 or np.any(ds[name].values != 0)]
    indices = list(np.ndindex(codes.shape))
    rows = []
    for index in indices[:MOST_ROWS]:
        label = MISSING[0] if codes[index] < 0 else Status(int(codes[index])).label
        rows.append([*_place(ds.status, index), label, *(_with_error(ds, name, index) for name in columns)])
    last = {name: ds[name].isel(time=-1) for name in _over_time(ds, dims)}
    for row, index in zip(rows, indices, strict=False):
        row += [and_error(value.values[index], _error_of(ds, name, index)) for name, value in last.items()]
    names = [*(str(dim) for dim in dims), "status", *columns, *(f"{name} at the end" for name in last)]
    more = f"<p>{len(indices) - MOST_ROWS} more are in the store.</p>" if len(indices) > MOST_ROWS else ""
    return table(names, rows, text=["status"]) + more


def _rank(name: str) -> int:
    """What was found comes first, then drifts, then counts."""
    counts = ("steps", "accepted", "rejected", "hessian_vector_products")
    return 2 if name in counts or name.endswith("gradient_evaluations") else int(name.startswith("drift_"))


def _over_time(ds: xr.Dataset, dims: tuple[Hashable, ...]) -> list[str]:
    """Scalars over time that are available for every run."""
    names = [str(name) for name, value in ds.data_vars.items() if value.dims == (*dims, "time")]
    return [name for name in names if name != "saved_time" and ds[name].dtype.kind in "biuf"]


def _error_of(ds: xr.Dataset, name: str, index: tuple[int, ...]) -> float:
    available = f"error_{name}" in ds and ds[f"error_{name}"].dims == ds.status.dims
    return float(ds[f"error_{name}"].values[index]) if available else float("nan")


def _with_error(ds: xr.Dataset, name: str, index: tuple[int, ...]) -> str:
    return and_error(ds[name].values[index], _error_of(ds, name, index))


def _averages(ds: xr.Dataset) -> str:
    """Means over seeds with their standard errors; of a sweep without seeds, a line that says so."""
    if "seed" not in ds.sizes or "status" not in ds or ds.sizes["seed"] < 2 or "seed" not in ds.status.dims:
        return "<p>No seeds to average over: every run is listed below, with drifts and estimated errors.</p>"
    dims = ds.status.dims
    names = (["loss_last"] if "loss_last" in ds else []) + _over_time(ds, dims)
    ended = (ds.status >= 0) & (ds.status <= int(Status.STOPPED))
    columns = {}
    for name in names:
        value = (ds[name].isel(time=-1) if "time" in ds[name].dims else ds[name]).where(ended)
        columns[name] = value.mean("seed"), value.std("seed", ddof=1) / np.sqrt(value.count("seed"))
    other = [dim for dim in dims if dim != "seed"]
    counts = ended.sum("seed").transpose(*other)
    rows = []
    for index in list(np.ndindex(counts.shape))[:MOST_ROWS]:
        cells = [and_error(*(part.transpose(*other).values[index] for part in both)) for both in columns.values()]
        rows.append([*_place(counts, index), str(int(counts.values[index])), *cells])
    note = "Mean over seeds and its standard error; runs that failed are left out. Observables are at the last time."
    return f"<p>{note}</p>" + table([*(str(dim) for dim in other), "runs", *names], rows)


def _cost(ds: xr.Dataset) -> str:
    """What was evaluated in all, and how long it took, as far as the store tells."""
    rows = []
    for name, value in ds.data_vars.items():
        if str(name).endswith(("gradient_evaluations", "hessian_vector_products")) or str(name) == "steps":
            counted = value.values[value.values > 0]
            unknown = int(np.count_nonzero(value.values < 0))
            also = f" ({unknown} runs not counted)" if unknown else ""
            if counted.size or unknown:
                rows.append((str(name), f"{number(np.sum(counted))} in all{also}"))
    rows += [(name, number(ds.attrs[name])) for name in COST if name in ds.attrs]
    return pairs(rows) if rows else ""


def _settings(ds: xr.Dataset) -> str:
    rows = [(str(name), str(value)) for name, value in ds.attrs.items() if name not in NOT_SETTINGS]
    config = {k: v for k, v in json.loads(ds.attrs.get("config", "{}")).items() if k not in ds.attrs}
    rows += [(name, json.dumps(value)) for name, value in config.items()]
    sizes = ", ".join(f"{size} {dim}" for dim, size in ds.sizes.items())
    return pairs([*rows, ("sizes", sizes)])


def _versions(ds: xr.Dataset) -> str:
    available = {str(name): value for name, value in ds.attrs.items()}
    note = "<p>The data set does not tell with which versions it was computed.</p>"
    return versions(available) if "versions" in available else note
