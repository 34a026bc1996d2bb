"""Small initialisation on real data: escape from the saddle at zero, over scales, widths and seeds."""

import os
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, PyTree

from gradflow import _checks
from gradflow.data import Dataset
from gradflow.data._dataset import InputsAndTargets
from gradflow.data._load import load_some
from gradflow.flows import GradientFlow
from gradflow.limits._small_start import predict_small_start
from gradflow.models import TwoLayer
from gradflow.observables import Accuracy, Loss, NeuronAngles, ParameterNorm
from gradflow.problems import EmpiricalRisk, losses
from gradflow.rules import GradientDescent
from gradflow.runs._iterate import iterate_to
from gradflow.runs._progress import Bar
from gradflow.solvers import Tsit5
from gradflow.studies._compare import extrapolate_steps
from gradflow.studies._escape_times import Build, Observe, escape_times, from_start, leading_order
from gradflow.sweeps import sweep

QUESTION = "How do networks leave a small initialisation, and in which directions?"
"""What the study asks; the heading of its report."""

AFTERWARDS = 12.0
"""How long a run goes on after the escape, in units of the predicted slope."""

QUICK: dict[str, object] = {"scales": (1e-2, 1e-4, 1e-6), "widths": (16,), "seeds": (0,), "saves": 121, "rtol": 1e-3}
"""Arguments of `small_init` that take about 20 seconds, on 120 samples."""


