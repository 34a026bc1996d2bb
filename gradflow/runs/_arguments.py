"""The arguments that runs have in common, checked: what they start from, times, tolerances, sizes."""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import ArrayLike, Bool, Float, PyTree, Scalar

from gradflow import _checks
from gradflow._solution import Solution
from gradflow._tree import rest_of, split
from gradflow.flows import AbstractFlow
from gradflow.protocols import ChecksStart, offered
from gradflow.rules import AbstractRule
from gradflow.runs._leaves import warn_of_leaves
from gradflow.runs._record import Observable
from gradflow.runs._until import Until
from gradflow.solvers import StepControl


class Recorded(NamedTuple):
    """What a run keeps on its way, and what ends it early, as `solve` and `iterate` are given it."""

    observe: Mapping[str, Observable] | None
    save_params: bool
    until: Until | None


def halves(
    what: AbstractFlow | AbstractRule,
    params: PyTree | Solution,
    trainable: PyTree,
    title: str,
    checkpoint: type[eqx.Module],
) -> tuple[PyTree, PyTree]:
    """The parameters from which a flow or rule starts: those that flow, and the rest.

    `params` may be a `Solution` that is to be continued, if it is one of `title` whose checkpoint is of the type given.
    """
    if not isinstance(params, Solution):
        if trainable is None:
            warn_of_leaves(params)
        return split(params, trainable)
    _checks.check_no_filter(trainable)
    advice = "Pass its `final` parameters, to start anew from there."
    if params.title != title or not isinstance(params.checkpoint, checkpoint):
        actual = f"one of {params.title}"
        raise _checks.fail("params", f"be parameters, or a Solution of {title}", actual, advice)
    flowing = what.params(params.state)
    frozen = rest_of(params.final, flowing)
    wanted = jax.tree_util.tree_structure(eqx.filter_eval_shape(what.init, flowing, frozen))
    if wanted != jax.tree_util.tree_structure(params.state):
        actual = "one whose state is of another structure"
        raise _checks.fail("params", f"be parameters, or a Solution of the same {title}", actual, advice)
    return flowing, frozen


def check_start(owner: AbstractFlow | AbstractRule, params: PyTree) -> None:
    """Lets the problem of a flow or a rule, if it has one that looks, refuse what it cannot start from."""
    problem = offered(getattr(owner, "problem", None), ChecksStart)
    if problem is not None:
        problem.check_start(params)


def check_times(ts: ArrayLike | Sequence[float], t0: float | Scalar) -> Float[jax.Array, " T"]:
    advice = "For instance jax.numpy.linspace(0, 10, 101)."
    try:
        times = np.asarray(ts) if _checks.is_concrete(ts) else jnp.asarray(ts)
        if times.dtype == object:
            times = times.astype(float)
    except (TypeError, ValueError) as error:
        raise _checks.fail("ts", "be an array of times", f"not convertible to one ({error})", advice) from error
    if not (jnp.issubdtype(times.dtype, jnp.floating) or jnp.issubdtype(times.dtype, jnp.integer)):
        raise _checks.fail("ts", "be an array of real numbers", f"of type {times.dtype}", advice)
    times = times.astype(float) if isinstance(times, np.ndarray) else times
    if times.ndim != 1 or times.shape[0] == 0:
        raise _checks.fail("ts", "be one-dimensional and not empty", f"of shape {times.shape}", advice)
    if isinstance(times, np.ndarray):
        if not np.all(np.isfinite(times)):
            raise _checks.fail("ts", "be finite", "not", advice)
        rising = times[1:] > times[:-1]
        if not np.all(rising):
            where = int(np.argmin(rising))
            actual = f"{times[where]:g} followed by {times[where + 1]:g} at index {where}"
            raise _checks.fail("ts", "increase strictly", actual, "Sort the times and remove repeated ones.")
        if _checks.is_concrete(t0) and times[0] < float(t0):
            raise _checks.fail("ts", f"not start before the flow does, at t = {float(t0):g}", f"{times[0]:g} first")
        # In NumPy, for what JAX makes of a concrete array under a trace cannot be looked at.
        with np.errstate(over="ignore"):
            given, times = times, times.astype(jnp.result_type(float))
        if not np.all(times[1:] > times[:-1]):
            advice = "Enable float64: jax.config.update('jax_enable_x64', True)."
            actual = f"not distinct in float32 between {given[0]:g} and {given[-1]:g}"
            raise _checks.fail("ts", "increase strictly", actual, advice)
    return jnp.asarray(times, jnp.result_type(float))


def valid_times(ts: Float[jax.Array, " T"], t0: Scalar) -> Bool[jax.Array, ""]:
    """Whether save times are finite, increase, and do not begin before `t0`: what cannot be refused under a trace."""
    return jnp.all(jnp.isfinite(ts)) & jnp.all(ts[1:] > ts[:-1]) & (ts[0] >= t0)


