"""Members of a sweep: built one by one, grouped by shape, what they share held once.

`build` is called for every member in the beginning, to know shapes and to hash all numbers. Members are kept as long
as they take little memory; the others are built again when their turn comes. There may be many thousands, so that all
that depends on structure and shapes alone is found out once for each form in which they come.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradflow._checks import fail
from gradflow._tree import choose, split
from gradflow.models._parametrisation import Multipliers
from gradflow.runs._member import AbstractMember, can_be_run, member_of
from gradflow.sweeps._digest import HELD, Digest, arrays_of, equal, with_arrays

KEPT = 256 * 2**20
"""Bytes of members that are kept rather than built again."""


PARTS = ("flow or rule", "start", "observables")
"""What a member consists of."""


class Kind(NamedTuple):
    """Members of equal shapes. `run` is the first of them, `differs` tells which of its arrays another one does not
    share."""

    signature: Any
    run: AbstractMember
    members: list[int]
    arrays: list[Any]
    differs: list[bool]


class Form(NamedTuple):
    """What members of equal structure, shapes and types have in common, as `build` gives them."""

    kind: int
    sources: list[Any]  # of every array: which leaf of a member it is, or the array itself where all share it
    flowing: list[int]  # which of the arrays are parameters that flow
    parts: tuple[slice, slice, slice]  # the arrays of the flow or rule, of the parameters, of the observables


class Roster:
    """All members of a grid, by number, the last axis fastest."""

    def __init__(
        self,
        build: Callable[..., Any],
        axes: Mapping[str, Iterable[Any]],
        observe: Callable[[Any], dict[str, Any]],
        trainable: Any = None,
        sketches: bool = True,
    ):
        self._build, self._observe, self._trainable = build, observe, trainable
        self._axes = {name: list(values) for name, values in axes.items()}
        self.shape = tuple(len(values) for values in self._axes.values())
        self.places = list(itertools.product(*(range(size) for size in self.shape)))
        self.kinds: list[Kind] = []
        self.kind_of: list[int] = []
        self.latest = 0.0  # start of a flow
        self.sizes: list[float] = []  # of the parameters of every member
        self._by_signature: dict[Any, int] = {}
        self._forms: dict[Any, Form] = {}
        self._kept: dict[int, list[Any]] = {}
        self._converted: dict[int, tuple[Any, Any]] = {}
        self._digests, room = {name: Digest(sketches) for name in PARTS}, KEPT
        self.sketches: list[list[tuple[float, float]]] = []  # of every member, part by part
        for number in range(len(self.places)):
            form, leaves = self._make(number)
            kind = self.kinds[form.kind]
            kind.members.append(number)
            self.kind_of.append(form.kind)
            self.sizes.append(_size([leaves[i] for i in form.flowing]))
            for i, (leaf, first) in enumerate(zip(leaves, kind.arrays, strict=True)):
                if leaf is first or equal(leaf, first):
                    leaves[i] = first
                else:
                    kind.differs[i] = True
                    room -= leaf.nbytes
            pairs = zip(self._digests.values(), form.parts, strict=True)
            self.sketches.append([digest.add(leaves[part]) for digest, part in pairs])
            if room >= 0:
                self._kept[number] = leaves

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of all numbers that the members are made of, by part."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def leaves(self, number: int) -> list[Any]:
        """The arrays of a member, in the order of the leaves of its kind."""
        if number in self._kept:
            return self._kept[number]
        form, leaves = self._make(number)
        if form.kind != self.kind_of[number]:
            actual = "returning another shape or structure when called again"
            raise fail("build", f"return the same at {self.said(number)} every time", actual)
        return leaves

    def run(self, number: int) -> AbstractMember:
        """A member, as `build` and `observe` gave it."""
        return with_arrays(self.kinds[self.kind_of[number]].run, self.leaves(number))

    def said(self, number: int) -> str:
        """The coordinates of a member, for messages."""
        return ", ".join(f"{name}={value}" for name, value in self._point(number).items())

    def _point(self, number: int) -> dict[str, Any]:
        return {name: self._axes[name][i] for name, i in zip(self._axes, self.places[number], strict=True)}

    def _make(self, number: int) -> tuple[Form, list[Any]]:
        """What `build` gives for a member, checked: its form and its arrays."""
        try:
            built = self._build(**self._point(number))
            member = self._member(built)
            given, structure = jax.tree_util.tree_flatten(member)
            given = [self._as_jax(leaf) for leaf in given]
            key = structure, tuple(map(_trait, given))
            form = self._forms.get(key)
            if form is None:
                form = self._forms[key] = self._new_form(structure, given)
            leaves = [given[source] if type(source) is int else source for source in form.sources]
            self.latest = max(self.latest, member.t0)
            member.check_values([leaves[i] for i in form.flowing])
        except ValueError as error:
            raise ValueError(f"At {self.said(number)}: {error}") from error
        return form, leaves

    def _member(self, built: Any) -> AbstractMember:
        """What `build` returns, as a member."""
        if not (isinstance(built, tuple) and len(built) in (2, 3) and can_be_run(built[0])):
            must = "return a pair (flow, params) or (rule, params), or (flow, params, key) for a stochastic flow"
            raise fail("build", must, f"returning {_said(built)}")
        what, params, *key = built
        return member_of(what, choose(params, self._trainable), self._observe(what), *key)

    def _new_form(self, structure: Any, given: list[Any]) -> Form:
        run = _with_widths(jax.tree_util.tree_unflatten(structure, given))
        shape = signature(run)
        if shape not in self._by_signature:
            # Members of equal shapes stand or fall together, and a check traces the problem.
            run.what.check(*split(run.params))
            self._by_signature[shape] = len(self.kinds)
            self.kinds.append(Kind(shape, run, [], arrays_of(run), [False] * len(shape[2])))
        places: list[Any] = [_Place(i) if eqx.is_array(leaf) else leaf for i, leaf in enumerate(given)]
        spread = jax.tree_util.tree_leaves(_with_widths(jax.tree_util.tree_unflatten(structure, places)))
        sources = [leaf.index if isinstance(leaf, _Place) else leaf for leaf in spread if _is_source(leaf)]
        what, params, _ = run.parts()
        before = len(arrays_of(what))
        after = before + len(arrays_of(params))
        parts = slice(before), slice(before, after), slice(after, None)
        flowing = [before + i for i, leaf in enumerate(arrays_of(params)) if eqx.is_inexact_array(leaf)]
        return Form(self._by_signature[shape], sources, flowing, parts)

    def _as_jax(self, leaf: Any) -> Any:
        """NumPy arrays as JAX arrays, so that they are batched, shared and hashed like these; each converted once
        as long as no more than `HELD` others come between."""
        if not isinstance(leaf, np.ndarray | np.generic) or leaf.dtype.kind not in "biufc":
            return leaf
        if id(leaf) not in self._converted:
            if len(self._converted) >= HELD:
                self._converted.clear()
            self._converted[id(leaf)] = leaf, jnp.asarray(leaf)
        return self._converted[id(leaf)][1]


def signature(run: PyTree) -> Any:
    """Structure, shapes and types: what decides about the compiled program."""
    arrays, static = eqx.partition(run, eqx.is_array)
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree_util.tree_leaves(arrays))
    rest = tuple(jax.tree_util.tree_leaves(static))
    try:
        hash(rest)
    except TypeError:
        rest = tuple(id(leaf) for leaf in rest)
    # One equals True and 1.0.
    rest = tuple((type(leaf), leaf) for leaf in rest)
    return jax.tree_util.tree_structure(arrays), jax.tree_util.tree_structure(static), shapes, rest


class _Place:
    """Stands for a leaf."""

    def __init__(self, index: int):
        self.index = index


def _is_source(leaf: Any) -> bool:
    return isinstance(leaf, _Place) or eqx.is_array(leaf)


def _trait(leaf: Any) -> Any:
    """What the form of a member knows of a leaf."""
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return type(leaf), leaf  # one equals True and 1.0


def _size(flowing: list[Any]) -> float:
    """The largest parameter that flows; infinity where one is not finite."""
    largest = max((float(np.max(np.abs(np.asarray(leaf, float)), initial=0.0)) for leaf in flowing), default=0.0)
    return largest if np.isfinite(largest) else np.inf


def _is_multipliers(node: Any) -> bool:
    return isinstance(node, Multipliers)


def _with_widths(run: PyTree) -> PyTree:
    """The widths as numbers, where they enter a network other than by shapes."""
    with_array = lambda node: node.with_array() if _is_multipliers(node) else node  # noqa: E731
    return jax.tree_util.tree_map(with_array, run, is_leaf=_is_multipliers)


def _said(built: Any) -> str:
    if not isinstance(built, tuple):
        return type(built).__name__
    return f"({', '.join(type(part).__name__ for part in built)})"
