"""Members that run in one program: of equal shapes, or padded to one where that changes nothing."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradflow._checks import fail
from gradflow.runs._member import Options
from gradflow.sweeps._digest import arrays_of, equal
from gradflow.sweeps._members import Kind, Roster
from gradflow.sweeps._padding import padding_of, stacked, what_changes
from gradflow.sweeps._program import Own, Padding


class Group(NamedTuple):
    """Members, by number, and what makes one program of them."""

    members: list[int]
    shared: PyTree
    structure: Any  # of the arrays of a run
    shapes: list[tuple[int, ...]]  # of these arrays, padded
    differs: list[bool]  # which of them belong to the members
    paddings: dict[int, Padding] | None  # by kind


def group_members(roster: Roster, options: Options, pad: bool | None) -> list[Group]:
    """Groups in order of first appearance. `pad`: whether to pad; `None` where it changes nothing."""
    buckets: dict[Any, list[int]] = {}
    for i, kind in enumerate(roster.kinds):
        key = kind.signature if pad is False else _bucket(kind.signature)
        buckets.setdefault(key, []).append(i)
    groups = []
    for kinds in buckets.values():
        shapes = _common([_shapes(roster.kinds[i]) for i in kinds])
        changed = {i: what_changes(roster.kinds[i].run, shapes, options) for i in kinds} if len(kinds) > 1 else {}
        alone = [i for i in kinds if changed.get(i) is not None]
        if pad and alone:
            where = roster.said(roster.kinds[alone[0]].members[0])
            actual = f"True, but zeros added at {where} change {changed[alone[0]]}"
            raise fail("pad", "be False or None", actual)
        together = [i for i in kinds if i not in alone]
        parts = ([together] if together else []) + [[i] for i in alone]
        groups += [_group(roster, part, options) for part in parts]
    return sorted(groups, key=lambda group: group.members[0])


def stack(roster: Roster, group: Group, members: list[int], options: Options) -> Own:
    """What these members of a group have of their own."""
    columns = list(zip(*(roster.leaves(number) for number in members), strict=True))
    own = [
        stacked(list(column), shape) if differs else None
        for column, shape, differs in zip(columns, group.shapes, group.differs, strict=True)
    ]
    kinds = [roster.kind_of[number] for number in members]
    padding = iterates = None
    if group.paddings is not None:
        padding = jax.tree_util.tree_map(_stacked, *(group.paddings[kind] for kind in kinds))
    if roster.kinds[kinds[0]].run.iterates(options.ts) is not None:
        # Free places are filled up with one member, again and again.
        known: dict[int, Any] = {number: roster.run(number).iterates(options.ts) for number in set(members)}
        iterates = jnp.asarray(np.stack([known[number] for number in members]))
    return Own(jax.tree_util.tree_unflatten(group.structure, own), iterates, padding)


def _stacked(*leaves: Any) -> Array:
    return jnp.asarray(np.stack([np.asarray(leaf) for leaf in leaves]))


def _group(roster: Roster, kinds: list[int], options: Options) -> Group:
    members = sorted(number for i in kinds for number in roster.kinds[i].members)
    arrays, static = eqx.partition(roster.kinds[kinds[0]].run, eqx.is_array)
    base, structure = arrays_of(arrays), jax.tree_util.tree_structure(arrays)
    shapes = _common([_shapes(roster.kinds[i]) for i in kinds])
    differs = [False] * len(base)
    for kind in (roster.kinds[i] for i in kinds):
        pairs = zip(differs, kind.differs, kind.arrays, base, strict=True)
        differs = [d or own or not (leaf is a or equal(leaf, a)) for d, own, leaf, a in pairs]
    common = jax.tree_util.tree_unflatten(
        structure, [None if d else leaf for d, leaf in zip(differs, base, strict=True)]
    )
    paddings = {i: padding_of(roster.kinds[i].run, options) for i in kinds} if len(kinds) > 1 else None
    return Group(members, eqx.combine(common, static), structure, shapes, differs, paddings)


def _bucket(signature: Any) -> Any:
    """What members of one program have in common when shapes are rounded up to powers of two."""
    arrays, static, shapes, rest = signature
    rounded = tuple((tuple(1 << max(size - 1, 0).bit_length() for size in shape), dtype) for shape, dtype in shapes)
    return arrays, static, rounded, rest


def _shapes(kind: Kind) -> list[tuple[int, ...]]:
    return [shape for shape, _ in kind.signature[2]]


def _common(rows: list[list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    return [tuple(map(max, zip(*shapes, strict=True))) for shapes in zip(*rows, strict=True)]
