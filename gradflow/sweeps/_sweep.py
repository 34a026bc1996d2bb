"""`sweep`: a grid of flows or rules, run a few at a time and returned as one labelled data set."""

import contextlib
import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from gradflow import _checks
from gradflow._solution import Status
from gradflow._tree import split
from gradflow.runs._arguments import check_jumps, check_longest_step, check_times, check_tolerances
from gradflow.runs._member import Options, Solver, default_for
from gradflow.runs._progress import Bar
from gradflow.runs._record import check_observe
from gradflow.runs._until import Until, check_until
from gradflow.runs._variables import MISSING
from gradflow.stores._store import Store, provenance
from gradflow.sweeps._callback import SweepSnapshot
from gradflow.sweeps._checkpoint import Checkpoint, unfinished_file
from gradflow.sweeps._dataset import RESERVED, configuration, put, row_of, solvers_of, template
from gradflow.sweeps._groups import Group, group_members, stack
from gradflow.sweeps._identity import codes_of, differences, identity_of
from gradflow.sweeps._launch import check_share, launch_jobs
from gradflow.sweeps._members import Members
from gradflow.sweeps._memory import Plan, announcement, plan
from gradflow.sweeps._program import at
from gradflow.sweeps._scheduler import Finished, run_queue
from gradflow.sweeps._slots import local_mesh


