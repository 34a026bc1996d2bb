"""The phase diagram as a map: the full order-parameter system over learning rate and noise."""

import os
from collections.abc import Sequence

import jax
import numpy as np
import xarray as xr

from gradflow import _checks
from gradflow.flows import OrderParameterFlow
from gradflow.problems import OrderParameters, TeacherStudent
from gradflow.sweeps import sweep

LEARNT = 0.5
"""A plateau ends when the risk has fallen to this fraction of its value there."""


def phase_map(
    *,
    rates: Sequence[float] = tuple(np.geomspace(0.05, 4.0, 12).tolist()),
    noises: Sequence[float] = tuple(np.geomspace(1e-6, 1e-1, 11).tolist()),
    units: int = 4,
    width: int = 8,
    dim: int = 1000,
    horizon: float = 1e4,
    saves: int = 121,
    informed: bool = False,
    rtol: float = 1e-4,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> xr.Dataset:
    """Risk of one-pass SGD over learning rate and label noise.

    By the full order-parameter system, from one start.

    **Arguments**

    - `rates`: values of `gamma / p`; `noises`: variances of the label noise. `units`, `width`: sizes of an orthogonal
      erf teacher and of the student. `horizon`: time `t = steps * rate / dim` to which all run.
    - `dim`, `informed`, `seed`: the start is that of weights drawn for so many inputs, in the space of the teacher or
      anywhere. `saves`: number of save times, equally spaced in the logarithm from `t = 1`.
    - `rtol`, `store`, `resume`, `progress`: as for `sweep`.

    On a CPU points are solved one at a time: they need from 500 to 900 evaluations each, and a batch takes as many
    steps as its most expensive member. A thousand points of the default sizes take 75 s on one core; at `rtol=1e-4` the
    risk is good to 2e-3 at the end, and to 7e-3 in the descents (`python benchmarks/order_parameters.py`).

    **Returns** an `xarray.Dataset` over `(rate, noise, time)`: `risk`; over `(rate, noise)`: `final_risk`;
    `plateau_risk`, where the risk falls most slowly before the student specialises; `plateau_length`, from where the
    risk first comes within a tenth of that to where it has fallen to half of it; `learning_time`, when it has. NaN
    where there is no such plateau, or the run ends before it does.

    **Raises** `ValueError` for bad input.

    >>> import gradflow as gf
    >>> ds = gf.studies.phase_map(rates=[0.5, 1.0], noises=[0.0], units=1, width=2, horizon=50.0, progress=False)
    >>> dict(ds.final_risk.sizes)
    {'rate': 2, 'noise': 1}
    """
    _checks.check_positive("rates", np.asarray(rates, float), "They are learning rates over the width.")
    ts = save_times(horizon, saves)
    problem = TeacherStudent.orthogonal(dim, units)
    draw = problem.informed if informed else problem.uninformed
    start = problem.order_parameters(draw(width, jax.random.key(seed)))

    def build(rate: float, noise: float) -> tuple[OrderParameterFlow, OrderParameters]:
        flow = OrderParameterFlow(problem.P, gamma_over_p=float(rate), noise=float(noise))
        return flow, start

    ds = sweep(
        build,
        {"rate": list(rates), "noise": list(noises)},
        ts,
        observe=lambda flow: {"risk": flow.risk},
        rtol=rtol,
        batch=1 if jax.default_backend() == "cpu" else None,
        store=store,
        resume=resume,
        progress=progress,
    )
    return ds.merge(plateaus(ds)).assign_attrs(units=units, width=width, dim=dim, informed=int(informed))


def save_times(horizon: float, saves: int) -> np.ndarray:
    """Times from 1 to `horizon`, equally spaced in the logarithm."""
    _checks.check_positive("horizon", horizon)
    _checks.check_count("saves", saves, least=10)
    if horizon <= 1:
        raise _checks.fail("horizon", "be above 1, the first save time", f"{horizon:g}")
    return np.geomspace(1, horizon, saves)


def plateaus(ds: xr.Dataset) -> xr.Dataset:
    """Plateaus of the variable `risk`, whose last dimension is `time`."""
    risk, ts = ds.risk.values, ds.time.values
    shape = risk.shape[:-1]
    columns = {name: np.full(shape, np.nan) for name in ("plateau_risk", "plateau_length", "learning_time")}
    for index in np.ndindex(shape):
        for name, value in zip(columns, find_plateau(ts, risk[index]), strict=True):
            columns[name][index] = value
    about = {
        "plateau_risk": "risk on the plateau before the student specialises",
        "plateau_length": "time spent on that plateau",
        "learning_time": "time at which the risk is half of that on the plateau",
    }
    dims = ds.risk.dims[:-1]
    variables = {name: (dims, value, {"long_name": about[name]}) for name, value in columns.items()}
    variables["final_risk"] = (dims, risk[..., -1], {"long_name": "risk at the end"})
    return xr.Dataset(variables, {name: ds[name] for name in dims})


def find_plateau(ts: np.ndarray, risk: np.ndarray) -> tuple[float, float, float]:
    """Height, length and end of the first plateau that the risk leaves again; NaN where there is none.

    A plateau is where the risk falls by less than its square root would over time, `-d ln R / d ln t < 1/2`, after and
    before a stretch in which it falls faster.
    """
    none = float("nan"), float("nan"), float("nan")
    if not np.all(np.isfinite(risk)) or np.any(risk <= 0):
        return none
    speed = -np.gradient(np.log(risk), np.log(ts))
    fast = speed > 0.5
    # After the first descent, which may be under way when the record starts.
    begin = int(np.argmax(fast)) if fast.any() else 0
    slow = np.flatnonzero(~fast[begin:])
    if not fast.any() or slow.size == 0:
        return none
    begin += int(slow[0])
    again = np.flatnonzero(fast[begin:])
    if again.size == 0:
        return none
    flat = begin + int(np.argmin(speed[begin : begin + int(again[0])]))
    height = float(risk[flat])
    low = np.flatnonzero(risk[flat:] <= LEARNT * height)
    if low.size == 0:
        return height, float("nan"), float("nan")
    end = flat + int(low[0])
    left = np.log(risk[end - 1] / risk[end])
    rate = np.log(risk[end - 1] / (LEARNT * height)) / left
    learnt = float(np.exp(np.log(ts[end - 1]) + rate * np.log(ts[end] / ts[end - 1])))
    start = float(ts[int(np.argmax(risk <= 1.1 * height))])
    return height, learnt - start, learnt
