"""Gradient flow `theta' = -grad L(theta)`."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from gradflow._checks import check_callable, fail
from gradflow._conserved import Conserved
from gradflow._tree import join
from gradflow.flows._base import AbstractFlow
from gradflow.models import Smoothed
from gradflow.problems._kinks import kinks_of
from gradflow.protocols import ConservesAlong, offered


class GradientFlow(AbstractFlow):
    """Gradient flow, the limit of gradient descent at vanishing learning rate:

        theta' = -grad L(theta)

    **Time unit**: iterate `k` of gradient descent with learning rate `eta` sits at `t = k eta`.

    The integral of `|grad L|^2` along the trajectory is carried in the state at no extra gradient. Since
    `dL/dt = -|grad L|^2`, loss plus integral is constant on the exact flow of any problem; its drift, and that of what
    the problem's model conserves, stands in the `Solution`.

    **Arguments**

    - `problem`: a callable `params -> scalar`, such as a `gradflow.EmpiricalRisk`. An Equinox module keeps its data as
      leaves; a plain function compiles once per function object.

    **Raises** `ValueError` if the problem cannot be called, or does not give a real scalar.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> flow = gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2))
    >>> sol = gf.solve(flow, jnp.ones(2), jnp.array([0.0, 1.0]))
    >>> [round(float(w), 3) for w in sol.final]
    [0.368, 0.368]
    """

    problem: Callable[[PyTree], Scalar]
    symmetric_jacobian: ClassVar[bool] = True

    def __init__(self, problem: Callable[[PyTree], Scalar]):
        check_callable("problem", problem, "problem(params) -> scalar", "See `gradflow.EmpiricalRisk`.")
        self.problem = problem

    @property
    def time_unit(self) -> str:
        return "t = k * learning_rate"

    def init(self, trainable: PyTree, frozen: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        dtype = jnp.result_type(*jax.tree_util.tree_leaves(trainable))
        return trainable, jnp.zeros((), dtype)

    def vector_field(self, t: Scalar, state: PyTree, frozen: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        gradient = jax.grad(lambda p: self.problem(join(p, frozen)))(state[0])
        return self.derivative(jax.tree_util.tree_map(jnp.negative, gradient))

    def derivative(self, slope: PyTree) -> tuple[PyTree, Float[Array, ""]]:
        leaves = jax.tree_util.tree_leaves(slope)
        return slope, jnp.asarray(sum(jnp.sum(leaf**2) for leaf in leaves), jnp.result_type(*leaves))

    def params(self, state: PyTree) -> PyTree:
        return state[0]

    def kinks(self, trainable: PyTree, frozen: PyTree) -> tuple[str, ...] | None:
        return field_kinks(self.problem, trainable, frozen)

    def controlled(self, state: PyTree) -> PyTree:
        return state[0]

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return self.problem(join(state[0], frozen))

    def conserved(self, state: PyTree, frozen: PyTree) -> dict[str, Conserved]:
        return energy_and_balances(self.problem, self.loss(state, frozen), state[1], join(state[0], frozen))

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        check_scalar(self.problem, join(trainable, frozen))


def energy_and_balances(
    problem: Callable[[PyTree], Scalar], loss: Scalar, dissipated: Scalar, params: PyTree
) -> dict[str, Conserved]:
    """What gradient flow conserves: the loss plus the integral of the squared gradient, and what the model knows of."""
    quantities = {"energy": Conserved(loss + dissipated, jnp.abs(loss) + jnp.abs(dissipated))}
    conserving = offered(problem, ConservesAlong)
    return quantities if conserving is None else quantities | conserving.conserved(params)


def check_scalar(problem: Callable[[PyTree], Scalar], params: PyTree) -> None:
    """Refuses a problem whose value is not a real floating-point scalar, without evaluating it."""
    try:
        value = eqx.filter_eval_shape(problem, params)
    except TypeError as error:
        x = getattr(problem, "x", None)
        if x is None:
            raise
        actual = f"a {type(params).__name__} that fails on them ({str(error).splitlines()[0]})"
        advice = "Build it for inputs of that size, or reshape `x`."
        raise fail("params", f"give predictions at inputs of shape {x.shape[1:]}", actual, advice) from error
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        actual = f"returning {'shape ' + str(shape) if shape is not None else type(value).__name__}"
        actual += f" of type {dtype}" if dtype is not None else ""
        advice = "Reduce it, for instance with jax.numpy.mean."
        raise fail("problem", "return a real floating-point scalar", actual, advice)


def field_kinks(problem: Callable[[PyTree], Scalar], trainable: PyTree, frozen: PyTree) -> tuple[str, ...] | None:
    """The operations at which the gradient of a problem jumps; none where ReLU has been smoothed."""
    smoothed = isinstance(getattr(problem, "predict", None), Smoothed)
    return () if smoothed else kinks_of(problem, trainable, frozen)
