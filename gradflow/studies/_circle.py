"""The illustration of the source: squared-ReLU neurons on the circle, gradient descent beside its flow."""

import jax
import numpy as np
import xarray as xr

from gradflow import _checks
from gradflow.data import Dataset, circle
from gradflow.data._dataset import InputsAndTargets
from gradflow.flows import NeuronPolarFlow
from gradflow.limits._alternating_flow import nearest_points
from gradflow.models import OneLayer
from gradflow.models._polar import neuron_rows, unit_rows
from gradflow.observables import Loss, NeuronAngles, ParameterNorm
from gradflow.problems import EmpiricalRisk, NeuralCorrelation, losses
from gradflow.rules import GradientDescent
from gradflow.runs._iterate import iterate
from gradflow.runs._solve import solve

QUESTION = "Does gradient descent from small weights follow its flow, and do neurons point to the KKT points?"
"""What the study asks; the heading of its report."""

SMALL = 1e-2
"""Norm of the weights up to which directions are those of the first phase."""

QUICK = {"steps": 20_000, "width": 8}
"""Arguments of `circle_illustration` that take about 20 seconds."""


def circle_illustration(
    dataset: InputsAndTargets,
    *,
    width: int = 20,
    scale: float = 1e-5,
    learning_rate: float = 5e-5,
    steps: int = 50_000,
    seed: int = 0,
    saves: int = 251,
    rtol: float = 1e-6,
) -> xr.Dataset:
    """Squared-ReLU neurons on the circle: gradient descent beside its flow.

    The settings are those of the source.

    `H(x; w) = sum_j max(0, w_j . x)^2`, 50 unit inputs, labels `5 max(0, x_1)^2 + 4 max(0, x_2)^2`, square loss summed
    over samples, learning rate 5e-5 for 50,000 iterations, Gaussian weights of standard deviation 1e-5. The norm stays
    tiny while the angles of the neurons converge to those of KKT points; then the loss falls. The width is not stated
    there.

    **Arguments**: `dataset`: inputs in the plane, such as `gradflow.data.circle()`. `width`, `scale`, `learning_rate`,
    `steps`, `seed`: of network and descent. `saves`: about as many rows, at least two. `rtol`: of the flow.

    **Returns** an `xarray.Dataset` over `(run, time)`: `risk`, `norm`, and by neuron `polar_angle`, with runs
    `"descent"` and `"flow"`; and `kkt_angle`, the angles of the KKT points of one neuron.

    **Raises** `ValueError` for inputs that do not lie in the plane, a width or `steps` below one, fewer than two rows,
    and a scale or learning rate that is not positive.

    Source: A. Kumar and J. Haupt (2024), arXiv 2402.09226, Figure 1.

    >>> import gradflow as gf
    >>> ds = gf.studies.circle_illustration(gf.data.circle(20), width=4, steps=2000, saves=21)
    >>> dict(ds.polar_angle.sizes)
    {'run': 2, 'time': 21, 'neuron': 4}
    >>> print(gf.tables.circle(ds).splitlines()[0])
    width 4, scale 1e-05, learning rate 5e-05
    >>> len(gf.plot.circle(ds).axes)
    3
    """
    x, y = (np.asarray(part) for part in dataset)
    if x.shape[1:] != (2,) or y.ndim != 1:
        raise _checks.fail("dataset", "have inputs in the plane and one target each", f"of shape {x.shape}, {y.shape}")
    _checks.check_count("steps", steps)
    _checks.check_count("saves", saves, least=2)
    problem = EmpiricalRisk(x, y, losses.square, reduction="sum")
    model = OneLayer(2, width, init_scale=scale, key=jax.random.key(seed))
    every = max(1, steps // (saves - 1))
    observe = {"risk": Loss(problem), "norm": ParameterNorm(), "polar_angle": NeuronAngles()}
    descent = iterate(GradientDescent(problem, learning_rate), model, steps, observe=observe, save_every=every)
    flow = solve(NeuronPolarFlow(problem), model, descent.ts, observe=observe, rtol=rtol)
    correlation = NeuralCorrelation(problem)
    ends, values = nearest_points(correlation, model, unit_rows(neuron_rows(model))[0])
    angles = np.unique(np.round(np.arctan2(ends[:, 1], ends[:, 0])[values > 0], 6))
    data = {
        name: (
            ("run", "time", *(["neuron"] if name == "polar_angle" else [])),
            np.stack([np.asarray(run.observed[name]) for run in (descent, flow)]),
        )
        for name in observe
    }
    about = {"study": "circle", "width": width, "scale": scale, "learning_rate": learning_rate}
    coordinates = {"run": ["descent", "flow"], "time": np.asarray(descent.ts), "kkt": np.arange(angles.size)}
    return xr.Dataset(data | {"kkt_angle": ("kkt", angles)}, coordinates, about)


def load_data(samples: int | None = None) -> Dataset:
    """The data of the source, or another number of them."""
    return circle(50 if samples is None else samples)
