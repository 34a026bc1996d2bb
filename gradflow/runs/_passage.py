"""A step across the kinks of a field, passed once more with its tangent: switch by switch, on one side at a time."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from gradflow.problems._switching import Sides, Switching
from gradflow.solvers import AbstractMethod, Field

TOGETHER = 1e-9
"""Share of a step within which switches are at one place, if they react alike to a change of the state."""
GRAZING = 1e-3
"""Share of the mean rate of a switching function along a step, below which its surface is grazed, not crossed."""
REVERSED = 1e-9
"""Share of the rate before a surface up to which a rate back to it, from beyond, is rounding: a neuron that dies rests
there."""
BESIDE = 2 / 3
"""Power of the unit of rounding: the share of a step that a state is moved to either side of a surface."""


class Programmed(Field):
    """A field by its program, whose arguments are all that it depends on: the functions of a flow may have captured
    values that have derivatives, and a rule for derivatives must not."""

    switching: Switching | None = None
    sides: Sides | None = None

    def slope(self, t: Scalar, y: PyTree) -> PyTree:
        assert self.switching is not None
        return self.switching(t, y, self.sides)[0]


class Passage(eqx.Module):
    """A step that has been taken, up to a time `s` within it."""

    switching: Switching
    method: AbstractMethod
    field: Field
    state: PyTree  # of the method, before the step; `None` where that is not known
    y0: PyTree
    y1: PyTree
    dense: PyTree
    dt: Scalar
    s: Scalar
    keep: Bool[Array, ""]

    @property
    def restarts(self) -> bool:
        """Whether the method takes steps that know of none before."""
        return self.state is not None and type(self.method).piece is not AbstractMethod.piece

    def programmed(self, t: Scalar, sides: Sides | None) -> Programmed:
        """The field in time counted from `t`."""
        field = self.field
        parts = field.progress, field.extents, field.before, field.after
        return Programmed(field.flow, field.frozen, t, *parts, self.switching, sides)

    def at(self, s: Scalar) -> PyTree:
        return self.method.interpolate(self.field, self.dense, s)

    def rate(self, y: PyTree, s: Scalar, sides: Sides | None) -> tuple[PyTree, Float[Array, " switches"]]:
        return self.switching(self.field.t + s.astype(self.field.t.dtype), y, sides)


class Passed(eqx.Module):
    """What has been met on the way: only derivatives look, so all is zero where none is taken."""

    crossed: Int[Array, ""]  # switches
    missed: Int[Array, ""]  # of these, where the jump is not known: surfaces that are grazed, slid along or left

    @classmethod
    def nothing(cls) -> "Passed":
        return cls(jnp.asarray(0), jnp.asarray(0))


def saltation(passage: Passage, moves: PyTree, slope: PyTree) -> tuple[PyTree, Passed]:
    """The tangent at the end of a passage, one switch after another, and what was met.

    Where the method takes steps of their own, those between the switches are taken again, each on one side of them, and
    differentiated; elsewhere the jumps are added to the tangent `slope` of the step as it was taken.
    """
    dt = passage.dt
    _, before = passage.rate(passage.y0, jnp.zeros_like(dt), None)
    _, after = passage.rate(passage.y1, dt, None)
    turns = passage.keep & ((before > 0) != (after > 0)) & jnp.isfinite(after - before)
    share = jnp.where(turns, before / jnp.where(turns, before - after, 1), jnp.inf)
    turns &= share * dt.astype(share.dtype) <= passage.s.astype(share.dtype)
    mean = jnp.where(turns, jnp.abs(after - before), 0) / dt.astype(share.dtype)
    met = _Met(turns, share, mean, before != 0)
    zeros = jax.tree_util.tree_map(jnp.zeros_like, passage.y1)
    origin = _Place(jnp.zeros_like(dt), passage.y0, dense(moves.y0, passage.y0), zeros)
    start = (turns, before > 0, origin, Passed.nothing())

    def cross(state: tuple) -> tuple:
        return _cross(passage, moves, met, *state)

    _, up, last, met_so_far = jax.lax.while_loop(lambda state: jnp.any(state[0]), cross, start)

    def arrive() -> PyTree:
        still = _add(slope, last.jump)
        if not passage.restarts:
            return still
        (y, usable), v = _piece(passage, moves, last, passage.s, moves.s, Sides(turns, up))
        return _where(usable & _finite(y), v, still)

    return jax.lax.cond(met_so_far.crossed > 0, arrive, lambda: slope), met_so_far


class _Met(NamedTuple):
    """Of every switch, whether it turns in a passage, at which share of the step, and how fast its function changes."""

    turns: Bool[Array, " switches"]
    share: Float[Array, " switches"]
    mean: Float[Array, " switches"]
    inside: Bool[Array, " switches"]  # whether the step begins beside its surface, not on it


class _Place(NamedTuple):
    """Where a passage has got to: time in the step, state, tangent, and the sum of the jumps so far."""

    s: Scalar
    y: PyTree
    v: PyTree
    jump: PyTree


def _cross(
    passage: Passage,
    moves: PyTree,
    met: _Met,
    todo: Bool[Array, " switches"],
    up: Bool[Array, " switches"],
    place: _Place,
    met_so_far: Passed,
) -> tuple:
    """Crosses the next switch, and those at one place with it.

    The field is taken on either side of them at the same state, with all other switches of the step as they stand.
    """
    first, sides = jnp.argmin(jnp.where(todo, met.share, jnp.inf)), Sides(met.turns, up)
    guess = (met.share[first] * passage.dt.astype(met.share.dtype)).astype(passage.dt.dtype)
    s, y, v = _reach(passage, moves, place, jnp.maximum(guess, place.s), first, sides)
    # On the surface itself `a == max(a, b)` holds on both sides.
    offset = jnp.finfo(met.share.dtype).eps ** BESIDE

    def displaced(side: int) -> PyTree:
        return jax.tree_util.tree_map(lambda a, b, c: a + side * offset * (c - b), y, passage.y0, passage.y1)

    f0, _ = passage.rate(displaced(-1), s, sides)
    still, one, zero = jax.tree_util.tree_map(lambda _: None, moves), jnp.ones_like(s), jnp.zeros_like(s)

    def change(moves: PyTree, direction: PyTree, time: Scalar) -> Float[Array, " switches"]:
        """Derivatives of the switching functions."""
        functions = lambda passage, y, s: passage.rate(y, s, sides)[1]  # noqa: E731
        return eqx.filter_jvp(functions, (passage, y, s), (moves, direction, time))[1]

    along, probed = change(still, f0, one), change(still, jax.tree_util.tree_map(_probe, y), zero)
    alike = jnp.abs(probed * along[first] - probed[first] * along) <= 1e-6 * jnp.abs(probed[first] * along)
    together = (todo & (met.share - met.share[first] <= TOGETHER) & alike).at[first].set(True)
    turned = jnp.where(together, ~up, up)
    f1, _ = passage.rate(displaced(1), s, Sides(met.turns, turned))
    sign = jnp.where(up[first], -1, 1)
    arrives, leaves = sign * along[first], sign * change(still, f1, one)[first]
    clear = met.inside[first] & (arrives > GRAZING * met.mean[first]) & (leaves >= -REVERSED * arrives)

    shift = change(moves, v, zero)[first]
    ratio = jnp.where(clear, shift / jnp.where(clear, along[first], 1), 0)
    gap = jax.tree_util.tree_map(jnp.subtract, f1, f0)
    jump = jax.tree_util.tree_map(lambda leaf: leaf * ratio.astype(leaf.dtype), gap)
    # A jump that rounding makes is none, as at a guard between two forms of one function.
    missed = met_so_far.missed + (
        ~clear & (_size(gap) > jnp.sqrt(jnp.finfo(met.share.dtype).eps) * jnp.maximum(_size(f0), _size(f1)))
    )
    after = _Place(s, displaced(1), _add(v, jump), _add(place.jump, jump))
    return todo & ~together, turned, after, Passed(met_so_far.crossed + 1, missed)


def _reach(
    passage: Passage, moves: PyTree, place: _Place, s: Scalar, first: Int[Array, ""], sides: Sides
) -> tuple[Scalar, PyTree, PyTree]:
    """Time, state and tangent at the surface of the switch `first`, which is met at about time `s`."""
    y, v = eqx.filter_jvp(lambda passage: passage.at(s), (passage,), (moves,))
    v = _add(dense(v, y), place.jump)
    if passage.restarts:
        (other, usable), w = _piece(passage, moves, place, s, None, sides)
        usable &= _finite(other)  # of values alone: they must not depend on tangents
        y, v = _where(usable, other, y), _where(usable, w, v)
    rate, value = passage.rate(y, s, sides)
    functions = lambda y, s: passage.rate(y, s, sides)[1][first]  # noqa: E731
    _, along = eqx.filter_jvp(functions, (y, s), (rate, jnp.ones_like(s)))
    remaining = jnp.where(along != 0, -value[first] / jnp.where(along != 0, along, 1), 0).astype(s.dtype)
    remaining = jnp.clip(remaining, place.s - s, jnp.maximum(passage.s - s, 0))

    def shifted(passage: Passage, y: PyTree) -> PyTree:
        rate, _ = passage.rate(y, s, sides)
        return jax.tree_util.tree_map(lambda a, b: a + remaining.astype(a.dtype) * b, y, rate)

    y, v = eqx.filter_jvp(shifted, (passage, y), (moves, v))
    return s + remaining, y, dense(v, y)


def _piece(
    passage: Passage, moves: PyTree, place: _Place, s: Scalar, ds: Scalar | None, sides: Sides
) -> tuple[tuple[PyTree, Bool[Array, ""]], PyTree]:
    """A step of the method from a place to time `s`, which has the tangent `ds`, on given sides, and its tangent."""

    def step(passage: Passage, y: PyTree, s: Scalar) -> tuple[PyTree, Bool[Array, ""]]:
        t = passage.field.t + place.s.astype(passage.field.t.dtype)
        attempted = passage.method.piece(passage.programmed(t, sides), s - place.s, y, passage.state)
        assert attempted is not None  # by `passage.restarts`
        return attempted

    reached, (tangent, _) = eqx.filter_jvp(step, (passage, place.y, s), (moves, place.v, ds))
    return reached, dense(tangent, reached[0])


def _where(condition: Bool[Array, ""], a: PyTree, b: PyTree) -> PyTree:
    return jax.tree_util.tree_map(lambda x, y: jnp.where(condition, x, y), a, b)


def _finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree_util.tree_leaves(tree)]))


def _size(tree: PyTree) -> Scalar:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0.0) for leaf in jax.tree_util.tree_leaves(tree)]))


def _probe(leaf: Array) -> Array:
    """A fixed direction in general position."""
    return jnp.sin(1 + jnp.arange(leaf.size, dtype=leaf.dtype) ** 1.5).reshape(leaf.shape)


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree_util.tree_map(jnp.add, a, b)


def dense(tangents: PyTree, primals: PyTree) -> PyTree:
    """Tangents with zeros in the place of those that are none; none for what is not differentiated."""

    def fill(tangent: Any, primal: Any) -> Any:
        return jnp.zeros_like(primal) if tangent is None and eqx.is_inexact_array(primal) else tangent

    return jax.tree_util.tree_map(fill, tangents, primals, is_leaf=lambda leaf: leaf is None)