def small_init(
    dataset: InputsAndTargets,
    *,
    loss_names: Sequence[str] = ("square", "logistic"),
    scales: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
    widths: Sequence[int] = (16, 32, 64),
    seeds: Sequence[int] = (0, 1, 2),
    rtol: float = 1e-4,
    saves: int = 241,
    store: str | os.PathLike[str] | None = None,
    resume: bool = True,
    chunk: tuple[int, int] | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Escape of two-layer ReLU networks from small initial weights.

    Gradient flow of networks without biases, from `delta * v`.

    While the weights are small their directions follow a flow that does not know `delta`; then the norm grows like
    `exp(2 N t)` and the loss falls. So the time of escape grows like `ln(1/delta) / (2 N)`, `N` the value of the neural
    correlation function at the direction found (Kumar & Haupt 2024, arXiv 2402.09226). The study measures that
    slope, the directions, the cost of the flow, and the cost of gradient descent of the same accuracy.

    The whole time of escape is predicted from the start at scale one, for all scales at once: the flow of `N` tells
    when the loss would have fallen by a tenth had it not taken part, `N(w(t)) scale^2 = L(0) / 10`, and one run from
    the aligned directions how much later it does, since residuals shrink. What is left vanishes with the scale.

    **Arguments**

    - `dataset`: two classes, inputs `x (n, d)`, targets `y` of +1 and -1; `gradflow.data.digits(classes=(0, 1),
      centre=True, unit_norm=True, labels="pm1")` is the default of the command line.
    - `loss_names`: among `"square"`, `"logistic"`, `"exponential"`. `scales`: values of `delta`. `widths`, `seeds`.
    - `rtol`: tolerance. ReLU makes the field jump where activation patterns change, which an error control pays for:
      the cost grows like `1 / rtol` on data where neurons keep crossing. All runs take the explicit `Tsit5`.
    - `saves`: number of save times. `store`, `resume`, `chunk`, `progress`: as for `sweep`. As long as other chunks
      are missing, only what the runs themselves give is returned.

    **Returns** an `xarray.Dataset`:

    - over `(loss, width, scale, seed, time)`: `risk`, `accuracy`, `norm`, and `angle`, `angle_negative` of every neuron
      to the directions that theory predicts for positive and for negative output weights;
    - over `(loss, width, scale, seed)`: `escape_time` (the loss has fallen by a tenth), `predicted_time` to leading
      order in `ln(1/scale)`, as if all neurons had turned from the start on, `predicted_time_from_start`, which knows
      how they turn, and `aligned`, the fraction of neurons within 0.1 of either direction at the escape;
    - over `(loss, width)`: `slope` of the escape time against `ln(1/scale)`; over `loss`: `predicted_slope`;
    - over `(loss, saddle)`, for the middle width, the smallest scale and the first seed: `saddle_time` and
      `saddle_loss`, the saddles that alternating gradient flow predicts, zero included;
    - over `(loss, scale)`, for the middle width and the first seed: `flow_error` (largest distance of the loss curve
      from that of a flow at `rtol / 30`, over the initial loss; since at kinks neither error falls in proportion to the
      tolerance, it is good to a factor of two or three), `flow_gradient_evaluations`, and `descent_steps`, the steps of
      gradient descent for the same error, extrapolated from two learning rates with the order measured.

    **Raises** `ValueError` for targets other than +1 and -1, unknown losses, and what `sweep` refuses.

    >>> import gradflow as gf
    >>> data = gf.data.digits(classes=(0, 1), n=20, centre=True, unit_norm=True, labels="pm1")
    >>> few = {"loss_names": ["square"], "widths": [4], "seeds": [0], "scales": [1e-2, 1e-3], "rtol": 1e-3}
    >>> ds = gf.studies.small_init(data, **few, saves=41, progress=False)
    >>> bool(ds.escape_time[0, 0, 0, 0] < ds.escape_time[0, 0, 1, 0])
    True
    >>> len(gf.plot.small_init(ds).axes)
    4
    """
    problems = _problems(dataset, loss_names)
    _checks.check_count("saves", saves, least=2)
    if not len(scales):
        raise _checks.fail("scales", "hold at least one value", repr(scales))
    _checks.check_positive("scales", np.asarray(scales, float), "Zero is a saddle: nothing would move.")
    predicted = {name: predict_small_start(problem) for name, problem in problems.items()}
    x, _ = dataset

    def build(loss: str, width: int, scale: float, seed: int) -> tuple[GradientFlow, TwoLayer]:
        model = TwoLayer(x.shape[1], int(width), init_scale=scale, key=jax.random.key(int(seed)))
        return GradientFlow(problems[str(loss)]), model

    observe = _observables(problems, predicted[loss_names[0]].escape.directions)
    # The escape of the smallest scale, and about as long again for the fit that follows.
    longest = max(prediction.escape.slope for prediction in predicted.values())
    horizon = longest * (np.log(1 / np.min(scales)) + AFTERWARDS)
    axes = {"loss": list(loss_names), "width": list(widths), "scale": list(scales), "seed": list(seeds)}
    ts = np.linspace(0, horizon, saves)
    ds = sweep(
        build,
        axes,
        ts,
        observe=observe,
        solver=Tsit5(),
        rtol=rtol,
        store=store,
        resume=resume,
        progress=progress,
        max_steps=200_000,
        chunk=chunk,
    )
    # A finished study, resumed; or one of which others have parts still to do.
    if "predicted_time_from_start" in ds or np.any(ds.status.values < 0):
        return ds
    derived = escape_times(ds)
    about = {"long_name": "predicted slope of the escape time against ln(1/scale)", "units": "1"}
    derived["predicted_slope"] = ("loss", [predicted[name].escape.slope for name in ds.loss.values], about)
    derived = derived.merge(leading_order(ds, derived.escape_time.values, predicted, build))
    derived = derived.merge(from_start(ds, predicted, build, observe, rtol, progress))
    derived = derived.merge(_against_descent(build, ds, observe, rtol, progress))
    # A store's attributes are replaced as a whole, so the old ones go along.
    derived.attrs = {**ds.attrs, "study": "small-init", "data": str(getattr(dataset, "name", "unnamed"))}
    if store is not None:
        derived.to_zarr(store, mode="a", zarr_format=2)
    return ds.merge(derived).assign_attrs(derived.attrs)


def _problems(dataset: InputsAndTargets, loss_names: Sequence[str]) -> dict[str, EmpiricalRisk]:
    """The problem for every loss, by name; raises `ValueError` for bad input."""
    x, y = dataset
    if np.ndim(y) != 1 or not np.all(np.isin(np.asarray(y), (-1, 1))):
        actual = f"of shape {np.shape(y)} with values such as {np.ravel(np.asarray(y))[:3].tolist()}"
        raise _checks.fail("dataset", "have targets +1 and -1", actual, 'Load it with labels="pm1" and two classes.')
    by_name = {"square": losses.square, "logistic": losses.logistic, "exponential": losses.exponential}
    if isinstance(loss_names, str) or not loss_names:
        raise _checks.fail("loss_names", "be a list of names, at least one", repr(loss_names))
    for name in loss_names:
        _checks.check_choice("loss_names", name, by_name)
    return {name: EmpiricalRisk(x, y, by_name[name]) for name in loss_names}


def _observables(problems: dict[str, EmpiricalRisk], directions: Float[np.ndarray, "2 d"]) -> Observe:
    """What is observed along a flow: the same instances for all flows of a problem, so that programs are shared."""
    positive, negative = directions
    observables = {
        name: {
            "risk": Loss(problem),
            "accuracy": Accuracy(problem),
            "norm": ParameterNorm(),
            "angle": NeuronAngles(positive),
            "angle_negative": NeuronAngles(negative),
        }
        for name, problem in problems.items()
    }

    def observe(flow: GradientFlow) -> Mapping[str, Callable[[PyTree], Array]]:
        return next(observables[name] for name, problem in problems.items() if problem is flow.problem)

    return observe


def load_data(
    name: str = "digits",
    *,
    path: str | None = None,
    samples: int | None = None,
    classes: tuple[int, int] = (0, 1),
    quick: bool = False,
) -> Dataset:
    """A data set by name as `small_init` takes it: two classes distinguished by signs, centred, of norm one."""
    samples = 120 if quick and samples is None else samples
    return load_some(name, path=path, samples=samples, classes=classes, centre=True, unit_norm=True, labels="pm1")


def _gap(risk: np.ndarray, reference: np.ndarray) -> float:
    """Largest distance between two loss curves, over the initial loss."""
    return float(np.max(np.abs(risk - reference)) / reference[0])


def _against_descent(build: Build, ds: xr.Dataset, observe: Observe, rtol: float, progress: bool) -> xr.Dataset:
    """Error and cost of the flow, and the steps of gradient descent for the same error, per loss and scale."""
    width, seed = int(ds.width.values[ds.sizes["width"] // 2]), int(ds.seed.values[0])
    scales, ts = ds.scale.values, ds.time.values
    axes = {"loss": ds.loss.values, "width": [width], "scale": scales, "seed": [seed]}
    options = {"solver": Tsit5(), "rtol": rtol / 30, "max_steps": 200_000}
    exact = sweep(build, axes, ts, observe=observe, progress=progress, **options)
    dims, shape = ("loss", "scale"), (ds.sizes["loss"], scales.size)
    error, cost, steps = np.full(shape, np.nan), np.zeros(shape, np.int64), np.full(shape, np.nan)
    cells = list(np.ndindex(shape))
    with Bar("gradient descent", len(cells), unit="cell", show=progress) as bar:
        for i, j in cells:
            ours = ds.sel(width=width, seed=seed).isel(loss=i, scale=j)
            reference = exact.risk.values[i, 0, j, 0]
            error[i, j], cost[i, j] = _gap(ours.risk.values, reference), int(ours.gradient_evaluations)
            flow, params = build(str(ds.loss.values[i]), width, float(scales[j]), seed)
            gaps = []
            for every in (8, 16):
                rule = GradientDescent(flow.problem, (ts[1] - ts[0]) / every)
                ks = every * np.arange(ts.size)
                run = iterate_to(rule, params, ks, observe={"risk": Loss(flow.problem)}, save_params=False, throw=False)
                gaps.append(_gap(np.asarray(run.observed["risk"]), reference))
            steps[i, j] = extrapolate_steps(16 * (ts.size - 1), gaps[1], np.log2(gaps[0] / gaps[1]), float(error[i, j]))
            bar.advance()
    coordinates = {name: ds[name] for name in dims}
    about = {"width": width, "seed": seed}
    return xr.Dataset(
        {
            "flow_error": (dims, error, {"long_name": "error of the loss curve over the initial loss", **about}),
            "flow_gradient_evaluations": (dims, cost, {"long_name": "gradients evaluated by the flow", **about}),
            "descent_steps": (dims, steps, {"long_name": "gradient-descent steps for that error", **about}),
        },
        coordinates,
    )
