"""Hybrid: Bogacki and Shampine's method of order three on short steps, ROCK2 on long ones."""

from collections.abc import Callable
from typing import ClassVar

import diffrax
import equinox as eqx
from jaxtyping import PyTree, Scalar

from gradflow.solvers._rock2 import AbstractROCK2


class Hybrid(AbstractROCK2):
    """An explicit method on short steps, `ROCK2` on long ones.

    The default for ReLU networks. A step with `h rho <= 2.5`, where `rho` is the spectral radius, is taken by the
    method of Bogacki and Shampine, of order three and three evaluations; a longer one by `ROCK2`, of as many stages as
    it takes. So what limits the steps decides. Early in training, in the escape from a small initialisation and where a
    field jumps often, that is the error, and the nonstiff method is the cheaper one; late in training it is stability.
    In `gradflow.solve` the first four steps do without the spectral radius. Not for oscillatory flows.

    **Arguments** and **Raises**: as for `ROCK2`.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.GradientFlow(lambda w: 0.5 * (w[0] ** 2 + 1e3 * w[1] ** 2))
    >>> methods = gf.solvers.Hybrid(), gf.solvers.Bosh3()
    >>> runs = [gf.solve(flow, jnp.ones(2), [5.0], rtol=1e-4, solver=method) for method in methods]
    >>> bool(runs[0].stats["gradient_evaluations"] < runs[1].stats["gradient_evaluations"] / 3)
    True
    """

    nonstiff: ClassVar[float] = 2.5

    spectral_radius: Callable[[Scalar, PyTree, PyTree], Scalar] | None = None
    refresh: int = eqx.field(default=25, static=True)
    max_stages: int | None = eqx.field(default=None, static=True)
    bounded: bool = eqx.field(default=False, static=True)

    def error_order(self, terms: diffrax.AbstractTerm) -> int:
        del terms
        return 3
