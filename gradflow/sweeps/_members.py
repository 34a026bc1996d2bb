"""Members of a sweep: built one by one, grouped by shape, their shared arrays held once."""

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradflow._checks import fail
from gradflow._tree import split
from gradflow.flows import AbstractFlow


class Member(NamedTuple):
    """One point of the grid: its index along every axis, `at`, and what `build` made of it."""

    at: tuple[int, ...]
    run: PyTree


class Group(NamedTuple):
    """Members whose programs are equal: arrays that differ are stacked, all others held once."""

    indices: list[tuple[int, ...]]
    stacked: PyTree
    shared: PyTree


def build_members(
    build: Callable[..., Any], axes: Mapping[str, Iterable[Any]], observe: Callable[[Any], dict[str, Any]]
) -> list[Member]:
    """Calls `build` at every point of the grid, the last axis fastest."""
    members = []
    converted: dict[int, tuple[Any, Any]] = {}
    checked: set[Any] = set()
    axes = {name: list(values) for name, values in axes.items()}
    for index in itertools.product(*(range(len(values)) for values in axes.values())):
        point = {name: values[i] for (name, values), i in zip(axes.items(), index, strict=True)}
        where = ", ".join(f"{name}={value}" for name, value in point.items())
        try:
            built = build(**point)
            if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], AbstractFlow)):
                raise fail("build", "return a pair (flow, params)", f"returning {_kind(built)}")
            flow, params = built
            run = flow, params, observe(flow)
            # Members of equal shapes stand or fall together, and a check traces the problem.
            if (shape := _signature(run)) not in checked:
                flow.check(*split(params))
                checked.add(shape)
            flow.check_values(*split(params))
        except ValueError as error:
            raise ValueError(f"At {where}: {error}") from error
        members.append(Member(index, jax.tree_util.tree_map(functools.partial(_as_jax, converted), run)))
    return members


def group_members(members: list[Member]) -> list[Group]:
    """Groups in order of first appearance."""
    found: dict[Any, list[Member]] = {}
    for member in members:
        found.setdefault(_signature(member.run), []).append(member)
    return [_stack(group) for group in found.values()]


def fingerprint(trees: Iterable[PyTree]) -> str:
    """A hash of all that pytrees are made of: structure, names of functions, every number in every array."""
    digest = hashlib.sha256()
    seen: dict[int, bytes] = {}
    for tree in trees:
        arrays, static = eqx.partition(tree, eqx.is_array)
        text = repr(jax.tree_util.tree_structure(arrays)) + repr(jax.tree_util.tree_leaves(static))
        # Addresses of function objects differ from one process to the next.
        digest.update(re.sub(r"0x[0-9a-f]+", "", text).encode())
        for leaf in jax.tree_util.tree_leaves(arrays):
            if id(leaf) not in seen:
                array = _numbers(leaf)
                seen[id(leaf)] = hashlib.sha256(str((array.shape, array.dtype)).encode() + array.tobytes()).digest()
            digest.update(seen[id(leaf)])
    return digest.hexdigest()[:16]


def _signature(run: PyTree) -> Any:
    arrays, static = eqx.partition(run, eqx.is_array)
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree_util.tree_leaves(arrays))
    rest = tuple(jax.tree_util.tree_leaves(static))
    try:
        hash(rest)
    except TypeError:
        rest = tuple(id(leaf) for leaf in rest)
    return jax.tree_util.tree_structure(arrays), jax.tree_util.tree_structure(static), shapes, rest


def _stack(group: list[Member]) -> Group:
    first, static = eqx.partition(group[0].run, eqx.is_array)
    leaves, structure = jax.tree_util.tree_flatten(first)
    columns = [[] for _ in leaves]
    for member in group:
        for column, leaf in zip(columns, jax.tree_util.tree_leaves(eqx.filter(member.run, eqx.is_array)), strict=True):
            column.append(leaf)
    differs = [any(leaf is not column[0] and not _equal(leaf, column[0]) for leaf in column) for column in columns]
    stacked = [jnp.stack(column) if d else None for column, d in zip(columns, differs, strict=True)]
    shared = [None if d else column[0] for column, d in zip(columns, differs, strict=True)]
    indices = [member.at for member in group]
    return Group(
        indices,
        jax.tree_util.tree_unflatten(structure, stacked),
        eqx.combine(jax.tree_util.tree_unflatten(structure, shared), static),
    )


def _as_jax(converted: dict[int, tuple[Any, Any]], leaf: Any) -> Any:
    """NumPy arrays as JAX arrays, so that they are batched, shared and hashed like these; each converted once."""
    if not isinstance(leaf, np.ndarray | np.generic) or leaf.dtype.kind not in "biufc":
        return leaf
    if id(leaf) not in converted:
        converted[id(leaf)] = leaf, jnp.asarray(leaf)
    return converted[id(leaf)][1]


def _kind(built: Any) -> str:
    if not isinstance(built, tuple):
        return type(built).__name__
    return f"({', '.join(type(part).__name__ for part in built)})"


def _numbers(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _equal(a: Any, b: Any) -> bool:
    return bool(np.array_equal(_numbers(a), _numbers(b), equal_nan=_numbers(a).dtype.kind == "f"))
