"""Slots: a few members run at a time, and each slot is refilled inside the compiled loop as soon as its member is done.

A batch that waits for its slowest member throws most of its work away. Here a slot goes on to the next member of a
queue at once. The host gives out members and collects results a few at a time, so that memory is bounded by the slots,
not by the grid. Several devices run loops of their own: none waits for another before the end of a segment.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree

from gradflow._solution import Status
from gradflow._tree import full_precision
from gradflow.runs._member import Options
from gradflow.sweeps._program import PerMember, Program, at, make_program

EMPTY = -1


class Pending(eqx.Module):
    """Members about to be admitted to a slot. On several devices every leaf has one more leading axis."""

    per_member: PerMember  # leading axis: room
    member_ids: Int[Array, "*devices room"]  # their numbers
    size: Int[Array, "*devices"]  # how many of them there are; the rest repeats
    more: Bool[Array, "*devices"]  # whether others wait for room in here


class Shapes(NamedTuple):
    """Shapes of what a member carries from step to step, and of its result."""

    carry: PyTree
    result: PyTree


class SlotState(eqx.Module):
    """Slots with the members that run, and the results of those that have finished; all leaves are arrays.

    On several devices every leaf has one more leading axis.
    """

    per_member: PyTree  # leading axis: slots
    carry: PyTree
    member_ids: Int[Array, "*devices slots"]  # number of the member in the slot, or EMPTY
    next: Int[Array, "*devices"]  # first pending member that has not been admitted
    finished: PyTree  # results
    finished_ids: Int[Array, "*devices capacity"]  # whose they are
    num_finished: Int[Array, "*devices"]
    steps: Int[Array, "*devices"]  # attempted steps of all slots together
    num_evaluations: Int[Array, "*devices"]  # evaluations, with those of slots that only waited for another


def shapes_of(one: PerMember, shared: PyTree, options: Options) -> Shapes:
    """The shapes of a member like this one."""

    @full_precision
    def shapes(one: PerMember, shared: PyTree, options: Options) -> tuple[PyTree, PyTree]:
        program = make_program(one, shared, options)
        carry = program.begin()
        return carry, program.result(carry)

    arrays = lambda tree: eqx.filter(tree, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))  # noqa: E731
    carry, result = eqx.filter_eval_shape(shapes, one, shared, options)
    return Shapes(arrays(carry), arrays(result))


def empty_slots(one: PerMember, shapes: Shapes, slots: int, capacity: int) -> SlotState:
    """Empty slots, for members like this one."""

    def blank(count: int) -> Callable[[jax.ShapeDtypeStruct], Array]:
        return lambda leaf: _zeros((count, *leaf.shape), leaf.dtype)

    zero = jnp.zeros((), int)
    return SlotState(
        per_member=jax.tree_util.tree_map(lambda leaf: jnp.stack([leaf] * slots), one),
        carry=jax.tree_util.tree_map(blank(slots), shapes.carry),
        member_ids=jnp.full(slots, EMPTY, int),
        next=zero,
        finished=jax.tree_util.tree_map(blank(capacity), shapes.result),
        finished_ids=jnp.full(capacity, EMPTY, int),
        num_finished=zero,
        steps=zero,
        num_evaluations=zero,
    )


def _zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0, impl=dtype._impl.name), shape)
    return jnp.zeros(shape, dtype)


@eqx.filter_jit
def run_segment(
    fixed: tuple[PyTree, Options], pending: Pending, state: SlotState, budget: Int[Array, ""], mesh: Mesh | None = None
) -> SlotState:
    """Goes on until an evaluation budget is used up, there is no room for more results, or no member is left.

    `fixed` is what members share, and the options. With a `mesh`, pending members and slots are divided over its
    devices.
    """
    if mesh is None:
        return _run_segment(fixed, pending, state, budget)
    arrays, static = eqx.partition(fixed, eqx.is_array)
    sharded, replicated = PartitionSpec(mesh.axis_names[0]), PartitionSpec()

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(replicated, sharded, sharded, replicated),
        out_specs=sharded,
        check_vma=False,
    )
    def on_each(arrays: PyTree, pending: Pending, state: SlotState, budget: Array) -> SlotState:
        one = _run_segment(eqx.combine(arrays, static), at(pending, 0), at(state, 0), budget)
        return jax.tree_util.tree_map(lambda leaf: leaf[None], one)

    return on_each(arrays, pending, state, budget)


@full_precision
def _run_segment(
    fixed: tuple[PyTree, Options], pending: Pending, state: SlotState, budget: Int[Array, ""]
) -> SlotState:
    shared, options = fixed
    begun = eqx.filter_eval_shape(
        lambda per_member: make_program(per_member, shared, options).begin(), at(state.per_member, 0)
    )
    static = eqx.filter(begun, lambda leaf: not isinstance(leaf, jax.ShapeDtypeStruct))
    loop = _Loop(shared, options, pending, static, state.num_evaluations + budget)
    done = jax.lax.while_loop(loop.goes_on, lambda now: loop.refill(loop.step_all(now)), loop.refill(state))
    # Without weak types, so that what comes out goes in again without another compilation.
    return jax.tree_util.tree_map(_strong, done)


class _Loop(NamedTuple):
    """What stays fixed during a segment."""

    shared: PyTree
    options: Options
    pending: Pending
    static: PyTree  # what is no array in what a member carries from step to step
    last: Int[Array, ""]  # evaluations at which the segment ends

    def program(self, per_member: PerMember) -> Program:
        return make_program(per_member, self.shared, self.options)

    def refill(self, now: SlotState) -> SlotState:
        """Empties the slots of members that are done, as far as there is room, and fills those that are empty."""
        return jax.lax.while_loop(lambda s: jnp.any(self._due(s)), self._exchange, now)

    def step_all(self, now: SlotState) -> SlotState:
        """One attempted step in every slot."""
        going, slots = _active(now), now.member_ids.size
        if slots == 1:
            carry = _put(now.carry, 0, self._step(at(now.per_member, 0), at(now.carry, 0)))
        else:
            # An empty slot mimics another one: by itself it might keep all others waiting.
            source = jnp.where(going, jnp.arange(slots), jnp.argmax(going))
            follow = lambda tree: jax.tree_util.tree_map(lambda leaf: leaf[source], tree)  # noqa: E731
            per_member, before = jax.lax.cond(jnp.all(going), lambda t: t, follow, (now.per_member, now.carry))
            stepped = jax.vmap(self._step)(per_member, before)
            keep = lambda a, b: jnp.where(going.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)  # noqa: E731
            carry = jax.tree_util.tree_map(keep, stepped, now.carry)
        work = jnp.max(jnp.where(going, carry.evaluations - now.carry.evaluations, 0))
        where = lambda s: (s.carry, s.steps, s.num_evaluations)  # noqa: E731
        return eqx.tree_at(where, now, (carry, now.steps + 1, now.num_evaluations + slots * work))

    def goes_on(self, now: SlotState) -> Bool[Array, ""]:
        # With a slot empty that could be filled, the host is asked at once, so that order does not depend on time.
        pending, capacity = self.pending, now.finished_ids.size
        asking = pending.more & (now.next >= pending.size) & jnp.any(now.member_ids == EMPTY)
        return jnp.any(_active(now)) & ~asking & (now.num_finished < capacity) & (now.num_evaluations < self.last)

    def _due(self, now: SlotState) -> Bool[Array, " slots"]:
        """Slots that wait to be emptied, or filled."""
        empty = now.member_ids == EMPTY
        full = now.num_finished >= now.finished_ids.size
        return jnp.where(empty, now.next < self.pending.size, ~_active(now) & ~full)

    def _exchange(self, now: SlotState) -> SlotState:
        slot = jnp.argmax(self._due(now))
        now = jax.lax.cond(now.member_ids[slot] == EMPTY, lambda s: s, lambda s: self._retire(s, slot), now)
        return jax.lax.cond(now.next < self.pending.size, lambda s: self._admit(s, slot), lambda s: s, now)

    def _retire(self, now: SlotState, slot: Int[Array, ""]) -> SlotState:
        """With the result of the member in a slot, which is empty then."""
        carry = eqx.combine(at(now.carry, slot), self.static)
        result = self.program(at(now.per_member, slot)).result(carry)
        finished = _put(now.finished, now.num_finished, eqx.filter(result, eqx.is_array))
        finished_ids = now.finished_ids.at[now.num_finished].set(now.member_ids[slot])
        where = lambda s: (s.finished, s.finished_ids, s.num_finished, s.member_ids)  # noqa: E731
        return eqx.tree_at(
            where, now, (finished, finished_ids, now.num_finished + 1, now.member_ids.at[slot].set(EMPTY))
        )

    def _admit(self, now: SlotState, slot: Int[Array, ""]) -> SlotState:
        """With the next pending member in a slot."""
        per_member = at(self.pending.per_member, now.next)
        carry = self.program(per_member).begin()
        where = lambda s: (s.per_member, s.carry, s.member_ids, s.next, s.num_evaluations)  # noqa: E731
        new = (
            _put(now.per_member, slot, per_member),
            _put(now.carry, slot, eqx.filter(carry, eqx.is_array)),
            now.member_ids.at[slot].set(self.pending.member_ids[now.next]),
            now.next + 1,
            now.num_evaluations + carry.evaluations,
        )
        return eqx.tree_at(where, now, new)

    def _step(self, per_member: PerMember, carry: PyTree) -> PyTree:
        return eqx.filter(self.program(per_member).attempt(eqx.combine(carry, self.static)), eqx.is_array)


def _active(now: SlotState) -> Bool[Array, " slots"]:
    return (now.member_ids != EMPTY) & (now.carry.code == Status.RUNNING)


def _strong(leaf: Array) -> Array:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return leaf if is_key else jax.lax.convert_element_type(leaf, leaf.dtype)


def local_mesh(devices: Sequence[object]) -> Mesh | None:
    """The devices as a mesh with one axis; `None` for a single one."""
    return None if len(devices) == 1 else Mesh(np.array(devices), ("device",))


def divided(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """A pytree of arrays with a leading axis of devices, laid out over them; without a mesh, the only entry."""
    if mesh is None:
        return at(tree, 0)
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))


def _put(tree: PyTree, index: int | Int[Array, ""], values: PyTree) -> PyTree:
    return jax.tree_util.tree_map(lambda leaf, value: leaf.at[index].set(value), tree, values)
