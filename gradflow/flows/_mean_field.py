"""Mean-field flow: networks of any width, and of width infinity, as one system with a weight for every node."""

import warnings
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import TheoryWarning, check_finite, check_not_negative, fail, is_concrete
from gradflow._conserved import Conserved
from gradflow._tree import full_precision, join
from gradflow.flows._base import AbstractFlow
from gradflow.models import MeanFieldNet
from gradflow.problems import EmpiricalRisk, PopulationRisk
from gradflow.problems._kinks import kinks_of
from gradflow.programs import fresh_jit

BOUNDED = 1e4
"""Where an activation is looked at to see whether it is bounded."""


class MeanFieldFlow(AbstractFlow):
    """Gradient flow of a network that averages over its nodes, of any width.

    Its units are those in which width infinity has a limit.

    For two hidden layers, with `p` the weights of the nodes, `Z_i = sum_j p1_j W2_ji s(W1_j . x)` and
    `g = sum_i p2_i C_i s(Z_i)`, and `e = -dl/dg` (for square loss `y - g`):

        C_i'   = E[ e s(Z_i) ]
        W2_ji' = E[ e C_i s'(Z_i) s(W1_j . x) ]                     - decay_2 W2_ji
        W1_j'  = E[ e sum_i p2_i C_i s'(Z_i) W2_ji s'(W1_j . x) x ]

    and likewise for one and for more. `p = 1 / N` gives the finite network, whose gradients are taken `N1`, `N1 N2` and
    `N2` times; the weights of a quadrature rule, with the means of the entries of `W2` for a start, give the limit
    `N -> infinity`; a node of weight zero is a test particle, which moves like the others and is seen by none.

    **Time unit**: step `k` of `gradflow.MeanFieldSGD` sits at `t = k / N1`. Gradient flow of a
    `gradflow.models.TwoLayer` of width `N` in mean-field parametrisation takes `N t` for what takes `t` here.

    Since `dL/dt` is minus the mean square of the velocities over labels, loss plus its integral is constant, for the
    limit and for every rule of nodes; the drift of this energy stands in the `Solution`.

    **Arguments**

    - `problem`: an `EmpiricalRisk`, or a `PopulationRisk`.
    - `weights`: for every hidden layer the weights of its nodes, as `gradflow.models.MeanFieldStart` gives them.
    - `decay`: weight decay, one rate for all layers, or one for each, the output last. Entries `u` between layers decay
      with their mean, `u e^(-decay t) + A`, so that the means still tell everything.

    The parameters are a `gradflow.models.MeanFieldNet`.

    **Raises** `ValueError` for other problems, inputs that are not `(n, d)`, and weights and decay of the wrong shape,
    negative or not finite; so does `solve` for parameters that do not fit. **Warns** (`TheoryWarning`) of unbounded
    activations, which the theorems leave out, and of a start at which three or more layers do not move.

    **Source**: Sirignano and Spiliopoulos 2019, arXiv 1903.04440; Nguyen and Pham 2020, arXiv 2001.11443.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> from gradflow.models.nodes import Uniform
    >>> start = gf.models.MeanFieldStart(2, first=Uniform(-1, 1), middle=[Uniform(0, 1)], output=Uniform(-1, 1))
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([1.0, -1.0]), gf.losses.square)
    >>> for width in (8, jnp.inf):
    ...     net, weights = start.at(width, jax.random.key(0))
    ...     sol = gf.solve(gf.MeanFieldFlow(problem, weights), net, [1.0])
    ...     print(width, sol.status, bool(sol.drift["energy"] < 1e-4))
    8 ok True
    inf ok True
    """

    problem: EmpiricalRisk | PopulationRisk
    weights: tuple[Float[Array, " _"], ...]
    decay: Float[Array, "*layers"]

    def __init__(
        self,
        problem: EmpiricalRisk | PopulationRisk,
        weights: Sequence[ArrayLike],
        decay: ArrayLike | Sequence[ArrayLike] = 0.0,
    ):
        if not isinstance(problem, EmpiricalRisk | PopulationRisk):
            advice = "Nodes of quadrature over a distribution make a gradflow.PopulationRisk."
            raise fail(
                "problem", "be an EmpiricalRisk or a PopulationRisk", f"of type {type(problem).__name__}", advice
            )
        if problem.x.ndim != 2:
            raise fail("problem.x", "be inputs (n, d)", f"of shape {problem.x.shape}")
        self.weights = tuple(jnp.asarray(p) for p in weights)
        for number, p in enumerate(self.weights):
            if p.ndim != 1 or not jnp.issubdtype(p.dtype, jnp.floating):
                raise fail(f"weights[{number}]", "be an array (nodes,) of floats", f"{p.dtype} of shape {p.shape}")
            check_finite(f"weights[{number}]", p)
            check_not_negative(f"weights[{number}]", p)
        check_not_negative("decay", decay)
        self.problem, self.decay = problem, jnp.asarray(decay, float)
        if self.decay.shape not in ((), (len(self.weights) + 1,)):
            must = f"be one rate or {len(self.weights) + 1}, the output last"
            raise fail("decay", must, f"of shape {self.decay.shape}")

    @full_precision
    def predictions(self, params: MeanFieldNet, x: Float[Array, "m d"] | None = None) -> Float[Array, "m *out_size"]:
        """Predictions at the inputs of the problem, or at others."""
        dtype = params.output.dtype
        inputs = self.problem.x if x is None else x
        return params.predictions(inputs.astype(dtype), self._weights(dtype))

    @full_precision
    def risk(self, params: MeanFieldNet) -> Float[Array, ""]:
        """The risk, without the penalty that belongs to weight decay."""
        return self.problem.of_predictions(self.predictions(params)).astype(params.output.dtype)

    @property
    def time_unit(self) -> str:
        return "t = k / N1"

    def init(self, trainable: PyTree, frozen: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        return trainable, jnp.zeros((), trainable.output.dtype)

    def vector_field(self, t: Scalar, state: PyTree, frozen: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        net = join(state[0], frozen)
        dtype = net.output.dtype
        drift = net.velocity(self.problem.x.astype(dtype), self._weights(dtype), self.problem.residuals)
        rates = self._rates(dtype)
        layers = [v - rates[i] * w for i, (v, w) in enumerate(zip(drift.layers, net.layers, strict=True))]
        output = drift.output - rates[-1] * net.output
        rate = eqx.tree_at(lambda n: (n.layers, n.output), state[0], (tuple(layers), output))
        return self.derivative(rate)

    def derivative(self, slope: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        return slope, jnp.sum(slope.squares(self._weights(slope.output.dtype)))

    def kinks(self, trainable: PyTree, frozen: PyTree) -> tuple[str, ...] | None:
        return kinks_of(self.risk, trainable, frozen)

    def params(self, state: PyTree) -> PyTree:
        return state[0]

    def controlled(self, state: PyTree) -> PyTree:
        return state[0]

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return self.risk(join(state[0], frozen))

    def conserved(self, state: PyTree, frozen: PyTree) -> dict[str, Conserved]:
        net = join(state[0], frozen)
        dtype = net.output.dtype
        penalty = self._rates(dtype) @ net.squares(self._weights(dtype)) / 2
        total = self.risk(net) + penalty
        return {"energy": Conserved(total + state[1], jnp.abs(total) + jnp.abs(state[1]))}

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        if not isinstance(trainable, MeanFieldNet):
            advice = "See gradflow.models.MeanFieldStart."
            raise fail("params", "be a gradflow.models.MeanFieldNet", f"of type {type(trainable).__name__}", advice)
        widths, given = trainable.widths, tuple(p.shape[0] for p in self.weights)
        if widths != given:
            raise fail("weights", f"hold an entry for each node of params, {widths}", f"for {given} nodes")
        if trainable.layers[0].shape[1] != self.problem.x.shape[1]:
            actual = f"of {trainable.layers[0].shape[1]} inputs"
            raise fail("params", f"take the {self.problem.x.shape[1]} inputs of the problem", actual)
        if trainable.output.shape[1:] != self.problem.y.shape[1:]:
            actual = f"of shape {trainable.output.shape[1:]}"
            raise fail("params.output", f"have outputs like the targets, {self.problem.y.shape[1:]}", actual)

    def check_values(self, trainable: PyTree, frozen: PyTree) -> None:
        self.check(trainable, frozen)
        warn_unbounded(trainable.activation)
        if len(self.weights) < 3 or not is_concrete((self, trainable)):
            return
        drift = _drift(self, trainable, frozen)
        largest = max(float(jnp.max(jnp.abs(leaf), initial=0.0)) for leaf in jax.tree_util.tree_leaves(drift))
        if largest < 1e-13 * max(float(jnp.max(jnp.abs(self.problem.y), initial=0.0)), 1e-300):
            warnings.warn(
                "The flow does not move: with an odd activation, three or more hidden layers and laws symmetric"
                " about zero, the limit of infinite width never leaves its start, while finite networks learn, the"
                " later the wider. Give the laws in `middle` and `output` a mean, or take kernels.",
                TheoryWarning,
                stacklevel=4,
            )

    def _weights(self, dtype: DTypeLike) -> tuple[Array, ...]:
        return tuple(p.astype(dtype) for p in self.weights)

    def _rates(self, dtype: DTypeLike) -> Float[Array, " layers"]:
        return jnp.broadcast_to(self.decay.astype(dtype), (len(self.weights) + 1,))


@fresh_jit
def _drift(flow: MeanFieldFlow, trainable: PyTree, frozen: PyTree) -> PyTree:
    return flow.vector_field(jnp.zeros(()), flow.init(trainable, frozen), frozen)[0]


def warn_unbounded(activation: Callable[[Array], Array]) -> None:
    """Says that the theorems ask for a bounded activation."""
    with jax.core.eval_context():
        far = jnp.array([-BOUNDED, BOUNDED, -1e2 * BOUNDED, 1e2 * BOUNDED], jnp.float32)
        values = np.abs(np.asarray(activation(far)))
    if not np.all(np.isfinite(values)) or values[2:].max() > 2 * values[:2].max() + 1:
        warnings.warn(
            "The theorems on mean-field limits ask for a bounded activation, which this one is not: the flow runs, but"
            " its existence for all times, and the convergence of finite networks to it, are not theirs.",
            TheoryWarning,
            stacklevel=5,
        )
