"""Phase diagram of one-pass SGD in high dimension: simulations, the full system, and what theory predicts."""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, Int, Key, PyTree

from gradflow import _checks
from gradflow.flows import OrderParameterFlow
from gradflow.problems import OrderParameters, TeacherStudent
from gradflow.rules import OnePassSGD
from gradflow.runs._iterate import iterate_to
from gradflow.runs._progress import Bar
from gradflow.runs._solve import solve
from gradflow.solvers import Tsit5
from gradflow.studies._exponent_map import exponent_map
from gradflow.studies._phase_map import phase_map, plateaus
from gradflow.sweeps._part import load_or_compute
from gradflow.theory import PhaseRegion, finite_dim_plateau, phase_region, plateau

QUESTION = "What does one-pass SGD learn in high dimension, and at which learning rates?"
"""What the study asks; the heading of its report."""

HORIZONS = {"green": 20.0, "blue": 100.0, "orange": 200.0}
"""Time to which each region is run beside SGD."""

PLATEAU_FACTOR = 100.0
"""How much longer informed starts run for their plateau."""

QUICK: dict[str, object] = {
    "units": 2,
    "width": 4,
    "seeds": 2,
    "dims": (50, 200),
    "starts": (50, 500),
    "rates": (0.1, 0.3, 1.0, 3.0),
    "noises": (1e-5, 1e-4, 1e-3),
    "saves": 21,
    "horizon": 1e3,
    "horizons": {"green": 5.0, "blue": 20.0, "orange": 20.0},
    "kappas": (0.1,),
    "sums": (-0.4, -0.2, 0.0, 0.2, 0.4),
}
"""Arguments of `phase_diagram` that take about 20 seconds."""


class _MapOptions(TypedDict):
    """What both maps take."""

    rtol: float
    progress: bool
    saves: int
    resume: bool


