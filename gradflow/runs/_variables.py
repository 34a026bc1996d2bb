"""The variables of labelled results: how those of a run are called, and what holds one number for each run."""

import re

import jax
import numpy as np
from jaxtyping import Array, PyTree

from gradflow._checks import fail
from gradflow._solution import Solution, Status

MISSING = -1
COUNTS = ("steps", "accepted", "rejected", "gradient_evaluations", "hessian_vector_products")
PER_RUN = ("t_final", "loss_first", "loss_last")
OF_RUNS = ("drift_", "error_")
"""How the variables begin that hold one number for each quantity of a run."""
ATTRIBUTES: dict[str, dict[str, object]] = {
    "status": {
        "long_name": "how the run ended",
        "flag_values": list(range(MISSING, len(Status.labels()))),
        "flag_meanings": " ".join(("missing", *Status.labels())),
    },
    "t_final": {"long_name": "time that the run reached", "units": "1"},
    "saved_time": {"long_name": "time of the saved state: that of the nearest iterate for a rule", "units": "1"},
    "gradient_evaluations": {"long_name": "gradients evaluated, rejected steps included", "units": "1"},
    "hessian_vector_products": {"long_name": "Hessian-vector products evaluated", "units": "1"},
    "steps": {"long_name": "attempted steps", "units": "1"},
    "loss_first": {"long_name": "loss at the start"},
    "loss_last": {"long_name": "loss where the run ended"},
}


def named_arrays(observed: dict[str, PyTree]) -> dict[str, Array | np.ndarray]:
    """Observables as variables: those of a pytree are called by the name of the observable and their place in it.

    >>> import jax.numpy as jnp
    >>> from gradflow.runs._variables import named_arrays
    >>> list(named_arrays({"norm": {"first": jnp.ones(2), "layers": [jnp.ones(3)]}, "loss": jnp.ones(())}))
    ['norm_first', 'norm_layers_0', 'loss']
    """
    arrays = {}
    for name, value in observed.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            place = re.sub(r"\W", "_", jax.tree_util.keystr(path, simple=True, separator="_"))
            called = f"{name}_{place}" if place else name
            if called in arrays:
                raise fail("observe", "have names of its own", f"with two arrays called {called!r}", "Rename one.")
            arrays[called] = leaf
    return arrays


def numbers_of(results: Solution) -> dict[str, Array | np.ndarray]:
    """What a run, or each of a batch, has one number of: how it ended, what it cost, how accurate it was."""
    numbers: dict[str, Array | np.ndarray] = {f"drift_{name}": value for name, value in results.drift.items()}
    numbers |= {f"error_{name}": value for name, value in (results.errors or {}).items()}
    numbers |= {name: results.stats[name] for name in COUNTS}
    numbers |= {"status": results.code, "t_final": results.t_final}
    if results.loss is not None:
        numbers |= {"loss_first": results.loss[0], "loss_last": results.loss[1]}
    return numbers
