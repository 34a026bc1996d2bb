"""The data set of a sweep: its variables before anything has run, the values of one member, its provenance."""

import hashlib
import json
from collections.abc import Mapping

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array

from gradflow._checks import fail
from gradflow._solution import Solution
from gradflow._tree import flatten, split
from gradflow.runs._member import AbstractMember, Options, Solver
from gradflow.runs._record import value_of
from gradflow.runs._run import point
from gradflow.runs._variables import ATTRIBUTES, COUNTS, MISSING, OF_RUNS, PER_RUN, named_arrays, numbers_of
from gradflow.stores._installation import installation
from gradflow.stores._zarr_group import FORMAT
from gradflow.sweeps._members import Members
from gradflow.sweeps._padding import corner

RESERVED = frozenset({"time", "params", "status", "saved_time", *PER_RUN, *COUNTS})


class Row(dict[str, jax.ShapeDtypeStruct]):
    """Shapes and types of the variables of the members of one shape, and its saved parameters leaf by leaf.

    `observed`: the names of those that are observed.
    """

    def __init__(
        self,
        columns: dict[str, jax.ShapeDtypeStruct],
        observed: dict[str, jax.ShapeDtypeStruct],
        params: list[tuple[int, ...]],
    ):
        super().__init__(columns | observed)
        self.params, self.observed = params, list(observed)


def row_of(member: AbstractMember, options: Options) -> Row:
    """Shape and type of every variable of one member, without running it."""
    rows = options.ts.size

    def every_row(values: Mapping[str, Array | np.ndarray]) -> dict[str, Array]:
        return {name: jnp.broadcast_to(value, (rows, *value.shape)) for name, value in values.items()}

    def sample(member: AbstractMember) -> tuple[dict[str, Array], dict[str, Array]]:
        run = member.run(options)
        state = run.initial()
        full, columns, loss = run.params(state), {}, run.loss(state)
        columns |= {f"drift_{name}": jnp.max(quantity.value) for name, quantity in run.conserved(state).items()}
        columns |= {f"error_{name}": value for name, value in run.errors(state).items()}
        if loss is not None:
            columns |= {"loss_first": loss, "loss_last": loss}
        observables = run.observables(point(), state)
        observed = named_arrays({name: value_of(name, fn, full) for name, fn in observables.items()})
        timed = {"params": flatten(run.start)[0]} if options.save_params else {}
        timed |= {"saved_time": options.ts[0]} if run.rounds_times else {}
        return columns | every_row(timed) | {"t_final": options.ts[0]}, every_row(observed)

    shapes = [leaf.shape for leaf in jax.tree_util.tree_leaves(split(member.params)[0])]
    columns, observed = eqx.filter_eval_shape(sample, member)
    return Row(columns, observed, shapes)


def put(
    arrays: dict[str, np.ndarray], grid_indices: list[tuple[int, ...]], results: Solution, which: np.ndarray, row: Row
) -> None:
    """Enters results of members of one shape: those at `which` of a batch, without padding, at these grid indices."""
    index = tuple(np.array(grid_indices).T)
    for name, value in _values_of(results, row).items():
        inside = corner(row[name].shape) if name in row else ()
        # Variables may have more room than this shape takes.
        room = tuple(slice(size) for size in value[(0, *inside)].shape)
        arrays[name][(*index, *room)] = value[(which, *inside)]


def _values_of(results: Solution, row: Row) -> dict[str, np.ndarray]:
    """The variables of a batch of members, padded as they are; all but the saved parameters, which are cut."""
    columns = numbers_of(results)
    observed = named_arrays(results.observed)
    columns |= {name: _unreached_as_nan(value, results.reached) for name, value in observed.items()}
    if "saved_time" in row:
        columns["saved_time"] = np.where(results.reached, results.ts, np.nan)
    if "params" in row:
        leaves = jax.tree_util.tree_leaves(results.params)
        parts = [leaf[corner((*leaf.shape[:2], *s))] for leaf, s in zip(leaves, row.params, strict=True)]
        flat = np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=2)
        columns["params"] = _unreached_as_nan(flat, results.reached)
    return {name: np.asarray(value) for name, value in columns.items()}


def _unreached_as_nan(rows: Array | np.ndarray, reached: np.ndarray) -> np.ndarray:
    """Rows of a batch, with NaN in those that its members did not reach, where their type has one."""
    rows = np.asarray(rows)
    if not jnp.issubdtype(rows.dtype, jnp.inexact):
        return rows
    return np.where(reached.reshape(*reached.shape, *(1,) * (rows.ndim - 2)), rows, np.nan).astype(rows.dtype)


