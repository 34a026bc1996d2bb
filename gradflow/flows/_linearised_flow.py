"""Training of a linearised model, in the space of its predictions: the tangent-kernel flow, with or without
momentum."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Scalar

from gradflow._checks import check_count, check_finite, fail, is_concrete
from gradflow._linalg import kernel
from gradflow._tree import full_precision, join, split
from gradflow.flows._base import AbstractFlow
from gradflow.flows._second_order import AbstractSecondOrderFlow
from gradflow.problems import EmpiricalRisk, losses
from gradflow.programs import fresh_jit


class LinearisedFlow(AbstractFlow):
    """Predictions of a linearised model (NTK) under gradient flow or momentum.

    For predictions `u` of the model linearised at `params`, and `K = J J^T` its tangent kernel:

        u' = -K grad_u L(u)
        u' = W - b K grad_u L(u),     W' = -a W - (c - b' - a b) K grad_u L(u)        with `dynamics`

    which is `D'' + (a + b K) D' + c K D = 0` for the residuals `D = u - y` of the sum of squares. The state is the
    predictions `(n, ...)`: start `solve` from `flow.start`, and observables get them. For the square loss and constant
    coefficients `exact(ts)` is the solution, in the eigenbasis of `K`.

    **Time unit**: that of `GradientFlow`, `t = k * learning_rate`, or of `dynamics`.

    **Arguments**

    - `problem`: an `EmpiricalRisk`. `params`: where to linearise.
    - `dynamics`: a second-order flow such as `HeavyBallFlow(problem, mu, s)`, whose coefficients and start are taken.
    - `path`: times `(T,)` and kernels `(T, rows, rows)` to follow instead of the one at `params`, linear in between;
      with the kernels of a run these are its own residual dynamics, but for jumps of the kernel.
    - `chunk`: rows of the kernel computed at once.

    **Raises** `ValueError` for a problem without data, parameters that are not finite, other `dynamics`, a path of the
    wrong shape or whose times do not increase, and a `chunk` below one; so does `exact` for another loss than the
    square, for coefficients that are not constant, and with a path.

    Source: A. Jacot, F. Gabriel and C. Hongler (2018), arXiv 1806.07572; with momentum X. Liu et al. (2022), arXiv
    2208.03941.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> problem = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), gf.losses.square, lambda w, x: x @ w, reduction="sum")
    >>> flow = gf.LinearisedFlow(problem, jnp.zeros(2))
    >>> sol = gf.solve(flow, flow.start, [1.0], rtol=1e-5)
    >>> round(float(flow.exact([1.0])[0, 0]), 4), round(float(sol.final[0]), 4)
    (0.6321, 0.6321)
    """

    problem: EmpiricalRisk
    start: Float[Array, "n ..."]
    kernel: Float[Array, "rows rows"]
    path: tuple[Float[Array, " T"], Float[Array, "T rows rows"]] | None
    dynamics: AbstractSecondOrderFlow | None

    def __init__(
        self,
        problem: EmpiricalRisk,
        params: PyTree,
        dynamics: AbstractSecondOrderFlow | None = None,
        path: tuple[ArrayLike, ArrayLike] | None = None,
        chunk: int = 32,
    ):
        if not isinstance(problem, EmpiricalRisk):
            actual = f"of type {type(problem).__name__}"
            raise fail("problem", "be a gradflow.EmpiricalRisk, which holds the data", actual)
        if dynamics is not None and not isinstance(dynamics, AbstractSecondOrderFlow):
            advice = "For instance gradflow.HeavyBallFlow(problem, mu, s); None is gradient flow."
            raise fail("dynamics", "be a second-order flow", f"of type {type(dynamics).__name__}", advice)
        check_count("chunk", chunk)
        trainable, frozen = split(params)
        check_finite("params", trainable)
        self.problem, self.dynamics = problem, dynamics
        self.start, self.kernel = _linearise(problem, trainable, frozen, chunk)
        self.path = None
        if path is not None:
            times, kernels = (jnp.asarray(part, float) for part in path)
            if times.ndim != 1 or kernels.shape != (times.size, *self.kernel.shape):
                must = f"be times (T,) and kernels (T, {self.kernel.shape[0]}, {self.kernel.shape[0]})"
                raise fail("path", must, f"of shapes {times.shape} and {kernels.shape}")
            check_finite("path", (times, kernels))
            if is_concrete(times) and not np.all(np.diff(np.asarray(times)) > 0):
                raise fail("path", "have increasing times", "not increasing", "Sort the times, with their kernels.")
            self.path = (times, kernels)

    @property
    def t0(self) -> float | Scalar:
        return 0.0 if self.dynamics is None else self.dynamics.t0

    @property
    def time_unit(self) -> str:
        return "t = k * learning_rate" if self.dynamics is None else self.dynamics.time_unit

    @property
    def eigenvalues(self) -> Float[Array, " rows"]:
        """Of the kernel, over `n` for mean reduction, increasing: the rates of gradient flow for the square loss."""
        return jnp.linalg.eigvalsh(self.kernel) * self._weight()

    def init(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        if self.dynamics is None:
            return trainable
        initial_momentum = self.dynamics.initial_momentum()
        zero = jnp.zeros_like(trainable)
        t0 = jnp.asarray(self.dynamics.t0, trainable.dtype)
        if initial_momentum is None:
            return trainable, zero
        return trainable, initial_momentum.astype(zero.dtype) * self._slope(t0, trainable)

    def vector_field(self, t: Scalar, state: PyTree, frozen: PyTree) -> PyTree:
        if self.dynamics is None:
            return -self._slope(t, state)
        u, w = state
        a, b, g = (number.astype(u.dtype) for number in self.dynamics.coefficients(t))
        slope = self._slope(t, u)
        return w - b * slope, -a * w - g * slope

    def params(self, state: PyTree) -> PyTree:
        return state if self.dynamics is None else state[0]

    def loss(self, state: PyTree, frozen: PyTree) -> Float[Array, ""]:
        return self._risk(self.params(state))

    def check(self, trainable: PyTree, frozen: PyTree) -> None:
        shape = getattr(trainable, "shape", None)
        if shape != self.start.shape:
            actual = f"of shape {shape}" if shape is not None else f"of type {type(trainable).__name__}"
            advice = "Start from flow.start, the predictions where the model was linearised."
            raise fail("params", f"be predictions of shape {self.start.shape}", actual, advice)

    @full_precision
    def exact(self, ts: ArrayLike | Sequence[float]) -> Float[Array, "T n ..."]:
        """Predictions at times `ts`, from `flow.start`, in closed form.

        **Raises** `ValueError` unless the loss is `losses.square`, the kernel is one, the coefficients are constant.
        """
        if self.problem.loss is not losses.square:
            raise fail("problem", "have the loss gradflow.losses.square for a closed form", "one with another")
        if self.path is not None or not (self.dynamics is None or self.dynamics.autonomous):
            actual = "one that changes in time"
            raise fail("dynamics", "have constant coefficients, and no path, for a closed form", actual)
        values, vectors = jnp.linalg.eigh(self.kernel)
        lam = jnp.maximum(values * self._weight(), 0)
        y = self.problem.y.astype(self.start.dtype)
        d = vectors.T @ jnp.ravel(self.start - y)
        t = jnp.asarray(ts, lam.dtype)[:, None]
        if self.dynamics is None:
            modes = jnp.exp(-lam[None] * t) * d[None]
        else:
            zero = jnp.zeros((), lam.dtype)
            a, b, g = self.dynamics.coefficients(zero)
            initial_momentum = self.dynamics.initial_momentum()
            slope = ((zero if initial_momentum is None else initial_momentum) - b) * lam * d
            modes = oscillation(t, *(row[None] for row in (a + b * lam, (g + a * b) * lam, d, slope)))
        return y[None] + (modes @ vectors.T).reshape(-1, *self.start.shape)

    def _slope(self, t: Scalar, u: Array) -> Array:
        """`K(t) grad_u L(u)`."""
        gradient = jnp.ravel(jax.grad(self._risk)(u))
        matrix = self.kernel
        if self.path is not None:
            times, kernels = self.path
            place = jnp.clip(jnp.searchsorted(times, t) - 1, 0, times.size - 2)
            weight = jnp.clip((t - times[place]) / (times[place + 1] - times[place]), 0, 1)
            matrix = (1 - weight) * kernels[place] + weight * kernels[place + 1]
        return (matrix @ gradient).reshape(u.shape)

    def _risk(self, u: Array) -> Float[Array, ""]:
        each = jax.vmap(self.problem.loss)(u, self.problem.y)
        return jnp.mean(each) if self.problem.reduction == "mean" else jnp.sum(each)

    def _weight(self) -> float:
        return 1 / self.problem.num_samples if self.problem.reduction == "mean" else 1.0


def oscillation(t: Array, p: Array, q: Array, value: Array, slope: Array) -> Array:
    """At times `(T, 1)`, the solution of `z'' + p z' + q z = 0` with `z(0) = value`, `z'(0) = slope`, all `(1, modes)`,
    for real, double and complex roots."""
    half = p / 2
    inside = half**2 - q
    size = jnp.sqrt(jnp.abs(inside))
    over = inside > 0
    # Growing and decaying parts are paired so that nothing overflows; near a double root both quotients tend to t.
    fast, slow = jnp.exp(-(half + size) * t), jnp.exp(-jnp.where(over, q / jnp.where(over, half + size, 1), 0) * t)
    damped = jnp.exp(-half * t)
    near = size * t < 1e-4
    safe = jnp.where(size > 0, size, 1)
    series = t * (1 + inside * t**2 / 6)
    c = jnp.where(over, 0.5 * (fast + slow), damped * jnp.cos(size * t))
    s = jnp.where(over, 0.5 * (slow - fast) / safe, damped * jnp.sin(size * t) / safe)
    s = jnp.where(near, damped * series, s)
    return value * c + (slope + half * value) * s


@fresh_jit
@full_precision
def _linearise(problem: EmpiricalRisk, trainable: PyTree, frozen: PyTree, chunk: int) -> tuple[Array, Array]:
    def predict(p: PyTree) -> Array:
        return problem.predictions(join(p, frozen))

    return predict(trainable), kernel(predict, trainable, chunk)
