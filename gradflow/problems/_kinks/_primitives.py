"""What is known of primitives of JAX that do not act entry by entry."""

from gradflow.problems._kinks._entrywise import OPERATIONS

INLINED = frozenset(
    [
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "core_closed_call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "shard_map",
        "xla_pmap",
    ]
)
"""Calls whose program is walked through as if it stood in the place of the call."""
REARRANGING = frozenset(
    [
        "broadcast_in_dim",
        "reshape",
        "squeeze",
        "expand_dims",
        "transpose",
        "rev",
        "slice",
        "dynamic_slice",
        "gather",
        "concatenate",
        "pad",
        "split",
        "optimization_barrier",
        "reduce_sum",
        "cumsum",
        "reduce_prod",
        "reduce_window_sum",
        "dynamic_update_slice",
        "tile",
    ]
)
"""Not negative where all that enters is not."""
KEEPING = frozenset(["broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "optimization_barrier"])
"""What they give holds the entries that they were given, and no others."""
JUMPING = {
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_window_max": "max",
    "reduce_window_min": "min",
    "reduce_window": "reduce_window",
    "reduce": "reduce",
    "cummax": "max",
    "cummin": "min",
    "scatter_max": "max",
    "scatter_min": "min",
    "scatter-max": "max",
    "scatter-min": "min",
    "select_and_gather_add": "max",
    "pmax": "max",
    "pmin": "min",
    "argmax": "argmax",
    "argmin": "argmin",
    "sort": "sort",
    "top_k": "top_k",
    "approx_top_k": "top_k",
}
"""Operations across entries that have kinks, and what these are called."""
REPEATED = frozenset({"dot_general", "reduce_sum", "transpose", *KEEPING, *OPERATIONS})
"""Operations that programs write down again rather than keep what they have."""
