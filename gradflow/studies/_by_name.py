"""What belongs to a study, found by its name: the figure of `small-init` is `small_init` in `plot/_small_init.py`."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import xarray as xr

from gradflow._checks import fail


def studies_in(room: str) -> list[str]:
    """The studies that have a file in a room, such as `"gradflow.plot"`.

    >>> from gradflow.studies._by_name import studies_in
    >>> "small-init" in studies_in("gradflow.plot")
    True
    """
    # A room has files of its own as well, such as the style of figures, which share a name with no study.
    return [file.removeprefix("_").replace("_", "-") for file in sorted(_files(room) & _files(__package__))]


def function_for(ds: xr.Dataset, room: str, advice: str) -> Callable[[xr.Dataset], Any]:
    """The function of the caller's room that belongs to the study which wrote a data set.

    **Raises** `ValueError`, with the advice, for a data set that no study wrote.
    """
    study, available = ds.attrs.get("study"), studies_in(room)
    if study not in available:
        listed = ", ".join(repr(name) for name in available)
        raise fail("ds", f"carry the attribute `study`, one of {listed}", repr(study), advice)
    name = study.replace("-", "_")
    return getattr(importlib.import_module(f"{room}._{name}"), name)


FORMER_NAMES = {
    "mean-field": {"limit_met": "limit_converged"},
    "phase-diagram": {"predicted": "predicted_settled_risk"},
    "two-directions": {"share": "driving_fraction"},
}
"""Variables of data sets that earlier versions wrote under another name, by study."""


def with_current_names(ds: xr.Dataset) -> xr.Dataset:
    """The data set of a study, with the variables of earlier versions under the names of this one."""
    former = FORMER_NAMES.get(ds.attrs.get("study", ""), {})
    return ds.rename({old: new for old, new in former.items() if old in ds})


def question_of(ds: xr.Dataset) -> str:
    """What the study asks that wrote a data set; empty for a data set that no study wrote.

    >>> import xarray as xr
    >>> from gradflow.studies._by_name import question_of
    >>> question_of(xr.Dataset().assign_attrs(study="momentum"))
    'Which is faster, heavy ball or Nesterov, and do their flows tell?'
    """
    study = str(ds.attrs.get("study", "")).replace("-", "_")
    if f"_{study}" not in _files(__package__):
        return ""
    return str(importlib.import_module(f"{__package__}._{study}").QUESTION)


def _files(room: str | None) -> set[str]:
    return {info.name for info in pkgutil.iter_modules(importlib.import_module(str(room)).__path__)}