def sweep(
    build: Callable[..., Any],
    axes: Mapping[str, Iterable[Any]],
    ts: Any,
    *,
    observe: Any = None,
    solver: Solver | None = None,
    rtol: float = 1e-5,
    atol: float | None = None,
    save_params: bool = False,
    until: Until | None = None,
    max_steps: int = 100_000,
    jumps: Any = None,
    longest_step: float | None = None,
    store: Any = None,
    resume: bool = True,
    batch: int | None = None,
    pad: bool | None = None,
    chunk: tuple[int, int] | None = None,
    launch: Any = None,
    jobs: int = 8,
    progress: bool = True,
    trainable: Any = None,
    callback: Callable[[SweepSnapshot], Any] | None = None,
) -> xr.Dataset:
    """Solves a flow, or runs a rule, at every point of a grid.

    A few members run at a time, each in a slot; as soon as one has finished, the next takes its slot, within the
    compiled loop. No member waits for the slowest, and one that fails does not affect the others.

    **Arguments**

    - `build`: called as `build(scale=..., width=..., seed=...)`, one keyword per axis; returns `(flow, params)` or
      `(rule, params)`, and `(flow, params, key)` for a stochastic flow, with the random key of the path. It has to
      return the same every time: members that take much memory are built twice. Arrays that all members share, such as
      data, are held once.
    - `axes`: name -> values, all numbers or all strings. The last axis runs fastest.
    - `ts`, `solver`, `rtol`, `atol`, `until`, `max_steps`, `jumps`, `longest_step`, `trainable`: as for `solve`. A rule
      saves the iterate nearest to each of these times by its own clock; `saved_time` tells which that is. A `solver` is
      one for all: flows with noise and without go into one sweep where it is `None`. A path that takes more than
      `max_steps` ends with that status, as a rule does.
    - `observe`: name -> function of the parameters, or a function `flow -> such a dictionary`. The names become
      variables, so they differ from those of the axes and of what is listed below. Arrays in a pytree are variables of
      their own, such as `norm_first` for `{"first": ...}` of the observable `norm`.
    - `save_params`: also keep the parameters, flattened, at every save time.
    - `store`: path of a zarr store, written as members finish. With `resume`, members already there are kept, and those
      that ran at an interruption go on where they were; a store with results of another sweep is refused. With
      `resume=False` it is started over. Two sweeps are the same if their numbers are: those of all members, and what a
      few of every shape give for loss, field and observables at the start and near it; and if their functions, with all
      constants, data and helpers that these refer to, have the same code; where functions stand and what they are
      called does not count. Functions of installed packages are compared by name. On another machine numbers count
      within rounding; under another version of Python they alone decide.
    - `batch`: members that run at a time, per device. By default one for every core on a CPU, up to 128 if they are
      tiny, and up to 256 elsewhere, as far as memory goes.
    - `pad`: whether members of several widths run in one program, padded with zeros to the widest; by default wherever
      that changes nothing, which is tried for every shape. Widths are taken together up to the next power of two.
    - `chunk`: `(k, n)`, run only part `k` (from 0) of `n`, for jobs that share a store. Processes of one
      `jax.distributed` run share the grid in this way by themselves.
    - `launch`: an executor with `submit`, such as `submitit.AutoExecutor`: runs the sweep as that many `jobs`, each
      with a chunk, waits for them, and returns everything.
    - `progress`: show a bar; a line every 30 seconds where standard error is no terminal.
    - `callback`: called with a `gradflow.sweeps.SweepSnapshot` after each segment. An exception that it raises stops
      the sweep as an interruption does, and reaches the caller with what has finished as its attribute `dataset`.

    All local devices are used, each with a loop of its own. A CPU is one device, on whose cores members run side by
    side, unless they are tiny; `jax.config.update("jax_num_cpu_devices", n)` at the start of a program divides it.

    **Returns** an `xarray.Dataset` with dimensions `(*axes, "time")`. Observables of a shape that depends on the member
    are padded with NaN (zero or False in integer and Boolean ones). Besides the observables: `status` (a code, see its
    attributes; -1 is a member still missing from a store), `t_final`, `loss_first`, `loss_last`, the counts of
    `Solution.stats`, `drift_...` of each conserved quantity, and `error_...` of each of `Solution.errors`. A member
    that fails keeps its partial results. The attributes say how everything was computed: `evaluations_spent` counts
    also evaluations of slots that waited for others; `runs` tells, for every run that added to it, its time, its
    compiled programs and the evaluations of each device.

    **Raises** `ValueError` for bad input, for a sweep that does not fit into memory, and for a store that cannot be
    written or holds another sweep; `RuntimeError` where launched jobs fail, whose finished part the store keeps.

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
    _check_build(build, grid)
    _checks.check_count("max_steps", max_steps)
    if batch is not None:
        _checks.check_count("batch", batch)
    check_until(until)
    if callback is not None:
        _checks.check_callable("callback", callback, "fn(snapshot), see gradflow.sweeps.SweepSnapshot")
    share = check_share(chunk, store, resume)
    if launch is not None:
        if callback is not None:
            raise _checks.fail("callback", "be None where jobs are launched", "given", "They run in other processes.")
        how = {"observe": observe, "solver": solver, "rtol": rtol, "atol": atol, "save_params": save_params}
        how |= {"until": until, "max_steps": max_steps, "batch": batch, "pad": pad, "store": store, "resume": resume}
        how |= {"jumps": jumps, "longest_step": longest_step, "trainable": trainable}
        return launch_jobs(launch, jobs, sweep, (build, axes, ts), how, share, progress)
    values = {name: values.tolist() for name, values in grid.items()}
    members = Members(build, values, _check_observe(observe), trainable, sketches=store is not None)
    limits = check_jumps(jumps), check_longest_step(longest_step)
    options = _options(members, ts, solver, rtol, atol, until, max_steps, save_params, limits)
    codes = codes_of(members, list(solvers_of(members, options).values()), until)
    options = dataclasses.replace(options, code=str(codes))
    groups = group_members(members, options, pad)
    rows = [row_of(shape_group.first, options) for shape_group in members.shape_groups]
    empty = template(grid, members, rows, options, configuration(grid, members, options))
    target, tag = None, ""
    if store is not None:
        identity = identity_of(members, options, codes)
        differ = functools.partial(differences, new=identity, members=members, options=options)
        tag = identity.tag + empty.attrs["config"]
        target = Store(store, empty, identity, differ, resume=resume, alone=share.whole)
    ds = empty.copy(deep=True) if target is None or target.found is None else target.found
    arrays = {str(name): ds[name].values for name in ds.data_vars}

    mine = {number for number, index in enumerate(members.grid_indices) if share.holds(index, members.shape)}
    todo = {number for number in mine if arrays["status"][members.grid_indices[number]] == MISSING}
    counters: dict[str, Any] = {}
    units = []
    for number, group in enumerate(groups):
        missing, size = [i for i in group.members if i in todo], len(mine.intersection(group.members))
        if missing:
            units.append(Unit(number, group, missing, size, _plan(members, group, options, batch, size, empty.nbytes)))

    notice = announcement([unit.plan for unit in units]) if units and progress else None
    done = len(mine) - len(todo)
    with Bar("sweep", len(mine), unit="members", done=done, show=progress) as bar:
        if notice is not None:
            bar.write(notice)

        def keep(finished: Finished) -> None:
            nonlocal done
            indices = [members.grid_indices[number] for number in finished.member_ids]
            groups_of = np.array([members.shape_group_of[number] for number in finished.member_ids])
            for i in np.unique(groups_of):
                which = np.flatnonzero(groups_of == i)
                put(arrays, [indices[j] for j in which], finished.results, which, rows[i])
            if target is not None and indices:
                target.write(sorted(indices), arrays)
            done += len(indices)
            bar.reach(done)
            if callback is not None:
                callback(_snapshot(members, finished, done, len(mine)))

        try:
            for unit in units:
                file = None if target is None else target.sidecar / unfinished_file(share, unit.number)
                checkpoint = None if file is None else Checkpoint(file, tag)
                with contextlib.closing(_run_unit(unit, members, options, checkpoint, counters)) as queue:
                    for finished in queue:
                        keep(finished)
        except Exception as error:
            error.dataset = ds.copy(data=arrays)  # pyright: ignore[reportAttributeAccessIssue]
            raise
        finally:
            costs = {
                "wall_seconds": round(time.perf_counter() - began, 3),
                "evaluations_spent": int(np.sum(counters.get("evaluations", 0))),
                "evaluations_by_device": np.ravel(counters.get("evaluations", 0)).tolist(),
                "programs": len(units),
            }
            if target is not None and todo:
                target.record(costs, share)

    result = ds.copy(data=arrays)
    return result.assign_attrs(provenance([costs]) if target is None else target.finish())


def _snapshot(members: Members, finished: Finished, done: int, total: int) -> SweepSnapshot:
    numbers = [int(number) for number in finished.member_ids]
    results = finished.results
    statuses = [Status(int(code)).label for code in results.code] if numbers else []
    losses = [None] * len(numbers) if not numbers or results.loss is None else [float(x) for x in results.loss[1]]
    return SweepSnapshot(done, total, [members.coordinates(number) for number in numbers], statuses, losses)


class Unit(NamedTuple):
    """Members of one group that are to be run here, in one program."""

    number: int  # of the group
    group: Group
    missing: list[int]
    size: int  # members that are or were to be run here: a resumed sweep has the slots and devices that it had
    plan: Plan


def _run_unit(
    unit: Unit, members: Members, options: Options, checkpoint: Checkpoint | None, counters: dict[str, Any]
) -> Generator[Finished]:
    mesh = local_mesh(jax.local_devices()[: unit.size])
    together = mesh is not None or unit.plan.slots * unit.plan.workers > 1
    return run_queue(
        functools.partial(stack, members, unit.group, options=options),
        _longest_first(members, unit.missing, together),
        unit.group.shared,
        options,
        unit.plan,
        mesh=mesh,
        checkpoint=checkpoint,
        counters=counters,
    )


def _options(
    members: Members,
    ts: Any,
    solver: Any,
    rtol: float,
    atol: float | None,
    until: Until | None,
    max_steps: int,
    save_params: bool,
    limits: tuple[Any, Any] = (None, None),
) -> Options:
    firsts = [shape_group.first for shape_group in members.shape_groups]
    dtypes = {jnp.result_type(*jax.tree_util.tree_leaves(split(first.params)[0])) for first in firsts}
    control = check_tolerances(rtol, atol, max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps)))
    default = default_for(firsts, float(control.rtol)) if solver is None else None
    times = check_times(ts, members.latest)
    options = Options(times, solver, default, control, until, jnp.asarray(max_steps), save_params, *limits)
    for shape_group in members.shape_groups:
        try:
            shape_group.first.check_options(options)
        except ValueError as error:
            raise ValueError(f"At {members.describe(shape_group.members[0])}: {error}") from error
    return options


def _plan(members: Members, group: Group, options: Options, batch: int | None, count: int, results: int) -> Plan:
    one = at(stack(members, group, group.members[:1], options), 0)
    return plan(one, group.shared, options, batch, count, results)


def _longest_first(members: Members, missing: list[int], together: bool) -> list[int]:
    """The order in which members are admitted.

    Where several run at once, those that start smallest go first: a flow takes the longer to leave a saddle
    the nearer it starts. The order does not depend on what has finished so far, so that a sweep can be repeated.
    """
    return sorted(missing, key=lambda number: members.sizes[number]) if together else missing


def _check_build(build: Any, grid: Mapping[str, np.ndarray]) -> None:
    call = f"build({', '.join(f'{name}=...' for name in grid)})"
    _checks.check_callable("build", build, call)
    try:
        signature = inspect.signature(build)
    except ValueError:  # not known
        return
    try:
        signature.bind(**{name: values[0] for name, values in grid.items()})
    except TypeError as error:
        raise _checks.fail("build", f"be callable as {call}", f"one that takes {signature}") from error


def _check_axes(axes: Any) -> dict[str, np.ndarray]:
    if not isinstance(axes, Mapping) or not axes:
        actual = "empty" if isinstance(axes, Mapping) else f"of type {type(axes).__name__}"
        raise _checks.fail("axes", "be a dictionary name -> values with at least one axis", actual)
    grid = {}
    for name, values in axes.items():
        if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
            actual = f"{name!r}, which every sweep has" if name in RESERVED else repr(name)
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
