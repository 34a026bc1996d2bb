"""A sweep made ready to run: its members built and grouped, the options they share, the data set to be filled."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import ArrayLike

from gradflow._tree import split
from gradflow.flows import AbstractFlow
from gradflow.rules import AbstractRule
from gradflow.runs._arguments import check_jumps, check_longest_step, check_times, check_tolerances
from gradflow.runs._member import Options, default_for
from gradflow.runs._record import Observable, check_observe
from gradflow.sweeps._dataset import Row, configuration, row_of, solvers_of, template
from gradflow.sweeps._groups import Group, group_members
from gradflow.sweeps._identity import Codes, codes_of
from gradflow.sweeps._members import Members
from gradflow.sweeps._settings import ObservablesOf, Settings


class Prepared(NamedTuple):
    """Members in groups of one program each, and the data set with nothing in it yet."""

    members: Members
    options: Options
    codes: Codes
    groups: list[Group]
    rows: list[Row]  # of every shape group
    empty: xr.Dataset


def prepare(
    build: Callable[..., tuple],
    grid: dict[str, np.ndarray],
    ts: ArrayLike | Sequence[float],
    settings: Settings,
    *,
    sketches: bool,
) -> Prepared:
    """Builds all members. `sketches`: with what a store knows them by on another machine."""
    values = {name: values.tolist() for name, values in grid.items()}
    members = Members(build, values, _observables_from(settings.observe), settings.trainable, sketches=sketches)
    options = options_for(members, ts, settings)
    codes = codes_of(members, list(solvers_of(members, options).values()), settings.until)
    options = dataclasses.replace(options, code=str(codes))
    groups = group_members(members, options, settings.pad)
    rows = [row_of(shape_group.first, options) for shape_group in members.shape_groups]
    empty = template(grid, members, rows, options, configuration(grid, members, options))
    return Prepared(members, options, codes, groups, rows, empty)


def options_for(members: Members, ts: ArrayLike | Sequence[float], settings: Settings) -> Options:
    """What all members have in common, checked."""
    limits = check_jumps(settings.jumps), check_longest_step(settings.longest_step)
    firsts = [shape_group.first for shape_group in members.shape_groups]
    dtypes = {jnp.result_type(*jax.tree_util.tree_leaves(split(first.params)[0])) for first in firsts}
    coarsest = max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps))
    control = check_tolerances(settings.rtol, settings.atol, coarsest)
    default = default_for(firsts, float(control.rtol)) if settings.solver is None else None
    times, max_steps = check_times(ts, members.latest), jnp.asarray(settings.max_steps)
    options = Options(
        times, settings.solver, default, control, settings.until, max_steps, settings.save_params, *limits
    )
    for shape_group in members.shape_groups:
        try:
            shape_group.first.check_options(options)
        except ValueError as error:
            raise ValueError(f"At {members.describe(shape_group.members[0])}: {error}") from error
    return options


def _observables_from(
    observe: Mapping[str, Observable] | ObservablesOf | None,
) -> Callable[[AbstractFlow | AbstractRule], dict[str, Observable]]:
    """What is observed, checked, as a function of the flow or rule of a member."""
    if callable(observe):
        return functools.partial(_observables_of, observe)
    fixed = check_observe(observe)
    return lambda what: fixed


def _observables_of(observe: ObservablesOf, what: AbstractFlow | AbstractRule) -> dict[str, Observable]:
    return check_observe(observe(what))
