"""Predictions on a chunk of samples at a time, so that memory does not grow with their number."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped

from gradflow._checks import fail
from gradflow._tree import join, split

SHARE_OF_MEMORY = 0.25
"""Share of memory that what a derivative keeps of all samples may take before it is computed in chunks. A gradient
needs as much again for what flows back, and a product with the Hessian twice that."""
SMALLEST = 2**18
"""Numbers in the inputs that are taken to fit without a question."""

Call = Callable[[PyTree, PyTree], Array]
"""Predictions on inputs: `call(params, inputs)`."""


def num_samples(inputs: PyTree[Shaped[Array, "m ..."]]) -> int:
    """The length of the leading axis."""
    return int(jnp.shape(jax.tree_util.tree_leaves(inputs)[0])[0])


def in_chunks(call: Call, params: PyTree, inputs: PyTree[Shaped[Array, "m ..."]], size: int) -> Array:
    """`call(params, inputs)`, at most `size` samples at a time.

    Derivatives keep the parameters and the inputs alone, and predict once more, chunk by chunk. The chunks are as
    large as one another, so that they share a program: the last starts early, and what it predicts again is dropped.
    The order of all sums is that of the chunks.
    """
    total = num_samples(inputs)
    chunks = math.ceil(total / size)
    if chunks == 1:
        return call(params, inputs)
    size = math.ceil(total / chunks)
    trainable, frozen = split(params)

    def predict(weights: PyTree, start: Array) -> Array:
        chunk = jax.tree_util.tree_map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), inputs)
        return one_each(call(join(weights, frozen), chunk), size)

    # Within a loop nothing can be moved out of a chunk, so there is no need to forbid it.
    again = jax.checkpoint(predict, prevent_cse=False)
    starts = jnp.minimum(jnp.arange(chunks) * size, total - size)
    predictions = jax.lax.map(lambda start: again(trainable, start), starts)
    new = total - (chunks - 1) * size
    whole = predictions[:-1].reshape(-1, *predictions.shape[2:])
    return jnp.concatenate([whole, predictions[-1, size - new :]])


def one_each(predictions: Array, samples: int) -> Array:
    """The predictions, or `ValueError` unless there is one for every sample."""
    shape = jnp.shape(predictions)
    if shape[:1] != (samples,):
        advice = "`predict` takes the whole batch, not one sample. Its first argument are the parameters."
        raise fail("predict", f"return {samples} predictions", f"returning shape {shape}", advice)
    return predictions


def size_that_fits(call: Call, params: PyTree, inputs: PyTree[Shaped[Array, "m ..."]]) -> int:
    """How many samples fit into memory at once, from what a derivative of their predictions keeps."""
    total, leaves = num_samples(inputs), jax.tree_util.tree_leaves(inputs)
    if sum(leaf.size for leaf in leaves) < SMALLEST:
        return total
    needed, memory = bytes_for_derivatives(call, params, inputs), available_memory()
    if needed <= SHARE_OF_MEMORY * memory:
        return total
    return max(1, int(total * SHARE_OF_MEMORY * memory / needed))


def bytes_for_derivatives(call: Call, params: PyTree, inputs: PyTree[Shaped[Array, "m ..."]]) -> int:
    """Memory that the derivative of all predictions keeps beside parameters and inputs; nothing is computed."""
    trainable, frozen = split(params)

    def pullback(weights: PyTree, inputs: PyTree) -> PyTree:
        return jax.vjp(lambda w: call(join(w, frozen), inputs), weights)[1]

    held = jax.tree_util.tree_leaves(eqx.filter_eval_shape(pullback, trainable, inputs))
    given = jax.tree_util.tree_leaves((trainable, inputs))
    return max(_bytes(held) - _bytes(given), 0)


def available_memory() -> int:
    """Bytes of the default device; on a CPU those of the machine, or of its control group if that has fewer."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**33
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdigit() else memory


def _bytes(leaves: list) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves if hasattr(leaf, "dtype"))
