"""Where a vector field jumps: its program, with the switches in it laid open.

A switch is an operation whose result, or its derivative, jumps where a switching function `g` of the state changes its
sign: `a > b` and `max(a, b)` with `g = a - b`, `sign(a)` with `g = a`, a maximum over entries as a tournament of
maxima of two. The program is read off the jaxpr of the field, so that the field of any model can be had on either side
of any of its switches, wherever the state is.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import AbstractValue, ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from gradflow.problems._kinks._primitives import INLINED

Program = ClosedJaxpr | Jaxpr
"""A program, with its constants or without."""
Held = Iterator[tuple[Array, Array]]
"""For every array of switching functions in turn, which of them are held, and which of those on the upper side."""

COMPARISONS = {"gt": True, "ge": True, "lt": False, "le": False}
"""Comparisons, and what they give where the first operand is the larger one."""
PAIRS = {"max": True, "min": False, "sign": True, **COMPARISONS}
OVER_ENTRIES = {"reduce_max": True, "reduce_min": False}
OPAQUE = frozenset(
    [
        *("argmax", "argmin", "sort", "top_k", "approx_top_k", "round", "floor", "ceil", "rem", "cummax", "cummin"),
        *("reduce_window", "reduce_window_max", "reduce_window_min", "reduce", "scatter-max", "scatter-min"),
        *("select_and_scatter_add", "select_and_gather_add"),
    ]
)
"""Operations that jump in ways that are not followed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What is done at each equation of a program: nothing, or a switch, or a program within it that has switches."""

    actions: tuple["Plan | int | None", ...]
    varying: tuple[bool, ...]  # which results depend on the state
    lost: frozenset[str]  # operations that may jump and are not followed

    @property
    def count(self) -> int:
        """Arrays of switching functions."""
        return sum(action.count if isinstance(action, Plan) else action or 0 for action in self.actions)


class Switching(eqx.Module):
    """The program of a field, `values` of its switching functions, and the field on chosen sides of them."""

    leaves: list[Array]  # all that the field depends on, besides time and state
    program: Jaxpr = eqx.field(static=True)
    plan: Plan = eqx.field(static=True)
    structure: Hashable = eqx.field(static=True)  # of the state

    def __call__(self, t: Scalar, y: PyTree, sides: "Sides | None" = None) -> tuple[PyTree, Float[Array, " switches"]]:
        """The field, and its switching functions."""
        given = None if sides is None else iter(sides.split(self.shapes(t, y)))
        args = [*self.leaves, t, *jax.tree_util.tree_leaves(y)]
        outs, values = _evaluate(self.program, self.plan, args, given)
        dtype = jnp.result_type(*jax.tree_util.tree_leaves(y))
        flat = [jnp.ravel(value).astype(dtype) for value in values]
        return jax.tree_util.tree_unflatten(self.structure, outs), jnp.concatenate(flat)

    def without_opaque(self) -> "Switching | None":
        """The switches that are followed, as if there were no others."""
        plan = dataclasses.replace(self.plan, lost=frozenset())
        return dataclasses.replace(self, plan=plan) if plan.count else None

    def shapes(self, t: Scalar, y: PyTree) -> list[tuple[int, ...]]:
        args = [*self.leaves, t, *jax.tree_util.tree_leaves(y)]
        values = jax.eval_shape(lambda args: _evaluate(self.program, self.plan, args, None)[1], args)
        return [value.shape for value in values]


class Sides(eqx.Module):
    """The sides on which switches are held: `up` where the switching function counts as positive."""

    held: Bool[Array, " switches"]
    up: Bool[Array, " switches"]

    def split(self, shapes: Sequence[tuple[int, ...]]) -> list[tuple[Array, Array]]:
        halves, start = [], 0
        for shape in shapes:
            stop = start + math.prod(shape)
            halves.append((self.held[start:stop].reshape(shape), self.up[start:stop].reshape(shape)))
            start = stop
        return halves


def switching(
    vector_field: Callable[..., PyTree], flow: PyTree, t: Scalar, y: PyTree, frozen: PyTree
) -> Switching | None:
    """The switches of `vector_field(flow, t, y, frozen)` that depend on the state; `None` where there are none."""
    dynamic, static = eqx.partition((flow, frozen), eqx.is_array)
    leaves, structure = jax.tree_util.tree_flatten(dynamic)
    flat, state = jax.tree_util.tree_flatten(y)

    def program(leaves: list[Array], t: Scalar, flat: list[Array]) -> list[Array]:
        flow, frozen = eqx.combine(jax.tree_util.tree_unflatten(structure, leaves), static)
        rate = vector_field(flow, t, jax.tree_util.tree_unflatten(state, flat), frozen)
        return [jnp.asarray(a, b.dtype) for a, b in zip(jax.tree_util.tree_leaves(rate), flat, strict=True)]

    with jax.disable_jit(False):
        closed = jax.make_jaxpr(program)(leaves, t, flat)
    # What functions have captured may have derivatives as well, and so becomes an argument.
    inner = closed.jaxpr
    inner = inner.replace(constvars=[], invars=[*inner.constvars, *inner.invars])
    leaves = [jnp.asarray(const) for const in closed.consts] + leaves
    plan = _plan(inner, [False] * (len(leaves) + 1) + [True] * len(flat))
    return Switching(leaves, inner, plan, state) if plan.count or plan.lost else None


def _is_float(aval: AbstractValue) -> TypeGuard[ShapedArray]:
    return isinstance(aval, ShapedArray) and jnp.issubdtype(aval.dtype, jnp.floating)


def _inner(eqn: JaxprEqn) -> Program | None:
    return next((eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params), None)


def _open(jaxpr: Program) -> tuple[Jaxpr, list[object]]:
    """A program and its constants."""
    return (jaxpr.jaxpr, list(jaxpr.consts)) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, [])


def _plan(jaxpr: Program, flags: Sequence[bool]) -> Plan:
    """Marks the switches that depend on arguments with a flag."""
    inner, consts = _open(jaxpr)
    depends = dict(zip([*inner.constvars, *inner.invars], [False] * len(consts) + list(flags), strict=True))
    actions: list[Plan | int | None] = []
    lost: set[str] = set()
    for eqn in inner.eqns:
        inputs = [not isinstance(atom, Literal) and depends[atom] for atom in eqn.invars]
        action, outs = _action(eqn, inputs, lost) if any(inputs) else (None, [False] * len(eqn.outvars))
        actions.append(action)
        depends.update(zip(eqn.outvars, outs, strict=True))
    outs = tuple(not isinstance(atom, Literal) and depends[atom] for atom in inner.outvars)
    return Plan(tuple(actions), outs, frozenset(lost))


def _action(eqn: JaxprEqn, inputs: list[bool], lost: set[str]) -> tuple[Plan | int | None, Sequence[bool]]:
    """What is done at an equation, and which of its results depend on the state."""
    name, first = eqn.primitive.name, eqn.invars[0].aval
    every = [True] * len(eqn.outvars)
    if name in PAIRS and _is_float(first):
        return 1, every
    if name in OVER_ENTRIES and _is_float(first):
        size = math.prod(first.shape[axis] for axis in eqn.params["axes"])
        return max(size - 1, 0).bit_length(), every
    if name in OPAQUE and _is_float(first):
        lost.add(name)
    inner = _inner(eqn) if name in INLINED and name != "shard_map" else None
    if inner is not None:
        plan = _plan(inner, inputs)
        lost |= plan.lost
        return plan if plan.count else None, plan.varying
    if name == "scan":
        plan = _scan_plan(eqn, inputs)
        lost |= plan.lost
        return plan if plan.count else None, plan.varying
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns") or isinstance(part, ClosedJaxpr):
                first = len(inputs) - len(_open(part)[0].invars)
                plan = _plan(part, inputs[first:] if first >= 0 else [True] * len(_open(part)[0].invars))
                lost |= plan.lost | ({name} if plan.count else set())
    return None, every


def _scan_plan(eqn: JaxprEqn, inputs: list[bool]) -> Plan:
    constant, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    flags = list(inputs)
    while True:
        plan = _plan(eqn.params["jaxpr"], flags)
        carry = [a or b for a, b in zip(flags[constant : constant + carried], plan.varying[:carried], strict=True)]
        if carry == flags[constant : constant + carried]:
            return plan
        flags[constant : constant + carried] = carry


def _evaluate(
    jaxpr: Program, plan: Plan, args: Sequence[object], sides: Held | None
) -> tuple[list[object], list[Array]]:
    """The results of a program and the switching functions in it, which are held on `sides` where these are given."""
    inner, consts = _open(jaxpr)
    environment: dict[Var, object] = dict(zip([*inner.constvars, *inner.invars], [*consts, *args], strict=True))
    values: list[Array] = []
    for eqn, action in zip(inner.eqns, plan.actions, strict=True):
        inputs = [atom.val if isinstance(atom, Literal) else environment[atom] for atom in eqn.invars]
        if isinstance(action, Plan):
            run = _scan if eqn.primitive.name == "scan" else _call
            outs, more = run(eqn, action, inputs, sides)
            values += more
        elif action:
            outs = [_switch(eqn, inputs, sides, values)]
        else:
            outs = _bind(eqn, inputs)
        environment.update(zip(eqn.outvars, outs, strict=True))
    return [atom.val if isinstance(atom, Literal) else environment[atom] for atom in inner.outvars], values


def _bind(eqn: JaxprEqn, inputs: list[object]) -> list[object]:
    bound = eqn.primitive.get_bind_params(eqn.params)
    # Older versions of JAX give the functions of a call apart from its parameters.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    outs = eqn.primitive.bind(*functions, *inputs, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def _call(eqn: JaxprEqn, plan: Plan, inputs: list[object], sides: Held | None) -> tuple[list[object], list[Array]]:
    inner = _inner(eqn)
    assert inner is not None  # the plan is that of a program
    return _evaluate(inner, plan, inputs, sides)


def _scan(eqn: JaxprEqn, plan: Plan, inputs: list[object], sides: Held | None) -> tuple[list[object], list[Array]]:
    constant, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    fixed, start, rows = inputs[:constant], inputs[constant : constant + carried], inputs[constant + carried :]
    given = None if sides is None else [next(sides) for _ in range(plan.count)]

    def body(
        carry: list[object], each: tuple[list[object], list[tuple[Array, Array]] | None]
    ) -> tuple[list[object], PyTree]:
        rows, given = each
        args = [*fixed, *carry, *rows]
        outs, values = _evaluate(eqn.params["jaxpr"], plan, args, None if given is None else iter(given))
        return outs[:carried], (outs[carried:], values)

    options = {"length": eqn.params["length"], "reverse": eqn.params["reverse"]}
    last, (stacked, values) = jax.lax.scan(body, list(start), (list(rows), given), **options)
    return [*last, *stacked], values


def _switch(eqn: JaxprEqn, inputs: list[Any], sides: Held | None, values: list[Array]) -> Array:
    """The result of a switch, whose switching functions are appended to `values`."""
    name, first = eqn.primitive.name, inputs[0]
    if name in OVER_ENTRIES:
        axes = eqn.params["axes"]
        entries = jnp.moveaxis(first, axes, range(len(axes)))
        entries = entries.reshape(-1, *entries.shape[len(axes) :])
        while entries.shape[0] > 1:
            half = entries.shape[0] // 2
            winners = _one_of(entries[:half], entries[half : 2 * half], OVER_ENTRIES[name], sides, values)
            entries = jnp.concatenate([winners, entries[2 * half :]])
        return entries[0]
    if name in ("max", "min"):
        a, b = jnp.broadcast_arrays(*inputs)
        return _one_of(a, b, PAIRS[name], sides, values)
    value = first if name == "sign" else jnp.subtract(*inputs)
    natural = eqn.primitive.bind(*inputs, **eqn.params)
    values.append(value)
    if sides is None:
        return natural
    held, up = next(sides)
    forced = jnp.where(up, 1, -1).astype(value.dtype) if name == "sign" else up == COMPARISONS[name]
    return jnp.where(held, forced, natural)


def _one_of(a: Array, b: Array, larger: bool, sides: Held | None, values: list[Array]) -> Array:
    """The larger or the smaller one of two arrays, entry by entry."""
    values.append(a - b)
    natural = jnp.maximum(a, b) if larger else jnp.minimum(a, b)
    if sides is None:
        return natural
    held, up = next(sides)
    return jnp.where(held, jnp.where(up == larger, a, b), natural)