def phase_diagram(
    *,
    exponents: Sequence[float] = (0.25, 0.0, -0.25),
    dims: Sequence[int] = (100, 1000),
    seeds: int = 4,
    units: int = 4,
    width: int = 8,
    noise: float = 1e-3,
    horizons: dict[str, float] | None = None,
    starts: Sequence[int] = (100, 1_000, 10_000, 100_000),
    rates: Sequence[float] = tuple(np.geomspace(0.01, 4.0, 14).tolist()),
    noises: Sequence[float] = tuple(np.geomspace(1e-6, 1e-1, 11).tolist()),
    horizon: float = 1e4,
    rtol: float = 1e-4,
    saves: int = 121,
    kappas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4),
    sums: Sequence[float] = tuple(np.round(np.linspace(-0.45, 0.6, 15), 12).tolist()),
    store: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> xr.Dataset:
    """One-pass SGD beside its equations in every region, and maps of them.

    An erf student of `width` units learns an orthogonal teacher of `units`, from an informed start
    (Veiga et al. 2022, arXiv 2202.00293).

    **Arguments**

    - `exponents`: values of `kappa + delta`, each in a region that has an equation; `gamma / p = d^-exponent`.
    - `dims`, `seeds`: numbers of inputs, and of runs of SGD at each. `horizons`: region -> time to which these go.
    - `noise`: variance of the label noise there. `starts`: numbers of inputs of uninformed starts.
    - `rates`, `noises`, `horizon`: the map, from an uninformed start at `d = 1000`, as for `phase_map`.
    - `kappas`, `sums`: the map over the exponents, as for `exponent_map`: two teacher units, `d = 1000`, up to
      `horizon`.
    - `rtol`: tolerance. `saves`: number of save times of the maps and of the starts.
    - `store`: folder in which every part is kept as soon as it is there. With `resume`, parts already there are not
      computed again; parts of other arguments are refused.

    **Returns** an `xarray.Dataset`: over `(exponent, dim, seed, point)` the `risk_sgd`, over `(exponent, dim, point)`
    `risk_full` of the full system and `risk_truncated` of the terms that survive at infinite `d`, at times `t`;
    over `(start, time)` the risk `risk_start` with its plateau; over `(rate, noise, time)` the map of `phase_map`, in
    which a rate also stands for the dimension `rate^-2` of a green point at `kappa + delta = 1/2`; over
    `(rate, noise)` the `settled_risk` from an informed start, beside the `predicted_settled_risk`; and over
    `(kappa, kappa_plus_delta)` what `exponent_map` finds, with `_exponents` at the end of the names.

    **Raises** `ValueError` for exponents in the red region, for bad input, and for a store of another study.

    >>> import gradflow as gf
    >>> gf.studies.phase_diagram(exponents=[-0.7])
    Traceback (most recent call last):
    ...
    ValueError: Argument `kappa + delta` must be above -1/2, but is -0.7. No differential equation ...
    """
    regions = [phase_region(float(exponent), 0.0) for exponent in exponents]
    times = HORIZONS | ({} if horizons is None else horizons)
    # The red region has no terms, which is refused here.
    spans = [float(times[region.terms]) for region in regions]
    _checks.check_count("seeds", seeds, least=2)
    _checks.check_count("width", width)
    # What the problems below would refuse, before anything runs.
    TeacherStudent.orthogonal(min(map(int, [*dims, *starts])), units, noise=noise)
    parts = _Parts(store, resume)
    size = _Size(units, width, float(noise), seeds, rtol)
    against = _against_sgd(regions, dims, size, spans, parts, progress)

    ts = np.geomspace(1, horizon, saves)
    config: dict[str, object] = {"units": units, "width": width, "starts": list(starts), "noise": float(noise)}
    config |= {"rtol": rtol, "ts": ts.tolist()}
    begun = parts.get(
        "starts",
        config,
        lambda: _uninformed(starts, ts, units, width, noise, rtol),
        lambda: _begun(TeacherStudent.orthogonal(int(min(starts)), units, noise=noise), width, 1.0, False),
    )
    options = _MapOptions(rtol=rtol, progress=progress, saves=saves, resume=resume)
    mapped = functools.partial(phase_map, rates=rates, noises=noises, units=units, width=width, **options)
    computed = mapped(horizon=horizon, store=parts.path("map"))
    # Close to its plateau the risk falls like t^-2 only.
    settled = mapped(horizon=PLATEAU_FACTOR * horizon, informed=True, store=parts.path("settled")).final_risk
    scaled = exponent_map(
        kappas=kappas, exponents=sums, noise=noise, horizon=horizon, **options, store=parts.path("exponents")
    )
    scaled = scaled.rename({name: f"{name}_exponents" for name in scaled.data_vars})
    ds = computed.merge(begun).merge(against).merge(scaled)
    ds["settled_risk"] = settled.assign_attrs(long_name="risk at the end from an informed start")
    predicted = [[_predicted(float(rate), float(level)) for level in noises] for rate in rates]
    about = {"long_name": "predicted plateau, A g noise / (1 - 2 A g)"}
    ds["predicted_settled_risk"] = (("rate", "noise"), np.array(predicted), about)
    ds.attrs = {"study": "phase-diagram", "noise": float(noise), "units": units, "width": width, "rtol": float(rtol)}
    ds.attrs["exponents_dim"] = int(scaled.attrs["dim"])
    return ds


def _predicted(rate: float, noise: float) -> float:
    try:
        return plateau(rate, noise)
    except ValueError:
        return float("nan")


class _Parts(NamedTuple):
    """Where the parts of a study are kept: a folder, or nowhere."""

    folder: str | os.PathLike[str] | None
    resume: bool

    def path(self, name: str) -> pathlib.Path | None:
        return None if self.folder is None else pathlib.Path(self.folder) / f"{name}.zarr"

    def get(
        self,
        name: str,
        config: dict[str, object],
        compute: Callable[[], xr.Dataset],
        starts: Callable[[], dict[str, PyTree]],
    ) -> xr.Dataset:
        return load_or_compute(self.path(name), config, compute, starts, resume=self.resume)


