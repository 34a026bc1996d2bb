"""Fluctuations of one-pass SGD around its order parameters, to leading order in the number of inputs."""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_count, check_positive, fail, is_concrete
from gradflow._tree import flatten
from gradflow.flows._base import AbstractFlow
from gradflow.flows._order_parameters import OrderParameterFlow, Overlaps
from gradflow.problems import OrderParameters
from gradflow.problems._field_sums import triangle
from gradflow.programs import fresh_jit

MEMORY = 2**34
"""Bytes that an evaluation may hold."""


EARLY = 1e-10
"""Time whose diffusion a run starts with, for the factor of no covariance has no derivative."""

LEAST = 1e-14
"""Least diffusion in any direction, over that in all: a little above rounding. Without it the factor would shrink to
nothing where nothing diffuses, as between students that are alike, and rounding be divided by it."""

UNRESOLVED = 1e3
"""Residuals below this multiple of the rounding of numbers of order one count as that."""


class Fluctuations(eqx.Module):
    """Order parameters with their covariance over runs of SGD.

    `covariance` is that of the upper triangle of `Q`, of `M` and of the second layer, flattened in this order: the
    product `factor factor^T`.
    """

    mean: OrderParameters
    factor: Float[Array, "*rows size size"]

    @property
    def covariance(self) -> Float[Array, "*rows size size"]:
        return self.factor @ jnp.swapaxes(self.factor, -1, -2)


