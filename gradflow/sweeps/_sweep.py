"""`sweep`: a grid of flows, batched member by member and returned as one labelled data set."""

import datetime
import functools
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, PyTree

from gradflow import _checks
from gradflow._record import bind, seen
from gradflow._solution import STATUS, Solution
from gradflow._solve import check_observe, check_times, check_tolerances
from gradflow._tree import flatten, join, split
from gradflow._until import Until
from gradflow.flows import AbstractFlow
from gradflow.solvers import AbstractMethod, default_solver
from gradflow.sweeps._flight import Options, at
from gradflow.sweeps._members import Group, Member, build_members, fingerprint, group_members
from gradflow.sweeps._queue import Checkpoint, run_queue, usual_slots
from gradflow.sweeps._store import FORMAT, Store

MISSING = -1
COUNTS = ("steps", "accepted", "rejected", "gradient_evaluations", "hessian_vector_products")
TAKEN = frozenset({"time", "params", "status", "t_final", "loss_first", "loss_last", *COUNTS})


def sweep(
    build: Callable[..., Any],
    axes: Mapping[str, Iterable[Any]],
    ts: Any,
    *,
    observe: Any = None,
    solver: diffrax.AbstractSolver | AbstractMethod | None = None,
    rtol: float = 1e-5,
    atol: float | None = None,
    save_params: bool = False,
    until: Until | None = None,
    max_steps: int = 100_000,
    store: Any = None,
    resume: bool = True,
    batch: int | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Solves a flow at every point of a grid.

    **Arguments**

    - `build`: called as `build(scale=..., width=..., seed=...)`, one keyword per axis; returns `(flow, params)`.
      Members whose arrays have equal shapes run in one program, batched with `vmap`; every other shape (another
      width) compiles once. Arrays that all members share, such as data, are held once.
    - `axes`: name -> values, all numbers or all strings. The last axis runs fastest, and neighbours along it share a
      batch: put the axis that changes the cost least last.
    - `ts`, `solver`, `rtol`, `atol`, `until`, `max_steps`: as for `solve`.
    - `observe`: name -> function of the parameters, or a function `flow -> such a dictionary`. The names become
      variables, so they differ from those of the axes and of what is listed below.
    - `save_params`: also keep the parameters, flattened, at every save time.
    - `store`: path of a zarr store, written batch by batch. With `resume`, members already there are kept; a store with
      results of another sweep is refused. With `resume=False` it is started over.
    - `batch`: members per program call; by default 8 on a CPU and 256 elsewhere.
    - `progress`: show a bar.

    **Returns** an `xarray.Dataset` with dimensions `(*axes, "time")`. Observables of a shape that depends on the member
    are padded with NaN (zero or False in integer and Boolean ones). Besides the observables: `status` (a code, see its
    attributes; -1 is a member still missing from a store), `t_final`, `loss_first`, `loss_last`, the counts of
    `Solution.stats`, and `drift_...` of each conserved quantity. A member that fails keeps its partial results and
    harms no other. The attributes say how everything was computed.

    **Raises** `ValueError` for bad input, and for a store that cannot be written or holds another sweep.

    >>> import gradflow as gf, jax
    >>> problem = gf.EmpiricalRisk(*gf.data.circle(8), gf.losses.square)
    >>> def build(scale, seed):
    ...     model = gf.models.TwoLayer(2, 4, init_scale=scale, key=jax.random.key(seed))
    ...     return gf.GradientFlow(problem), model
    >>> axes = {"scale": [1e-2, 1e-4], "seed": range(3)}
    >>> ds = gf.sweep(build, axes, [0.0, 1.0], observe={"norm": gf.observables.ParameterNorm()}, progress=False)
    >>> dict(ds.norm.sizes)
    {'scale': 2, 'seed': 3, 'time': 2}
    """
    began = time.perf_counter()
    grid = _check_axes(axes)
    _checks.check_callable("build", build, f"build({', '.join(f'{name}=...' for name in grid)})")
    _checks.check_count("max_steps", max_steps)
    if batch is not None:
        _checks.check_count("batch", batch)
    members = build_members(build, {name: values.tolist() for name, values in grid.items()}, _check_observe(observe))
    dtypes = {jnp.result_type(*jax.tree_util.tree_leaves(split(member.run[1])[0])) for member in members}
    control = check_tolerances(rtol, atol, max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps)))
    flows = {type(member.run[0]): member.run[0] for member in members}
    suited = max(flows.values(), key=lambda flow: flow.oscillatory or flow.limited)
    solver = default_solver(float(control.rtol), suited) if solver is None else solver
    times = check_times(ts, max(float(member.run[0].t0) for member in members))
    if until is not None and not isinstance(until, Until):
        raise _checks.fail("until", "be a gradflow.Until", f"of type {type(until).__name__}")
    options = Options(times, solver, control, until, jnp.asarray(max_steps), save_params)

    groups = group_members(members)
    template = _template(grid, members, groups, options, dtypes)
    target = None if store is None else Store(store, template, resume=resume)
    found = template.copy(deep=True) if target is None or target.found is None else target.found
    arrays = {name: found[name].values for name in found.data_vars}
    todo = {member.at for member in members if arrays["status"][member.at] == MISSING}

    from tqdm import tqdm

    tally = {"evaluations": 0}
    with tqdm(total=len(members), initial=len(members) - len(todo), unit="flow", disable=not progress) as bar:
        for number, group in enumerate(groups):
            missing = [place for place, index in enumerate(group.indices) if index in todo]
            if not missing:
                continue
            take = functools.partial(_take, group)
            slots = usual_slots(at(take(missing[:1]), 0), group.shared, options) if batch is None else batch
            slots = min(slots, len(group.indices))
            checkpoint = None if target is None else Checkpoint(target.path / f".in-flight-{number}.npz")
            for landed in run_queue(take, missing, group.shared, options, slots, checkpoint, tally):
                indices = []
                for place, (solution, flat) in landed:
                    index = group.indices[place]
                    for name, value in _values(solution, flat).items():
                        arrays[name][index] = _padded(value, arrays[name].shape[len(grid) :])
                    indices.append(index)
                if target is not None and indices:
                    target.write(sorted(indices), {str(name): arrays[name] for name in template.data_vars})
                bar.update(len(indices))

    result = found.copy(data=arrays)
    spent = {"wall_seconds": float(found.attrs.get("wall_seconds", 0.0))}
    spent["evaluations_spent"] = int(found.attrs.get("evaluations_spent", 0)) + tally["evaluations"]
    if todo:
        spent["wall_seconds"] = round(spent["wall_seconds"] + time.perf_counter() - began, 3)
    result.attrs.update(spent)
    if target is not None:
        target.finish(spent)
    return result


def _take(group: Group, places: list[int]) -> PyTree:
    """What the members at these places of a group have of their own."""
    rows = np.asarray(places)
    return jax.tree_util.tree_map(lambda leaf: leaf[rows], group.stacked)


def _values(solution: Solution, flat: np.ndarray | None) -> dict[str, np.ndarray]:
    """The variables of one member."""
    values: dict[str, Any] = {f"drift_{name}": value for name, value in solution.drift.items()}
    values |= {name: solution.stats[name] for name in COUNTS} | solution.observed
    values |= {"status": solution.code, "t_final": solution.t_final}
    if solution.loss is not None:
        values |= {"loss_first": solution.loss[0], "loss_last": solution.loss[1]}
    if flat is not None:
        values["params"] = flat
    return {name: np.asarray(value) for name, value in values.items()}


def _padded(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if value.shape == shape:
        return value
    padded = np.full(shape, np.nan if value.dtype.kind == "f" else 0, value.dtype)
    padded[tuple(slice(size) for size in value.shape)] = value
    return padded


def _template(
    grid: dict[str, np.ndarray], members: list[Member], groups: list[Group], options: Options, dtypes: set[Any]
) -> xr.Dataset:
    """The data set with nothing in it yet: every variable at its largest shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, Any] = {}
    for group in groups:
        flow, params, observe = eqx.combine(jax.tree_util.tree_map(lambda leaf: leaf[0], group.stacked), group.shared)
        for name in observe:
            if name in TAKEN or name in grid or name.startswith("drift_"):
                advice = "Names of axes and of the variables that every sweep has are taken."
                raise _checks.fail("observe", "have names of its own", f"with the name {name!r}", advice)
        rows = _row_shapes(flow, params, observe, options)
        for name, value in rows.items():
            before = shapes[name] if name in shapes else (0,) * value.ndim
            if len(before) != value.ndim:
                actual = f"with {name!r} of {len(before)} and of {value.ndim} axes"
                raise _checks.fail("observe", "return arrays with the same number of axes everywhere", actual)
            shapes[name] = tuple(max(a, b) for a, b in zip(before, value.shape, strict=True))
            kinds[name] = np.result_type(kinds.get(name, value.dtype), value.dtype)
    sizes = tuple(len(values) for values in grid.values())
    variables = {}
    for name, shape in shapes.items():
        inner = [] if name in _PER_MEMBER or name.startswith("drift_") else ["time"]
        dims = (*grid, *inner, *(f"{name}_{i}" for i in range(len(shape) - len(inner))))
        empty = np.nan if np.issubdtype(kinds[name], np.inexact) else 0
        variables[name] = (dims, np.full(sizes + shape, empty, kinds[name]), _ATTRIBUTES.get(name, {}))
    for name in COUNTS:
        variables[name] = (tuple(grid), np.zeros(sizes, np.int64), _ATTRIBUTES.get(name, {}))
    variables["status"] = (tuple(grid), np.full(sizes, MISSING, np.int8), _ATTRIBUTES["status"])
    coordinates: dict[str, Any] = {name: (name, values) for name, values in grid.items()}
    coordinates["time"] = ("time", np.asarray(options.ts), {"long_name": "flow time", "units": "1"})
    return xr.Dataset(variables, coordinates, _provenance(grid, members, options, dtypes))


