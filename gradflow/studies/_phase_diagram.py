"""Phase diagram of one-pass SGD in high dimension: simulations, the full system, and what theory predicts."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from gradflow import _checks
from gradflow._iterate import iterate_to
from gradflow._solve import solve
from gradflow.flows import OrderParameterFlow
from gradflow.problems import TeacherStudent
from gradflow.rules import OnePassSGD
from gradflow.studies._phase_map import phase_map, plateaus
from gradflow.theory import finite_dim_plateau, phase_region, plateau

HORIZONS = {"green": 20.0, "blue": 100.0, "orange": 200.0}
"""Time to which each region is run beside SGD."""

SETTLED = 100.0
"""How much longer informed starts run for their plateau."""


def phase_diagram(
    *,
    exponents: Sequence[float] = (0.25, 0.0, -0.25),
    dims: Sequence[int] = (100, 1000),
    seeds: int = 4,
    units: int = 4,
    width: int = 8,
    noise: Any = 1e-3,
    horizons: dict[str, float] | None = None,
    starts: Sequence[int] = (100, 1_000, 10_000, 100_000),
    rates: Sequence[float] = tuple(np.geomspace(0.01, 4.0, 14).tolist()),
    noises: Sequence[float] = tuple(np.geomspace(1e-6, 1e-1, 11).tolist()),
    horizon: Any = 1e4,
    rtol: float = 1e-4,
    saves: int = 121,
    progress: bool = True,
) -> xr.Dataset:
    """SGD against its order parameters in every region of the phase diagram, and the diagram as a computed map.

    An erf student of `width` units learns an orthogonal teacher of `units`, from an informed start
    (Veiga et al. 2022, arXiv 2202.00293).

    **Arguments**

    - `exponents`: values of `kappa + delta`, each in a region that has an equation; `gamma / p = d^-exponent`.
    - `dims`, `seeds`: numbers of inputs, and of runs of SGD at each. `horizons`: region -> time to which these go.
    - `noise`: variance of the label noise there. `starts`: numbers of inputs of uninformed starts.
    - `rates`, `noises`, `horizon`: the map, from an uninformed start at `d = 1000`, as for `phase_map`.
    - `rtol`: tolerance. `saves`: number of save times of the map and of the starts.

    **Returns** an `xarray.Dataset`: over `(exponent, dim, seed, point)` the `risk_sgd`, over `(exponent, dim, point)`
    `risk_full` of the full system and `risk_truncated` of the terms that survive at infinite `d`, at times `t`;
    over `(start, time)` the risk `risk_start` with its plateau; over `(rate, noise, time)` the map of `phase_map`, in
    which a rate also stands for the dimension `rate^-2` of a green point at `kappa + delta = 1/2`; and over
    `(rate, noise)` the `settled_risk` from an informed start, which `predicted` foretells.

    **Raises** `ValueError` for exponents in the red region, and for bad input.

    >>> import gradflow as gf
    >>> gf.studies.phase_diagram(exponents=[-0.7])
    Traceback (most recent call last):
    ...
    ValueError: Argument `kappa + delta` must be above -1/2, but is -0.7. No differential equation ...
    """
    regions = [phase_region(float(exponent), 0.0) for exponent in exponents]
    names = [region.terms for region in regions]
    _checks.check_count("seeds", seeds, least=2)
    _checks.check_count("width", width)
    # What the problems below would refuse, before anything runs.
    TeacherStudent.orthogonal(min(map(int, [*dims, *starts])), units, noise=noise)
    spans = HORIZONS | ({} if horizons is None else horizons)
    against = _against_sgd(regions, names, dims, seeds, units, width, noise, spans, rtol, progress)

    begun = _uninformed(starts, np.geomspace(1, horizon, saves), units, width, noise, rtol)
    options: dict[str, Any] = {"rtol": rtol, "progress": progress}
    sizes: dict[str, Any] = {"units": units, "width": width, "saves": saves}
    computed = phase_map(rates=rates, noises=noises, horizon=horizon, **sizes, **options)
    # Close to its plateau the risk falls like t^-2 only.
    late = {"horizon": SETTLED * horizon, "informed": True}
    settled = phase_map(rates=rates, noises=noises, **late, **sizes, **options).final_risk
    found = computed.merge(begun).merge(against)
    found["settled_risk"] = settled.assign_attrs(long_name="risk at the end from an informed start")
    predicted = [[_predicted(float(rate), float(level)) for level in noises] for rate in rates]
    about = {"long_name": "predicted plateau, A g noise / (1 - 2 A g)"}
    found["predicted"] = (("rate", "noise"), np.array(predicted), about)
    found.attrs = {"study": "phase-diagram", "noise": float(noise), "units": units, "width": width, "rtol": float(rtol)}
    return found


def _predicted(rate: float, noise: float) -> float:
    try:
        return plateau(rate, noise)
    except ValueError:
        return float("nan")


def _against_sgd(
    regions: Any,
    names: list[str],
    dims: Sequence[int],
    seeds: int,
    units: int,
    width: int,
    noise: float,
    spans: dict[str, float],
    rtol: float,
    progress: bool,
) -> xr.Dataset:
    """Runs of SGD, the full system at the same `g`, and the terms that survive."""
    from tqdm import tqdm

    points = 20
    shape = (len(regions), len(dims), points + 1)
    sgd = np.full((len(regions), len(dims), seeds, points + 1), np.nan)
    full, truncated = np.full(shape, np.nan), np.full((len(regions), len(dims), points + 1), np.nan)
    times, rates = np.zeros(shape), np.zeros(shape[:2])
    cells = [(i, j) for i in range(len(regions)) for j in range(len(dims))]
    for i, j in tqdm(cells, desc="SGD", unit="cell", disable=not progress):
        dim = int(dims[j])
        problem = TeacherStudent.orthogonal(dim, units, noise=noise)
        weights = problem.informed(width, jax.random.key(0))
        g = rates[i, j] = regions[i].gamma_over_p(dim)
        # At least one step from point to point.
        ks = np.round(np.linspace(0, max(points, spans[names[i]] * dim / g), points + 1)).astype(int)
        sgd[i, j], times[i, j] = simulate(problem, weights, g, ks, seeds)
        first = problem.order_parameters(weights)
        for terms, into in (("full", full), (names[i], truncated)):
            into[i, j] = _risk_along(problem.P, first, times[i, j], g, noise, terms, rtol)[0]
    axes = ("exponent", "dim", "point")
    return xr.Dataset(
        {
            "risk_sgd": (("exponent", "dim", "seed", "point"), sgd, {"long_name": "exact risk of one-pass SGD"}),
            "risk_full": (axes, full, {"long_name": "risk of the full system"}),
            "risk_truncated": (axes, truncated, {"long_name": "risk of the terms that survive at infinite d"}),
            "t": (axes, times, {"long_name": "time, steps * gamma / (p d)"}),
            "gamma_over_p": (("exponent", "dim"), rates, {"long_name": "learning rate over width"}),
            "region": ("exponent", names),
        },
        {"exponent": [region.exponent for region in regions], "dim": list(dims), "seed": np.arange(seeds)},
    )


def _uninformed(starts: Sequence[int], ts: np.ndarray, units: int, width: int, noise: float, rtol: float) -> xr.Dataset:
    """The full system at `g = 1` from weights drawn at random for several numbers of inputs, and its plateaus."""
    risk, codes = np.full((len(starts), ts.size), np.nan), np.zeros(len(starts), np.int8)
    for i, dim in enumerate(starts):
        problem = TeacherStudent.orthogonal(int(dim), units, noise=noise)
        first = problem.order_parameters(problem.uninformed(width, jax.random.key(0)))
        risk[i], codes[i] = _risk_along(problem.P, first, ts, 1.0, noise, "full", rtol)
    found = xr.Dataset({"risk": (("start", "time"), risk)}, {"start": list(starts), "time": ts})
    found = found.merge(plateaus(found)).drop_vars("final_risk").assign(status=("start", codes))
    return found.rename({name: f"{str(name).replace('_risk', '')}_start" for name in found.data_vars})


def _risk_along(
    P: Any, first: Any, ts: np.ndarray, g: float, noise: float, terms: str, rtol: float
) -> tuple[np.ndarray, int]:
    """Risk at the times `ts`, and how the run ended. A tenth of `rtol`: explicit steps err more than others."""
    flow = OrderParameterFlow(P, gamma_over_p=g, noise=noise, terms=terms)
    run = solve(flow, first, ts, rtol=rtol / 10, observe={"risk": flow.risk}, save_params=False, throw=False)
    return np.asarray(run.observed["risk"]), int(run.code)


def simulate(problem: TeacherStudent, weights: Any, g: float, ks: Any, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Risk at steps `ks` of one-pass SGD in single precision, `(seeds, len(ks))`, and the times of these steps."""
    keys = jax.random.split(jax.random.key(1), seeds)
    risk, ts = _simulated(keys, jnp.asarray(g), jnp.asarray(weights, jnp.float32), problem, jnp.asarray(ks))
    return np.asarray(risk), np.asarray(ts[0])