class FluctuationFlow(AbstractFlow):
    """Mean and covariance of the order parameters over runs of SGD.

    The linear-noise approximation at `d` inputs:

        y' = F(y)        S' = J S + S J^T + D,        J = dF/dy,        D = (g / d) C(y)

    What is integrated is a factor of `S = L L^T`, with `L' = J L + D L^-T / 2`, so that `S` is positive at any
    tolerance, and `L` is good to a fraction of its own size where `S` itself, whose entries differ by orders of
    magnitude late in a run, would not be. It starts from the diffusion of a time of 1e-10.

    `C(y)` is the covariance of one step's change of `y`, in units of `g / d`: of `s'(lambda_j) lambda*_r E` for `M` and
    the like for `Q`, with `E` the residual. It has no closed form, and is taken over a fixed sample of fields, made to
    have exactly the moments of first and second order it should have; its error is about `2 / sqrt(samples)`. Valid
    while the standard deviations are small against the scale on which `F` bends.

    **Time unit**: that of `flow`.

    **Arguments**: `flow`: an `OrderParameterFlow`; `width`: number of student units; `dim`: number of inputs `d`;
    `samples`: size of the sample; `key`. Start from `flow.start(order_parameters)`; `flow.risk_error(params)` is the
    standard deviation of the risk.

    **Raises** `ValueError` for another flow, for sizes that are not positive, for fewer samples than twice the number
    of fields, `width + k + 1`, and in `start` for a covariance that is not one; in `solve` where an evaluation would
    hold more than 16 GiB: with the default sample and 4 teacher units, beyond about 170 student units.

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

    def __init__(self, flow: OrderParameterFlow, width: int, *, dim: ArrayLike, samples: int = 4096, key: Array):
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

    def start(self, params: OrderParameters, covariance: ArrayLike | None = None) -> Fluctuations:
        """A start from these order parameters, the same in every run unless a `covariance` is given."""
        size = flatten(self.flow.init(params, None))[0].size
        if covariance is None:
            return Fluctuations(params, jnp.zeros((size, size), params.Q.dtype))
        given = jnp.asarray(covariance, params.Q.dtype)
        if given.shape != (size, size):
            raise fail("covariance", f"be of shape {(size, size)}", f"of shape {given.shape}")
        values, vectors = jnp.linalg.eigh((given + given.T) / 2)
        if is_concrete(given):
            min_value, max_value = float(values[0]), float(jnp.max(jnp.abs(values)))
            if not np.allclose(given, given.T, rtol=1e-6, atol=1e-6 * max_value) or min_value < -1e-6 * max_value:
                actual = f"one with eigenvalue {min_value:.1e}" if min_value < 0 else "not symmetric"
                raise fail("covariance", "be symmetric and positive semi-definite", actual)
        return Fluctuations(params, vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :])

    @property
    def time_unit(self) -> str:
        return self.flow.time_unit

    @property
    def jumps(self) -> Float[Array, " n"] | None:
        return self.flow.jumps

    def init(self, trainable: Fluctuations, frozen: PyTree) -> tuple[Overlaps, Array]:
        mean, S = self.flow.init(trainable.mean, None), trainable.covariance
        spread = jnp.trace(self._diffusion(jnp.asarray(1.0, S.dtype), trainable.mean))
        return mean, jnp.linalg.cholesky(S + EARLY * spread * jnp.eye(S.shape[0], dtype=S.dtype))

    def params(self, state: tuple[Overlaps, Array]) -> Fluctuations:
        return Fluctuations(self.flow.params(state[0]), state[1])

    def vector_field(self, t: Scalar, state: tuple[Overlaps, Array], frozen: PyTree) -> tuple[Overlaps, Array]:
        mean, L = state
        y, unflatten = flatten(mean)

        def field(flat: Array) -> Array:
            return flatten(self.flow.vector_field(t, unflatten(flat), None))[0]

        # All directions at once; the field itself is evaluated only once.
        value, along = jax.linearize(field, y)
        slope = jax.vmap(along, in_axes=1, out_axes=1)(L)
        factor = jnp.asarray(1 if self.flow.schedule is None else self.flow.schedule(t), L.dtype)
        D = self._diffusion(factor, self.flow.params(mean))
        return unflatten(value), slope + jnp.linalg.solve(L, D).T / 2

    def _diffusion(self, factor: Scalar, params: OrderParameters) -> Float[Array, "size size"]:
        """`D`, for this factor on the learning rate."""
        flow, dtype = self.flow, params.Q.dtype
        p = params.M.shape[0]
        g, per_sample = flow.gamma_over_p.astype(dtype), 1 / flow.batch_size.astype(dtype)
        values, vectors = jnp.linalg.eigh(flow.covariance(params))
        root = vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :]
        fields = self.points[:, :-1] @ root.T
        hidden, c = flow.activation(fields), flow.residual_weights(params)
        error = hidden @ c + jnp.sqrt(flow.noise).astype(dtype) * self.points[:, -1]
        push = flow.activation.derivative(fields[:, :p]) * error[:, None]
        push = push if params.output is None else push * params.output[None, :]
        rows, columns = triangle(p)
        dQ = push[:, rows] * fields[:, columns] + push[:, columns] * fields[:, rows]
        dQ = factor * dQ + factor**2 * g * per_sample * push[:, rows] * push[:, columns]
        dM = factor * push[:, :, None] * fields[:, None, p:]
        dv = None
        if params.output is not None:
            dv = factor * flow.second_layer_rate.astype(dtype) * error[:, None] * hidden[:, :p]
        steps = jax.vmap(lambda *parts: flatten(Overlaps(*parts))[0], in_axes=(0, 0, None if dv is None else 0))(
            dQ, dM, dv
        )
        steps = steps - jnp.mean(steps, axis=0, keepdims=True)
        covariance = steps.T @ steps / steps.shape[0]
        min_variance = LEAST * jnp.trace(covariance) + (UNRESOLVED * float(jnp.finfo(dtype).eps)) ** 2
        return (
            per_sample
            * g
            / self.dim.astype(dtype)
            * (covariance + min_variance * jnp.eye(covariance.shape[0], dtype=dtype))
        )

    @fresh_jit
    def risk_error(self, params: Fluctuations) -> Float[Array, ""]:
        """Standard deviation of the risk over runs of SGD, to first order."""
        y, unflatten = flatten(self.flow.init(params.mean, None))
        slope = jax.grad(lambda flat: self.flow.loss(unflatten(flat), None))(y)
        return jnp.linalg.norm(params.factor.T @ slope)

    def loss(self, state: tuple[Overlaps, Array], frozen: PyTree) -> Float[Array, ""]:
        return self.flow.loss(state[0], None)

    def errors(self, state: tuple[Overlaps, Array], frozen: PyTree) -> dict[str, Scalar]:
        return self.flow.errors(state[0], None)

    def complaint(self, errors: Mapping[str, ArrayLike]) -> str:
        return self.flow.complaint(errors)

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        if not isinstance(trainable, Fluctuations):
            actual = f"of type {type(trainable).__name__}"
            raise fail("params", "be a start with a covariance", actual, "Start from `flow.start(order_parameters)`.")
        self.flow.check(trainable.mean, None)
        width = self.points.shape[1] - 1 - self.flow.P.shape[0]
        if trainable.mean.M.shape[0] != width:
            raise fail("params.mean", f"hold {width} student units", f"of {trainable.mean.M.shape[0]}")
        size, samples = trainable.factor.shape[0], self.points.shape[0]
        held = trainable.factor.dtype.itemsize * size * (2 * samples + 8 * size)
        if held > MEMORY:
            must = f"have a covariance that takes at most {MEMORY / 2**30:.0f} GiB with what its derivative needs"
            raise fail("params", must, f"of {width} units, which take {held / 2**30:.0f} GiB", "Take fewer units.")

    def check_values(self, trainable: PyTree, frozen: PyTree) -> None:
        self.check(trainable, frozen)
        self.flow.check_values(trainable.mean, None)
