"""Samples that several devices share."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from gradflow._tree import join, split
from gradflow.problems._chunks import Call, in_chunks, num_samples, one_each


def spread(
    x: PyTree[Shaped[Array, "n ..."]], y: Shaped[Array, "n ..."], place: NamedSharding
) -> tuple[PyTree[Shaped[Array, "m ..."]], Shaped[Array, "n ..."]]:
    """Inputs on the devices of a mesh, with copies of the last one where the devices do not divide their number; and
    the targets on all of them."""
    devices, n = place.mesh.shape[place.spec[0]], num_samples(x)
    missing = -n % devices
    if missing:
        warnings.warn(
            f"{n} samples on {devices} devices: the last sample is copied {missing} times, and what is predicted for"
            " the copies is dropped.",
            stacklevel=4,
        )

    def put(leaf: Array) -> Array:
        if missing:
            leaf = jnp.concatenate([leaf, jnp.broadcast_to(leaf[-1:], (missing, *leaf.shape[1:]))])
        return jax.device_put(leaf, place)

    return jax.tree_util.tree_map(put, x), jax.device_put(y, NamedSharding(place.mesh, PartitionSpec()))


def on_devices(
    call: Call, params: PyTree, inputs: PyTree[Shaped[Array, "m ..."]], size: int | None, place: NamedSharding
) -> Shaped[Array, "m ..."]:
    """`call(params, inputs)` on inputs that devices share: each predicts its own samples, at most `size` at a time.

    Parameters go to the devices as one vector, so that their derivative comes back in a single sum over devices.
    """
    trainable, frozen = split(params)
    flat, unflatten = ravel_pytree(trainable)
    arrays, static = eqx.partition(frozen, eqx.is_array)

    def local(flat: Array, arrays: PyTree, inputs: PyTree) -> Array:
        here = join(unflatten(flat), eqx.combine(arrays, static))
        samples = num_samples(inputs)
        return one_each(in_chunks(call, here, inputs, samples if size is None else size), samples)

    parts = place.spec
    shared = jax.shard_map(local, mesh=place.mesh, in_specs=(PartitionSpec(), PartitionSpec(), parts), out_specs=parts)
    return shared(flat, arrays, inputs)
