"""The principal flow: gradient descent on a quadratic, exactly."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_callable, check_count, check_positive
from gradflow._linalg import hessian_vector_product, matrix_function
from gradflow._tree import flatten, join
from gradflow.flows._base import AbstractFlow
from gradflow.flows._gradient_flow import check_scalar, field_kinks


class PrincipalFlow(AbstractFlow):
    """Gradient descent with all powers of `eta H`, no derivatives of the Hessian:

        X' = (log|1 - eta H| / (eta H)) grad f(X)

    so that a mode of a quadratic with eigenvalue `lambda` moves at the rate `log|1 - eta lambda| / eta`, as the
    iterates do, for every learning rate: it is stable for `eta lambda < 2`, as they are. Beyond `eta lambda = 1` the
    iterates change sign at every step and the flow follows their size. On other losses it is of second order in `eta`.

    **Time unit**: iterate `k` of gradient descent sits at `t = k eta`.

    **Arguments**: `problem`, a callable `params -> scalar`, twice differentiable; `learning_rate`, positive, may be
    traced; `iterations`: Hessian-vector products per evaluation, at most. The function of `H` is applied by that many
    Lanczos steps from the gradient, exact once they exhaust the parameters; `H` itself is never formed.

    **Raises** `ValueError` for a problem that cannot be called, a learning rate that is not positive, and `iterations`
    below one.

    Source: M. Rosca, Y. Wu, C. Qin and B. Dherin (2022), arXiv 2206.05735, whose flow is complex beyond `eta lambda =
    1`; this one takes the modulus.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.PrincipalFlow(lambda w: 0.5 * w[0] ** 2, learning_rate=0.5)
    >>> round(float(gf.solve(flow, jnp.ones(1), [1.0], rtol=1e-6).final[0]), 5)  # (1 - 1/2)^2
    0.25
    """

    problem: Callable[[PyTree], Scalar]
    learning_rate: Float[Array, ""]
    iterations: int = eqx.field(static=True)

    def __init__(self, problem: Callable[[PyTree], Scalar], learning_rate: ArrayLike, iterations: int = 20):
        check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
        check_positive("learning_rate", learning_rate)
        check_count("iterations", iterations)
        self.problem, self.iterations = problem, int(iterations)
        self.learning_rate = jnp.asarray(learning_rate, float)

    @property
    def products_per_evaluation(self) -> int:
        return self.iterations

    @property
    def time_unit(self) -> str:
        return "t = k * learning_rate"

    def init(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        return trainable

    def vector_field(self, t: Scalar, state: PyTree, frozen: PyTree) -> PyTree:
        def problem(p: PyTree) -> Float[Array, ""]:
            return self.problem(join(p, frozen))

        product, _ = hessian_vector_product(problem, state)
        gradient, unflatten = flatten(jax.grad(problem)(state))
        eta = self.learning_rate.astype(gradient.dtype)

        def rate(eigenvalues: Array) -> Array:
            z = eta * eigenvalues
            small = jnp.abs(z) < 1e-4
            safe = jnp.where(small, 1, z)
            return jnp.where(small, -(1 + z / 2 + z**2 / 3), jnp.log(jnp.abs(1 - safe)) / safe)

        return unflatten(matrix_function(product, gradient, rate, self.iterations))

    def kinks(self, trainable: PyTree, frozen: PyTree) -> tuple[str, ...] | None:
        return field_kinks(self.problem, trainable, frozen)

    def params(self, state: PyTree) -> PyTree:
        return state

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(join(state, frozen))

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        check_scalar(self.problem, join(trainable, frozen))
