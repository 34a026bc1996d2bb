"""What a run leaves behind for the one that continues it, and how that one takes it up."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from gradflow._conserved import Conserved
from gradflow.flows import AbstractFlow

SAME = 64
"""Units of rounding within which a loss and the constants of a flow count as those of the run that is continued."""


class Step(eqx.Module):
    """The last step of a continued run, which may lead beyond its end: the state inside is interpolated."""

    t: Scalar
    dt: Scalar
    y1: PyTree
    dense: PyTree


class Checkpoint(eqx.Module):
    """What a run needs, besides its state and time, to be continued as if it had never stopped."""

    t: Scalar  # where the method stands, which may be ahead of the end of the run
    y: PyTree
    step: Step | None
    rounding_error: Scalar
    dt: Scalar
    method_state: PyTree  # its arrays
    usable: Bool[Array, ""]  # whether the method's state belongs to the state that the run ended with
    scale: PyTree
    was_zero: Bool[Array, ""]
    fingerprint: Float[Array, " numbers"]  # of the flow, at the end of the run
    reference: dict[str, Conserved]  # conserved quantities at the start of the first run
    method: str = eqx.field(static=True)


class Resumed(eqx.Module):
    """Where a continued run starts."""

    t: Scalar
    state: PyTree
    checkpoint: Checkpoint


class Launch(eqx.Module):
    """What a method starts with, and where."""

    t: Scalar
    y: PyTree
    step: Step | None
    rounding_error: Scalar
    dt: Scalar
    method_state: PyTree
    evaluations: Int[Array, ""]
    finite: Bool[Array, ""]


def relaunch(
    checkpoint: Checkpoint,
    t: Scalar,
    now: Float[Array, " numbers"],
    anew: Callable[[], Launch],
    method: str,
    jumps: Float[Array, " J"] | None,
    oversteps: bool,
) -> Launch:
    """The method as the run before left it; started `anew` if it, the problem or a constant of the flow has changed.

    `now` is the fingerprint of the flow, and `oversteps` tells whether a run may go on from a step that leads beyond
    time `t`.
    """
    fresh = eqx.filter_eval_shape(anew)
    arrays, static = eqx.partition(fresh, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    step = Step(
        checkpoint.t, jnp.zeros_like(checkpoint.t), checkpoint.y, None if fresh.step is None else fresh.step.dense
    )
    if fresh.step is not None:
        step = checkpoint.step if checkpoint.step is not None else jax.tree_util.tree_map(_blank, step)
    parts = (
        checkpoint.t,
        checkpoint.y,
        None if fresh.step is None else step,
        checkpoint.rounding_error,
        checkpoint.dt,
        checkpoint.method_state,
    )
    resumed = Launch(*parts, jnp.asarray(0), jnp.asarray(True))
    if checkpoint.method != method or not _alike((resumed, checkpoint.fingerprint), (arrays, now)):
        return anew()
    near = jnp.abs(now - checkpoint.fingerprint) <= SAME * jnp.finfo(now.dtype).eps * jnp.abs(now)
    same = jnp.all(near) & checkpoint.usable
    if not oversteps:
        same &= checkpoint.t == t
    if jumps is not None:  # what the method knows of the field before a jump is worth nothing after it
        same &= ~jnp.any((jumps >= t) & (jumps <= checkpoint.t))
    resumed = jax.tree_util.tree_map(lambda a, b: a.astype(b.dtype), resumed, arrays)
    launch = jax.lax.cond(same, lambda: resumed, lambda: eqx.filter(anew(), eqx.is_array))
    return eqx.combine(launch, static)


def _blank(leaf: PyTree) -> PyTree:
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _alike(tree: PyTree, other: PyTree) -> bool:
    """Whether two pytrees of arrays have the same structure and shapes."""
    leaves, structure = jax.tree_util.tree_flatten(tree)
    others, wanted = jax.tree_util.tree_flatten(other)
    return structure == wanted and all(a.shape == b.shape for a, b in zip(leaves, others, strict=True))


def fingerprint(flow: AbstractFlow, y: PyTree, loss: Scalar | None) -> Float[Array, " numbers"]:
    """The loss at a state and the numbers among the flow's leaves: what tells whether it is the same flow."""
    leaves = [leaf for leaf in jax.tree_util.tree_leaves(flow) if eqx.is_inexact_array(leaf)]
    numbers: list[Scalar] = [leaf for leaf in leaves if leaf.ndim == 0]
    numbers += [] if loss is None else [loss]
    dtype = jnp.result_type(*jax.tree_util.tree_leaves(y))
    return jnp.stack([jnp.zeros((), dtype), *(jnp.asarray(number).astype(dtype) for number in numbers)])
