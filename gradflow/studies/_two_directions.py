"""Two nearby directions of opposite labels: plateau, escape, sliding neurons, and where large steps get stuck."""

import itertools
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, PyTree

from gradflow import observables, theory
from gradflow._checks import check_count, check_positive, fail
from gradflow.data import two_directions as two_directions_data
from gradflow.flows import GradientFlow
from gradflow.models import SignedTwoLayer, Smoothed
from gradflow.problems import EmpiricalRisk, losses
from gradflow.rules import GradientDescent
from gradflow.runs._iterate import iterate
from gradflow.runs._solve import solve
from gradflow.solvers import NDF

PLATEAU, ESCAPED = 0.01, 0.1
"""The plateau begins when the loss is within a hundredth above it; it is escaped a tenth below."""

QUESTION = "How long do two nearby inputs of opposite labels hold a network on a plateau, and which neurons slide?"
"""What the study asks; the heading of its report."""

QUICK: dict[str, object] = {"angles": (0.1, 0.05, 0.025), "steps": 20_000, "saves": 201}
"""Arguments of `two_directions` that take about 20 seconds."""


def two_directions(
    angles: Sequence[float] = (0.2, 0.1, 0.05, 0.025, 0.0125),
    *,
    ratio: int = 3,
    width: int = 32,
    kappa: float = 0.01,
    learning_rate: float = 0.5,
    steps: int = 40_000,
    horizon: float = 1e5,
    saves: int = 401,
    seed: int = 0,
    rtol: float = 1e-5,
) -> xr.Dataset:
    """Two nearby inputs of opposite labels: plateau, escape, sliding neurons.

    Gradient flow of `f(x) = sum_k a_k relu(w_k . x)`, `a_k = +-1/sqrt(m)` fixed, in four phases, for every angle.

    Its start is `|w_k| = kappa / sqrt(m)` in random directions, its loss exponential, its data `ratio` copies of one
    input and one of another. The kinks are rounded (`gradflow.models.Smoothed`) over a fiftieth of the angle, so that
    neurons slide as Filippov's solution does. The phases end when

    1. condensation and escape from the saddle: the loss comes within 1 % above the plateau `2 sqrt(p) / (1 + p)`;
    2. plateau: the loss is 10 % below it, the escape time of `gradflow.theory.two_directions`;
    3. escape: every sample is on its own side;
    4. late: the run ends. The direction tends to a KKT point of the maximum-margin problem.

    Negative neurons begin to slide along the kink of `x+` in the first phase already. Whether they slide to the end
    depends on the start: they do with `seed=0`, and leave the kink at `t D^2` of 16 to 81 with `seed=3`. `slide_until`
    has when.

    Beside it runs gradient descent with a step that is large against `|w_k|`, for the largest angle: its first steps
    kill the negative neurons, and the loss sticks above `1 / (1 + p)`.

    **Arguments**: `angles`: decreasing; `horizon`: of the flow, times the squared angle; `learning_rate`, `steps`: of
    descent; `seed`: of the start.

    **Returns** a data set over `angle` and `time`: `scaled_time (angle, time)`, `risk`, `sliding` (negative neurons
    that slide along the kink of `x+`), `slide_until` (the last scaled time at which any does, NaN if none ever does),
    `residual` (stationarity and slackness), the ends of the phases `phase_end (angle, phase)`, `plateau_loss` (over the
    plateau, where the loss falls slowest), `driving_fraction` (of the neurons, those that drive the two outputs apart),
    `predicted_escape_time`, `law_error` (the largest relative difference of the loss from the law of
    `gradflow.theory.two_directions` after the escape, of order `D^2`); over `step`: `descent_time`, `descent_risk` and
    `flow_risk` at the same times, `descent_alive` (negative neurons active on `x-`).

    **Raises** `ValueError` for a ratio below two, angles that do not decrease, other numbers that are not positive, and
    a start without neurons of either sign that see the data.

    >>> import gradflow as gf
    >>> ds = gf.studies.two_directions(angles=(0.2,), horizon=10.0, steps=100, saves=41)
    >>> ds.risk.shape
    (1, 41)
    >>> print(gf.tables.two_directions(ds).splitlines()[0])
    two directions, 3 copies to one, width 32: ends of the phases
    >>> len(gf.plot.two_directions(ds).axes)
    4
    """
    check_count("ratio", ratio, least=2, advice="It is the number of copies of the one input; with one there is none.")
    check_positive("kappa", kappa)
    check_positive("horizon", horizon)
    check_count("steps", steps)
    check_count("saves", saves, least=2)
    angles = [float(angle) for angle in angles]
    if not angles or any(b >= a for a, b in itertools.pairwise(angles)):
        raise fail("angles", "be a decreasing sequence, not empty", f"{angles}")
    model = _start(width, kappa, seed)
    runs = [_run(model, angle, ratio, horizon, saves, rtol) for angle in angles]
    ds = xr.Dataset(
        {name: (("angle", *dims), np.stack([run[name] for run in runs])) for name, dims in _DIMS.items()},
        coords={"angle": angles, "phase": ["condensation", "plateau", "escape"]},
        attrs={"study": "two-directions", "ratio": ratio, "width": width, "kappa": kappa, "seed": seed, "rtol": rtol},
    )
    ds["descent_time"], ds["descent_risk"], ds["descent_alive"] = _descent(
        model, angles[0], ratio, learning_rate, steps, saves
    )
    first = ds.isel(angle=0)
    ds["flow_risk"] = ("step", np.interp(ds.descent_time, first.scaled_time / angles[0] ** 2, first.risk))
    return ds.assign_attrs(learning_rate=learning_rate)


