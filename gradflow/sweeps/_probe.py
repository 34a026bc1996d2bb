"""Everything that a run of a member is made of, evaluated at one point: what the run would do first, in numbers."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from gradflow._tree import Chosen, PaddedRest, flatten, full_precision, join, scaled_norm, split
from gradflow.flows import AbstractFlow
from gradflow.runs._record import bind, seen
from gradflow.sweeps._program import Options, Padding

START, CONSERVED = "the state at the start", "what is conserved"


class Place(eqx.Module):
    """Where a member is looked at."""

    share: Float[Array, ""]  # of the time of a flow
    first: Int[Array, ""]  # iterate of a rule
    steps: Int[Array, ""]  # that a rule goes on from there
    push: Float[Array, ""]  # of the whole state, velocities and the like included, over the size of the parameters


def place(share: float, first: int = 0, steps: int = 1, push: float = 0.0) -> Place:
    return Place(jnp.asarray(share, float), jnp.asarray(first), jnp.asarray(steps), jnp.asarray(push, float))


@eqx.filter_jit
@full_precision
def probe(run: PyTree, options: Options, padding: Padding | None, where: Place) -> dict[str, Any]:
    """State, derivative or step, loss, observables and condition of a member, by what they are called in messages."""
    what, params, observe = run
    trainable, frozen = split(params)
    if padding is not None:
        frozen = PaddedRest(frozen, padding.widths)
    state = what.init(trainable, frozen)
    found: dict[str, Any] = {START: state}
    state = _pushed(state, where.push * scaled_norm(flatten(trainable)[0]))
    watched = observe
    if isinstance(what, AbstractFlow):
        t = what.t0 + where.share * (options.ts[-1] - what.t0)
        found["the derivative"] = what.vector_field(t, state, frozen)
        found[CONSERVED] = {name: q.value for name, q in what.conserved(state, frozen).items()}
        watched = bind(observe, what, t, state, frozen)
    else:
        found["a step"] = _steps(what, where, state, frozen)
    found["the loss"] = what.loss(state, frozen)
    full = join(what.params(state), frozen)
    found |= {f"the observable {name!r}": fn(seen(fn, full)) for name, fn in watched.items()}
    if options.until is not None:
        found["the condition `until`"] = options.until.excess(full)
    return found


def _steps(rule: Any, where: Place, state: PyTree, frozen: PyTree) -> tuple[PyTree, Array]:
    """The state after some steps, and the last loss: the first step of many rules does not know all constants."""
    loss = eqx.filter_eval_shape(rule.step, where.first, state, frozen)[1]

    def step(i: Array, carry: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
        return rule.step(where.first + i, carry[0], frozen)

    return jax.lax.fori_loop(0, where.steps, step, (state, jnp.zeros(loss.shape, loss.dtype)))


def _pushed(state: PyTree, size: Array) -> PyTree:
    """The state moved by up to this size in every entry: the start of a velocity, zero, hides what acts on it."""

    def moved(leaf: Any) -> Any:
        if not eqx.is_inexact_array(leaf):
            return leaf
        waves = jnp.sin(1.0 + jnp.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype)
        return jnp.where(size > 0, leaf + size.astype(leaf.dtype) * waves, leaf)

    return jax.tree_util.tree_map(moved, state)


def elsewhere(run: PyTree, far: float = 0.5, seed: int = 0, absolute: float = 0.0) -> PyTree:
    """The member at a point where no symmetry of the start hides anything: every entry moved at random, by a multiple
    of its leaf's size and by an absolute amount."""
    what, params, observe = run
    trainable, frozen = split(params)
    rng = np.random.default_rng(seed)

    def moved(leaf: Array) -> Array:
        size = float(jnp.sqrt(jnp.mean(leaf.astype(float) ** 2))) or 0.3
        return (leaf + (far * size + absolute) * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    whole = join(jax.tree_util.tree_map(moved, trainable), frozen)
    return what, Chosen(whole, params.held) if isinstance(params, Chosen) else whole, observe