def _begun(problem: TeacherStudent, width: int, g: float, informed: bool) -> dict[str, PyTree]:
    """What a part starts from: risk, field of the order parameters, and a step of SGD."""
    weights = (problem.informed if informed else problem.uninformed)(width, jax.random.key(0))
    first = problem.order_parameters(weights)
    flow = OrderParameterFlow(problem.P, gamma_over_p=g, noise=float(problem.noise))
    step = OnePassSGD(problem, g, key=jax.random.key(1)).step(jnp.asarray(0), weights, None)
    return {
        "risk": flow.risk(first),
        "vector field": flow.vector_field(jnp.zeros(()), flow.init(first, None), None),
        "step": step,
    }


class _Size(NamedTuple):
    """Of what stands beside SGD: units of teacher and student, noise of the labels, runs, tolerance."""

    units: int
    width: int
    noise: float
    seeds: int
    rtol: float


def _against_sgd(
    regions: list[PhaseRegion],
    dims: Sequence[int],
    size: _Size,
    spans: list[float],
    parts: _Parts,
    progress: bool,
) -> xr.Dataset:
    """Runs of SGD, the full system at the same `g`, and the terms that survive."""
    rows = []
    with Bar("SGD", len(regions) * len(dims), unit="cell", show=progress) as bar:
        for region, span in zip(regions, spans, strict=True):
            row = []
            for dim in map(int, dims):
                config = size._asdict() | {"span": span, "exponent": region.exponent, "dim": dim}
                compute = functools.partial(_cell, region, dim, span, size)
                problem = TeacherStudent.orthogonal(dim, size.units, noise=size.noise)
                begun = functools.partial(_begun, problem, size.width, region.gamma_over_p(dim), True)
                row.append(parts.get(f"sgd-{region.exponent:g}-{dim}", config, compute, begun))
                bar.advance()
            rows.append(xr.concat(row, "dim", combine_attrs="drop"))
    ds = xr.concat(rows, "exponent", combine_attrs="drop")
    # Names of one length in memory and on disk.
    ds["region"] = ("exponent", np.array([region.terms for region in regions]))
    coordinates = {"exponent": [region.exponent for region in regions], "dim": list(dims)}
    return ds.assign_coords(coordinates | {"seed": np.arange(size.seeds)})


def _cell(region: PhaseRegion, dim: int, span: float, size: _Size) -> xr.Dataset:
    """One region at one number of inputs, up to the time `span`."""
    units, width, noise, seeds, rtol = size
    name = region.terms
    points = 20
    problem = TeacherStudent.orthogonal(dim, units, noise=noise)
    weights = problem.informed(width, jax.random.key(0))
    g = region.gamma_over_p(dim)
    # At least one step from point to point.
    ks = np.round(np.linspace(0, max(points, span * dim / g), points + 1)).astype(int)
    sgd, times = simulate(problem, weights, g, ks, seeds)
    first = problem.order_parameters(weights)
    full = _risk_along(problem.P, first, times, g, noise, "full", rtol)[0]
    truncated = full if name == "blue" else _risk_along(problem.P, first, times, g, noise, name, rtol)[0]
    return xr.Dataset(
        {
            "risk_sgd": (("seed", "point"), sgd, {"long_name": "exact risk of one-pass SGD"}),
            "risk_full": ("point", full, {"long_name": "risk of the full system"}),
            "risk_truncated": ("point", truncated, {"long_name": "risk of the terms that survive at infinite d"}),
            "t": ("point", times, {"long_name": "time, steps * gamma / (p d)"}),
            "gamma_over_p": ((), g, {"long_name": "learning rate over width"}),
        }
    )


