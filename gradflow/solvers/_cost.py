"""How many evaluations of the vector field a step of a solver takes."""

from typing import Any

import diffrax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from gradflow.solvers._stabilised import AbstractStabilised


def counts_evaluations(solver: diffrax.AbstractSolver) -> bool:
    """Whether `evaluations_per_step` is known for a solver."""
    explicit = isinstance(solver, diffrax.AbstractERK) and isinstance(type(solver).tableau, diffrax.ButcherTableau)
    return explicit or isinstance(solver, AbstractStabilised)


def evaluations_per_step(
    solver: diffrax.AbstractSolver, solver_state: PyTree, after: PyTree = None
) -> Int[Array, ""] | None:
    """Evaluations of the field in one attempted step, or `None` if unknown.

    The attempt is that from `solver_state` to `after`.

    An explicit Runge-Kutta method whose last stage is the first of the next step ("first same as last") evaluates the
    field once more in its very first attempt. What an implicit method spends depends on its iterations, which diffrax
    does not pass on. A stabilised method counts for itself: what it spends is the difference between the two states.

    >>> import gradflow as gf
    >>> int(gf.solvers.evaluations_per_step(gf.solvers.Heun(), None))
    2
    """
    if isinstance(solver, AbstractStabilised):
        return solver_state.evaluations if after is None else after.evaluations - solver_state.evaluations
    if not counts_evaluations(solver):
        return None
    tableau: Any = type(solver).tableau  # pyright: ignore[reportAttributeAccessIssue]
    if not tableau.fsal:
        return jnp.asarray(tableau.num_stages)
    first, _ = solver_state
    return tableau.num_stages - 1 + jnp.asarray(first, int)