def _row_shapes(flow: AbstractFlow, params: PyTree, observe: dict[str, Any], options: Options) -> dict[str, Any]:
    """Shape and type of every variable of one member, without running it."""
    trainable, frozen = split(params)
    rows = options.ts.size

    def sample(trainable: PyTree) -> dict[str, Array]:
        state = flow.init(trainable, frozen)
        found = {f"drift_{name}": jnp.max(q.value) for name, q in flow.conserved(state, frozen).items()}
        loss = flow.loss(state, frozen)
        if loss is not None:
            found |= {"loss_first": loss, "loss_last": loss}
        full = join(trainable, frozen)
        bound = bind(observe, flow, jnp.asarray(flow.t0, options.ts.dtype), state, frozen)
        observed = {name: jnp.asarray(fn(seen(fn, full))) for name, fn in bound.items()}
        if options.save_params:
            observed["params"] = flatten(trainable)[0]
        found |= {name: jnp.broadcast_to(value, (rows, *value.shape)) for name, value in observed.items()}
        return found | {"t_final": jnp.asarray(options.ts[0])}

    return eqx.filter_eval_shape(sample, trainable)


_PER_MEMBER = ("t_final", "loss_first", "loss_last")
_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "status": {
        "long_name": "how the run ended",
        "flag_values": list(range(MISSING, len(STATUS))),
        "flag_meanings": " ".join(("missing", *STATUS)),
    },
    "t_final": {"long_name": "time that the run reached", "units": "1"},
    "gradient_evaluations": {"long_name": "gradients evaluated, rejected steps included"},
    "loss_first": {"long_name": "loss at the start"},
    "loss_last": {"long_name": "loss where the run ended"},
}


