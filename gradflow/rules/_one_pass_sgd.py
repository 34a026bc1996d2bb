"""One-pass SGD on a teacher-student problem: a fresh Gaussian input at every step."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree, Scalar

from gradflow._checks import check_callable, check_count, check_key, check_not_negative, check_positive, fail
from gradflow.flows import AbstractFlow, OrderParameterFlow
from gradflow.problems import OrderParameters, TeacherStudent
from gradflow.problems._teacher_student import split_weights
from gradflow.rules._base import AbstractRule, unknown_order


class OnePassSGD(AbstractRule):
    """Stochastic gradient descent with a fresh input `x ~ N(0, I_d)` at every step:

        w_j += (g / sqrt d) v_j s'(lambda_j) (y - f(x)) x,      lambda_j = w_j . x / sqrt d
        v_j += (rho g / d) s(lambda_j) (y - f(x))                only where the second layer is given

    with `g = gamma / p`, the learning rate over the width (`g = gamma` where the problem has plain sums).

    **Time unit**: step `nu` sits at `t = nu g / d`. Its limit for many inputs is `OrderParameterFlow`, whose parameters
    are the order parameters of the weights: observe `problem` and `problem.order_parameters`, which take both.

    **Arguments**

    - `problem`: a `gradflow.TeacherStudent`; the risk that a run reports is exact, not that of its samples.
    - `gamma_over_p`: positive. `schedule`: function `t -> factor` on it. `second_layer_rate`: `rho`, zero by default.
    - `batch_size`: fresh inputs of a step, which is the mean of the steps for each.
    - `key`: random key; `jax.vmap` over keys runs many seeds at once.

    The parameters are weights `W (p, d)`, or a pair `(W, v)`.

    **Raises** `ValueError` for another problem, learning rates that are not positive, batches below one, and what is no
    random key; so does `iterate` for weights of the wrong shape.

    Source: R. Veiga et al. (2022), arXiv 2202.00293.

    >>> import gradflow as gf, jax
    >>> problem = gf.TeacherStudent.orthogonal(dim=50, units=1)
    >>> rule = gf.OnePassSGD(problem, gamma_over_p=0.5, key=jax.random.key(0))
    >>> sol = gf.iterate(rule, problem.informed(2, jax.random.key(1)), 100, observe={"risk": problem})
    >>> round(float(sol.t_final), 4)
    1.0
    """

    problem: TeacherStudent
    gamma_over_p: Scalar
    schedule: Callable[[Scalar], ArrayLike] | None
    second_layer_rate: Scalar
    key: Key[Array, ""]
    batch_size: int = eqx.field(static=True)

    def __init__(
        self,
        problem: TeacherStudent,
        gamma_over_p: ArrayLike,
        *,
        key: Array,
        schedule: Callable[[Scalar], ArrayLike] | None = None,
        second_layer_rate: ArrayLike = 0.0,
        batch_size: int = 1,
    ):
        if not isinstance(problem, TeacherStudent):
            raise fail("problem", "be a gradflow.TeacherStudent", f"of type {type(problem).__name__}")
        check_positive("gamma_over_p", gamma_over_p, "It is the learning rate over the width.")
        if schedule is not None:
            check_callable("schedule", schedule, "schedule(t) -> factor on the learning rate")
        check_not_negative("second_layer_rate", second_layer_rate, "Zero keeps the second layer as it is.")
        check_count("batch_size", batch_size)
        key = check_key(key)
        self.problem, self.schedule, self.key, self.batch_size = problem, schedule, key, int(batch_size)
        self.gamma_over_p = jnp.asarray(gamma_over_p, float)
        self.second_layer_rate = jnp.asarray(second_layer_rate, float)

    @property
    def orders(self) -> tuple[int, ...]:
        return (1,)

    @property
    def time_unit(self) -> str:
        return "t = steps * gamma / (p d)"

    def time(self, k: ArrayLike) -> Float[Array, "..."]:
        return jnp.asarray(k, self.gamma_over_p.dtype) * (self.gamma_over_p / self.problem.dim)

    def init(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        return trainable

    def step(self, k: Int[Array, ""], state: PyTree, frozen: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        problem, dim = self.problem, self.problem.dim
        W, v = split_weights(state)
        inputs, label = jax.random.split(jax.random.fold_in(self.key, k))
        b, root = self.batch_size, jnp.sqrt(jnp.asarray(dim, W.dtype))
        x = jax.random.normal(inputs, (b, dim), W.dtype) / root
        fields = x @ W.T
        hidden, slopes = problem.activation(fields), problem.activation.derivative(fields)
        taught = problem.activation(x @ problem.teacher.astype(W.dtype).T) @ problem.teacher_output.astype(W.dtype)
        prediction = jnp.sum(hidden, axis=1) if v is None else hidden @ v
        if problem.normalised:
            taught, prediction = taught / problem.teacher.shape[0], prediction / W.shape[0]
        noise = jnp.sqrt(problem.noise) * jax.random.normal(label, (b,), W.dtype)
        error = (taught + noise - prediction).astype(W.dtype)
        factor = 1.0 if self.schedule is None else self.schedule(self.time(k))
        rate = jnp.asarray(self.gamma_over_p * factor, W.dtype) / b
        push = slopes if v is None else slopes * v[None, :]
        weights = W + (rate * error[:, None] * push).T @ x
        loss = jnp.mean(error**2) / 2
        if v is None:
            return weights, loss
        second = self.second_layer_rate.astype(W.dtype) * rate / dim * (error @ hidden)
        return (weights, v + second), loss

    def params(self, state: PyTree) -> PyTree:
        return state

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(state)

    def flow(self, order: int = 1) -> AbstractFlow:
        if order not in self.orders:
            raise unknown_order(self, order)
        options = {"schedule": self.schedule, "second_layer_rate": self.second_layer_rate}
        options |= {"batch_size": self.batch_size}
        return OrderParameterFlow(self.problem, gamma_over_p=self.gamma_over_p, **options)

    def with_learning_rate(self, learning_rate: float | Scalar) -> "AbstractRule":
        check_positive("gamma_over_p", learning_rate, "It is the learning rate over the width.")
        return eqx.tree_at(lambda rule: rule.gamma_over_p, self, jnp.asarray(learning_rate, float))

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        if isinstance(trainable, OrderParameters):
            raise fail("params", "be weights (units, dim)", "order parameters", "Those belong to OrderParameterFlow.")
        self.problem.order_parameters(trainable)
