"""`find_saddles`: a finished run as a sequence of saddles, with the times of the jumps between them."""

import itertools
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from gradflow import _checks
from gradflow._solution import Solution
from gradflow._tree import full_precision, join, split
from gradflow.models._polar import Polar
from gradflow.programs import fresh_jit
from gradflow.protocols import HasNeuronWeights, offered
from gradflow.runs._record import seen

LARGEST = 600
"""Parameters up to which the Hessian at a saddle is formed."""


RISES = 3.0
"""A jump lowers the loss by more than this many times what it ever rises: noise falls about as far as it rises."""

RESOLVED_LOSS = 1e-5
"""Part of the remaining loss that a jump lowers at the least: a hundred times the rounding of a loss in float32."""

RESOLVED = 1e-9
"""Distance from a saddle that its gradient distinguishes from rounding."""


class Saddle(eqx.Module):
    """A stretch of a run in which the loss hardly moves.

    - `entered`, `left`: times of the jumps on either side, where the loss falls fastest; the start and the end of the
      run for the first and the last. `time`: of the least gradient in between, where everything else is measured.
    - `loss`, `gradient`: there. `active`: neurons with more than a hundredth of the norm of the largest; -1 for
      parameters without neurons, 0 for the saddle at zero.
    - `index`: negative eigenvalues of the Hessian (-1 above 600 parameters), beyond a thousandth of the largest in
      modulus. `rate`: minus the lowest eigenvalue, at which the run leaves; in a homogeneous network of degree 2 it is
      twice the residual correlation, `correlation = rate / 2`.
    - `predicted`: time of the next jump, `t + ln(1/a) / rate`, with `a` the distance along the direction that grows at
      time `t`: the first at which it exceeds rounding, 1e-9, or the start of a `Polar` run. Right to `O(1 / rate)`.
    """

    entered: float
    left: float
    time: float
    loss: float
    gradient: float
    active: int
    index: int
    rate: float
    predicted: float

    @property
    def correlation(self) -> float:
        """The residual correlation of the feature that grows next, in a network of degree 2."""
        return self.rate / 2