def _provenance(
    grid: dict[str, np.ndarray], members: list[Member], options: Options, dtypes: set[Any]
) -> dict[str, Any]:
    """How it was computed. What decides about resuming is in `config`; the rest informs."""
    import importlib.metadata

    control, until = options.control, options.until
    config = {
        "axes": {name: values.tolist() for name, values in grid.items()},
        "ts": _times(np.asarray(options.ts)),
        "rtol": float(control.rtol),
        "atol": None if control.atol is None else float(control.atol),
        "solver": type(options.solver).__name__,
        "solver_options": fingerprint([options.solver]),
        "until": None if until is None else [until.sign, float(until.value)],
        "until_fn": None if until is None else fingerprint([until.fn]),
        "max_steps": int(options.max_steps),
        "save_params": options.save_params,
        "observe": sorted(members[0].run[2]),
        "members": fingerprint([member.run for member in members]),
    }
    device = jax.devices()[0]
    packages = ("gradflow-jax", "jax", "jaxlib", "diffrax", "equinox", "numpy")
    return {
        "format": FORMAT,
        "config": json.dumps(config),
        "flow": type(members[0].run[0]).__name__,
        "solver": config["solver"],
        "rtol": config["rtol"],
        "atol": "scaled to the state" if control.atol is None else float(control.atol),
        "dtype": "/".join(sorted(str(dtype) for dtype in dtypes)),
        "device": f"{device.platform}: {device.device_kind}",
        "python": platform.python_version(),
        "versions": json.dumps({name: _version(importlib.metadata.version, name) for name in packages}),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _times(ts: np.ndarray) -> list[Any]:
    """First, last and number of the save times, and a hash of them all."""
    return [float(ts[0]), float(ts[-1]), int(ts.size), hashlib.sha256(ts.tobytes()).hexdigest()[:16]]


def _version(lookup: Callable[[str], str], name: str) -> str:
    try:
        return lookup(name)
    except ModuleNotFoundError:
        return "unknown"


def _check_axes(axes: Any) -> dict[str, np.ndarray]:
    if not isinstance(axes, Mapping) or not axes:
        actual = "empty" if isinstance(axes, Mapping) else f"of type {type(axes).__name__}"
        raise _checks.fail("axes", "be a dictionary name -> values with at least one axis", actual)
    grid = {}
    for name, values in axes.items():
        if not isinstance(name, str) or not name.isidentifier() or name in TAKEN:
            actual = f"{name!r}, which every sweep has" if name in TAKEN else repr(name)
            raise _checks.fail("axes", "have names that are Python identifiers of their own", actual)
        grid[name] = _check_axis(f"axes[{name!r}]", values)
    return grid


def _check_axis(argument: str, values: Any) -> np.ndarray:
    must = "be a non-empty sequence of values, all numbers or all strings"
    advice = "Build what they stand for inside `build`."
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise _checks.fail(argument, must, repr(values), f"A single value goes into a list: [{values!r}].")
    given = list(values)
    try:
        array = np.asarray(given)
    except ValueError as error:  # rows of unequal lengths
        raise _checks.fail(argument, must, repr(given), advice) from error
    mixed = array.dtype.kind == "U" and not all(isinstance(value, str) for value in given)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "fiubU" or mixed:
        raise _checks.fail(argument, must, repr(given), advice)
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise _checks.fail(argument, "hold no NaN", repr(given))
    if len(np.unique(array)) != array.size:
        raise _checks.fail(argument, "hold each value once", repr(array.tolist()))
    return array


def _check_observe(observe: Any) -> Callable[[Any], dict[str, Any]]:
    if callable(observe):
        return functools.partial(_observables_of, observe)
    fixed = check_observe(observe)
    return lambda flow: fixed


def _observables_of(observe: Callable[[Any], Any], flow: Any) -> dict[str, Callable[[Any], Any]]:
    return check_observe(observe(flow))
