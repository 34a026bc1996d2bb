"""Fluctuations of one-pass SGD around its order parameters, to leading order in the number of inputs."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from gradflow._checks import check_count, check_positive, fail
from gradflow._tree import flatten
from gradflow.flows._base import AbstractFlow
from gradflow.flows._order_parameters import OrderParameterFlow, Overlaps
from gradflow.problems import OrderParameters
from gradflow.problems._field_sums import triangle

MEMORY = 2**34
"""Bytes that an evaluation may hold."""


class Fluctuations(eqx.Module):
    """Order parameters with their covariance over runs of SGD.

    `covariance` is that of the upper triangle of `Q`, of `M` and of the second layer, flattened in this order.
    """

    mean: OrderParameters
    covariance: Float[Array, "size size"]


class FluctuationFlow(AbstractFlow):
    """Mean and covariance of the order parameters over runs of SGD.

    The linear-noise approximation at `d` inputs:

        y' = F(y)        S' = J S + S J^T + (g / d) C(y),        J = dF/dy

    `C(y)` is the covariance of one step's change of `y`, in units of `g / d`: of `s'(lambda_j) lambda*_r E` for `M` and
    the like for `Q`, with `E` the residual. It has no closed form, and is taken over a fixed sample of fields, made to
    have exactly the moments of first and second order it should have; its error is about `2 / sqrt(samples)`. Valid
    while the standard deviations are small against the scale on which `F` bends.

    **Time unit**: that of `flow`.

    **Arguments**: `flow`: an `OrderParameterFlow`; `width`: number of student units; `dim`: number of inputs `d`;
    `samples`: size of the sample; `key`. Start from `flow.start(order_parameters)`; `flow.risk_error(params)` is the
    standard deviation of the risk.

    **Raises** `ValueError` for another flow, for sizes that are not positive, and for fewer samples than twice the
    number of fields, `width + k + 1`; and in `solve` where an evaluation would hold more than 16 GiB: with the default
    sample and 4 teacher units, beyond about 170 student units.

    >>> import gradflow as gf, jax
    >>> problem = gf.TeacherStudent.orthogonal(dim=400, units=1, noise=1e-2)
    >>> mean = gf.OrderParameterFlow(problem, gamma_over_p=0.5)
    >>> flow = gf.flows.FluctuationFlow(mean, width=2, dim=400, key=jax.random.key(0))
    >>> start = problem.order_parameters(problem.informed(2, jax.random.key(1)))
    >>> sol = gf.solve(flow, flow.start(start), [0.0, 5.0], rtol=1e-3)
    >>> bool(flow.risk_error(sol.final) > 0)
    True
    """

    flow: OrderParameterFlow
    dim: Scalar
    points: Float[Array, "samples fields"]

    def __init__(self, flow: Any, width: int, *, dim: Any, samples: int = 4096, key: Any):
        if not isinstance(flow, OrderParameterFlow):
            raise fail("flow", "be a gradflow.OrderParameterFlow", f"of type {type(flow).__name__}")
        check_count("width", width)
        check_positive("dim", dim, "It is the number of inputs.")
        size = width + flow.P.shape[0] + 1
        check_count("samples", samples, least=2 * size)
        self.flow, self.dim = flow, jnp.asarray(dim, float)
        drawn = jax.random.normal(key, (samples, size), flow.P.dtype)
        drawn = drawn - jnp.mean(drawn, axis=0, keepdims=True)
        factor = jnp.linalg.cholesky(drawn.T @ drawn / samples)
        self.points = jax.scipy.linalg.solve_triangular(factor, drawn.T, lower=True).T

    def start(self, params: OrderParameters, covariance: Any = None) -> Fluctuations:
        """A start from these order parameters, the same in every run unless a `covariance` is given."""
        size = flatten(self.flow.init(params, None))[0].size
        zero = jnp.zeros((size, size), params.Q.dtype)
        return Fluctuations(params, zero if covariance is None else jnp.asarray(covariance, params.Q.dtype))

    @property
    def jumps(self) -> Float[Array, " n"] | None:
        return self.flow.jumps

    def init(self, trainable: Fluctuations, frozen: PyTree) -> tuple[Overlaps, Array]:
        return self.flow.init(trainable.mean, None), trainable.covariance

    def params(self, state: tuple[Overlaps, Array]) -> Fluctuations:
        return Fluctuations(self.flow.params(state[0]), state[1])

    def vector_field(self, t: Scalar, state: tuple[Overlaps, Array], frozen: PyTree) -> tuple[Overlaps, Array]:
        mean, S = state
        y, unflatten = flatten(mean)

        def field(flat: Array) -> Array:
            return flatten(self.flow.vector_field(t, unflatten(flat), None))[0]

        # All directions at once; the field itself is evaluated only once.
        value, along = jax.linearize(field, y)
        moved = jax.vmap(along)(S)
        return unflatten(value), moved + moved.T + self._diffusion(t, self.flow.params(mean))

    def _diffusion(self, t: Scalar, params: OrderParameters) -> Float[Array, "size size"]:
        """`(g / d) C`."""
        flow, dtype = self.flow, params.Q.dtype
        p = params.M.shape[0]
        factor = jnp.asarray(1 if flow.schedule is None else flow.schedule(t), dtype)
        g, share = flow.gamma_over_p.astype(dtype), 1 / flow.batch_size.astype(dtype)
        values, vectors = jnp.linalg.eigh(flow.covariance(params))
        root = vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :]
        fields = self.points[:, :-1] @ root.T
        hidden, c = flow.activation(fields), flow.residual_weights(params)
        error = hidden @ c + jnp.sqrt(flow.noise).astype(dtype) * self.points[:, -1]
        push = flow.activation.derivative(fields[:, :p]) * error[:, None]
        push = push if params.output is None else push * params.output[None, :]
        rows, columns = triangle(p)
        dQ = push[:, rows] * fields[:, columns] + push[:, columns] * fields[:, rows]
        dQ = factor * dQ + factor**2 * g * share * push[:, rows] * push[:, columns]
        dM = factor * push[:, :, None] * fields[:, None, p:]
        dv = None
        if params.output is not None:
            dv = factor * flow.second_layer_rate.astype(dtype) * error[:, None] * hidden[:, :p]
        steps = jax.vmap(lambda *parts: flatten(Overlaps(*parts))[0], in_axes=(0, 0, None if dv is None else 0))(
            dQ, dM, dv
        )
        steps = steps - jnp.mean(steps, axis=0, keepdims=True)
        return share * g / self.dim.astype(dtype) * steps.T @ steps / steps.shape[0]

    @eqx.filter_jit
    def risk_error(self, params: Fluctuations) -> Float[Array, ""]:
        """Standard deviation of the risk over runs of SGD, to first order."""
        y, unflatten = flatten(self.flow.init(params.mean, None))
        slope = jax.grad(lambda flat: self.flow.loss(unflatten(flat), None))(y)
        return jnp.sqrt(jnp.maximum(slope @ params.covariance @ slope, 0))

    def loss(self, state: tuple[Overlaps, Array], frozen: PyTree) -> Float[Array, ""]:
        return self.flow.loss(state[0], None)

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        if not isinstance(trainable, Fluctuations):
            actual = f"of type {type(trainable).__name__}"
            raise fail("params", "be a start with a covariance", actual, "Start from `flow.start(order_parameters)`.")
        self.flow.check(trainable.mean, None)
        width = self.points.shape[1] - 1 - self.flow.P.shape[0]
        if trainable.mean.M.shape[0] != width:
            raise fail("params.mean", f"hold {width} student units", f"of {trainable.mean.M.shape[0]}")
        size, samples = trainable.covariance.shape[0], self.points.shape[0]
        held = trainable.covariance.dtype.itemsize * size * (2 * samples + 8 * size)
        if held > MEMORY:
            must = f"have a covariance that takes at most {MEMORY / 2**30:.0f} GiB with what its derivative needs"
            raise fail("params", must, f"of {width} units, which take {held / 2**30:.0f} GiB", "Take fewer units.")

    def check_values(self, trainable: PyTree, frozen: PyTree) -> None:
        self.check(trainable, frozen)
        self.flow.check_values(trainable.mean, None)