_DIMS = {
    "scaled_time": ("time",),
    "risk": ("time",),
    "sliding": ("time",),
    "residual": ("time", "part"),
    "phase_end": ("phase",),
    "plateau_loss": (),
    "driving_fraction": (),
    "predicted_escape_time": (),
    "predicted_risk": ("time",),
    "slide_until": (),
    "law_error": (),
    "gradient_evaluations": (),
}


def _start(width: int, kappa: float, seed: int) -> SignedTwoLayer:
    model = SignedTwoLayer(2, width, key=jax.random.key(seed))
    weight = model.weight / jnp.linalg.norm(model.weight, axis=1, keepdims=True)
    return eqx.tree_at(lambda m: m.weight, model, kappa / width**0.5 * weight)


def _problems(angle: float, ratio: int) -> tuple[EmpiricalRisk, EmpiricalRisk]:
    """The loss, and the same with kinks rounded over a fiftieth of the angle."""
    x, y = two_directions_data(ratio, 1, angle=angle, dtype="float64")
    smooth = EmpiricalRisk(x, y, losses.exponential, predict=Smoothed(0.02 * angle))
    return EmpiricalRisk(x, y, losses.exponential), smooth


def _run(
    model: SignedTwoLayer, angle: float, ratio: int, horizon: float, saves: int, rtol: float
) -> dict[str, np.ndarray | float]:
    plain, smooth = _problems(angle, ratio)
    ts = np.concatenate([[0.0], np.geomspace(0.1, horizon / angle**2, saves - 1)])
    observe: dict[str, Callable[[PyTree], Array]] = {
        "risk": smooth,
        "sliding": observables.SlidingNeurons(plain, 0.02 * angle),
        "alive": observables.ActivationPattern(plain.x),
        "margins": observables.Margins(smooth),
        "residual": observables.MaxMarginResidual(smooth, unseparated=np.inf),
    }
    sol = solve(GradientFlow(smooth), model, ts, observe=observe, rtol=rtol, solver=NDF(), save_params=False)
    risk, residual = (np.asarray(sol.observed[name]) for name in ("risk", "residual"))
    negative = np.asarray(model.signs) < 0
    sliding = np.asarray(sol.observed["sliding"])[:, 0] & negative
    forecast = theory.two_directions(ratio, angle, 1.0)
    begins = _crossing(ts, risk, forecast.plateau * (1 + PLATEAU))
    escapes = _crossing(ts, risk, forecast.plateau * (1 - ESCAPED))
    apart = np.min(np.asarray(sol.observed["margins"]), axis=1) > 0
    separated = float(ts[np.argmax(apart)]) if apart.any() else np.nan
    # Those that drive the two outputs apart, when the plateau begins.
    row = int(np.searchsorted(ts, begins)) if np.isfinite(begins) else len(ts) - 1
    alive = np.asarray(sol.observed["alive"])[row]
    moving = (~negative & alive[0] & alive[-1]) | sliding[row]
    fraction = float(np.mean(moving))
    if fraction == 0:
        raise fail("seed", "give neurons that see the data", "one of a start where none does", "Or raise `width`.")
    law = theory.two_directions(ratio, angle, fraction)
    # On the plateau: where the loss falls slowest in proportion to time.
    speed = np.gradient(np.log(risk), np.log(np.maximum(ts, ts[1])) + 1e-9 * np.arange(len(ts)))
    inside = (ts >= begins) & (ts <= escapes)
    flat = int(np.flatnonzero(inside)[np.argmax(speed[inside])]) if inside.any() else row
    predicted = law.loss(np.maximum(ts - begins, 0))
    after = ts > escapes
    return {
        "scaled_time": ts * angle**2,
        "risk": risk,
        "sliding": sliding.sum(axis=1),
        "residual": np.where(np.isinf(residual), np.nan, residual),
        "phase_end": np.array([begins, escapes, separated]),
        "plateau_loss": risk[flat] / forecast.plateau,
        "driving_fraction": fraction,
        "predicted_escape_time": law.escape_time(ESCAPED),
        "predicted_risk": predicted,
        "slide_until": float(ts[np.flatnonzero(sliding.any(axis=1))[-1]]) * angle**2 if sliding.any() else np.nan,
        "law_error": float(np.max(np.abs(risk / predicted - 1)[after])) if after.any() else np.nan,
        "gradient_evaluations": float(sol.stats["gradient_evaluations"]),
    }


