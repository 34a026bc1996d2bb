"""What `sweep` is given, checked before anything is built."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import ArrayLike, PyTree

from gradflow import _checks
from gradflow.runs._member import Solver
from gradflow.runs._record import Observable
from gradflow.runs._until import Until, check_until
from gradflow.sweeps._dataset import RESERVED

ObservablesOf = Callable[[Any], Mapping[str, Observable]]
"""What is observed of a member, by name, from its flow or rule: of whichever class `build` returns, so of any."""


class Settings(NamedTuple):
    """How members are run and what is observed of them, as `sweep` is given it."""

    observe: Mapping[str, Observable] | ObservablesOf | None
    solver: Solver | None
    rtol: float
    atol: float | None
    save_params: bool
    until: Until | None
    max_steps: int
    jumps: ArrayLike | Sequence[float] | None
    longest_step: float | None
    batch: int | None
    pad: bool | None
    trainable: PyTree


def check_settings(settings: Settings, callback: object) -> None:
    """Refuses settings that no member can be run with."""
    _checks.check_count("max_steps", settings.max_steps)
    if settings.batch is not None:
        _checks.check_count("batch", settings.batch)
    check_until(settings.until)
    if callback is not None:
        _checks.check_callable("callback", callback, "fn(snapshot), see gradflow.sweeps.SweepSnapshot")


def check_build(build: Callable[..., object], grid: Mapping[str, np.ndarray]) -> None:
    """Refuses what cannot be called with a value of each axis."""
    call = f"build({', '.join(f'{name}=...' for name in grid)})"
    _checks.check_callable("build", build, call)
    try:
        signature = inspect.signature(build)
    except ValueError:  # not known
        return
    try:
        signature.bind(**{name: values[0] for name, values in grid.items()})
    except TypeError as error:
        raise _checks.fail("build", f"be callable as {call}", f"one that takes {signature}") from error


def check_axes(axes: object) -> dict[str, np.ndarray]:
    """The axes as arrays, by name."""
    if not isinstance(axes, Mapping) or not axes:
        actual = "empty" if isinstance(axes, Mapping) else f"of type {type(axes).__name__}"
        raise _checks.fail("axes", "be a dictionary name -> values with at least one axis", actual)
    grid = {}
    for name, values in axes.items():
        if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
            actual = f"{name!r}, which every sweep has" if name in RESERVED else repr(name)
            raise _checks.fail("axes", "have names that are Python identifiers of their own", actual)
        grid[name] = _check_axis(f"axes[{name!r}]", values)
    return grid


def _check_axis(argument: str, values: object) -> np.ndarray:
    must = "be a non-empty sequence of values, all numbers or all strings"
    advice = "Build what they stand for inside `build`."
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise _checks.fail(argument, must, repr(values), f"A single value goes into a list: [{values!r}].")
    given = list(values)
    try:
        array = np.asarray(given)
    except ValueError as error:  # rows of unequal lengths
        raise _checks.fail(argument, must, repr(given), advice) from error
    mixed = array.dtype.kind == "U" and not all(isinstance(value, str) for value in given)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "fiubU" or mixed:
        raise _checks.fail(argument, must, repr(given), advice)
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise _checks.fail(argument, "hold no NaN", repr(given))
    if len(np.unique(array)) != array.size:
        raise _checks.fail(argument, "hold each value once", repr(array.tolist()))
    return array
