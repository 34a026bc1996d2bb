"""Which flow is an optimiser at the edge of stability? Rules beside all their flows."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from gradflow import _checks
from gradflow.data import Dataset
from gradflow.data._load import load_some
from gradflow.flows._momentum_flow import check_momentum
from gradflow.models import MLP
from gradflow.problems import EmpiricalRisk, losses
from gradflow.studies._edge_flows import FLOWS, RULES, WARM_UP
from gradflow.studies._edge_record import blank, collected, note_flow, note_rule
from gradflow.studies._edge_runs import Setting, learning_rate, run_rule

ACTIVATIONS = {"tanh": jnp.tanh, "gelu": jax.nn.gelu, "relu": jax.nn.relu}
INIT_SCALE = 0.5
"""Scale of the initial weights, at which the sharpness starts well below what it grows to."""
ALL = tuple(dict.fromkeys(flow for flows in FLOWS.values() for flow in flows))

QUESTION = "Which flow is my optimiser, at the step sizes people use?"

QUICK: dict[str, Any] = {
    "rules": ("gradient_descent",),
    "flows": ("gradient flow", "descent-ascent 2", "central"),
    "width": 6,
    "shares": (0.7,),
    "seeds": (0,),
    "steps": 80,
    "saves": 20,
}
"""Arguments of `edge` that take about 20 seconds, on 30 samples."""


def edge(
    dataset: Any,
    *,
    activation: str = "tanh",
    width: int = 16,
    rules: Sequence[str] = tuple(RULES),
    flows: Sequence[str] = ALL,
    shares: Sequence[float] = (0.6, 0.8),
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 400,
    saves: int = 50,
    momentum: float = 0.5,
    rtol: float = 1e-3,
    store: Any = None,
    resume: bool = True,
    progress: bool = True,
) -> xr.Dataset:
    """Rules at the step sizes people use, beside every flow that is known for them.

    Networks with two hidden layers. With the learning rates chosen here the sharpness rises to the stability threshold
    of the rule, `2 / learning_rate` for gradient descent, and stays there: the edge of stability. A flow is compared
    with the midpoints `(w_{k-1} + 2 w_k + w_{k+1}) / 4`, which do not alternate, and predicts the mean loss, averaged
    alike, if it knows the oscillation; otherwise its own loss stands for it.

    **Arguments**

    - `dataset`: inputs `x (n, d)`, targets `y (n, k)`, as `gradflow.data.digits(labels="onehot", centre=True)`.
    - `activation`: `"tanh"`, `"gelu"` or `"relu"`. `width`: of both layers. `seeds`: of the networks.
    - `rules`: among `"gradient_descent"`, `"heavy_ball"`, `"nesterov"`, `"scalar_rmsprop"`, `"rmsprop"`. `flows`: those
      to be compared, by name, wherever a rule has them.
    - `shares`: the threshold over the largest sharpness that gradient flow reaches in the time of all `steps`, which
      gives a learning rate, the median over seeds. The sharpness of the RMSProp rules, that of `D^-1/2 H D^-1/2`, grows
      without bound along their flow: for them it is the sharpness after 20 steps over the threshold, at the most.
    - `saves`: steps at which flows are compared. `momentum`: of heavy ball and Nesterov's method. `rtol`: of the flows.
    - `store`: folder of the runs of the flows, one sweep for each. `resume`, `progress`: as for `sweep`.

    **Returns** an `xarray.Dataset`:

    - over `(rule, share)`: `learning_rate`, `threshold`; over `(rule, share, seed)`: `travelled`, the distance of the
      last midpoint from the start, `late_loss`, the mean over the second half; over `(rule, share, seed, save)`: `loss`
      and the two largest eigenvalues at the midpoints, `rule_eigenvalue`;
    - over `(case, share, seed, save)`, with coordinates `of_rule(case)` and `flow(case)`: `distance` in units of the
      parameters, `predicted_loss`, `eigenvalue`;
    - over `(case, share, seed)`: `mean_distance`, as far as a run came, and `last_distance` over `travelled`;
      `loss_error`, of the predicted mean loss over the second half, relative; `sharpness_error`, alike; `gradients` and
      `products` with the Hessian, per step of the rule; `status`; `delay`, in steps, of the central flow; `departure`,
      the first saved step at which the distance is a twentieth of `travelled`, NaN where it never is; `valid_until`,
      the step at which the flow stops being valid, and the `reason`, see the attributes. A flow that refuses to start
      has NaN elsewhere.

    **Raises** `ValueError` for bad input.

    Source: J. Cohen et al. (2021), arXiv 2103.00065, for the edge of stability; the flows name theirs.

    >>> import gradflow as gf
    >>> data = gf.data.digits(n=10, centre=True, labels="onehot")
    >>> few = {"rules": ("scalar_rmsprop",), "width": 2, "shares": (0.7,), "seeds": (0,), "steps": 24, "saves": 4}
    >>> ds = gf.studies.edge(data, **few, progress=False)
    >>> ds.flow.values.tolist(), ds.distance.shape
    (['central'], (1, 1, 1, 4))
    """
    several = {"rules": tuple(rules), "shares": tuple(shares), "seeds": tuple(seeds), "flows": tuple(flows)}
    setting = _setting(dataset, activation, (width, steps, saves), several, momentum, rtol)
    cases = [(rule, flow) for rule in rules for flow in FLOWS[rule] if flow in flows]
    record = blank(setting, several, len(cases))

    from tqdm import tqdm

    with tqdm(total=(len(rules) + len(cases)) * len(shares), unit="run", disable=not progress) as bar:
        for i, name in enumerate(rules):
            make = _rules_of(name, setting, momentum)
            for j, share in enumerate(shares):
                rate = learning_rate(make, setting.models, share, steps)
                runs = run_rule(make(rate), setting.models, setting.ks)
                note_rule(record, (i, j), setting, runs)
                bar.update()
                for case in (number for number, (of_rule, _) in enumerate(cases) if of_rule == name):
                    flow = cases[case][1]
                    part = None if store is None else pathlib.Path(store) / f"{name}-{flow.replace(' ', '-')}-{j}.zarr"
                    note_flow(record, ((i, j), (case, j)), setting, runs, FLOWS[name][flow], (part, resume))
                    bar.update()
    return collected(record, setting, several, cases, str(getattr(dataset, "name", "unnamed")))


def _rules_of(name: str, setting: Setting, momentum: float) -> Callable[[Any], Any]:
    return lambda rate: RULES[name](setting.problem, rate, momentum)


def _setting(
    dataset: Any,
    activation: str,
    size: tuple[int, int, int],
    several: dict[str, tuple[Any, ...]],
    momentum: float,
    rtol: float,
) -> Setting:
    """The problem and the networks; raises `ValueError` for bad input."""
    width, steps, saves = size
    x, y = dataset
    if np.ndim(y) != 2:
        raise _checks.fail("dataset", "have targets of shape (n, k)", f"of shape {np.shape(y)}", 'Use labels="onehot".')
    _checks.check_choice("activation", activation, ACTIVATIONS)
    for name, values in several.items():
        if not values or len(set(values)) < len(values):
            raise _checks.fail(name, "be distinct values, at least one", repr(values))
    for name in several["flows"]:
        _checks.check_choice("flows", name, ALL)
    for name in several["rules"]:
        _checks.check_choice("rules", name, RULES)
        if not set(FLOWS[name]) & set(several["flows"]):
            raise _checks.fail("flows", f"name one of {name}, which has {list(FLOWS[name])}", repr(several["flows"]))
    _checks.check_positive("shares", np.asarray(several["shares"], float))
    if max(several["shares"]) >= 1:
        advice = "Otherwise no run comes to the edge."
        raise _checks.fail("shares", "lie below 1", f"{max(several['shares']):g}", advice)
    _checks.check_count("width", width)
    _checks.check_count("saves", saves, least=4)
    _checks.check_count("steps", steps, least=max(saves, WARM_UP + 4))
    _checks.check_positive("rtol", rtol)
    check_momentum(momentum)
    ks = np.unique(np.round(np.linspace(0, steps, saves + 1)[1:]).astype(int))
    options: dict[str, Any] = {"depth": 2, "activation": ACTIVATIONS[activation], "init_scale": INIT_SCALE}
    models = [MLP(x.shape[1], width, y.shape[1], **options, key=jax.random.key(seed)) for seed in several["seeds"]]
    about = {"activation": activation, "width": width, "steps": steps, "momentum": momentum, "samples": len(y)}
    return Setting(EmpiricalRisk(x, y, losses.square), models, ks, rtol, about)


def load_data(
    name: str = "digits", *, path: str | None = None, samples: int | None = None, quick: bool = False
) -> Dataset:
    """A data set by name as `edge` takes it: one output for each class, inputs centred."""
    samples = (30 if quick else 150) if samples is None else samples
    return load_some(name, path=path, samples=samples, centre=True, labels="onehot")
