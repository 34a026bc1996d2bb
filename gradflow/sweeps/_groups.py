"""Members that run in one program: of equal shapes, or padded to one where that changes nothing."""

from collections.abc import Hashable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradflow._checks import fail
from gradflow.programs._digest import arrays_of, equal
from gradflow.runs._member import Options
from gradflow.sweeps._members import Members, ShapeGroup, Signature
from gradflow.sweeps._padding import padding_of, stacked, what_changes
from gradflow.sweeps._program import Padding, PerMember


class Group(NamedTuple):
    """Members, by number, and what makes one program of them."""

    members: list[int]
    shared: PyTree
    structure: Hashable  # of the arrays of a run
    shapes: list[tuple[int, ...]]  # of these arrays, padded
    differs: list[bool]  # which of them belong to the members
    paddings: dict[int, Padding] | None  # by shape group


def group_members(members: Members, options: Options, pad: bool | None) -> list[Group]:
    """Groups in order of first appearance. `pad`: whether to pad; `None` where it changes nothing."""
    buckets: dict[Signature, list[int]] = {}
    for i, shape_group in enumerate(members.shape_groups):
        key = shape_group.signature if pad is False else _bucket(shape_group.signature)
        buckets.setdefault(key, []).append(i)
    groups = []
    for shape_groups in buckets.values():
        shapes = _common([_shapes(members.shape_groups[i]) for i in shape_groups])
        changed = (
            {i: what_changes(members.shape_groups[i].first, shapes, options) for i in shape_groups}
            if len(shape_groups) > 1
            else {}
        )
        alone = [i for i in shape_groups if changed.get(i) is not None]
        if pad and alone:
            where = members.describe(members.shape_groups[alone[0]].members[0])
            actual = f"True, but zeros added at {where} change {changed[alone[0]]}"
            raise fail("pad", "be False or None", actual)
        together = [i for i in shape_groups if i not in alone]
        parts = ([together] if together else []) + [[i] for i in alone]
        groups += [_group(members, part, options) for part in parts]
    return sorted(groups, key=lambda group: group.members[0])


def stack(members: Members, group: Group, numbers: list[int], options: Options) -> PerMember:
    """What these members of a group have of their own."""
    columns = list(zip(*(members.leaves(number) for number in numbers), strict=True))
    arrays = [
        stacked(list(column), shape) if differs else None
        for column, shape, differs in zip(columns, group.shapes, group.differs, strict=True)
    ]
    shape_groups = [members.shape_group_of[number] for number in numbers]
    padding = iterates = None
    if group.paddings is not None:
        padding = jax.tree_util.tree_map(_stacked, *(group.paddings[shape_group] for shape_group in shape_groups))
    if members.shape_groups[shape_groups[0]].first.iterates(options.ts) is not None:
        # Free room is filled up with one member, again and again.
        saved_iterates = {number: members.member(number).iterates(options.ts) for number in set(numbers)}
        iterates = jnp.asarray(np.stack([np.asarray(saved_iterates[number]) for number in numbers]))
    return PerMember(jax.tree_util.tree_unflatten(group.structure, arrays), iterates, padding)


def _stacked(*leaves: Array) -> Array:
    return jnp.asarray(np.stack([np.asarray(leaf) for leaf in leaves]))


def _group(members: Members, shape_groups: list[int], options: Options) -> Group:
    numbers = sorted(number for i in shape_groups for number in members.shape_groups[i].members)
    arrays, static = eqx.partition(members.shape_groups[shape_groups[0]].first, eqx.is_array)
    base, structure = arrays_of(arrays), jax.tree_util.tree_structure(arrays)
    shapes = _common([_shapes(members.shape_groups[i]) for i in shape_groups])
    differs = [False] * len(base)
    for shape_group in (members.shape_groups[i] for i in shape_groups):
        pairs = zip(differs, shape_group.differs, shape_group.arrays, base, strict=True)
        differs = [d or differing or not (leaf is a or equal(leaf, a)) for d, differing, leaf, a in pairs]
    common = jax.tree_util.tree_unflatten(
        structure, [None if d else leaf for d, leaf in zip(differs, base, strict=True)]
    )
    paddings = (
        {i: padding_of(members.shape_groups[i].first, options) for i in shape_groups} if len(shape_groups) > 1 else None
    )
    return Group(numbers, eqx.combine(common, static), structure, shapes, differs, paddings)


def _bucket(signature: Signature) -> Signature:
    """What members of one program have in common when shapes are rounded up to powers of two."""
    rounded = tuple(
        (tuple(1 << max(size - 1, 0).bit_length() for size in shape), dtype) for shape, dtype in signature.shapes
    )
    return signature._replace(shapes=rounded)


def _shapes(shape_group: ShapeGroup) -> list[tuple[int, ...]]:
    return [shape for shape, _ in shape_group.signature.shapes]


def _common(rows: list[list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    return [tuple(map(max, zip(*shapes, strict=True))) for shapes in zip(*rows, strict=True)]
