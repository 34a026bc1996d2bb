"""Members in flight: a few slots, each refilled inside the compiled loop as soon as its member has landed.

A batch that waits for its slowest member throws most of its work away. Here a slot goes on to the next member of a
queue at once. The host gives out members and collects results a few at a time, so that memory is bounded by the slots,
not by the grid.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from gradflow import _solution
from gradflow._loop import Carry, Setup, attempt, begin, finish
from gradflow._solution import Solution
from gradflow._solve import prepare
from gradflow._tree import flatten, full_precision
from gradflow._until import Until
from gradflow.solvers import AbstractMethod, StepControl

VACANT = -1


class Options(eqx.Module):
    """What all members have in common; numbers are leaves."""

    ts: Array
    solver: diffrax.AbstractSolver | AbstractMethod
    control: StepControl
    until: Until | None
    max_steps: Array
    save_params: bool = eqx.field(static=True)


class Flight(eqx.Module):
    """Slots with the members in flight, and the results of those that have landed; all leaves are arrays."""

    own: PyTree  # what is the member's own of its flow, parameters and observables; leading axis: slots
    carry: PyTree
    who: Int[Array, " slots"]  # number of the member in the queue, or VACANT
    next: Int[Array, ""]  # first member of the queue that has not set off
    outbox: PyTree
    sender: Int[Array, " capacity"]
    landed: Int[Array, ""]
    ticks: Int[Array, ""]  # attempted steps of all slots together
    spent: Int[Array, ""]  # gradient evaluations, with those of slots that only waited for another


def vacant(inbox: PyTree, shared: PyTree, options: Options, slots: int, capacity: int) -> Flight:
    """A flight with nobody on board, for members like those of an inbox."""
    one = jax.tree_util.tree_map(lambda leaf: leaf[0], inbox)
    carry, result = eqx.filter_eval_shape(_shapes, one, shared, options)

    def blank(count: int) -> Callable[[Any], Any]:
        return lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype)

    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    arrays = lambda tree: eqx.filter(tree, is_shape)  # noqa: E731
    zero = jnp.asarray(0)
    return Flight(
        own=jax.tree_util.tree_map(lambda leaf: jnp.stack([leaf[0]] * slots), inbox),
        carry=jax.tree_util.tree_map(blank(slots), arrays(carry)),
        who=jnp.full(slots, VACANT),
        next=zero,
        outbox=jax.tree_util.tree_map(blank(capacity), arrays(result)),
        sender=jnp.full(capacity, VACANT),
        landed=zero,
        ticks=zero,
        spent=zero,
    )


def _shapes(own: PyTree, shared: PyTree, options: Options) -> tuple[PyTree, PyTree]:
    setup = _setup(own, shared, options)
    carry = begin(setup)
    return carry, _result(setup, carry)


def evaluation(own: PyTree, shared: PyTree, options: Options) -> Any:
    """The derivative of the state at the start of a member."""
    setup = _setup(own, shared, options)
    return setup.flow.vector_field(setup.ts[0], setup.flow.init(setup.start, setup.frozen), setup.frozen)


def _setup(own: PyTree, shared: PyTree, options: Options) -> Setup:
    flow, params, observe = eqx.combine(own, shared)
    return prepare(
        flow,
        params,
        options.ts,
        observe=observe,
        solver=options.solver,
        rtol=options.control.rtol,
        atol=options.control.atol,
        save_params=options.save_params,
        until=options.until,
        max_steps=options.max_steps,
    )


def _result(setup: Setup, carry: Carry) -> tuple[Solution, Array | None]:
    """The solution without its parameters, and these as a matrix with a row for every save time."""
    solution = finish(setup, carry)
    flat = None
    if setup.save_params:
        flowing = eqx.filter(solution.params, eqx.is_inexact_array)
        flat = jax.vmap(lambda tree: flatten(tree)[0])(flowing)
    return eqx.tree_at(lambda s: (s.params, s.final), solution, (None, None), is_leaf=lambda x: x is None), flat


@eqx.filter_jit
@full_precision
def fly(
    fixed: tuple[PyTree, PyTree, Options],
    flight: Flight,
    first: Int[Array, ""],
    end: Int[Array, ""],
    budget: Int[Array, ""],
) -> Flight:
    """At most `budget` ticks; ends earlier when the outbox is full, or when nobody is left in the air.

    `fixed` is the inbox, what members share, and the options. The inbox holds the members of the queue from `first` on;
    those up to `end` are to set off.
    """
    inbox, shared, options = fixed
    last = flight.ticks + budget
    slots, capacity = flight.who.size, flight.sender.size
    static = eqx.filter(
        eqx.filter_eval_shape(lambda own: begin(_setup(own, shared, options)), at(flight.own, 0)),
        lambda leaf: not isinstance(leaf, jax.ShapeDtypeStruct),
    )

    def flying(now: Flight) -> Bool[Array, " slots"]:
        return (now.who != VACANT) & (now.carry.code == _solution.RUNNING)

    def due(now: Flight) -> Bool[Array, " slots"]:
        """Slots that wait to be emptied, or filled."""
        vacant = now.who == VACANT
        full = now.landed >= capacity
        return jnp.where(vacant, now.next < end, ~flying(now) & ~full)

    def exchange(now: Flight) -> Flight:
        slot = jnp.argmax(due(now))
        now = jax.lax.cond(now.who[slot] == VACANT, lambda f: f, lambda f: land(f, slot), now)
        return jax.lax.cond(now.next < end, lambda f: take_off(f, slot), lambda f: f, now)

    def land(now: Flight, slot: Int[Array, ""]) -> Flight:
        carry = eqx.combine(at(now.carry, slot), static)
        result = _result(_setup(at(now.own, slot), shared, options), carry)
        outbox = _put(now.outbox, now.landed, eqx.filter(result, eqx.is_array))
        sender = now.sender.at[now.landed].set(now.who[slot])
        where = lambda f: (f.outbox, f.sender, f.landed, f.who)  # noqa: E731
        return eqx.tree_at(where, now, (outbox, sender, now.landed + 1, now.who.at[slot].set(VACANT)))

    def take_off(now: Flight, slot: Int[Array, ""]) -> Flight:
        own = at(inbox, now.next - first)
        carry = begin(_setup(own, shared, options))
        where = lambda f: (f.own, f.carry, f.who, f.next, f.spent)  # noqa: E731
        new = (
            _put(now.own, slot, own),
            _put(now.carry, slot, eqx.filter(carry, eqx.is_array)),
            now.who.at[slot].set(now.next),
            now.next + 1,
            now.spent + carry.evaluations,
        )
        return eqx.tree_at(where, now, new)

    def step(own: PyTree, carry: PyTree) -> PyTree:
        return eqx.filter(attempt(_setup(own, shared, options), eqx.combine(carry, static)), eqx.is_array)

    def tick(now: Flight) -> Flight:
        going = flying(now)
        if slots == 1:
            carry = _put(now.carry, 0, step(at(now.own, 0), at(now.carry, 0)))
        else:
            # A slot with nobody on board mimics another one: by itself it might keep all others waiting.
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
        return jnp.any(flying(now)) & (now.landed < capacity) & (now.ticks < last)

    return jax.lax.while_loop(going_on, lambda f: settle(tick(f)), settle(flight))


def at(tree: PyTree, index: Any) -> PyTree:
    """The entry of every leaf at an index of its leading axis."""
    return jax.tree_util.tree_map(lambda leaf: leaf[index], tree)


def _put(tree: PyTree, index: Any, values: PyTree) -> PyTree:
    return jax.tree_util.tree_map(lambda leaf, value: leaf.at[index].set(value), tree, values)
