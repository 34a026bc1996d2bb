"""The empirical neural tangent kernel and its spectrum."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from gradflow._checks import check_count, check_finite
from gradflow._linalg import kernel
from gradflow._tree import at_least_single, full_precision, in_single, join, split
from gradflow.observables._loss import needs_data
from gradflow.problems import EmpiricalRisk
from gradflow.programs import fresh_jit


class NTK(eqx.Module):
    """The empirical tangent kernel `K = J J^T`, `J = df / dtheta`.

    Its shape is `(n k, n k)` for `k` outputs, samples outermost.

    Along gradient flow of a loss with mean reduction, predictions move as `f' = -K grad_f L`, with `grad_f L` of order
    `1/n` per sample. Costs one product with `J^T` and one with `J` per row; `J` itself is never held.

    **Arguments**: `problem`: an `EmpiricalRisk`; `x`: other inputs `(m, ...)` to evaluate at; `chunk`: rows computed at
    once.

    **Raises** `ValueError` for a problem without data (a plain function), inputs that are not finite, and a `chunk`
    below one.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(2 * jnp.eye(2), jnp.ones(2), gf.losses.square, lambda w, x: x @ w)
    >>> gf.observables.NTK(problem)(jnp.zeros(2)).tolist()
    [[4.0, 0.0], [0.0, 4.0]]
    """

    problem: EmpiricalRisk
    x: Array | None
    chunk: int = eqx.field(static=True)

    def __init__(
        self, problem: EmpiricalRisk, x: ArrayLike | Sequence[Sequence[float]] | None = None, *, chunk: int = 32
    ):
        self.problem = needs_data(problem)
        check_finite("x", x)
        self.x = None if x is None else jnp.asarray(x)
        check_count("chunk", chunk)
        self.chunk = chunk

    @in_single
    @fresh_jit
    @full_precision
    def __call__(self, params: PyTree) -> Float[Array, "rows rows"]:
        trainable, frozen = split(params)
        return kernel(lambda p: self.problem.predictions(join(p, frozen), self.x), trainable, self.chunk)


class NTKEigenvalues(eqx.Module):
    """All eigenvalues of the empirical tangent kernel, decreasing: `(n k,)`.

    **Arguments**, **Raises**: as for `NTK`.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.diag(jnp.array([1.0, 3.0])), jnp.ones(2), gf.losses.square, lambda w, x: x @ w)
    >>> gf.observables.NTKEigenvalues(problem)(jnp.zeros(2)).round(4).tolist()
    [9.0, 1.0]
    """

    ntk: NTK

    def __init__(
        self, problem: EmpiricalRisk, x: ArrayLike | Sequence[Sequence[float]] | None = None, *, chunk: int = 32
    ):
        self.ntk = NTK(problem, x, chunk=chunk)

    @full_precision
    def __call__(self, params: PyTree) -> Float[Array, " rows"]:
        # Of a kernel computed in half precision, the small eigenvalues would be those of its rounding.
        return jnp.linalg.eigvalsh(at_least_single(self.ntk)(at_least_single(params)))[::-1]