@eqx.filter_jit
def _simulated(keys: Any, g: Any, weights: Any, problem: TeacherStudent, ks: Any) -> Any:
    def one(key: Any) -> Any:
        rule = OnePassSGD(problem, g, key=key)
        found = iterate_to(rule, weights, ks, observe={"risk": problem}, save_params=False, throw=False)
        return found.observed["risk"], found.ts

    return jax.vmap(one)(keys)


def phase_diagram_table(ds: xr.Dataset) -> str:
    """What `phase_diagram` found, as text."""
    lines = [
        f"{'region':>8} {'kappa+delta':>11} {'d':>7} {'g':>9} {'SGD at the end':>22} {'full':>9} {'truncated':>10}"
    ]
    for i, exponent in enumerate(ds.exponent.values):
        for j, dim in enumerate(ds.dim.values):
            last = ds.risk_sgd.values[i, j, :, -1]
            cells = f"{ds.region.values[i]!s:>8} {exponent:11.2f} {int(dim):7d} {ds.gamma_over_p.values[i, j]:9.3g}"
            spread = f"{np.mean(last):.3e} +- {np.std(last, ddof=1):.0e}"
            both = f"{ds.risk_full.values[i, j, -1]:9.3e} {ds.risk_truncated.values[i, j, -1]:10.3e}"
            lines.append(f"{cells} {spread:>22} {both}")
    lines.append("SGD: mean and standard deviation over seeds of the exact risk; full, truncated: order parameters")
    lines += ["", f"{'uninformed, d':>14} {'plateau':>10} {'length in t':>12} {'learnt at t':>12}"]
    for i, dim in enumerate(ds.start.values):
        found = (ds[name].values[i] for name in ("plateau_start", "plateau_length_start", "learning_time_start"))
        height, length, learnt = (f"{value:.3g}" if np.isfinite(value) else "-" for value in found)
        lines.append(f"{int(dim):14d} {height:>10} {length:>12} {learnt:>12}")
    off = np.abs(ds.settled_risk / ds.predicted - 1).values
    near = (ds.rate.values[:, None] <= 1) & (ds.noise.values[None, :] <= 1e-3) & (ds.noise.values[None, :] >= 1e-5)
    if near.any():
        worst = 100 * np.max(off[near])
        lines += [
            "",
            f"plateau against A g noise / (1 - 2 A g): off by at most {worst:.1f} % for g <= 1, 1e-5 <= noise <= 1e-3",
        ]
    slopes = power_laws(ds)
    lines.append(
        f"plateau grows like noise^{slopes['noise']:.3f}; at kappa + delta = 1/2 it falls like d^{slopes['dim']:.3f}"
    )
    lines.append(f"    (predicted: 1, and {slopes['predicted']:.3f} over the same d; {GREEN_LIMIT:.1f} for large d)")
    failed = int(np.count_nonzero(ds.status.values != 0) + np.count_nonzero(ds.status_start.values != 0))
    runs = ds.status.size + ds.status_start.size
    lines.append(
        f"map: {ds.sizes['rate']} learning rates x {ds.sizes['noise']} noises;"
        f" {failed} of {runs} runs did not reach the end"
    )
    return "\n".join(lines)


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

    def power(x: np.ndarray, y: Any) -> float:
        return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if x.size > 1 else float("nan")

    return {
        "noise": power(noises[usable], ds.settled_risk.values[row, usable]),
        "dim": power(dims[large], ds.settled_risk.values[large, column]),
        "predicted": power(dims[large], predicted),
    }
