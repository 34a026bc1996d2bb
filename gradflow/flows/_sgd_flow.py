"""Stochastic gradient descent in continuous time: an Ito equation with the covariance of the mini-batch gradient."""

from collections.abc import Callable
from typing import Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_choice, check_count, check_positive, fail
from gradflow._tree import join
from gradflow.flows._base import AbstractStochasticFlow
from gradflow.flows._gradient_flow import check_scalar
from gradflow.flows._second_order import shifted
from gradflow.problems import EmpiricalRisk


class SGDFlow(AbstractStochasticFlow):
    """The diffusion that SGD follows in law, to weak order 1 or 2.

    For learning rate `eta` and batches of `B` out of `n` samples:

        dX = -grad L dt - (eta / 4) grad |grad L|^2 dt + sqrt(eta) sum_i c (g_i - g) dW_i        (Ito)
        g_i = gradient of sample i,  g = grad L,  c^2 = 1 / (n B), without replacement (n - B) / ((n - 1) n B)

    where the second drift term belongs to `order=2` alone. The noise has exactly the covariance of a mini-batch
    gradient, from `n` numbers; no `P x P` matrix is formed. Means of smooth functions of the parameters at a fixed time
    differ from those of SGD by `O(eta^order)`; single paths have nothing in common.

    **Time unit**: step `k` of SGD sits at `t = k eta`.

    `gradflow.solve` takes a `key`, and steps of fixed size: see `gradflow.solvers.EulerMaruyama` and `SmallNoise`.
    `jax.vmap` over keys runs many paths at once, and so does `gradflow.sweep`.

    **Arguments**

    - `problem`: an `EmpiricalRisk`. `learning_rate`: positive; `batch_size`: from 1 to `n`.
    - `order`: 1 or 2. At order 2 an evaluation of the drift takes one Hessian-vector product.
    - `sampling`: `"replacement"` or `"batch"`, as in `gradflow.SGD`.

    **Raises** `ValueError` for another kind of problem, for values outside these ranges, and for an unknown `sampling`.

    Source: Q. Li, C. Tai and W. E (2017), *Stochastic modified equations and adaptive stochastic gradient algorithms*,
    arXiv 1511.06251. Orders are confirmed by exact moments, and by SGD itself.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), gf.losses.square, predict=lambda w, x: x @ w)
    >>> flow = gf.SGDFlow(problem, learning_rate=0.1, batch_size=1)
    >>> gf.solve(flow, jnp.zeros(2), [0.0, 1.0], key=jax.random.key(0)).status
    'ok'
    """

    problem: EmpiricalRisk
    learning_rate: Float[Array, ""]
    batch_size: int = eqx.field(static=True)
    order: int = eqx.field(static=True)
    sampling: Literal["replacement", "batch"] = eqx.field(static=True)

    def __init__(
        self,
        problem: EmpiricalRisk,
        learning_rate: ArrayLike,
        batch_size: int,
        order: int = 1,
        sampling: Literal["replacement", "batch"] = "replacement",
    ):
        check_batches(problem, batch_size)
        check_positive("learning_rate", learning_rate)
        if order not in (1, 2):
            raise fail("order", "be 1 or 2", repr(order))
        check_choice("sampling", sampling, ("replacement", "batch"))
        self.problem, self.batch_size, self.order, self.sampling = problem, int(batch_size), int(order), sampling
        self.learning_rate = jnp.asarray(learning_rate, float)

    @property
    def products_per_evaluation(self) -> int:
        return self.order - 1

    @property
    def noise_size(self) -> int:
        return self.problem.num_samples

    @property
    def weak_order(self) -> int:
        return self.order

    @property
    def time_step(self) -> Scalar:
        return self.learning_rate

    @property
    def time_unit(self) -> str:
        return "t = k * learning_rate"

    def init(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        return trainable

    def vector_field(self, t: Scalar, state: PyTree, frozen: PyTree) -> PyTree:
        gradient = self._gradient(frozen)
        if self.order == 1:
            return _negative(gradient(state))
        g = gradient(state)
        _, hg = jax.jvp(gradient, (state,), (g,))
        return shifted(_negative(g), -self.learning_rate / 2, hg)

    def noise(self, t: Scalar, state: PyTree, frozen: PyTree, increments: Float[Array, " n"]) -> PyTree:
        return self._weighted(state, frozen, self._noise_weights(increments))

    def moved(self, t: Scalar, dt: Scalar, state: PyTree, frozen: PyTree, increments: Float[Array, " n"]) -> PyTree:
        """Drift and noise weigh the samples' gradients differently, so one gradient does for both."""
        n = self.problem.num_samples
        weight = 1 / n if self.problem.reduction == "mean" else 1.0
        weights = self._noise_weights(increments) - (dt * weight).astype(increments.dtype)
        step = self._weighted(state, frozen, weights)
        if self.order == 2:
            gradient = self._gradient(frozen)
            g = gradient(state)
            step = shifted(step, -dt * self.learning_rate / 2, jax.jvp(gradient, (state,), (g,))[1])
        return jax.tree_util.tree_map(jnp.add, state, step)

    def params(self, state: PyTree) -> PyTree:
        return state

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(join(state, frozen))

    def terms(
        self, path: diffrax.AbstractPath | Callable[[ArrayLike, ArrayLike], Array] | None = None
    ) -> diffrax.AbstractTerm:
        """Drift and noise as diffrax terms with `args = frozen`.

        `path`: a Brownian motion of diffrax of shape `(n,)`, or a function `(t0, t1) -> (n,)` of its increments.
        """
        if path is None:
            advice = f"For instance diffrax.VirtualBrownianTree(t0, t1, tol, ({self.noise_size},), key)."
            raise fail("path", "be a Brownian motion", "None", advice)
        drift: Callable[..., PyTree] = self.vector_field

        def operator(t: ArrayLike, state: PyTree, frozen: PyTree) -> lineax.AbstractLinearOperator:
            shape = jax.ShapeDtypeStruct((self.noise_size,), jnp.result_type(*jax.tree_util.tree_leaves(state)))
            return lineax.FunctionLinearOperator(lambda xi: self.noise(jnp.asarray(t), state, frozen, xi), shape)

        return diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(operator, path))

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        check_scalar(self.problem, join(trainable, frozen))

    def _gradient(self, frozen: PyTree) -> Callable[[PyTree], PyTree]:
        return jax.grad(lambda p: self.problem(join(p, frozen)))

    def _weighted(self, state: PyTree, frozen: PyTree, weights: Float[Array, " n"]) -> PyTree:
        """`sum_i weights_i g_i`, in one gradient."""

        def total(p: PyTree) -> Float[Array, ""]:
            losses = self.problem.per_sample(join(p, frozen))
            return jnp.sum(jax.lax.stop_gradient(weights).astype(losses.dtype) * losses)

        return jax.grad(total)(state)

    def _noise_weights(self, increments: Float[Array, " n"]) -> Float[Array, " n"]:
        """The weights of `g_i` in the noise; `sum_i (g_i - g) xi_i = sum_i g_i (xi_i - mean xi)`."""
        n, batch = self.problem.num_samples, self.batch_size
        variance = 1 / (n * batch)
        if self.sampling == "batch":
            variance *= (n - batch) / max(n - 1, 1)
        size = 1.0 if self.problem.reduction == "mean" else float(n)
        scale = (jnp.sqrt(self.learning_rate * variance) * size).astype(increments.dtype)
        return scale * (increments - jnp.mean(increments))


def check_batches(problem: Callable[[PyTree], Scalar], batch_size: int) -> None:
    """Refuses problems without samples, and batches larger than the data."""
    if not isinstance(problem, EmpiricalRisk):
        advice = "Its gradient has to be a mean over samples."
        raise fail("problem", "be a gradflow.EmpiricalRisk", f"of type {type(problem).__name__}", advice)
    check_count("batch_size", batch_size)
    n = problem.num_samples
    if batch_size > n:
        raise fail("batch_size", f"be at most {n}, the number of samples", str(batch_size))


def _negative(tree: PyTree) -> PyTree:
    return jax.tree_util.tree_map(jnp.negative, tree)