def _uninformed(starts: Sequence[int], ts: np.ndarray, units: int, width: int, noise: float, rtol: float) -> xr.Dataset:
    """The full system at `g = 1` from weights drawn at random for several numbers of inputs, and its plateaus."""
    risk, codes = np.full((len(starts), ts.size), np.nan), np.zeros(len(starts), np.int8)
    for i, dim in enumerate(starts):
        problem = TeacherStudent.orthogonal(int(dim), units, noise=noise)
        first = problem.order_parameters(problem.uninformed(width, jax.random.key(0)))
        risk[i], codes[i] = _risk_along(problem.P, first, ts, 1.0, noise, "full", rtol)
    ds = xr.Dataset({"risk": (("start", "time"), risk)}, {"start": list(starts), "time": ts})
    ds = ds.merge(plateaus(ds)).drop_vars("final_risk").assign(status=("start", codes))
    return ds.rename({name: f"{str(name).replace('_risk', '')}_start" for name in ds.data_vars})


def _risk_along(
    P: Float[Array, "units units"],
    first: OrderParameters,
    ts: np.ndarray,
    g: float,
    noise: float,
    terms: str,
    rtol: float,
) -> tuple[np.ndarray, int]:
    """Risk at the times `ts`, and how the run ended. A tenth of `rtol`: explicit steps err more than others."""
    flow = OrderParameterFlow(P, gamma_over_p=g, noise=noise, terms=terms)
    # Truncated systems run for a short time only.
    solver = None if terms == "full" else Tsit5()
    observe = {"risk": flow.risk}
    run = solve(flow, first, ts, observe=observe, solver=solver, rtol=rtol / 10, save_params=False, throw=False)
    return np.asarray(run.observed["risk"]), int(run.code)


def simulate(
    problem: TeacherStudent, weights: Float[Array, "width dim"], g: float, ks: Int[np.ndarray, " points"], seeds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Risk at steps `ks` of one-pass SGD in single precision, `(seeds, len(ks))`, and the times of these steps."""
    keys = jax.random.split(jax.random.key(1), seeds)
    risk, ts = _simulated(keys, jnp.asarray(g), jnp.asarray(weights, jnp.float32), problem, jnp.asarray(ks))
    return np.asarray(risk), np.asarray(ts[0])


@eqx.filter_jit
def _simulated(
    keys: Key[Array, " seeds"],
    g: Float[Array, ""],
    weights: Float[Array, "width dim"],
    problem: TeacherStudent,
    ks: Int[Array, " points"],
) -> tuple[Float[Array, "seeds points"], Float[Array, "seeds points"]]:
    def one(key: Key[Array, ""]) -> tuple[Float[Array, " points"], Float[Array, " points"]]:
        rule = OnePassSGD(problem, g, key=key)
        sol = iterate_to(rule, weights, ks, observe={"risk": problem}, save_params=False, throw=False)
        return sol.observed["risk"], sol.ts

    return jax.vmap(one)(keys)


GREEN_LIMIT = -0.5
"""Power of `d` with which the plateau of the green region falls at `kappa + delta = 1/2`."""


def power_laws(ds: xr.Dataset) -> dict[str, float]:
    """Powers of the settled risk: in the noise at the rate nearest one, and in `d = rate^-2` at the noise nearest 1e-3.

    Rates above a third are left out of the second, where `d` is below ten.
    """
    row = int(np.argmin(np.abs(np.log(ds.rate.values))))
    column = int(np.argmin(np.abs(np.log(np.maximum(ds.noise.values, 1e-300) / 1e-3))))
    noises, dims = ds.noise.values, ds.rate.values**-2.0
    usable = (noises >= 1e-5) & (noises <= 1e-3)
    large = dims >= 10
    predicted = [finite_dim_plateau(-GREEN_LIMIT, dim, noises[column]) for dim in dims[large]]

    def power(x: np.ndarray, y: np.ndarray | list[float]) -> float:
        return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if x.size > 1 else float("nan")

    return {
        "noise": power(noises[usable], ds.settled_risk.values[row, usable]),
        "dim": power(dims[large], ds.settled_risk.values[large, column]),
        "predicted": power(dims[large], predicted),
    }
