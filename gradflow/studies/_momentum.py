"""Momentum on wide two-layer ReLU networks: the methods, their flows at both resolutions, and the rates predicted."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, PyTree

from gradflow import _checks
from gradflow._solution import Solution, Status
from gradflow.data import Dataset
from gradflow.data._dataset import InputsAndTargets
from gradflow.data._load import load_some
from gradflow.flows import HeavyBallFlow, LinearisedFlow, NesterovFlow
from gradflow.models import SignedTwoLayer
from gradflow.observables import NeuronMovement
from gradflow.problems import EmpiricalRisk, losses
from gradflow.rules import GradientDescent, HeavyBall, Nesterov
from gradflow.runs._iterate import iterate_to
from gradflow.runs._progress import Bar
from gradflow.runs._solve import solve
from gradflow.solvers import Bosh3
from gradflow.studies._compare import run_distance
from gradflow.theory import faster_method, momentum_rates, relu_gram

QUESTION = "Which is faster, heavy ball or Nesterov, and do their flows tell?"
"""What the study asks; the heading of its report."""

_Method = tuple[type[HeavyBall], type[HeavyBallFlow]] | tuple[type[Nesterov], type[NesterovFlow]]

METHODS: dict[Literal["heavy_ball", "nesterov"], _Method] = {
    "heavy_ball": (HeavyBall, HeavyBallFlow),
    "nesterov": (Nesterov, NesterovFlow),
}
Number = TypeVar("Number", int, float)
ALL = ("gradient_descent", *METHODS)
SHARE = 0.25
"""Learning rate times the largest eigenvalue of the tangent kernel."""
FOLDINGS = 4.0
"""Length of a run, in units of the time in which the slowest mode decays by `e`."""

QUICK: dict[str, object] = {"widths": (64, 256), "ratios": (0.1, 4.0), "steps": 200, "saves": 60}
"""Arguments of `momentum` that take about 20 seconds, on 24 samples."""


def momentum(
    dataset: InputsAndTargets,
    *,
    widths: Sequence[int] = (128, 512, 2048),
    ratios: Sequence[float] = (0.03, 0.3, 3.0),
    steps: int | None = None,
    rtol: float = 1e-3,
    saves: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Gradient descent, heavy ball and Nesterov's method on wide ReLU networks.

    The networks are `m^(-1/2) sum_r a_r relu(w_r . x)` with fixed signs `a_r`.

    The tangent kernel `H` of such a network hardly moves if it is wide, and the residuals of the sum of squares then
    obey `D'' + (2 sqrt(mu) + b H) D' + (1 + r) H D = 0`, `b = sqrt(s)` for Nesterov's method and zero for the heavy
    ball. So the eigenvalues of `H` predict how fast each mode decays, and which of the two methods is faster in the
    end: Nesterov's, as long as `mu` is below the smallest eigenvalue; above it the heavy ball.

    **Arguments**

    - `dataset`: two classes, inputs `x (n, d)`, targets `y` of +1 and -1; no two inputs parallel.
    - `widths`: of the networks. `ratios`: values of `mu` over the smallest eigenvalue of the kernel at initialisation,
      in the widest network. The learning rate is a quarter over its largest one.
    - `steps`: of the methods; by default four times the time in which the slowest mode decays by `e`, at most 2000.
    - `rtol`: tolerance of the flows, which are solved in the narrowest network, with the low-order `Bosh3`, since the
      field jumps where ReLU switches. `saves`: iterates kept. `seed`: of the networks.

    **Returns** an `xarray.Dataset` over `(rule, ratio, width, save)`: `loss`; over `(rule, ratio, width)`:
    `status`, the largest `movement` of a neuron, the `distance` that all weights moved, `linear_error`, how far
    predictions are from those of the linearised high-resolution flow, over `|D(0)|`; over `(momentum, resolution,
    ratio, save)`: `flow_gap`, distance to the flow over the distance travelled; `flow_gradient_evaluations`; over
    `(momentum, ratio, mode)`: `measured_rate` and `predicted_rate` of the iterates, per unit of `t = k sqrt(s)`, and
    over `mode` the `eigenvalue`; over `(momentum, ratio)`: `final_rate`, `predicted_final_rate`; over `ratio`: `winner`
    and `predicted_winner`, a tie where rates are within one percent: at equal `mu` they differ by a share
    `sqrt(s / mu) lambda / 2`, little for a kernel of large condition number unless `mu` is small.

    **Raises** `ValueError` for bad input, `SolveError` if a flow fails.

    Source: X. Liu et al. (2022), arXiv 2208.03941, who compare the methods so on MNIST, Fashion-MNIST and CIFAR-10; the
    rates and the point where the winner changes are those of `gradflow.theory.momentum_rates`.

    >>> import gradflow as gf
    >>> data = gf.data.digits(classes=(0, 1), n=6, centre=True, unit_norm=True, labels="pm1")
    >>> few = {"widths": (16, 32), "ratios": (0.1,), "steps": 20, "saves": 10}
    >>> ds = gf.studies.momentum(data, **few, progress=False)
    >>> str(ds.predicted_winner[0].values)
    'nesterov'
    >>> print(gf.tables.momentum(ds).split(";")[0])
    digits, 6 samples
    >>> len(gf.plot.momentum(ds).axes)
    6
    """
    sizes, multiples = _sorted("widths", widths), _sorted("ratios", ratios)
    problem, models = _networks(dataset, sizes, multiples, saves, seed)
    x, _ = dataset
    grams = [relu_gram(x, model.weight) for model in models]
    values, modes = np.linalg.eigh(grams[-1])
    s, mus = _coefficients(grams, float(values[0]), multiples)
    if steps is None:
        slowest = float(values[0]) * min(1.0, multiples[0])
        steps = int(min(2000, np.ceil(FOLDINGS / np.sqrt(slowest * s))))
    _checks.check_count("steps", steps, least=10)
    setting = _Setting(problem, models, s, mus, np.arange(0, steps + 1, max(1, steps // saves)), steps)
    results = _blank(len(sizes), len(multiples), setting.ks.size, len(values))

    with Bar("momentum", 3 * len(sizes) + 4 * len(multiples), unit="run", show=progress) as bar:
        paths = _run_methods(setting, modes, results, bar)
        _run_flows(setting, paths, rtol, results, bar)
    forecasts = [faster_method(values, mu, s, "discrete") for mu in mus]
    results["predicted_final_rate"] = np.array([[p.heavy_ball for p in forecasts], [p.nesterov for p in forecasts]])
    for name in ("", "predicted_"):
        results[f"{name}winner"] = np.array([_winner(*pair) for pair in results[f"{name}final_rate"].T])
    results["predicted_rate"] = np.array(
        [[momentum_rates(values, mu, s, name, "discrete") for mu in mus] for name in METHODS]
    )
    about = {"learning_rate": s, "steps": steps, "rtol": rtol, "seed": seed, "samples": len(problem.y)}
    ks = setting.ks
    coordinates = {"ratio": multiples, "width": sizes, "iteration": ("save", ks), "t": ("save", ks * np.sqrt(s))}
    return _dataset(results, coordinates, {"eigenvalue": values, "mu": mus}, about, dataset)


class _Setting(NamedTuple):
    """What all runs have in common: learning rate `s`, coefficients `mus`, and the steps `ks` that are kept."""

    problem: EmpiricalRisk
    models: list[SignedTwoLayer]
    s: float
    mus: np.ndarray
    ks: np.ndarray
    steps: int


def _networks(
    dataset: InputsAndTargets, widths: list[int], ratios: list[float], saves: int, seed: int
) -> tuple[EmpiricalRisk, list[SignedTwoLayer]]:
    """The problem, and a network of every width; raises `ValueError` for bad input."""
    x, y = dataset
    if np.ndim(y) != 1 or not np.all(np.isin(np.asarray(y), (-1, 1))):
        actual = f"of shape {np.shape(y)} with values such as {np.ravel(np.asarray(y))[:3].tolist()}"
        raise _checks.fail("dataset", "have targets +1 and -1", actual, 'Load it with labels="pm1" and two classes.')
    for width in widths:
        _checks.check_count("widths", width)
    _checks.check_positive("ratios", np.asarray(ratios, float))
    _checks.check_count("saves", saves, least=8)
    models = [SignedTwoLayer(x.shape[1], width, key=jax.random.key(seed)) for width in widths]
    return EmpiricalRisk(x, y, losses.square, reduction="sum"), models


def _coefficients(
    grams: list[Float[np.ndarray, "n n"]], min_eigenvalue: float, ratios: list[float]
) -> tuple[float, np.ndarray]:
    """The learning rate, from the largest eigenvalue of all kernels, and `mu`, from the least of the widest network."""
    max_eigenvalue = float(max(np.linalg.eigvalsh(gram)[-1] for gram in grams))
    if min_eigenvalue <= 1e-10 * max_eigenvalue:
        advice = "Remove repeated inputs, or widen the network beyond the number of samples."
        raise _checks.fail(
            "dataset", "have a tangent kernel of full rank", f"with eigenvalue {min_eigenvalue:.1e}", advice
        )
    mus = np.array(ratios) * min_eigenvalue
    if mus[-1] > max_eigenvalue:
        raise _checks.fail(
            "ratios", f"be at most {max_eigenvalue / min_eigenvalue:g}, the condition of the kernel", f"{ratios[-1]:g}"
        )
    return SHARE / max_eigenvalue, mus


def _run_methods(setting: _Setting, modes: np.ndarray, results: dict[str, np.ndarray], bar: Bar) -> dict[str, PyTree]:
    """Fills in what the methods do in every network; returns their paths in the narrowest one."""
    problem, models, s, mus, ks, steps = setting
    paths: dict[str, PyTree] = {}
    y = np.asarray(problem.y)
    for j, model in enumerate(models):
        # Rates of fast modes take every iterate; they are measured in the widest network.
        dense = j == len(models) - 1 > 0
        rows = np.arange(steps + 1) if dense else ks
        for i, method in enumerate(ALL):
            runs = _iterate_all(method, problem, model, s, mus, rows, save_params=j == 0)
            if j == 0:
                paths[method] = runs.params
            every, movement = np.asarray(runs.observed["u"]), _moved(model, runs.final)
            u = every[:, ks] if dense else every
            results["loss"][i, :, j] = 0.5 * np.sum((u - y) ** 2, axis=2)
            results["status"][i, :, j] = np.asarray(runs.code)
            results["movement"][i, :, j] = np.max(movement, axis=1)
            results["distance"][i, :, j] = np.linalg.norm(movement, axis=1)
            results["linear_error"][i, :, j] = _linear_error(method, problem, model, s, mus, ks, u)
            if j == len(models) - 1 and method in METHODS:
                results["measured_rate"][i - 1] = _rates((every - y) @ modes, rows, s)
                results["final_rate"][i - 1] = _final_rate(u - y, ks, s)
            bar.advance()
    return paths


def _run_flows(
    setting: _Setting, paths: dict[str, PyTree], rtol: float, results: dict[str, np.ndarray], bar: Bar
) -> None:
    """Fills in how far the methods are from their flows, in the narrowest network."""
    problem, models, s, mus, ks, _ = setting
    for i, (method, (_, flow)) in enumerate(METHODS.items()):
        for k, mu in enumerate(mus):
            path = jax.tree_util.tree_map(lambda leaf, k=k: leaf[k], eqx.filter(paths[method], eqx.is_inexact_array))
            for j, resolution in enumerate(("low", "high")):
                exact = solve(flow(problem, mu, s, resolution), models[0], ks * np.sqrt(s), rtol=rtol, solver=Bosh3())
                distance, travelled = run_distance(path, exact.params)
                results["flow_gap"][i, j, k] = np.asarray(distance) / float(travelled)
                results["flow_gradient_evaluations"][i, j, k] = int(exact.stats["gradient_evaluations"])
                bar.advance()


def load_data(
    name: str = "digits",
    *,
    path: str | None = None,
    samples: int | None = None,
    classes: tuple[int, int] = (0, 1),
    quick: bool = False,
) -> Dataset:
    """A data set by name as `momentum` takes it: two classes distinguished by signs, centred, of norm one."""
    samples = (24 if quick else 40) if samples is None else samples
    return load_some(name, path=path, samples=samples, classes=classes, centre=True, unit_norm=True, labels="pm1")


def _sorted(name: str, values: Sequence[Number]) -> list[Number]:
    ordered = sorted(values)
    if not ordered or len(set(ordered)) < len(ordered):
        raise _checks.fail(name, "be distinct values, at least one", repr(values))
    return ordered


def _blank(widths: int, ratios: int, rows: int, modes: int) -> dict[str, np.ndarray]:
    every, pair = (len(ALL), ratios, widths), (len(METHODS), ratios)
    return {
        "loss": np.full((*every, rows), np.nan),
        "status": np.zeros(every, np.int8),
        "movement": np.full(every, np.nan),
        "distance": np.full(every, np.nan),
        "linear_error": np.full(every, np.nan),
        "measured_rate": np.full((*pair, modes), np.nan),
        "final_rate": np.full(pair, np.nan),
        "flow_gap": np.full((len(METHODS), 2, ratios, rows), np.nan),
        "flow_gradient_evaluations": np.zeros((len(METHODS), 2, ratios), np.int64),
    }


def _iterate_all(
    method: str,
    problem: EmpiricalRisk,
    model: SignedTwoLayer,
    s: float,
    mus: np.ndarray,
    ks: np.ndarray,
    save_params: bool,
) -> Solution:
    """A method for all values of `mu` in one program; gradient descent, which has none, is run once."""

    def run(mu: Float[Array, ""]) -> Solution:
        rule = METHODS[method][0](problem, s, mu=mu) if method in METHODS else GradientDescent(problem, s)
        observe = {"u": problem.predictions}
        return iterate_to(rule, model, ks, observe=observe, save_params=save_params, throw=False)

    return eqx.filter_vmap(run)(jnp.asarray(mus if method in METHODS else mus[:1]))


def _moved(model: SignedTwoLayer, final: PyTree) -> np.ndarray:
    """How far every neuron moved, in each of several runs."""
    flowing, static = eqx.partition(final, eqx.is_inexact_array)
    distance = NeuronMovement(model)
    return np.asarray(jax.vmap(lambda leaves: distance(eqx.combine(leaves, static)))(flowing))


def _linear_error(
    method: str, problem: EmpiricalRisk, model: SignedTwoLayer, s: float, mus: np.ndarray, ks: np.ndarray, u: np.ndarray
) -> np.ndarray:
    """How far predictions are from the linearised flow at the most, over the size of the first residuals."""
    errors = []
    for row, mu in zip(u, mus[: len(u)], strict=True):
        dynamics = METHODS[method][1](problem, mu, s) if method in METHODS else None
        flow = LinearisedFlow(problem, model, dynamics)
        times = ks * (np.sqrt(s) if method in METHODS else s)
        away = np.linalg.norm(row - np.asarray(flow.exact(times)), axis=1)
        errors.append(np.max(away) / np.linalg.norm(row[0] - np.asarray(problem.y)))
    return np.array(errors)


def _rates(residuals: np.ndarray, ks: np.ndarray, s: float) -> np.ndarray:
    """Decay of every mode, from the recursion of two terms that fits its early history; NaN where there is no fit.

    Equally spaced values `z_j` of a mode obey `z_{j+1} = p z_j - q z_{j-1}`; the larger root gives the rate.
    """
    spacing = int(ks[1] - ks[0])
    rates = np.full(residuals.shape[:1] + residuals.shape[2:], np.nan)
    for i, run in enumerate(residuals):
        for mode, z in enumerate(run.T):
            # Later, the mode is what others, moving with the kernel, make of it.
            large = np.abs(z) > 0.03 * np.max(np.abs(z))
            last = int(np.max(np.flatnonzero(large))) + 1 if np.any(large) else 0
            if last >= 6:
                rows = np.stack([z[1 : last - 1], -z[: last - 2]], axis=1)
                (p, q), *_ = np.linalg.lstsq(rows, z[2:last], rcond=None)
                radius = np.max(np.abs(np.roots([1, -p, q])))
                rates[i, mode] = -np.log(radius) / (spacing * np.sqrt(s)) if radius > 0 else np.nan
    return rates


def _final_rate(residuals: np.ndarray, ks: np.ndarray, s: float) -> np.ndarray:
    """Slope of `-log |D|` in `t` over the second half of each run."""
    half = ks.size // 2
    size = np.log(np.linalg.norm(residuals, axis=2))[:, half:]
    finite = np.all(np.isfinite(size), axis=1)
    t = ks[half:] * np.sqrt(s)
    fits = [-np.polyfit(t, row, 1)[0] if ok else np.nan for row, ok in zip(size, finite, strict=True)]
    return np.array(fits)


def _winner(first: float, second: float) -> str:
    """The faster of the two, or a tie where they are within one percent."""
    if not np.isfinite(first) or not np.isfinite(second):
        return "unknown"
    if abs(first - second) <= 0.01 * max(abs(first), abs(second)):
        return "tie"
    return "nesterov" if second > first else "heavy_ball"


_ABOUT = {
    "loss": (("rule", "ratio", "width", "save"), "training loss, |D|^2 / 2"),
    "status": (("rule", "ratio", "width"), "how the run of the method ended"),
    "movement": (("rule", "ratio", "width"), "largest movement of a neuron"),
    "distance": (("rule", "ratio", "width"), "distance that all weights moved"),
    "linear_error": (("rule", "ratio", "width"), "distance of predictions from the linearised flow over |D(0)|"),
    "flow_gap": (("momentum", "resolution", "ratio", "save"), "distance to the flow over distance travelled"),
    "flow_gradient_evaluations": (("momentum", "resolution", "ratio"), "gradients evaluated by the flow"),
    "measured_rate": (("momentum", "ratio", "mode"), "measured rate of decay of a mode per unit of t"),
    "predicted_rate": (("momentum", "ratio", "mode"), "predicted rate of decay of a mode per unit of t"),
    "final_rate": (("momentum", "ratio"), "measured rate of decay of the residuals per unit of t"),
    "predicted_final_rate": (("momentum", "ratio"), "predicted rate of decay of the residuals per unit of t"),
    "winner": (("ratio",), "faster method in the second half of the run"),
    "predicted_winner": (("ratio",), "predicted faster method"),
    "eigenvalue": (("mode",), "eigenvalue of the tangent kernel at the start, widest network"),
    "mu": (("ratio",), "strong-convexity parameter that the methods use"),
}


def _dataset(
    results: dict[str, np.ndarray],
    coordinates: Mapping[str, object],
    more: dict[str, np.ndarray],
    about: Mapping[str, object],
    dataset: InputsAndTargets,
) -> xr.Dataset:
    whole = results | more
    variables = {name: (_ABOUT[name][0], value, {"long_name": _ABOUT[name][1]}) for name, value in whole.items()}
    variables["status"][2].update(
        flag_values=list(range(len(Status.labels()))), flag_meanings=" ".join(Status.labels())
    )
    names = {"rule": list(ALL), "momentum": list(METHODS), "resolution": ["low", "high"]}
    attributes = {"study": "momentum", "data": str(getattr(dataset, "name", "unnamed")), **about}
    return xr.Dataset(variables, {**names, **coordinates}, attributes)


def movement_slope(ds: xr.Dataset) -> xr.DataArray:
    """The power of the width with which the movement of neurons falls.

    Of the largest movement, per method and ratio, from what `momentum` returned.

    NaN with fewer than two widths.

    >>> import xarray as xr, gradflow as gf
    >>> movement = xr.DataArray([2.0, 1.0], dims="width", coords={"width": [100, 400]})
    >>> float(gf.studies.movement_slope(xr.Dataset({"movement": movement})).round(3))
    -0.5
    """
    if ds.sizes["width"] < 2:
        return ds.movement.isel(width=0, drop=True) * np.nan
    x = np.log(ds.width)
    x = x - x.mean()
    return (np.log(ds.movement) * x).sum("width") / (x**2).sum()
