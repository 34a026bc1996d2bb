"""The phase diagram in its own coordinates: the full order-parameter system over the exponents of width and rate."""

import os
from collections.abc import Sequence

import jax
import numpy as np
import xarray as xr

from gradflow import _checks
from gradflow.flows import OrderParameterFlow
from gradflow.problems import OrderParameters, TeacherStudent
from gradflow.studies._phase_map import plateaus, save_times
from gradflow.sweeps import sweep
from gradflow.theory import phase_region


def exponent_map(
    *,
    kappas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4),
    exponents: Sequence[float] = tuple(np.round(np.linspace(-0.45, 0.6, 22), 12).tolist()),
    dim: int = 1000,
    units: int = 2,
    least_width: int = 2,
    ratio: float = 1.0,
    noise: float = 1e-3,
    horizon: float = 1e4,
    saves: int = 121,
    informed: bool = False,
    rtol: float = 1e-4,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> xr.Dataset:
    """Risk of one-pass SGD over the exponents of width and learning rate.

    By the full system, for width `p = p0 d^kappa` and learning rate `gamma ~ d^-delta`, at one number of inputs.

    `gamma / p = ratio * d^-(kappa + delta)` as it is, no term dropped. The grid is one over `kappa` and
    `kappa + delta`, so that every point has an equation; in the plane of `kappa` and `delta` it is sheared.

    **Arguments**

    - `kappas`: exponents of the width, `p = round(least_width * dim^kappa)`; every width compiles once, and an
      evaluation costs `O(p^4)`: with `least_width=2, dim=1000`, one of `p = 32` (`kappa = 0.4`) takes 3 ms.
    - `exponents`: values of `kappa + delta`, all above -1/2. `dim`, `units`, `noise`: inputs, teacher units, and the
      variance of the label noise. Students of all widths start from the first units of one draw.
    - The others as for `phase_map`.

    **Returns** an `xarray.Dataset` over `(kappa, kappa_plus_delta, time)` with what `phase_map` returns, and `delta`,
    `width`, `gamma_over_p`, the `region` of theory, and `learning_samples`: the samples over `d` at the learning time.

    **Raises** `ValueError` for bad input, and for exponents in the red region, where SGD has no equation.

    >>> import gradflow as gf
    >>> few = {"units": 1, "horizon": 50.0, "saves": 21, "progress": False}
    >>> ds = gf.studies.exponent_map(kappas=[0.0], exponents=[-0.2, 0.3], **few)
    >>> ds.region.values.tolist()
    ['orange', 'green']
    """
    ts = save_times(horizon, saves)
    _checks.check_positive("ratio", ratio, "It is the learning rate over the width at kappa = delta = 0.")
    _checks.check_count("least_width", least_width)
    if not len(kappas) or not np.all(np.isfinite(np.asarray(kappas, float))) or np.min(np.asarray(kappas, float)) < 0:
        raise _checks.fail("kappas", "hold exponents that are not negative", f"{list(kappas)}")
    regions = [phase_region(float(exponent), 0.0) for exponent in exponents]
    names = [region.terms for region in regions]
    widths = {float(kappa): round(least_width * dim ** float(kappa)) for kappa in kappas}
    problem = TeacherStudent.orthogonal(dim, units, noise=noise)
    draw = problem.informed if informed else problem.uninformed
    drawn = problem.order_parameters(draw(max(widths.values()), jax.random.key(seed)))

    starts = {kappa: OrderParameters(drawn.Q[:p, :p], drawn.M[:p]) for kappa, p in widths.items()}

    def build(kappa: float, kappa_plus_delta: float) -> tuple[OrderParameterFlow, OrderParameters]:
        g = ratio * dim ** -float(kappa_plus_delta)
        return OrderParameterFlow(problem.P, gamma_over_p=g, noise=float(noise)), starts[float(kappa)]

    ds = sweep(
        build,
        {"kappa": list(widths), "kappa_plus_delta": [region.exponent for region in regions]},
        ts,
        observe=lambda flow: {"risk": flow.risk},
        rtol=rtol,
        store=store,
        resume=resume,
        progress=progress,
        batch=1 if jax.default_backend() == "cpu" else None,
    )
    ds = ds.merge(plateaus(ds))
    exponent = ds.kappa_plus_delta
    rates = ratio * float(dim) ** -exponent
    return ds.assign(
        delta=(exponent - ds.kappa).transpose("kappa", ...).assign_attrs(long_name="exponent of the learning rate"),
        width=("kappa", list(widths.values()), {"long_name": "student units"}),
        gamma_over_p=rates.assign_attrs(long_name="learning rate over width"),
        region=("kappa_plus_delta", names),
        learning_samples=(ds.learning_time / rates).assign_attrs(long_name="samples over d at the learning time"),
    ).assign_attrs(units=units, dim=dim, noise=float(noise), informed=int(informed))