def check_jumps(jumps: ArrayLike | Sequence[float] | None) -> Float[jax.Array, " J"] | None:
    """Times at which a field jumps, as an array."""
    if jumps is None:
        return None
    if isinstance(jumps, jax.core.Tracer):
        times: jax.Array | np.ndarray = jumps
    else:
        try:
            times = np.asarray(jumps, dtype=float)
        except (TypeError, ValueError) as error:
            raise _checks.fail("jumps", "be an array of times", f"not convertible to one ({error})") from error
    if times.ndim != 1:
        raise _checks.fail("jumps", "be one-dimensional", f"of shape {times.shape}", "For instance [50.0, 51.0].")
    if isinstance(times, np.ndarray):
        if not np.all(np.isfinite(times)):
            raise _checks.fail("jumps", "be finite", "not", "Leave out what never happens.")
        if not np.all(times[1:] > times[:-1]):
            raise _checks.fail("jumps", "increase strictly", f"{times.tolist()}", "Sort them and remove repeated ones.")
    return jnp.asarray(times, jnp.result_type(float))


def join_jumps(
    given: Float[jax.Array, " J"] | None, declared: Float[jax.Array, " I"] | None
) -> Float[jax.Array, " J"] | None:
    """All jumps in order, those that the user gives and those that the flow declares; `None` where there are none."""
    all_times = [jnp.asarray(times, jnp.result_type(float)) for times in (given, declared) if times is not None]
    all_times = [times for times in all_times if times.size]
    return jnp.sort(jnp.concatenate(all_times)) if all_times else None


def check_longest_step(longest_step: float | ArrayLike | None) -> Float[jax.Array, ""] | None:
    """The limit on steps in time as an array."""
    if longest_step is None:
        return None
    _checks.check_positive("longest_step", longest_step, "None sets no limit.")
    value = jnp.asarray(longest_step, jnp.result_type(float))
    if value.ndim:
        raise _checks.fail("longest_step", "be a scalar", f"of shape {value.shape}")
    return value


def check_memory(rows: int, trainable: PyTree) -> None:
    """Warns of parameters at all save times that take more memory than is free."""
    wanted = rows * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(trainable))
    free = free_memory() if wanted > WORTH_A_LOOK else None
    if free is not None and wanted > free:
        message = (
            f"The parameters at {rows} save times take {wanted:,} bytes, and {free:,} are free. Save fewer times, or"
            " pass save_params=False and observe what is needed of them."
        )
        warnings.warn(message, stacklevel=4)


WORTH_A_LOOK = 2**26
"""Bytes of saved parameters below which the free memory of the machine is not looked up."""


def free_memory() -> int | None:
    """Free bytes where arrays are put by default; `None` where this is not known."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)
    try:
        # What the system can give, its caches included; only Linux tells.
        with open("/proc/meminfo") as lines:
            entries = dict(line.split(":", 1) for line in lines)
        return 1024 * int(entries["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def check_size(trainable: PyTree, dtype: DTypeLike) -> None:
    """Warns of a start so small that differences of a millionth of it underflow."""
    if not _checks.is_concrete(trainable):
        return
    largest = max(_checks.largest_entry(leaf) for leaf in jax.tree_util.tree_leaves(trainable))
    min_size = 1e6 * float(jnp.finfo(dtype).tiny)
    if 0 < largest < min_size:
        _checks.warn_precision(
            f"The largest entry of `params` is {largest:.1g}, and {jnp.dtype(dtype).name} resolves differences of"
            f" parameters only from about {min_size:.0e} on. Start from a larger scale"
            + (", or use float64 parameters." if jnp.dtype(dtype) == jnp.float32 else ".")
        )


def check_tolerances(rtol: float | ArrayLike, atol: float | ArrayLike | None, dtype: DTypeLike) -> StepControl:
    """The step control; a relative tolerance below what the precision can meet is raised to that, with a warning."""
    advice = "Typical values are 1e-3 ... 1e-8."
    _checks.check_positive("rtol", rtol, advice)
    min_rtol = 64 * float(jnp.finfo(dtype).eps)
    value = jnp.asarray(rtol, jnp.result_type(float))
    if value.ndim != 0:
        raise _checks.fail("rtol", "be a scalar", f"of shape {value.shape}", "Use jax.vmap over tolerances.")
    enable = " Enable float64 with jax.config.update('jax_enable_x64', True) and float64 parameters."
    if _checks.is_concrete(rtol):
        given = float(np.asarray(rtol))
        if given >= 1:
            raise _checks.fail("rtol", "be below 1", f"{given:g}", advice)
        if given < min_rtol:
            _checks.warn_precision(
                f"rtol = {given:g} is below what {jnp.dtype(dtype).name} can meet; using {min_rtol:.2g}."
                + (enable if jnp.dtype(dtype).itemsize < 8 else "")
            )
    value = jnp.maximum(value, min_rtol)
    if atol is None:
        return StepControl(value, None)
    if _checks.is_concrete(atol) and not np.all(np.asarray(atol) >= 0):
        raise _checks.fail("atol", "not be negative", f"{atol}", "None scales it to the state.")
    return StepControl(value, jnp.asarray(atol, jnp.result_type(float)))