def find_saddles(sol: Solution, problem: Callable[[PyTree], Array], *, drop: float | None = None) -> list[Saddle]:
    """The saddles that a run visited, its start and its end included.

    Jumps are local maxima of the rate at which the loss falls, `|grad L|^2`; two of them count as one if the loss falls
    by too little between the minima about them. Times are those of the saved rows, refined by a parabola: save densely.

    By default a jump lowers the loss by more than 1e-5 of what remains of it and by more than three times what it rises
    anywhere in the run, which a gradient flow does by errors of the solver alone; and the loss falls slower before and
    after. A saddle that holds 0.01 % of the loss is found at `rtol=1e-5`. Where errors or noise are of its size it is
    merged rather than one found that is none.

    **Arguments**: `sol`: a finished run with its parameters saved, of any flow or rule. `problem`: the loss. `drop`: in
    place of the above, the part of its first value by which each jump lowers the loss.

    **Raises** `ValueError` for runs without parameters, fewer than five rows, and a `drop` that is not positive.

    >>> import gradflow as gf, numpy as np
    >>> problem = gf.EmpiricalRisk(np.eye(2), np.array([2.0, 1.0]), gf.losses.square, reduction="sum")
    >>> start = gf.models.LogDiagonal(2, log_scale=-50.0)
    >>> sol = gf.solve(gf.LogDiagonalFlow(problem), start, np.linspace(0, 80, 801))
    >>> [(round(s.entered), round(s.loss, 3), s.index) for s in gf.find_saddles(sol, problem)]
    [(0, 2.5, 2), (25, 0.5, 1), (50, 0.0, 0)]
    """
    if sol.params is None:
        raise _checks.fail("sol", "hold the parameters", "one without", "Solve with save_params=True.")
    if drop is not None:
        _checks.check_positive("drop", drop)
    rows = int(sol.saved)
    if rows < 5:
        raise _checks.fail("sol", "have at least five rows", f"one of {rows}", "Save more densely.")
    ts = np.asarray(sol.ts)[:rows]
    flowing, static = eqx.partition(
        sol.params, lambda leaf: eqx.is_inexact_array(leaf) and leaf.shape[:1] == sol.ts.shape
    )
    flowing = jax.tree_util.tree_map(lambda leaf: leaf[:rows], flowing)
    losses, forces = (np.asarray(part, float) for part in _along(problem, flowing, static))
    with np.errstate(divide="ignore"):
        log_force = np.where(forces > 0, np.log(np.maximum(forces, 1e-300)), -690.0)
    least_falls = _least_falls(losses, drop)
    # Noise and errors of the solver move gradients of stiff directions where the loss hardly changes: both must agree.
    log_speed = log_force if drop is not None else _log_speed(ts, losses, least_falls / 2)
    peaks = _peaks(log_force, log_speed, losses, least_falls)
    edges = [0, *peaks, rows - 1]
    saddles = []
    for k in range(len(edges) - 1):
        low, high = edges[k], edges[k + 1]
        if k == 0:
            at = 0
        elif k == len(edges) - 2:
            at = high
        else:
            at = low + int(np.argmin(log_force[low : high + 1]))
        entered = ts[0] if k == 0 else _refined(ts, log_force, low)
        left = ts[-1] if k == len(edges) - 2 else _refined(ts, log_force, high)
        params = join(jax.tree_util.tree_map(lambda leaf, at=at: leaf[at], flowing), static)
        index, rate, away = _unstable(problem, seen(problem, params))
        predicted = at
        if index > 0 and not (k == 0 and isinstance(params, Polar)):
            # Rounding hides how far the state is along the growing direction until the gradient shows it.
            while predicted < high - 1 and log_force[predicted] < 2 * math.log(RESOLVED * rate):
                predicted += 1
            params = join(jax.tree_util.tree_map(lambda leaf, at=predicted: leaf[at], flowing), static)
            away = _unstable(problem, seen(problem, params))[2]
        log_away = float(jnp.max(params.log_norm)) if k == 0 and isinstance(params, Polar) else _log(away)
        wait = -log_away / rate if rate > 0 and log_away < 0 else math.inf
        force = float(np.exp(log_force[at] / 2))
        active = _active(seen(problem, params))
        whole = (float(entered), float(left), float(ts[at]), float(losses[at]), force, active, index, rate)
        saddles.append(Saddle(*whole, float(ts[predicted]) + wait))
    return saddles


@fresh_jit
@full_precision
def _along(problem: Callable[[PyTree], Array], flowing: PyTree, static: PyTree) -> tuple[Array, Array]:
    """Loss and squared gradient of all rows."""

    def one(row: PyTree) -> tuple[Array, Array]:
        trainable, frozen = split(seen(problem, join(row, static)))
        loss, gradient = jax.value_and_grad(lambda p: problem(join(p, frozen)))(trainable)
        return loss, sum(jnp.sum(leaf**2) for leaf in jax.tree_util.tree_leaves(gradient))  # pyright: ignore[reportReturnType]

    return jax.lax.map(one, flowing, batch_size=64)


def _least_falls(losses: np.ndarray, drop: float | None) -> np.ndarray:
    """By how much a jump that begins at a row has to lower the loss."""
    if drop is not None:
        return np.full(losses.shape, drop * abs(losses[0]))
    risen = np.max(losses - np.minimum.accumulate(losses))
    return np.maximum(RESOLVED_LOSS * np.abs(losses), RISES * risen)


