"""Members of a sweep: built one by one, grouped by shape, what they share held once.

`build` is called for every member in the beginning, to know shapes and to hash all numbers. Members are kept as long
as they take little memory; the others are built again when their turn comes.
"""

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
from gradflow._solve import check_size
from gradflow._tree import split
from gradflow.flows import AbstractFlow
from gradflow.models._parametrisation import Multipliers
from gradflow.rules import AbstractRule

KEPT = 256 * 2**20
"""Bytes of members that are kept rather than built again."""
HELD = 64
"""Arrays that are remembered by identity, and so kept alive."""


class Kind(NamedTuple):
    """Members of equal shapes. `run` is the first of them."""

    signature: Any
    run: PyTree
    members: list[int]


class Roster:
    """All members of a grid, by number, the last axis fastest."""

    def __init__(
        self,
        build: Callable[..., Any],
        axes: Mapping[str, Iterable[Any]],
        observe: Callable[[Any], dict[str, Any]],
    ):
        self._build, self._observe = build, observe
        self._axes = {name: list(values) for name, values in axes.items()}
        self.shape = tuple(len(values) for values in self._axes.values())
        self.places = list(itertools.product(*(range(size) for size in self.shape)))
        self.kinds: list[Kind] = []
        self.kind_of: list[int] = []
        self.latest = 0.0  # start of a flow
        self.sizes: list[float] = []  # of the parameters of every member
        self._kept: dict[int, list[Any]] = {}
        self._converted: dict[int, tuple[Any, Any]] = {}
        self._digest, room = Digest(), KEPT
        by_signature: dict[Any, int] = {}
        for number in range(len(self.places)):
            run = self._make(number, self.kinds, by_signature)
            leaves = arrays_of(run)
            kind = self.kinds[self.kind_of[number]]
            base = arrays_of(kind.run)
            shared = [a if leaf is a or equal(leaf, a) else leaf for leaf, a in zip(leaves, base, strict=True)]
            self._digest.add(with_arrays(run, shared))
            self.sizes.append(_size(run[1]))
            room -= sum(leaf.nbytes for leaf, a in zip(shared, base, strict=True) if leaf is not a)
            if room >= 0:
                self._kept[number] = shared

    @property
    def fingerprint(self) -> str:
        """A hash of all that the members are made of."""
        return self._digest.hexdigest()

    def leaves(self, number: int) -> list[Any]:
        """The arrays of a member, in the order of the leaves of its kind."""
        if number in self._kept:
            return self._kept[number]
        run = self._make(number)
        if signature(run) != self.kinds[self.kind_of[number]].signature:
            actual = "returning another shape or structure when called again"
            raise fail("build", f"return the same at {self.said(number)} every time", actual)
        return arrays_of(run)

    def run(self, number: int) -> PyTree:
        """A member, as `build` and `observe` gave it."""
        return with_arrays(self.kinds[self.kind_of[number]].run, self.leaves(number))

    def said(self, number: int) -> str:
        """The coordinates of a member, for messages."""
        return ", ".join(f"{name}={value}" for name, value in self._point(number).items())

    def _point(self, number: int) -> dict[str, Any]:
        return {name: self._axes[name][i] for name, i in zip(self._axes, self.places[number], strict=True)}

    def _make(self, number: int, kinds: list[Kind] | None = None, known: dict[Any, int] | None = None) -> PyTree:
        """What `build` gives for a member; checked, and entered into `kinds` if these are handed in."""
        try:
            built = self._build(**self._point(number))
            if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], AbstractFlow | AbstractRule)):
                raise fail("build", "return a pair (flow, params) or (rule, params)", f"returning {_kind(built)}")
            what, params = built
            run = what, params, self._observe(what)
            run = jax.tree_util.tree_map(functools.partial(_as_jax, self._converted), run)
            run = jax.tree_util.tree_map(_with_array, run, is_leaf=_is_multipliers)
            if kinds is not None and known is not None:
                shape = signature(run)
                # Members of equal shapes stand or fall together, and a check traces the problem.
                if shape not in known:
                    what.check(*split(params))
                    known[shape] = len(kinds)
                    kinds.append(Kind(shape, run, []))
                self.kind_of.append(known[shape])
                kinds[known[shape]].members.append(number)
                if isinstance(what, AbstractFlow):
                    self.latest = max(self.latest, float(what.t0))
                    trainable, frozen = split(params)
                    what.check_values(trainable, frozen)
                    check_size(trainable, jax.tree_util.tree_leaves(trainable)[0].dtype)
        except ValueError as error:
            raise ValueError(f"At {self.said(number)}: {error}") from error
        return run


