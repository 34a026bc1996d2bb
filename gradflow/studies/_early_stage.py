"""Early training of mildly wide ReLU networks: how far the loss falls within `1/eta` steps, and who is alive."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, Int, PyTree

from gradflow import observables, theory
from gradflow._checks import check_choice, check_count, check_positive, fail
from gradflow._solution import Status
from gradflow.data import Dataset, Options, correlated
from gradflow.data._load import load_some
from gradflow.flows import GradientFlow
from gradflow.models import Smoothed, TwoLayer, mildly_parametrised
from gradflow.problems import EmpiricalRisk, losses
from gradflow.rules import SGD, GradientDescent
from gradflow.runs._iterate import iterate, iterate_to
from gradflow.runs._solve import solve
from gradflow.solvers import RKC2, Tsit5

QUESTION = "How far does the loss fall in 1/eta steps, which neurons die, and what is left of the loss late?"
"""What the study asks; the heading of its report."""

PerSample = Callable[[Array, Array], Array]
"""The loss of one sample, from prediction and target."""

LOSSES: dict[str, PerSample] = {
    "exponential": losses.exponential,
    "logistic": losses.logistic,
    "hinge": losses.hinge,
    "square": losses.square,
    "cross-entropy": losses.cross_entropy,
}
LATE = ("exponential", "logistic", "cross-entropy")
"""Exponential-type losses, whose late phase is followed."""
PARTS = ("false-dead", "false-living", "true-dead", "true-living")
NEAR = 0.1
"""A drop counts as that of a wide network if it is within a tenth of it."""


Variable = tuple[str | tuple[str, ...], np.ndarray]
"""Dimensions and values of a variable of the data set."""


def early_stage(
    dataset: Dataset,
    *,
    widths: Sequence[int] = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    rates: Sequence[float] = (0.1, 0.03, 0.01, 0.003, 0.001),
    batches: Sequence[int] = (1, 2, 8),
    losses: Sequence[str] | None = None,
    kappa: float = 0.1,
    runs: int = 8,
    horizon: float = 1e8,
    saves: int = 61,
    smoothing: float = 0.01,
    max_steps: int = 20_000,
    seed: int = 0,
) -> xr.Dataset:
    """Early training of ReLU networks: loss drop, living neurons, late phase.

    Two layers, from a start with large output weights (`gradflow.models.mildly_parametrised`).

    Four questions. How far does the loss fall in the first `1/eta` steps (one unit of flow time) of descent, over
    widths at the middle rate and over rates at the middle width, and of SGD, over batches at the middle width, in the
    mean over `runs` starts? Does the partition of neurons into true or false and living or dead keep the order that
    theory gives it, along descent, SGD and flow, on these data and on the same inputs with random labels? How does
    it evolve? And what becomes of `t L(t)`, and of the direction, up to the time `horizon`?

    **Arguments**

    - `dataset`: inputs `x (n, d)`; targets of signs, class indices, or one-hot rows.
    - `widths`, `rates` (decreasing), `batches`, `losses`: what to compare; by default all losses that suit the targets.
    - `kappa`: size of the start. `runs`: number of starts. `horizon`, `saves`: of the flow, on a logarithmic clock;
      `smoothing`, `max_steps`: its kinks are rounded, and it may end early, as `late_status` tells.

    Only what lies in the span of the inputs matters, and is computed: no method here moves the rest of an input weight.

    **Returns** a data set with `drop_width (loss, width)`, `drop_rate (loss, rate)`, `drop_batch (loss, batch)`,
    with their standard deviations over starts `..._spread`; `width_needed (loss)`, the least width from which on
    the drop is within a tenth of that of the widest; `uncovered (loss, width)`, the number of samples on which no
    neuron of their own class lives after these steps (none can be fitted later while that lasts);
    `violations (data, path)` and `events`; `partition (late_time, part)`, shares of all pairs of neuron and sample;
    over `(late_loss, late_time)`: `risk`, `margin`, normalised, `residual`, `uncovered_late`, and `norm` of the
    gradient with its `bound` from living neurons.

    **Raises** `ValueError` for bad input.

    Source: M. Wang and C. Ma (2022), arXiv 2206.02139.

    >>> import gradflow as gf
    >>> data = gf.data.correlated(6, 3)
    >>> few = {"widths": (4, 8), "rates": (0.1, 0.05), "batches": (2,), "losses": ("square",), "runs": 2}
    >>> ds = gf.studies.early_stage(data, **few, horizon=10.0, saves=5)
    >>> int(ds.violations.sel(data="given").sum())
    0
    >>> print(gf.tables.early_stage(ds).splitlines()[0])
    loss drop within 1/eta steps, at width 8 and eta 0.05
    >>> len(gf.plot.early_stage(ds).axes)
    9
    """
    y, size = _targets(np.asarray(dataset.x, float), dataset.y), np.shape(dataset.x)[1]
    x = _within_span(np.asarray(dataset.x, float))
    names = _losses(losses, y, y.ndim == 1)
    _check_sizes({"widths": widths, "rates": rates, "batches": batches})
    check_count("runs", runs)
    check_count("saves", saves, least=2)
    check_positive("horizon", horizon)
    widths, rates = sorted(widths), sorted(rates, reverse=True)
    middle, rate = widths[len(widths) // 2], rates[len(rates) // 2]
    keys = jax.random.split(jax.random.key(seed), runs)
    outputs = None if y.ndim == 1 else y.shape[1]
    # The part within the span of weights drawn in all dimensions.
    within = kappa * (x.shape[1] / size) ** 0.5

    def starts(width: int) -> TwoLayer:
        return eqx.filter_vmap(lambda key: mildly_parametrised(x.shape[1], width, outputs, kappa=within, key=key))(keys)

    # One program for all losses.
    chosen = tuple(LOSSES[name] for name in names)
    problems = {name: EmpiricalRisk(x, y, _Chosen(chosen, jnp.asarray(i))) for i, name in enumerate(names)}
    variables = _all_drops(starts, list(problems.values()), widths, rates, batches, keys)
    model = _first(starts(middle))
    plain = problems[names[0]]
    control = EmpiricalRisk(x, jax.random.permutation(jax.random.key(seed + 1), y), plain.loss)
    counted = [_events(problem, model, rate, seed) for problem in (plain, control)]
    for i, name in enumerate(("violations", "events")):
        variables[name] = (("data", "path"), np.array([[pair[i] for pair in row] for row in counted]))
    ts = np.concatenate([[0.0], np.geomspace(min(0.01, horizon / 2), horizon, saves - 1)])
    late = [name for name in names if name in LATE] or [names[0]]
    variables |= _late_phase([_late(problems[name], model, ts, smoothing, max_steps) for name in late])
    coords = {"loss": list(names), "width": widths, "rate": rates, "batch": list(batches), "late_loss": late}
    coords |= {"late_time": ts, "part": list(PARTS), "data": ["given", "random labels"]}
    coords |= {"path": ["descent", "SGD", "flow"], "kkt": ["stationarity", "slackness"]}
    attrs: dict[str, object] = {"study": "early-stage", "data": repr(dataset), "kappa": kappa, "middle_width": middle}
    attrs |= {"middle_rate": rate, "runs": runs, "seed": seed, "smoothing": smoothing}
    attrs |= {"condition": _condition(x, y), "control_condition": _condition(x, control.y)}
    return xr.Dataset(variables, coords=coords, attrs=attrs)


def _check_sizes(sizes: Mapping[str, Sequence[int] | Sequence[float]]) -> None:
    for name, values in sizes.items():
        if not len(values):
            raise fail(name, "hold at least one value", "empty")
    for name in ("widths", "batches"):
        for value in sizes[name]:
            check_count(name, value)


def quick(two_classes: bool = True) -> dict[str, object]:
    """Arguments of `early_stage` that take about 20 seconds, on 40 samples."""
    few: dict[str, object] = {"widths": (8, 64), "rates": (0.1, 0.01), "batches": (2,), "saves": 41}
    return few | ({"losses": ("exponential", "square")} if two_classes else {})


def load_data(
    name: str = "correlated",
    *,
    path: str | None = None,
    samples: int | None = None,
    classes: tuple[int, int] | None = (0, 1),
    seed: int = 0,
    quick: bool = False,
) -> Dataset:
    """Data as `early_stage` takes them: `correlated`, or a data set by name, centred, of norm one.

    Two classes are distinguished by signs; with `None`, all classes by their index.
    """
    if name == "correlated":
        return correlated(20 if samples is None else samples, 8, seed=seed)
    options: Options = {"centre": True, "unit_norm": True, "labels": "index"}
    if classes is not None:
        options |= {"classes": classes, "labels": "pm1"}
    samples = (40 if quick else 100) if samples is None else samples
    return load_some(name, path=path, samples=samples, **options)


def _targets(x: np.ndarray, y: np.ndarray) -> jax.Array:
    """Signs or one-hot rows, which suit every loss; raises `ValueError` for data that have no partition."""
    label_kind = observables.NeuronPartition(x, y).kind
    return jnp.asarray(y if label_kind != "indices" else np.eye(int(np.max(y)) + 1)[np.asarray(y)], float)


def _within_span(x: Float[np.ndarray, "n d"]) -> Float[Array, "n rank"]:
    """The inputs in an orthonormal basis of their span; as they are if that is the whole space."""
    rank = int(np.linalg.matrix_rank(x))
    return jnp.asarray(x if rank == x.shape[1] else x @ np.linalg.svd(x, full_matrices=False)[2][:rank].T)


def _first(models: TwoLayer) -> TwoLayer:
    """The first of a batch."""
    return jax.tree_util.tree_map(lambda leaf: leaf[0] if eqx.is_array(leaf) else leaf, models)


def _losses(wanted: Sequence[str] | None, y: jax.Array, signs: bool) -> tuple[str, ...]:
    suiting = ("exponential", "logistic", "square", "hinge") if signs else ("cross-entropy", "square")
    chosen = suiting if wanted is None else tuple(wanted)
    for name in chosen:
        check_choice("losses", name, suiting, f"Others do not suit targets of shape {y.shape}.")
    if not chosen:
        raise fail("losses", "name at least one loss", "empty")
    return chosen


class _Uncovered(eqx.Module):
    """How many samples no neuron of their own class lives on."""

    partition: observables.NeuronPartition

    def __call__(self, params: TwoLayer) -> Int[Array, ""]:
        return jnp.sum(~jnp.any(self.partition(params) == PARTS.index("true-living"), axis=1))


class _Chosen(eqx.Module):
    """One of several losses, chosen at run time."""

    losses: tuple[PerSample, ...] = eqx.field(static=True)
    index: Int[Array, ""] = eqx.field(converter=jnp.asarray)

    def __call__(self, prediction: Float[Array, "*out"], target: Float[Array, "*out"]) -> Float[Array, ""]:
        return jax.lax.switch(self.index, self.losses, prediction, target)


@eqx.filter_jit
def _drops(rule: GradientDescent | SGD, models: TwoLayer, keys: jax.Array) -> Float[Array, "2 runs"]:
    """How far the loss falls in `1/eta` steps, from each of the models, and how many samples no neuron of their own
    class then lives on; SGD with each of the keys."""
    ks = jnp.stack([jnp.zeros(()), jnp.maximum(1, jnp.round(1 / rule.learning_rate))]).astype(int)
    problem = rule.problem
    assert isinstance(problem, EmpiricalRisk)
    uncovered = _Uncovered(observables.NeuronPartition(problem.x, problem.y))

    def one(model: TwoLayer, key: jax.Array) -> Float[Array, "2"]:
        seeded = eqx.tree_at(lambda r: r.key, rule, key) if isinstance(rule, SGD) else rule
        sol = iterate_to(seeded, model, ks, save_params=False, throw=False)
        return jnp.stack([problem(model) - problem(sol.final), uncovered(sol.final)])

    return eqx.filter_vmap(one, out_axes=1)(models, keys)


def _all_drops(
    starts: Callable[[int], TwoLayer],
    problems: list[EmpiricalRisk],
    widths: Sequence[int],
    rates: Sequence[float],
    batches: Sequence[int],
    keys: jax.Array,
) -> dict[str, Variable]:
    """Variables of the drops over widths, rates and batches; each varies at the middle of the others."""
    rate, many, samples = rates[len(rates) // 2], starts(widths[len(widths) // 2]), len(problems[0].x)
    rows: dict[str, list[list[Float[Array, "2 runs"]]]] = {"width": [], "rate": [], "batch": []}
    for width in widths:
        models = starts(width)
        rows["width"].append([_drops(GradientDescent(problem, rate), models, keys) for problem in problems])
    for eta in rates:
        rows["rate"].append([_drops(GradientDescent(problem, eta), many, keys) for problem in problems])
    for batch in batches:
        noisy = [SGD(problem, rate, batch_size=min(batch, samples), key=keys[0]) for problem in problems]
        rows["batch"].append([_drops(rule, many, keys) for rule in noisy])
    variables: dict[str, Variable] = {}
    for dim, drops in rows.items():
        # Over `dim`, loss, the two things measured, and starts.
        drop = np.array(drops).swapaxes(0, 1)
        variables[f"drop_{dim}"] = (("loss", dim), drop[:, :, 0].mean(axis=2))
        variables[f"drop_{dim}_spread"] = (("loss", dim), drop[:, :, 0].std(axis=2))
        if dim == "width":
            variables["uncovered"] = (("loss", dim), drop[:, :, 1].mean(axis=2))
    variables["width_needed"] = ("loss", np.array([_needed(widths, row) for row in variables["drop_width"][1]]))
    return variables


def _needed(widths: Sequence[int], drops: Float[np.ndarray, " widths"]) -> float:
    """The least width from which on the drop is within a tenth of that of the widest."""
    near = np.abs(drops / drops[-1] - 1) <= NEAR
    return float(widths[len(widths) - int(np.argmin(near[::-1]))]) if not near.all() else float(widths[0])


def _events(problem: EmpiricalRisk, model: TwoLayer, rate: float, seed: int) -> list[tuple[int, int]]:
    """Violations and all events along descent, SGD and flow, up to `t = 3`."""
    observe = {"codes": observables.NeuronPartition(problem.x, problem.y)}
    steps = max(1, round(3 / rate))
    noisy = SGD(problem, rate, batch_size=min(2, len(problem.x)), key=jax.random.key(seed + 3))
    iterated = functools.partial(iterate, observe=observe, save_every=1, save_params=False, throw=False)
    sols = [iterated(rule, model, steps) for rule in (GradientDescent(problem, rate), noisy)]
    solved = functools.partial(solve, observe=observe, rtol=1e-4, solver=Tsit5(), save_params=False, throw=False)
    sols.append(solved(GradientFlow(problem), model, np.linspace(0, 3, 101), max_steps=5000))
    counts = []
    for sol in sols:
        reached = sol.reached
        events = observables.switches(np.asarray(sol.ts)[reached], np.asarray(sol.observed["codes"])[reached])
        counts.append((events.violations, len(events.time)))
    return counts


@eqx.filter_jit
def _along(observe: dict[str, Callable[[PyTree], Array]], history: PyTree) -> dict[str, Array]:
    """Observables along a history of parameters; compiled once, where a run would do so at its start and within."""
    moving, static = eqx.partition(history, eqx.is_inexact_array)
    return jax.lax.map(lambda m: {name: fn(eqx.combine(m, static)) for name, fn in observe.items()}, moving)


class _Late(NamedTuple):
    """The late phase of one loss: what was observed, how the run ended, and its gradients."""

    values: dict[str, np.ndarray]
    status: int
    gradients: int


def _late(problem: EmpiricalRisk, model: TwoLayer, ts: np.ndarray, smoothing: float, max_steps: int) -> _Late:
    x, y = problem.x, problem.y
    smooth = EmpiricalRisk(x, y, problem.loss, predict=Smoothed(smoothing))
    observe: dict[str, Callable[[PyTree], Array]] = {"risk": smooth, "partition": observables.PartitionCounts(x, y)}
    observe |= {"uncovered_late": _Uncovered(observables.NeuronPartition(x, y))}
    observe |= {"margin": observables.NormalisedMargin(smooth)}
    observe |= {"residual": observables.MaxMarginResidual(smooth, unseparated=jnp.inf)}
    if y.ndim == 1:
        observe |= {"norm": observables.GradientNorm(problem), "bound": observables.GradientBound(problem)}
    # The curvature falls like 1/t, so that steps grow in proportion to time; but not where neurons slide.
    sol = solve(GradientFlow(smooth), model, ts, solver=RKC2(), max_steps=max_steps, throw=False)
    late = {name: np.full(len(ts), np.nan) for name in ("norm", "bound")}
    for name, values in _along(observe, sol.params).items():
        late[name] = np.where(sol.reached, np.asarray(values, float).T, np.nan).T
    late["residual"][np.isinf(late["residual"])] = np.nan  # where samples are not separated
    late["partition"] /= x.shape[0] * model.weight.shape[0]
    return _Late(late, int(Status.of(sol.status)), int(sol.stats["gradient_evaluations"]))


def _late_phase(followed: list[_Late]) -> dict[str, Variable]:
    """Variables of the late phase, from one run for each loss; the partition is that of the first."""
    variables: dict[str, Variable] = {}
    for name in ("risk", "margin", "residual", "uncovered_late", "norm", "bound"):
        dims = ("late_loss", "late_time", *(("kkt",) if name == "residual" else ()))
        variables[name] = (dims, np.stack([run.values[name] for run in followed]))
    variables["late_status"] = ("late_loss", np.array([run.status for run in followed]))
    variables["late_gradient_evaluations"] = ("late_loss", np.array([run.gradients for run in followed]))
    variables["partition"] = (("late_time", "part"), followed[0].values["partition"])
    return variables


def _condition(x: jax.Array, y: jax.Array) -> str:
    """In words, whether the data keep the condition for monotone sets."""
    if y.ndim > 1:
        return "for two classes only"
    condition = theory.partition_condition(x, y)
    return "holds" if condition.holds else f"violated by {condition.violations} of {condition.pairs} pairs"
