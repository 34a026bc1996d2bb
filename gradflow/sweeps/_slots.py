"""Members in flight: a few slots, each refilled inside the compiled loop as soon as its member has landed.

A batch that waits for its slowest member throws most of its work away. Here a slot goes on to the next member of a
queue at once. The host gives out members and collects results a few at a time, so that memory is bounded by the slots,
not by the grid. Several devices run loops of their own: none waits for another before the end of a segment.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree

from gradflow._solution import Status
from gradflow._tree import full_precision
from gradflow.runs._member import Options
from gradflow.sweeps._program import Own, at, make_program

VACANT = -1


class Inbox(eqx.Module):
    """Members about to set off."""

    own: Own  # leading axis: room
    who: Int[Array, " room"]  # their numbers
    size: Int[Array, ""]  # how many of them there are; the rest repeats
    more: Bool[Array, ""]  # whether others wait for room in here


class Flight(eqx.Module):
    """Slots with the members in flight, and the results of those that have landed; all leaves are arrays.

    On several devices every leaf has one more leading axis.
    """

    own: PyTree  # leading axis: slots
    carry: PyTree
    who: Int[Array, " slots"]  # number of the member on board, or VACANT
    next: Int[Array, ""]  # first member of the inbox that has not set off
    outbox: PyTree
    sender: Int[Array, " capacity"]
    landed: Int[Array, ""]
    ticks: Int[Array, ""]  # attempted steps of all slots together
    spent: Int[Array, ""]  # evaluations, with those of slots that only waited for another


def shapes_of(one: Own, shared: PyTree, options: Options) -> tuple[PyTree, PyTree]:
    """Shapes of what a member like this one carries from step to step, and of its result."""

    @full_precision
    def shapes(one: Own, shared: PyTree, options: Options) -> tuple[PyTree, PyTree]:
        program = make_program(one, shared, options)
        carry = program.begin()
        return carry, program.result(carry)

    arrays = lambda tree: eqx.filter(tree, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))  # noqa: E731
    carry, result = eqx.filter_eval_shape(shapes, one, shared, options)
    return arrays(carry), arrays(result)


def vacant(one: Own, shapes: tuple[PyTree, PyTree], slots: int, capacity: int) -> Flight:
    """An empty flight, for members like this one."""
    carry, result = shapes

    def blank(count: int) -> Callable[[Any], Any]:
        return lambda leaf: _zeros((count, *leaf.shape), leaf.dtype)

    zero = jnp.zeros((), int)
    return Flight(
        own=jax.tree_util.tree_map(lambda leaf: jnp.stack([leaf] * slots), one),
        carry=jax.tree_util.tree_map(blank(slots), carry),
        who=jnp.full(slots, VACANT, int),
        next=zero,
        outbox=jax.tree_util.tree_map(blank(capacity), result),
        sender=jnp.full(capacity, VACANT, int),
        landed=zero,
        ticks=zero,
        spent=zero,
    )


def _zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0, impl=dtype._impl.name), shape)
    return jnp.zeros(shape, dtype)


@eqx.filter_jit
def fly(
    fixed: tuple[PyTree, Options], inbox: Inbox, flight: Flight, budget: Int[Array, ""], mesh: Mesh | None = None
) -> Flight:
    """Goes on until an evaluation budget is spent, the outbox is full, or no member is left.

    `fixed` is what members share, and the options. With a `mesh`, inbox and flight are divided over its devices.
    """
    if mesh is None:
        return _fly(fixed, inbox, flight, budget)
    arrays, static = eqx.partition(fixed, eqx.is_array)
    share, whole = PartitionSpec(mesh.axis_names[0]), PartitionSpec()

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(whole, share, share, whole), out_specs=share, check_vma=False
    )
    def on_each(arrays: PyTree, inbox: Inbox, flight: Flight, budget: Array) -> Flight:
        one = _fly(eqx.combine(arrays, static), at(inbox, 0), at(flight, 0), budget)
        return jax.tree_util.tree_map(lambda leaf: leaf[None], one)

    return on_each(arrays, inbox, flight, budget)


@full_precision
def _fly(fixed: tuple[PyTree, Options], inbox: Inbox, flight: Flight, budget: Int[Array, ""]) -> Flight:
    shared, options = fixed
    last = flight.spent + budget
    slots, capacity = flight.who.size, flight.sender.size
    static = eqx.filter(
        eqx.filter_eval_shape(lambda own: make_program(own, shared, options).begin(), at(flight.own, 0)),
        lambda leaf: not isinstance(leaf, jax.ShapeDtypeStruct),
    )

    def flying(now: Flight) -> Bool[Array, " slots"]:
        return (now.who != VACANT) & (now.carry.code == Status.RUNNING)

    def due(now: Flight) -> Bool[Array, " slots"]:
        """Slots that wait to be emptied, or filled."""
        vacant = now.who == VACANT
        full = now.landed >= capacity
        return jnp.where(vacant, now.next < inbox.size, ~flying(now) & ~full)

    def exchange(now: Flight) -> Flight:
        slot = jnp.argmax(due(now))
        now = jax.lax.cond(now.who[slot] == VACANT, lambda f: f, lambda f: land(f, slot), now)
        return jax.lax.cond(now.next < inbox.size, lambda f: take_off(f, slot), lambda f: f, now)

    def land(now: Flight, slot: Int[Array, ""]) -> Flight:
        carry = eqx.combine(at(now.carry, slot), static)
        result = make_program(at(now.own, slot), shared, options).result(carry)
        outbox = _put(now.outbox, now.landed, eqx.filter(result, eqx.is_array))
        sender = now.sender.at[now.landed].set(now.who[slot])
        where = lambda f: (f.outbox, f.sender, f.landed, f.who)  # noqa: E731
        return eqx.tree_at(where, now, (outbox, sender, now.landed + 1, now.who.at[slot].set(VACANT)))

    def take_off(now: Flight, slot: Int[Array, ""]) -> Flight:
        own = at(inbox.own, now.next)
        carry = make_program(own, shared, options).begin()
        where = lambda f: (f.own, f.carry, f.who, f.next, f.spent)  # noqa: E731
        new = (
            _put(now.own, slot, own),
            _put(now.carry, slot, eqx.filter(carry, eqx.is_array)),
            now.who.at[slot].set(inbox.who[now.next]),
            now.next + 1,
            now.spent + carry.evaluations,
        )
        return eqx.tree_at(where, now, new)

    def step(own: Own, carry: PyTree) -> PyTree:
        return eqx.filter(make_program(own, shared, options).attempt(eqx.combine(carry, static)), eqx.is_array)

    def tick(now: Flight) -> Flight:
        going = flying(now)
        if slots == 1:
            carry = _put(now.carry, 0, step(at(now.own, 0), at(now.carry, 0)))
        else:
            # An empty slot mimics another one: by itself it might keep all others waiting.
            source = jnp.where(going, jnp.arange(slots), jnp.argmax(going))
            follow = lambda tree: jax.tree_util.tree_map(lambda leaf: leaf[source], tree)  # noqa: E731
            own, before = jax.lax.cond(jnp.all(going), lambda t: t, follow, (now.own, now.carry))
            moved = jax.vmap(step)(own, before)
            keep = lambda a, b: jnp.where(going.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)  # noqa: E731
            carry = jax.tree_util.tree_map(keep, moved, now.carry)
        work = jnp.max(jnp.where(going, carry.evaluations - now.carry.evaluations, 0))
        where = lambda f: (f.carry, f.ticks, f.spent)  # noqa: E731
        return eqx.tree_at(where, now, (carry, now.ticks + 1, now.spent + slots * work))

    def settle(now: Flight) -> Flight:
        return jax.lax.while_loop(lambda f: jnp.any(due(f)), exchange, now)

    def going_on(now: Flight) -> Bool[Array, ""]:
        # With a slot empty that could be filled, the host is asked at once, so that order does not depend on time.
        asking = inbox.more & (now.next >= inbox.size) & jnp.any(now.who == VACANT)
        return jnp.any(flying(now)) & ~asking & (now.landed < capacity) & (now.spent < last)

    done = jax.lax.while_loop(going_on, lambda f: settle(tick(f)), settle(flight))
    # Without weak types, so that what comes out goes in again without another compilation.
    return jax.tree_util.tree_map(_strong, done)


def _strong(leaf: Array) -> Array:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return leaf if is_key else jax.lax.convert_element_type(leaf, leaf.dtype)


def local_mesh(devices: list[Any]) -> Mesh | None:
    """The devices as a mesh with one axis; `None` for a single one."""
    return None if len(devices) == 1 else Mesh(np.array(devices), ("device",))


def divided(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """A pytree of arrays with a leading axis of devices, laid out over them; without a mesh, the only entry."""
    if mesh is None:
        return at(tree, 0)
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))


def _put(tree: PyTree, index: Any, values: PyTree) -> PyTree:
    return jax.tree_util.tree_map(lambda leaf, value: leaf.at[index].set(value), tree, values)
