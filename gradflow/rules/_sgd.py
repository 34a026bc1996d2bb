"""Stochastic gradient descent on mini-batches of a data set."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree

from gradflow._checks import check_choice, check_key
from gradflow.flows import AbstractFlow, GradientFlow, SGDFlow
from gradflow.flows._sgd_flow import check_batches
from gradflow.problems import EmpiricalRisk
from gradflow.rules._base import check_learning_rate, unknown_order
from gradflow.rules._descent import AbstractDescent

SAMPLINGS = ("replacement", "batch", "epochs")


class SGD(AbstractDescent):
    """Stochastic gradient descent on batches of `B` out of `n` samples:

        theta_{k+1} = theta_k - eta (1/B) sum_{i in batch k} grad l_i(theta_k)

    (`n` times that where the problem is a sum).

    **Time unit**: iterate `k` sits at `t = k eta`. In law it follows `SGDFlow` of order 1 or 2: means at a fixed time
    differ by `O(eta^order)`. In epochs the noise of single steps cancels to leading order, and the limit of order 1 is
    gradient flow itself.

    **Arguments**

    - `problem`: an `EmpiricalRisk`. `learning_rate`: positive, may be traced. `batch_size`: from 1 to `n`.
    - `key`: random key; `jax.vmap` over keys runs many seeds at once. Step `k` depends on the key and `k` alone.
    - `sampling`: `"replacement"`: every sample of a batch is drawn from all; `"batch"`: no sample twice in one batch;
      `"epochs"`: none twice in one pass over the data, which is shuffled anew for every pass (what does not fill a
      batch waits for the next shuffle).

    Counts of gradients are of mini-batch gradients, `B/n` of a full one each.

    **Raises** `ValueError` for another kind of problem, a learning rate that is not positive, batches larger than the
    data, an unknown sampling, and what is no random key.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), gf.losses.square, predict=lambda w, x: x @ w)
    >>> rule = gf.SGD(problem, 0.1, batch_size=1, key=jax.random.key(0), sampling="epochs")
    >>> sol = gf.iterate(rule, jnp.zeros(2), 20)
    >>> [round(float(w), 4) for w in sol.final]  # ten steps for each entry
    [0.6513, 0.6513]
    """

    problem: EmpiricalRisk
    learning_rate: Float[Array, ""]
    key: Key[Array, ""]
    batch_size: int = eqx.field(static=True)
    sampling: Literal["replacement", "batch", "epochs"] = eqx.field(static=True)

    def __init__(
        self,
        problem: EmpiricalRisk,
        learning_rate: ArrayLike,
        *,
        batch_size: int,
        key: Array,
        sampling: Literal["replacement", "epochs", "batch"] = "replacement",
    ):
        check_batches(problem, batch_size)
        check_learning_rate(learning_rate)
        check_choice("sampling", sampling, SAMPLINGS)
        key = check_key(key)
        self.problem, self.key, self.batch_size, self.sampling = problem, key, int(batch_size), sampling
        self.learning_rate = jnp.asarray(learning_rate, float)

    @property
    def orders(self) -> tuple[int, ...]:
        return (1,) if self.sampling == "epochs" else (1, 2)

    def batch(self, k: Int[Array, ""]) -> Int[Array, " batch_size"]:
        """The indices of the samples of step `k`."""
        n, size = self.problem.num_samples, self.batch_size
        if self.sampling == "epochs":
            steps = n // size
            order = jax.random.permutation(jax.random.fold_in(self.key, k // steps), n)
            return jax.lax.dynamic_slice_in_dim(order, (k % steps) * size, size)
        key = jax.random.fold_in(self.key, k)
        if self.sampling == "batch":
            return jax.random.permutation(key, n)[:size]
        return jax.random.randint(key, (size,), 0, n)

    def step(self, k: Int[Array, ""], state: PyTree, frozen: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        chosen = self.batch(k)
        drawn = jax.tree_util.tree_map(lambda leaf: leaf[chosen], (self.problem.x, self.problem.y))
        problem = eqx.tree_at(lambda p: (p.x, p.y), self.problem, drawn)
        scale = 1.0 if self.problem.reduction == "mean" else self.problem.num_samples / self.batch_size
        return self.descend(lambda p: scale * problem(p), state, frozen)

    def flow(self, order: int = 1) -> AbstractFlow:
        if order not in self.orders:
            raise unknown_order(self, order)
        if self.sampling == "epochs":
            return GradientFlow(self.problem)
        return SGDFlow(self.problem, self.learning_rate, self.batch_size, order=order, sampling=self.sampling)