def template(
    grid: dict[str, np.ndarray], members: Members, rows: list[Row], options: Options, config: dict[str, object]
) -> xr.Dataset:
    """The data set with nothing in it yet: every variable at its largest shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, np.dtype] = {}
    for row in rows:
        for name in row.observed:
            if name in RESERVED or name in grid or name.startswith(OF_RUNS):
                advice = "Names of axes and of the variables that every sweep has are taken."
                raise fail("observe", "have names of its own", f"with the name {name!r}", advice)
        for name, value in row.items():
            before = shapes[name] if name in shapes else (0,) * value.ndim
            if len(before) != value.ndim:
                actual = f"with {name!r} of {len(before)} and of {value.ndim} axes"
                raise fail("observe", "return arrays with the same number of axes everywhere", actual)
            shapes[name] = tuple(max(a, b) for a, b in zip(before, value.shape, strict=True))
            dtypes[name] = np.result_type(dtypes.get(name, value.dtype), value.dtype)
    sizes = tuple(len(values) for values in grid.values())
    variables = {}
    for name, shape in shapes.items():
        inner = [] if name in PER_RUN or name.startswith(OF_RUNS) else ["time"]
        dims = (*grid, *inner, *(f"{name}_{i}" for i in range(len(shape) - len(inner))))
        empty = np.nan if np.issubdtype(dtypes[name], np.inexact) else 0
        variables[name] = (dims, np.full(sizes + shape, empty, dtypes[name]), ATTRIBUTES.get(name, {}))
    for name in COUNTS:
        variables[name] = (tuple(grid), np.zeros(sizes, np.int64), ATTRIBUTES.get(name, {}))
    variables["status"] = (tuple(grid), np.full(sizes, MISSING, np.int8), ATTRIBUTES["status"])
    coordinates: dict[str, tuple] = {name: (name, values) for name, values in grid.items()}
    coordinates["time"] = ("time", np.asarray(options.ts), {"long_name": "flow time", "units": "1"})
    return xr.Dataset(variables, coordinates, _provenance(members, options, config))


def configuration(grid: dict[str, np.ndarray], members: Members, options: Options) -> dict[str, object]:
    """The settings that decide about the numbers, and so about resuming; see `_identity` for all else."""
    control, until = options.control, options.until
    # Named where they are given only: stores written before there were any stay valid.
    limits = {"jumps": options.jumps, "longest_step": options.longest_step}
    given = {name: np.asarray(value).tolist() for name, value in limits.items() if value is not None}
    for shape_group in members.shape_groups:
        given |= shape_group.first.settings(options)
    return given | {
        "axes": {name: values.tolist() for name, values in grid.items()},
        "ts": _times(np.asarray(options.ts)),
        "rtol": float(control.rtol),
        "atol": None if control.atol is None else float(control.atol),
        "solver": "/".join(solvers_of(members, options)),
        "until": None if until is None else [until.sign, float(until.value)],
        "max_steps": int(options.max_steps),
        "save_params": options.save_params,
        "observe": sorted(members.shape_groups[0].first.observe),
        "dtype": _dtype(members),
        "x64": bool(jax.config.read("jax_enable_x64")),
    }


def solvers_of(members: Members, options: Options) -> dict[str, Solver]:
    """The methods that take the steps of members, by name.

    Rules alone take none. What is named then is what stores have always named.
    """
    methods = [shape_group.first.method(options) for shape_group in members.shape_groups]
    by_name = {type(method).__name__: method for method in methods if method is not None}
    unused = diffrax.Tsit5() if options.solver is None else options.solver
    return dict(sorted(by_name.items())) or {type(unused).__name__: unused}


def _provenance(members: Members, options: Options, config: dict[str, object]) -> dict[str, object]:
    return {
        "format": FORMAT,
        "config": json.dumps(config),
        "flow": "/".join(sorted({type(shape_group.first.what).__name__ for shape_group in members.shape_groups})),
        "time_unit": "/".join(sorted({shape_group.first.what.time_unit for shape_group in members.shape_groups})),
        "solver": config["solver"],
        "rtol": config["rtol"],
        "atol": "scaled to the state" if options.control.atol is None else float(options.control.atol),
        "dtype": config["dtype"],
        **installation(),
    }


def _dtype(members: Members) -> str:
    flowing = [jax.tree_util.tree_leaves(split(shape_group.first.params)[0]) for shape_group in members.shape_groups]
    return "/".join(sorted({str(leaf.dtype) for leaves in flowing for leaf in leaves}))


def _times(ts: np.ndarray) -> list[float | int | str]:
    """First, last and number of the save times, and a hash of them all."""
    return [float(ts[0]), float(ts[-1]), int(ts.size), hashlib.sha256(ts.tobytes()).hexdigest()[:16]]
