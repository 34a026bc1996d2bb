"""Everything that a run of a member is made of, evaluated at one point: what the run would do first, in numbers."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradflow._tree import Chosen, flatten, full_precision, join, scaled_norm, split
from gradflow.runs._member import AbstractMember, Options
from gradflow.runs._record import seen
from gradflow.runs._run import Point
from gradflow.sweeps._program import Padding

START = "the state at the start"


@full_precision
def probe_anew(member: AbstractMember, options: Options, padding: Padding | None, where: Point) -> dict[str, PyTree]:
    """State, derivative or step, loss, observables and condition of a member, by what they are called in messages."""
    run = member.run(options)
    if padding is not None:
        run = run.padded(padding.widths, padding.extents, padding.counts)
    state = run.initial()
    values: dict[str, PyTree] = {START: state}
    state = _pushed(state, where.push * scaled_norm(flatten(run.start)[0]))
    values |= run.motion(where, state)
    values["the loss"] = run.loss(state)
    full = run.params(state)
    values |= {f"the observable {name!r}": fn(seen(fn, full)) for name, fn in run.observables(where, state).items()}
    if options.until is not None:
        values["the condition `until`"] = options.until.event_value(full)
    return values


probe = eqx.filter_jit(probe_anew)
"""The same, compiled."""


def _pushed(state: PyTree, size: Array) -> PyTree:
    """The state moved by up to this size in every entry: the start of a velocity, zero, hides what acts on it."""

    def push(leaf: Any) -> Any:
        if not eqx.is_inexact_array(leaf):
            return leaf
        waves = jnp.sin(1.0 + jnp.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype)
        return jnp.where(size > 0, leaf + size.astype(leaf.dtype) * waves, leaf)

    return jax.tree_util.tree_map(push, state)


def elsewhere(member: AbstractMember, far: float = 0.5, seed: int = 0, absolute: float = 0.0) -> AbstractMember:
    """The member at a point where no symmetry of the start hides anything: every entry moved at random, by a multiple
    of its leaf's size and by an absolute amount."""
    trainable, frozen = split(member.params)
    rng = np.random.default_rng(seed)

    def displace(leaf: Array) -> Array:
        size = float(jnp.sqrt(jnp.mean(leaf.astype(float) ** 2))) or 0.3
        return (leaf + (far * size + absolute) * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    whole = join(jax.tree_util.tree_map(displace, trainable), frozen)
    return member.replaced(Chosen(whole, member.params.held) if isinstance(member.params, Chosen) else whole)
