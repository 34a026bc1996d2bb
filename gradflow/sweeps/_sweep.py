"""`sweep`: a grid of flows or rules, run a few at a time and returned as one labelled data set."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import xarray as xr
from jaxtyping import ArrayLike, PyTree

from gradflow import _checks
from gradflow._solution import Status
from gradflow.runs._member import Options, Solver
from gradflow.runs._progress import Bar
from gradflow.runs._record import Observable
from gradflow.runs._until import Until
from gradflow.sweeps._callback import AxisValue, SweepSnapshot
from gradflow.sweeps._checkpoint import Checkpoint
from gradflow.sweeps._groups import Group, stack
from gradflow.sweeps._launch import Executor, check_share, launch_jobs
from gradflow.sweeps._members import Members
from gradflow.sweeps._memory import Plan, announcement, plan
from gradflow.sweeps._prepare import Prepared, prepare
from gradflow.sweeps._program import at
from gradflow.sweeps._results import Results
from gradflow.sweeps._scheduler import Costs, Finished, run_queue
from gradflow.sweeps._settings import ObservablesOf, Settings, check_axes, check_build, check_settings
from gradflow.sweeps._slots import local_mesh


def sweep(
    build: Callable[..., tuple],
    axes: Mapping[str, Iterable[AxisValue]],
    ts: ArrayLike | Sequence[float],
    *,
    observe: Mapping[str, Observable] | ObservablesOf | None = None,
    solver: Solver | None = None,
    rtol: float = 1e-5,
    atol: float | None = None,
    save_params: bool = False,
    until: Until | None = None,
    max_steps: int = 100_000,
    jumps: ArrayLike | Sequence[float] | None = None,
    longest_step: float | None = None,
    store: str | os.PathLike[str] | None = None,
    resume: bool = True,
    batch: int | None = None,
    pad: bool | None = None,
    chunk: tuple[int, int] | None = None,
    launch: Executor | None = None,
    jobs: int = 8,
    progress: bool = True,
    trainable: PyTree = None,
    callback: Callable[[SweepSnapshot], object] | None = None,
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
    limits = jumps, longest_step
    settings = Settings(observe, solver, rtol, atol, save_params, until, max_steps, *limits, batch, pad, trainable)
    grid = check_axes(axes)
    check_build(build, grid)
    check_settings(settings, callback)
    share = check_share(chunk, store, resume)
    if launch is not None:
        if callback is not None:
            raise _checks.fail("callback", "be None where jobs are launched", "given", "They run in other processes.")
        job = functools.partial(sweep, build, axes, ts, **settings._asdict(), store=store, progress=False)
        return launch_jobs(launch, jobs, job, store, resume, share, progress)
    prepared = prepare(build, grid, ts, settings, sketches=store is not None)
    results, costs = Results(prepared, store, share, resume), Costs()
    units = _units(prepared, results, batch)
    with Bar("sweep", len(results.mine), unit="members", done=results.done, show=progress) as bar:
        notice = announcement([unit.plan for unit in units]) if units else None
        if notice is not None:
            bar.write(notice)
        try:
            with contextlib.closing(_finished(units, prepared, results, costs)) as queue:
                for finished in queue:
                    results.keep(finished)
                    bar.reach(results.done)
                    if callback is not None:
                        callback(_snapshot(prepared.members, finished, results))
        except Exception as error:
            error.dataset = results.dataset()  # pyright: ignore[reportAttributeAccessIssue]
            raise
        finally:
            results.record(time.perf_counter() - began, costs.evaluations, len(units))
    return results.finish()


def _snapshot(members: Members, finished: Finished, so_far: Results) -> SweepSnapshot:
    numbers = [int(number) for number in finished.member_ids]
    results, total = finished.results, len(so_far.mine)
    statuses = [Status(int(code)).label for code in results.code] if numbers else []
    losses = [None] * len(numbers) if not numbers or results.loss is None else [float(x) for x in results.loss[1]]
    return SweepSnapshot(so_far.done, total, [members.coordinates(number) for number in numbers], statuses, losses)


class Unit(NamedTuple):
    """Members of one group that are to be run here, in one program."""

    number: int  # of the group
    group: Group
    missing: list[int]
    size: int  # members that are or were to be run here: a resumed sweep has the slots and devices that it had
    plan: Plan


def _units(prepared: Prepared, results: Results, batch: int | None) -> list[Unit]:
    """The groups of which members are missing."""
    units = []
    for number, group in enumerate(prepared.groups):
        missing = [i for i in group.members if i in results.todo]
        size = len(results.mine.intersection(group.members))
        if missing:
            one = at(stack(prepared.members, group, group.members[:1], prepared.options), 0)
            planned = plan(one, group.shared, prepared.options, batch, size, prepared.empty.nbytes)
            units.append(Unit(number, group, missing, size, planned))
    return units


def _finished(units: list[Unit], prepared: Prepared, results: Results, costs: Costs) -> Generator[Finished]:
    """What has finished, unit by unit and segment by segment."""
    for unit in units:
        checkpoint = results.checkpoint(unit.number)
        with contextlib.closing(_run_unit(unit, prepared.members, prepared.options, checkpoint, costs)) as queue:
            yield from queue


def _run_unit(
    unit: Unit, members: Members, options: Options, checkpoint: Checkpoint | None, costs: Costs
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
        costs=costs,
    )


def _longest_first(members: Members, missing: list[int], together: bool) -> list[int]:
    """The order in which members are admitted.

    Where several run at once, those that start smallest go first: a flow takes the longer to leave a saddle
    the nearer it starts. The order does not depend on what has finished so far, so that a sweep can be repeated.
    """
    return sorted(missing, key=lambda number: members.sizes[number]) if together else missing