class Digest:
    """A hash of all that pytrees are made of: structure, names of functions, every number in every array."""

    def __init__(self) -> None:
        self._hash, self._seen = hashlib.sha256(), {}

    def add(self, tree: PyTree) -> None:
        arrays, static = eqx.partition(tree, eqx.is_array)
        text = repr(jax.tree_util.tree_structure(arrays)) + repr(jax.tree_util.tree_leaves(static))
        # Addresses of function objects differ from one process to the next.
        self._hash.update(re.sub(r"0x[0-9a-f]+", "", text).encode())
        for leaf in jax.tree_util.tree_leaves(arrays):
            self._hash.update(self._of(leaf))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()[:16]

    def _of(self, leaf: Any) -> bytes:
        if leaf.nbytes < 4096:
            return _hashed(leaf)
        # Large arrays that come again are hashed once; they are held, so that their numbers stay theirs.
        if id(leaf) not in self._seen:
            if len(self._seen) >= HELD:
                self._seen.clear()
            self._seen[id(leaf)] = leaf, _hashed(leaf)
        return self._seen[id(leaf)][1]


def fingerprint(trees: Iterable[PyTree]) -> str:
    """The digest of several pytrees."""
    digest = Digest()
    for tree in trees:
        digest.add(tree)
    return digest.hexdigest()


def signature(run: PyTree) -> Any:
    """Structure, shapes and types: what decides about the compiled program."""
    arrays, static = eqx.partition(run, eqx.is_array)
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree_util.tree_leaves(arrays))
    rest = tuple(jax.tree_util.tree_leaves(static))
    try:
        hash(rest)
    except TypeError:
        rest = tuple(id(leaf) for leaf in rest)
    return jax.tree_util.tree_structure(arrays), jax.tree_util.tree_structure(static), shapes, rest


def numbers(leaf: Any) -> np.ndarray:
    """An array as NumPy sees it; the data of random keys."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _hashed(leaf: Any) -> bytes:
    array = numbers(leaf)
    return hashlib.sha256(str((array.shape, array.dtype)).encode() + array.tobytes()).digest()


def arrays_of(run: PyTree) -> list[Any]:
    """The arrays of a pytree."""
    return jax.tree_util.tree_leaves(eqx.filter(run, eqx.is_array))


def with_arrays(run: PyTree, leaves: list[Any]) -> PyTree:
    """The pytree with other arrays."""
    arrays, static = eqx.partition(run, eqx.is_array)
    return eqx.combine(jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(arrays), leaves), static)


def _as_jax(converted: dict[int, tuple[Any, Any]], leaf: Any) -> Any:
    """NumPy arrays as JAX arrays, so that they are batched, shared and hashed like these; each converted once
    as long as no more than `HELD` others come between."""
    if not isinstance(leaf, np.ndarray | np.generic) or leaf.dtype.kind not in "biufc":
        return leaf
    if id(leaf) not in converted:
        if len(converted) >= HELD:
            converted.clear()
        converted[id(leaf)] = leaf, jnp.asarray(leaf)
    return converted[id(leaf)][1]


def _size(params: PyTree) -> float:
    """The largest parameter that flows; infinity where one is not finite."""
    flowing = [np.asarray(leaf, float) for leaf in jax.tree_util.tree_leaves(params) if eqx.is_inexact_array(leaf)]
    largest = max((float(np.max(np.abs(leaf), initial=0.0)) for leaf in flowing), default=0.0)
    return largest if np.isfinite(largest) else np.inf


def _is_multipliers(node: Any) -> bool:
    return isinstance(node, Multipliers)


def _with_array(node: Any) -> Any:
    """The width as a number, where it enters a network other than by shapes."""
    return node.with_array() if isinstance(node, Multipliers) else node


def _kind(built: Any) -> str:
    if not isinstance(built, tuple):
        return type(built).__name__
    return f"({', '.join(type(part).__name__ for part in built)})"


def equal(a: Any, b: Any) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(np.array_equal(numbers(a), numbers(b), equal_nan=numbers(a).dtype.kind == "f"))