def _crossing(ts: np.ndarray, risk: np.ndarray, level: float) -> float:
    """When the loss first falls below a level, between save times; NaN if it does not."""
    below = np.flatnonzero(risk < level)
    if not below.size or below[0] == 0:
        return np.nan
    i = int(below[0])
    return float(np.interp(level, [risk[i], risk[i - 1]], [ts[i], ts[i - 1]]))


def _descent(
    model: SignedTwoLayer, angle: float, ratio: int, learning_rate: float, steps: int, saves: int
) -> list[tuple[str, np.ndarray]]:
    plain, _ = _problems(angle, ratio)
    observe = {"risk": plain, "alive": observables.ActivationPattern(plain.x)}
    every = max(1, steps // saves)
    rule = GradientDescent(plain, learning_rate)
    sol = iterate(rule, model, steps, observe=observe, save_every=every, save_params=False)
    alive = np.asarray(sol.observed["alive"])[:, -1] & (np.asarray(model.signs) < 0)
    path = (np.asarray(sol.ts), np.asarray(sol.observed["risk"]), alive.sum(axis=1))
    return [("step", values) for values in path]


def escape_slopes(ds: xr.Dataset) -> np.ndarray:
    """`d ln(escape time) / d ln(angle)` of `two_directions`, between neighbours.

    Theory has -2, as times go like the inverse squared angle.

    >>> import gradflow as gf, xarray as xr
    >>> ends = xr.DataArray([[1.0], [4.0]], {"angle": [0.2, 0.1], "phase": ["plateau"]}, ("angle", "phase"))
    >>> gf.studies.escape_slopes(xr.Dataset({"phase_end": ends})).round(6).tolist()
    [-2.0]
    """
    times = ds.phase_end.sel(phase="plateau").values
    return np.diff(np.log(times)) / np.diff(np.log(ds.angle.values))
