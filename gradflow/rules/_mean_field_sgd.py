"""Stochastic gradient descent of layers that average over their nodes, with a learning rate for each layer."""

import itertools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree, Scalar

from gradflow._checks import check_count, check_key, fail, is_concrete
from gradflow._tree import join
from gradflow.flows import AbstractFlow, MeanFieldFlow
from gradflow.models import MeanFieldNet
from gradflow.problems import EmpiricalRisk, PopulationRisk
from gradflow.rules._base import AbstractRule, AbstractRuleOfDescentTime, check_learning_rate, unknown_order


class MeanFieldSGD(AbstractRuleOfDescentTime):
    """SGD on a network whose layers average, at layerwise learning rates.

    These are the rates at which the limit of many nodes exists:

        W_l -= eta N_{l-1} N_l grad l,      W_1 -= eta N_1 grad l,      C -= eta N_L grad l

    with one sample (or the mean of a few) at a time. For two hidden layers and `eta = 1 / N_1` these are the rates
    `a_W1 = 1`, `a_W2 = N_2`, `a_C = N_2 / N_1` of the source, which writes the gradient with its factors
    `1 / N_1`, `1 / (N_1 N_2)`, `1 / N_2` apart. A step is an Euler step of `MeanFieldFlow` on its batch.

    **Time unit**: step `k` sits at `t = k eta`.

    **Arguments**

    - `problem`: an `EmpiricalRisk`, from which samples are drawn with replacement, or a `PopulationRisk`, whose nodes
      are drawn with their weights.
    - `weights`: `1 / N` for every node, as `gradflow.models.MeanFieldStart.draw` gives them.
    - `learning_rate`: `eta`, by default `1 / N_1`. `batch_size`: samples of a step. `key`: random key.

    **Raises** `ValueError` for other problems, weights that are not those of a finite network, a learning rate that is
    not positive, batches below one, and what is no random key.

    **Source**: Sirignano and Spiliopoulos 2019, arXiv 1903.04440.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> from gradflow.models.nodes import Uniform
    >>> start = gf.models.MeanFieldStart(2, first=Uniform(-1, 1), middle=[Uniform(0, 1)], output=Uniform(-1, 1))
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([1.0, -1.0]), gf.losses.square)
    >>> net, weights = start.draw(20, jax.random.key(0))
    >>> rule = gf.MeanFieldSGD(problem, weights, key=jax.random.key(1))
    >>> sol = gf.iterate(rule, net, 100)
    >>> round(float(sol.t_final), 6)
    5.0
    """

    problem: EmpiricalRisk | PopulationRisk
    weights: tuple[Float[Array, " _"], ...]
    learning_rate: Float[Array, ""]
    key: Key[Array, ""]
    batch_size: int = eqx.field(static=True)

    def __init__(
        self,
        problem: EmpiricalRisk | PopulationRisk,
        weights: Sequence[ArrayLike],
        learning_rate: ArrayLike | None = None,
        *,
        key: Array,
        batch_size: int = 1,
    ):
        flow = MeanFieldFlow(problem, weights)
        for number, p in enumerate(flow.weights):
            if is_concrete(p) and not np.allclose(p, 1 / p.shape[0]):
                advice = "Width infinity takes a flow: gradflow.MeanFieldFlow."
                raise fail(f"weights[{number}]", f"be 1 / {p.shape[0]} for each of {p.shape[0]} nodes", "not", advice)
        check_count("batch_size", batch_size)
        key = check_key(key)
        rate = 1 / flow.weights[0].shape[0] if learning_rate is None else learning_rate
        check_learning_rate(rate)
        self.problem, self.weights, self.key = problem, flow.weights, key
        self.learning_rate, self.batch_size = jnp.asarray(rate, float), int(batch_size)

    @property
    def orders(self) -> tuple[int, ...]:
        return (1,)

    def init(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        return trainable

    def samples(self, k: Int[Array, ""]) -> Int[Array, " batch"]:
        """Which samples step `k` takes."""
        weights = self.problem.weights if isinstance(self.problem, PopulationRisk) else None
        n = self.problem.x.shape[0]
        return jax.random.choice(jax.random.fold_in(self.key, k), n, (self.batch_size,), p=weights)

    def step(self, k: Int[Array, ""], state: PyTree, frozen: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        dtype = state.output.dtype
        chosen = self.samples(k)
        x, y = self.problem.x[chosen].astype(dtype), self.problem.y[chosen]
        weights = tuple(p.astype(dtype) for p in self.weights)

        def batch_loss(net: MeanFieldNet) -> Float[Array, ""]:
            losses = jax.vmap(self.problem.loss)(join(net, frozen).predictions(x, weights), y)
            return jnp.mean(losses).astype(dtype)

        loss, gradient = jax.value_and_grad(batch_loss)(state)
        rates = [self.learning_rate.astype(dtype) * n for n in self._nodes(weights)]
        layers = tuple(w - r * g for w, r, g in zip(state.layers, rates, gradient.layers, strict=False))
        output = state.output - rates[-1] * gradient.output
        return eqx.tree_at(lambda net: (net.layers, net.output), state, (layers, output)), loss

    def _nodes(self, weights: tuple[Float[Array, " _"], ...]) -> list[Scalar]:
        """For every layer, the output last, the product of the numbers of nodes that it joins."""
        # Not from the shapes: networks may be padded, with weight zero.
        widths = [1 / jnp.max(p) for p in weights]
        return [widths[0], *(n * m for n, m in itertools.pairwise(widths)), widths[-1]]

    def params(self, state: PyTree) -> PyTree:
        return state

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return MeanFieldFlow(self.problem, self.weights).risk(join(state, frozen))

    def flow(self, order: int = 1) -> AbstractFlow:
        if order not in self.orders:
            raise unknown_order(self, order)
        return MeanFieldFlow(self.problem, self.weights)

    def with_learning_rate(self, learning_rate: float | Scalar) -> "AbstractRule":
        check_learning_rate(learning_rate)
        return eqx.tree_at(lambda rule: rule.learning_rate, self, jnp.asarray(learning_rate, float))

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        MeanFieldFlow(self.problem, self.weights).check(trainable, frozen)
