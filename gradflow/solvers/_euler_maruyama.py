"""Steps of fixed size for stochastic flows, `dy = F dt + G dW` in Ito's sense."""

import abc
from typing import ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_positive, fail
from gradflow.protocols import HasNoise


class AbstractStochasticMethod(eqx.Module):
    """What `solve` asks of a method for stochastic flows.

    `dt` is the largest step; `None` takes the flow's own, which for `SGDFlow` is the learning rate. Between save times
    steps are equal.
    """

    gradients_per_step: ClassVar[int] = 1

    dt: eqx.AbstractVar[Scalar | None]

    @property
    def name(self) -> str:
        """What a `Solution` calls the method."""
        return type(self).__name__

    @abc.abstractmethod
    def step(self, flow: HasNoise, frozen: PyTree, t: Scalar, dt: Scalar, y: PyTree, dw: Float[Array, " n"]) -> PyTree:
        """The state after one step, `dw` being the increments of the Brownian motions."""

    def evaluations(self, flow: HasNoise) -> tuple[int, int]:
        """Gradients and Hessian-vector products of a step."""
        return self.gradients_per_step, self.gradients_per_step * flow.products_per_evaluation


class EulerMaruyama(AbstractStochasticMethod):
    """`y + F dt + G dW`, in steps of fixed size; weak order 1.

    For `SGDFlow` of order 1 it takes one gradient a step, as much as full-batch descent.

    Its weak error is of first order in `dt`, on top of that of the flow. Stable for `dt < 2 / sharpness`.

    **Arguments**: `dt`: largest step; by default the flow's `time_step`.

    **Raises** `ValueError` for a step that is not positive.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), gf.losses.square, predict=lambda w, x: x @ w)
    >>> flow = gf.SGDFlow(problem, learning_rate=0.1, batch_size=1)
    >>> solver = gf.solvers.EulerMaruyama(dt=0.02)
    >>> int(gf.solve(flow, jnp.zeros(2), [1.0], solver=solver, key=jax.random.key(0)).stats["gradient_evaluations"])
    50
    """

    dt: Scalar | None

    def __init__(self, dt: ArrayLike | None = None):
        self.dt = _step(dt)

    def step(self, flow: HasNoise, frozen: PyTree, t: Scalar, dt: Scalar, y: PyTree, dw: Float[Array, " n"]) -> PyTree:
        return flow.moved(t, dt, y, frozen, dw)

    def evaluations(self, flow: HasNoise) -> tuple[int, int]:
        # The drift of order 2 takes a gradient of its own, besides that which the noise shares.
        extra = flow.products_per_evaluation
        return 1 + (extra > 0), extra


class SmallNoise(AbstractStochasticMethod):
    """Heun's method for the drift, Euler's for the noise:

        y + dt/2 (F(y) + F(y + dt F(y))) + G(y) dW

    Where the noise is of size `sqrt(eta)`, as for `SGDFlow`, its weak error is `O(dt^2 + eta dt)`: with `dt` in
    proportion to `eta` it keeps the second order of `SGDFlow(order=2)`, which `EulerMaruyama` loses. Three gradients a
    step.

    **Arguments**, **Raises**: as for `EulerMaruyama`.

    Source: G. N. Milstein and M. V. Tretyakov (1997), *Numerical methods in the weak sense for stochastic differential
    equations with small noise*.

    >>> import gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), gf.losses.square, predict=lambda w, x: x @ w)
    >>> flow = gf.SGDFlow(problem, learning_rate=0.1, batch_size=1, order=2)
    >>> gf.solve(flow, jnp.zeros(2), [1.0], solver=gf.solvers.SmallNoise(), key=jax.random.key(0)).status
    'ok'
    """

    gradients_per_step: ClassVar[int] = 3

    dt: Scalar | None

    def __init__(self, dt: ArrayLike | None = None):
        self.dt = _step(dt)

    def step(self, flow: HasNoise, frozen: PyTree, t: Scalar, dt: Scalar, y: PyTree, dw: Float[Array, " n"]) -> PyTree:
        first = flow.vector_field(t, y, frozen)
        ahead = jax.tree_util.tree_map(lambda a, f: a + dt.astype(a.dtype) * f, y, first)
        second = flow.vector_field(t + dt, ahead, frozen)
        noise = flow.noise(t, y, frozen, dw)
        return jax.tree_util.tree_map(
            lambda a, f, g, b: a + dt.astype(a.dtype) / 2 * (f + g) + b, y, first, second, noise
        )

    def evaluations(self, flow: HasNoise) -> tuple[int, int]:
        return self.gradients_per_step, 2 * flow.products_per_evaluation


class FixedSteps(AbstractStochasticMethod):
    """A diffrax solver for Ito equations, in steps of fixed size.

    Not all of them suit: the noise of `SGDFlow` is neither additive nor commuting. Counts of gradients are known for
    `diffrax.Euler` alone, else -1.

    **Arguments**: `solver`: such as `diffrax.Euler()`; `dt`: as for `EulerMaruyama`.

    **Raises** `ValueError` for any other solver, Stratonovich ones among them, and for a step that is not positive.

    >>> import diffrax, gradflow as gf, jax, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), gf.losses.square, predict=lambda w, x: x @ w)
    >>> flow = gf.SGDFlow(problem, learning_rate=0.1, batch_size=1)
    >>> solver = gf.solvers.FixedSteps(diffrax.Euler(), dt=0.02)
    >>> gf.solve(flow, jnp.zeros(2), [1.0], solver=solver, key=jax.random.key(0)).status
    'ok'
    """

    solver: diffrax.AbstractSolver
    dt: Scalar | None

    def __init__(self, solver: object, dt: ArrayLike | None = None):
        if not isinstance(solver, diffrax.AbstractItoSolver):
            actual = f"of type {type(solver).__name__}"
            raise fail("solver", "be a diffrax solver in Ito's sense", actual, "For instance diffrax.Euler().")
        self.solver, self.dt = solver, _step(dt)

    @property
    def name(self) -> str:
        return type(self.solver).__name__

    def step(self, flow: HasNoise, frozen: PyTree, t: Scalar, dt: Scalar, y: PyTree, dw: Float[Array, " n"]) -> PyTree:
        terms = flow.terms(lambda t0, t1: dw)
        state = self.solver.init(terms, t, t + dt, y, frozen)
        y1, *_ = self.solver.step(terms, t, t + dt, y, frozen, state, made_jump=False)
        return y1

    def evaluations(self, flow: HasNoise) -> tuple[int, int]:
        return (2, flow.products_per_evaluation) if isinstance(self.solver, diffrax.Euler) else (-1, -1)


def _step(dt: ArrayLike | None) -> Scalar | None:
    if dt is None:
        return None
    check_positive("dt", dt, "It is the largest step in time.")
    return jnp.asarray(dt, float)
