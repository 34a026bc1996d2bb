"""How many evaluations of the vector field a step of a solver takes."""

from typing import Any

import diffrax
import jax.numpy as jnp
from jaxtyping import Array, Int


def evaluations_per_step(solver: diffrax.AbstractSolver, solver_state: Any) -> Int[Array, ""] | None:
    """Evaluations of the field in the attempt that starts from `solver_state`; `None` where it cannot be known.

    An explicit Runge-Kutta method whose last stage is the first of the next step ("first same as last") evaluates the
    field once more in its very first attempt. What an implicit method spends depends on its iterations, which diffrax
    does not pass on.

    >>> import gradflow as gf
    >>> int(gf.solvers.evaluations_per_step(gf.solvers.Heun(), None))
    2
    """
    if not isinstance(solver, diffrax.AbstractERK):
        return None
    tableau = type(solver).tableau
    if not isinstance(tableau, diffrax.ButcherTableau):
        return None
    if not tableau.fsal:
        return jnp.asarray(tableau.num_stages)
    first, _ = solver_state
    return tableau.num_stages - 1 + jnp.asarray(first, int)
