"""Rows written at the save times of a run: parameters and observables.

Rows not reached hold NaN in a result, but zeros while the run goes on: `jax_debug_nans` ends a program that returns a
NaN, and a run that is all right shall not trip over the empty rows of its buffers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from gradflow._checks import check_callable, fail, is_concrete
from gradflow._solution import Solution, moving
from gradflow.flows import AbstractFlow
from gradflow.protocols import GoesOn, KnowsOrdinary, SeesState, offered
from gradflow.rules import AbstractRule

Observable = Callable[[PyTree], PyTree]
"""What is observed: a function of the parameters, which gives an array or a pytree of arrays."""


def seen(fn: Observable, params: PyTree) -> PyTree:
    """Parameters as an observable is to see them.

    Coordinates other than the parameters themselves, such as `gradflow.Polar`, know their `ordinary()` parameters.
    These are shown to every function but those with an attribute `sees_coordinates` that is true.
    """
    coordinates = offered(params, KnowsOrdinary)
    return params if coordinates is None or getattr(fn, "sees_coordinates", False) else coordinates.ordinary()


class Record(eqx.Module):
    """Buffers with one row per save time; rows not yet written hold zero or False."""

    params: PyTree | None
    observed: dict[str, PyTree]
    memories: dict[str, PyTree]  # of the observables that go on from one row to the next


def bind(
    observe: dict[str, Observable], flow: AbstractFlow | AbstractRule, t: Scalar, state: PyTree, frozen: PyTree
) -> dict[str, Observable]:
    """Observables as functions of the parameters alone; those with a method `of_state` get time and state."""
    watching = {name: (fn, offered(fn, SeesState)) for name, fn in observe.items()}
    return {
        name: fn if seeing is None else (lambda _, seeing=seeing: seeing.of_state(flow, t, state, frozen))
        for name, (fn, seeing) in watching.items()
    }


def blank_record(
    rows: int, params: PyTree, observe: dict[str, Observable], save_params: bool, flowing: PyTree
) -> Record:
    """Buffers for runs of these parameters, of which `flowing` flow. All other leaves are kept once, without rows.

    An observable with a method `follow(memory, params) -> (memory, value)` goes on from what it knew at the row before,
    at first from `first_memory(params)`.
    """
    shapes = {
        name: eqx.filter_eval_shape(lambda p, name=name, fn=fn: value_of(name, fn, p), params)
        for name, fn in observe.items()
    }
    observed = jax.tree_util.tree_map(lambda shape: _blank(rows, shape.shape, shape.dtype), shapes)
    following = {name: (fn, offered(fn, GoesOn)) for name, fn in observe.items()}
    memories = {name: g.first_memory(seen(fn, params)) for name, (fn, g) in following.items() if g is not None}
    if not save_params:
        return Record(None, observed, memories)
    buffers = jax.tree_util.tree_map(lambda leaf: _blank(rows, leaf.shape, leaf.dtype), flowing)
    return Record(eqx.combine(buffers, params), observed, memories)


def write_row(record: Record, index: Int[Array, ""], params: PyTree, observe: dict[str, Observable]) -> Record:
    """The record with row `index` filled in."""

    def put(buffer: Any, leaf: Any) -> Any:
        flows = eqx.is_inexact_array(leaf) and buffer.ndim > leaf.ndim
        return buffer.at[index].set(leaf) if flows else buffer

    saved = record.params
    if saved is not None:
        saved = jax.tree_util.tree_map(put, saved, params)
    values, memories = {}, {}
    for name, fn in observe.items():
        following = offered(fn, GoesOn)
        if following is None:
            values[name] = value_of(name, fn, params)
        else:
            memories[name], values[name] = following.follow(record.memories[name], seen(fn, params))
    observed = jax.tree_util.tree_map(lambda buffer, value: buffer.at[index].set(value), record.observed, values)
    return Record(saved, observed, memories)


def with_unreached_rows(solution: Solution) -> Solution:
    """A solution with NaN in the rows that its run did not reach."""
    flowing = moving(solution.params, solution.held)
    params, observed = unreached_as_nan((flowing, solution.observed), solution.saved)
    return dataclasses.replace(solution, params=eqx.combine(params, solution.params), observed=observed)


def unreached_as_nan(tree: PyTree, saved: Int[Array, ""]) -> PyTree:
    """Buffers with NaN in the rows from `saved` on, where their type has one."""

    def mark(leaf: Any) -> Any:
        if not eqx.is_inexact_array(leaf) or (is_concrete(saved) and int(saved) == leaf.shape[0]):
            return leaf
        beyond = jnp.arange(leaf.shape[0]) >= saved
        return nan_where(beyond.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf)

    return jax.tree_util.tree_map(mark, tree)


def nan_where(condition: Bool[Array, "..."], values: Array) -> Array:
    """Values with NaN that mean "there is none". These are none of the business of `jax_debug_nans`, which looks at
    what programs return: where it is on, they are written on the host."""
    if jax.config.jax_debug_nans and is_concrete((condition, values)):  # pyright: ignore[reportAttributeAccessIssue]
        return jax.device_put(np.where(condition, np.asarray(np.nan, values.dtype), values), values.sharding)
    return jnp.where(condition, jnp.asarray(np.nan, values.dtype), values)


def value_of(name: str, fn: Observable, params: PyTree) -> PyTree:
    """What an observable is at some parameters: an array, or a pytree of arrays, which are recorded one by one.

    **Raises** `ValueError` for anything else, such as `None` of a function without `return`, and strings.
    """
    value = fn(seen(fn, params))
    leaves = jax.tree_util.tree_leaves(value)
    if not leaves:
        raise fail(f"observe[{name!r}]", "return an array or a pytree of arrays", _without_arrays(value))
    for leaf in leaves:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            actual = f"returning {'' if leaf is value else 'a pytree with '}a value of type {type(leaf).__name__}"
            raise fail(f"observe[{name!r}]", "return an array or a pytree of arrays", actual)
    return jax.tree_util.tree_map(jnp.asarray, value)


def _without_arrays(value: object) -> str:
    return "returning None: is there a `return`?" if value is None else f"returning an empty {type(value).__name__}"


def _blank(rows: int, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    return jnp.zeros((rows, *shape), dtype)


def check_observe(observe: object) -> dict[str, Observable]:
    """A dictionary of named functions, or a complaint."""
    if observe is None:
        return {}
    if not isinstance(observe, Mapping):
        actual = f"of type {type(observe).__name__}"
        raise fail("observe", "be a dictionary name -> function of the parameters", actual)
    for name, fn in observe.items():
        check_callable(f"observe[{name!r}]", fn, "fn(params) -> array or pytree of arrays")
    return dict(observe)