def _log_speed(ts: np.ndarray, losses: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Logarithm of the speed at which the loss falls, over the time that its lowest value so far takes for `spans`."""
    lowest = np.minimum.accumulate(losses)
    above, below = lowest + spans / 2, lowest - spans / 2
    begin = np.where(above >= lowest[0], ts[0], np.interp(-above, -lowest, ts))
    end = np.where(below <= lowest[-1], ts[-1], np.interp(-below, -lowest, ts))
    fall = np.minimum(above, lowest[0]) - np.maximum(below, lowest[-1])
    return np.log(np.maximum(fall, 1e-300)) - np.log(np.maximum(end - begin, 1e-300))


def _peaks(force: np.ndarray, speed: np.ndarray, losses: np.ndarray, least_falls: np.ndarray) -> list[int]:
    """Rows of the jumps: local maxima, merged until the loss falls by enough across each."""
    inside = np.flatnonzero((force[1:-1] >= force[:-2]) & (force[1:-1] > force[2:])) + 1
    peaks = [int(p) for p in inside]
    while peaks:
        edges = [0, *peaks, len(force) - 1]
        valleys = [a + int(np.argmin(force[a : b + 1])) for a, b in itertools.pairwise(edges)]
        valleys[0], valleys[-1] = 0, len(force) - 1
        falls = [losses[a] - losses[b] for a, b in itertools.pairwise(valleys)]
        sides = list(zip(peaks, itertools.pairwise(valleys), strict=True))
        depth = [min(rate[p] - max(rate[a], rate[b]) for rate in (force, speed)) for p, (a, b) in sides]
        # A jump is a fall of the loss with a rest on either side.
        low = [falls[i] < least_falls[valleys[i]] for i in range(len(peaks))]
        poor = [i for i in range(len(peaks)) if low[i] or depth[i] < 1.0]
        if not poor:
            break
        # Those without a fall first, or noise beside a jump would part it from the rest that it follows.
        peaks.pop(min(poor, key=lambda i: (not low[i], depth[i], falls[i])))
    return peaks


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _refined(ts: np.ndarray, values: np.ndarray, row: int) -> float:
    """Where the parabola through three rows is highest."""
    if not 0 < row < len(ts) - 1:
        return float(ts[row])
    a, b, _ = np.polyfit(ts[row - 1 : row + 2] - ts[row], values[row - 1 : row + 2], 2)
    shift = -b / (2 * a) if a < 0 else 0.0
    return float(ts[row] + np.clip(shift, ts[row - 1] - ts[row], ts[row + 1] - ts[row]))


def _unstable(problem: Callable[[PyTree], Array], params: PyTree) -> tuple[int, float, float]:
    """Negative eigenvalues, minus the lowest one, and the fraction of the state along its direction."""
    trainable, frozen = split(params)
    flat, _ = jax.flatten_util.ravel_pytree(trainable)
    if flat.size > LARGEST:
        return -1, math.nan, math.nan
    gradient, matrix = (np.asarray(part, float) for part in _second(problem, trainable, frozen))
    if not np.all(np.isfinite(matrix)):
        return -1, math.nan, math.nan
    values, vectors = np.linalg.eigh(matrix)
    index = int(np.sum(values < -1e-3 * np.max(np.abs(values), initial=1e-300)))
    if index == 0:
        return 0, 0.0, 0.0
    rate = float(-values[0])
    # Directions of one rate differ by rounding, and by how far the state still is from the saddle.
    same = values < values[0] * (1 - 1e-2)
    # The gradient along a direction of eigenvalue -rate is -rate times how far the state has gone along it.
    away = float(np.linalg.norm(vectors[:, same].T @ gradient)) / rate
    return index, rate, away


@fresh_jit
@full_precision
def _second(problem: Callable[[PyTree], Array], trainable: PyTree, frozen: PyTree) -> tuple[Array, Array]:
    flat, unflatten = jax.flatten_util.ravel_pytree(trainable)

    def value(v: Array) -> Array:
        return problem(join(unflatten(v), frozen))

    return jax.grad(value)(flat), jax.hessian(value)(flat)


def _active(params: PyTree) -> int:
    """Neurons that are not small beside the largest, which has to be of size at least a hundredth itself."""
    model = offered(params, HasNeuronWeights)
    if model is None:
        return -1
    norms = np.linalg.norm(np.asarray(model.neuron_weights(), float), axis=1)
    return int(np.sum(norms > 0.01 * max(float(np.max(norms)), 1.0)))
