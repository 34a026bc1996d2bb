"""Members of a sweep: built one by one, grouped by shape, what they share held once.

`build` is called for every member in the beginning, to know shapes and to hash all numbers. Members are kept as long
as they take little memory; the others are built again when their turn comes. There may be many thousands, so that all
that depends on structure and shapes alone is found out once for each template.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradflow._checks import fail
from gradflow._tree import choose, split
from gradflow.flows import AbstractFlow
from gradflow.models._parametrisation import Multipliers
from gradflow.programs._digest import HELD, Digest, arrays_of, equal, with_arrays
from gradflow.rules import AbstractRule
from gradflow.runs._member import AbstractMember, can_be_run, member_of
from gradflow.runs._record import Observable
from gradflow.sweeps._callback import AxisValue

KEPT = 256 * 2**20
"""Bytes of members that are kept rather than built again."""


PARTS = ("flow or rule", "start", "observables")
"""What a member consists of."""


class ShapeGroup(NamedTuple):
    """Members of equal shapes. `first` is the first of them, `differs` tells which of its arrays another one does not
    share."""

    signature: "Signature"
    first: AbstractMember
    members: list[int]
    arrays: list[jax.Array | np.ndarray]
    differs: list[bool]


class Template(NamedTuple):
    """What members of equal structure, shapes and types have in common, as `build` gives them."""

    shape_group: int
    sources: list[int | jax.Array | np.ndarray]  # which leaf of a member an array is; itself where all share it
    flowing: list[int]  # which of the arrays are parameters that flow
    parts: tuple[slice, slice, slice]  # the arrays of the flow or rule, of the parameters, of the observables


class Members:
    """All members of a grid, by number, the last axis fastest."""

    def __init__(
        self,
        build: Callable[..., object],
        axes: Mapping[str, Iterable[AxisValue]],
        observe: Callable[[AbstractFlow | AbstractRule], dict[str, Observable]],
        trainable: PyTree = None,
        sketches: bool = True,
    ):
        self._build, self._observe, self._trainable = build, observe, trainable
        self._axes = {name: list(values) for name, values in axes.items()}
        self.shape = tuple(len(values) for values in self._axes.values())
        self.grid_indices = list(itertools.product(*(range(size) for size in self.shape)))
        self.shape_groups: list[ShapeGroup] = []
        self.shape_group_of: list[int] = []
        self.latest = 0.0  # start of a flow
        self.sizes: list[float] = []  # of the parameters of every member
        self._by_signature: dict[Signature, int] = {}
        self._templates: dict[Hashable, Template] = {}
        self._kept: dict[int, list[jax.Array | np.ndarray]] = {}
        self._converted: dict[int, tuple[np.ndarray | np.generic, jax.Array]] = {}
        self._digests, room = {name: Digest(sketches) for name in PARTS}, KEPT
        self.sketches: list[list[tuple[float, float]]] = []  # of every member, part by part
        for number in range(len(self.grid_indices)):
            template, leaves = self._make(number)
            shape_group = self.shape_groups[template.shape_group]
            shape_group.members.append(number)
            self.shape_group_of.append(template.shape_group)
            self.sizes.append(_size([leaves[i] for i in template.flowing]))
            for i, (leaf, first) in enumerate(zip(leaves, shape_group.arrays, strict=True)):
                if leaf is first or equal(leaf, first):
                    leaves[i] = first
                else:
                    shape_group.differs[i] = True
                    room -= leaf.nbytes
            pairs = zip(self._digests.values(), template.parts, strict=True)
            self.sketches.append([digest.add(leaves[part]) for digest, part in pairs])
            if room >= 0:
                self._kept[number] = leaves

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of all numbers that the members are made of, by part."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def leaves(self, number: int) -> list[jax.Array | np.ndarray]:
        """The arrays of a member, in the order of the leaves of its shape group."""
        if number in self._kept:
            return self._kept[number]
        template, leaves = self._make(number)
        if template.shape_group != self.shape_group_of[number]:
            actual = "returning another shape or structure when called again"
            raise fail("build", f"return the same at {self.describe(number)} every time", actual)
        return leaves

    def member(self, number: int) -> AbstractMember:
        """A member, as `build` and `observe` gave it."""
        return with_arrays(self.shape_groups[self.shape_group_of[number]].first, self.leaves(number))

    def describe(self, number: int) -> str:
        """The coordinates of a member, for messages."""
        return ", ".join(f"{name}={value}" for name, value in self.coordinates(number).items())

    def coordinates(self, number: int) -> dict[str, AxisValue]:
        """The values of the axes at a member."""
        return {name: self._axes[name][i] for name, i in zip(self._axes, self.grid_indices[number], strict=True)}

    def _make(self, number: int) -> tuple[Template, list[jax.Array | np.ndarray]]:
        """What `build` gives for a member, checked: its template and its arrays."""
        try:
            built = self._build(**self.coordinates(number))
            member = self._member(built)
            given, structure = jax.tree_util.tree_flatten(member)
            given = [self._as_jax(leaf) for leaf in given]
            key = structure, tuple(map(_trait, given))
            template = self._templates.get(key)
            if template is None:
                template = self._templates[key] = self._new_template(structure, given)
            leaves = [given[source] if isinstance(source, int) else source for source in template.sources]
            self.latest = max(self.latest, member.t0)
            member.check_values([leaves[i] for i in template.flowing])
        except ValueError as error:
            raise ValueError(f"At {self.describe(number)}: {error}") from error
        return template, leaves

    def _member(self, built: object) -> AbstractMember:
        """What `build` returns, as a member."""
        if not (isinstance(built, tuple) and len(built) in (2, 3) and can_be_run(built[0])):
            must = "return a pair (flow, params) or (rule, params), or (flow, params, key) for a stochastic flow"
            raise fail("build", must, f"returning {_describe(built)}")
        what, params, *key = built
        return member_of(what, choose(params, self._trainable), self._observe(what), *key)

    def _new_template(self, structure: Hashable, given: list[PyTree]) -> Template:
        member = _with_widths(jax.tree_util.tree_unflatten(structure, given))
        shape = signature(member)
        if shape not in self._by_signature:
            # Members of equal shapes stand or fall together, and a check traces the problem.
            member.what.check(*split(member.params))
            self._by_signature[shape] = len(self.shape_groups)
            self.shape_groups.append(ShapeGroup(shape, member, [], arrays_of(member), [False] * len(shape.shapes)))
        marks: list[PyTree] = [_Mark(i) if eqx.is_array(leaf) else leaf for i, leaf in enumerate(given)]
        spread = jax.tree_util.tree_leaves(_with_widths(jax.tree_util.tree_unflatten(structure, marks)))
        sources = [leaf.index if isinstance(leaf, _Mark) else leaf for leaf in spread if _is_source(leaf)]
        what, params, _ = member.parts()
        before = len(arrays_of(what))
        after = before + len(arrays_of(params))
        parts = slice(before), slice(before, after), slice(after, None)
        flowing = [before + i for i, leaf in enumerate(arrays_of(params)) if eqx.is_inexact_array(leaf)]
        return Template(self._by_signature[shape], sources, flowing, parts)

    def _as_jax(self, leaf: PyTree) -> PyTree:
        """NumPy arrays as JAX arrays, so that they are batched, shared and hashed like these; each converted once
        as long as no more than `HELD` others come between."""
        if not isinstance(leaf, np.ndarray | np.generic) or leaf.dtype.kind not in "biufc":
            return leaf
        if id(leaf) not in self._converted:
            if len(self._converted) >= HELD:
                self._converted.clear()
            self._converted[id(leaf)] = leaf, jnp.asarray(leaf)
        return self._converted[id(leaf)][1]


class Signature(NamedTuple):
    """Structure, shapes and types: what decides about the compiled program."""

    arrays: Hashable  # structure of the arrays
    static: Hashable  # structure of the rest
    shapes: tuple[tuple[tuple[int, ...], str], ...]  # of the arrays, with their types
    static_leaves: tuple[Hashable, ...]  # leaves that are no arrays


def signature(member: AbstractMember) -> Signature:
    arrays, static = eqx.partition(member, eqx.is_array)
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree_util.tree_leaves(arrays))
    static_leaves = tuple(jax.tree_util.tree_leaves(static))
    try:
        hash(static_leaves)
    except TypeError:
        static_leaves = tuple(id(leaf) for leaf in static_leaves)
    # One equals True and 1.0.
    static_leaves = tuple((type(leaf), leaf) for leaf in static_leaves)
    return Signature(jax.tree_util.tree_structure(arrays), jax.tree_util.tree_structure(static), shapes, static_leaves)


class _Mark:
    """Stands for a leaf."""

    def __init__(self, index: int):
        self.index = index


def _is_source(leaf: object) -> bool:
    return isinstance(leaf, _Mark) or eqx.is_array(leaf)


def _trait(leaf: object) -> Hashable:
    """What the template of a member knows of a leaf."""
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return type(leaf), leaf  # one equals True and 1.0


def _size(flowing: Sequence[jax.Array | np.ndarray]) -> float:
    """The largest parameter that flows; infinity where one is not finite."""
    largest = max((float(np.max(np.abs(np.asarray(leaf, float)), initial=0.0)) for leaf in flowing), default=0.0)
    return largest if np.isfinite(largest) else np.inf


def _is_multipliers(node: object) -> bool:
    return isinstance(node, Multipliers)


def _with_widths(run: PyTree) -> PyTree:
    """The widths as numbers, where they enter a network other than by shapes."""
    with_array = lambda node: node.with_array() if _is_multipliers(node) else node  # noqa: E731
    return jax.tree_util.tree_map(with_array, run, is_leaf=_is_multipliers)


def _describe(built: object) -> str:
    if not isinstance(built, tuple):
        return type(built).__name__
    return f"({', '.join(type(part).__name__ for part in built)})"
