"""Ready-made studies, one question each: thin compositions of flows, rules, observables and sweeps.

They compute, and return an `xarray.Dataset`. A new study `x` is a function `x` in one file `_x.py` here, whose data set
carries the attribute `study`; a function of that name in `plot/_x.py`, its figure, and one in `tables/_x.py`, its text;
and one line in each `__init__.py`. By that name `gf.plot.draw`, `gf.tables.text` and `gradflow plot` find them. What it
asks, `QUESTION`, a quick version, `QUICK`, and the data sets, `load_data`, stand beside the study; a command for it,
whose options and sentences no name can tell, is one function in `cli/_studies.py`. Tests compare a study with a closed
form or another integrator.

For instance, how a quadratic decays from starts of several sizes:

>>> import gradflow as gf, jax.numpy as jnp
>>> flow = gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2))
>>> def decay(scales=(0.5, 1.0), **options):
...     axes, observe = {"scale": list(scales)}, {"norm": gf.observables.ParameterNorm()}
...     ds = gf.sweep(lambda scale: (flow, scale * jnp.ones(1)), axes, [0.0, 1.0], observe=observe, **options)
...     return ds.assign_attrs(study="decay")
>>> ds = decay(progress=False)
>>> ds.attrs["study"], [round(float(norm), 3) for norm in ds.norm.sel(time=1.0)]
('decay', [0.184, 0.368])
"""

import collections.abc as _abc

from gradflow.studies._circle import circle_illustration as circle_illustration
from gradflow.studies._compare import compare as compare
from gradflow.studies._compare import steps_to_match as steps_to_match
from gradflow.studies._discrete_gap import discrete_gap as discrete_gap
from gradflow.studies._early_stage import early_stage as early_stage
from gradflow.studies._edge import edge as edge
from gradflow.studies._exponent_map import exponent_map as exponent_map
from gradflow.studies._mean_field import mean_field as mean_field
from gradflow.studies._momentum import momentum as momentum
from gradflow.studies._momentum import movement_slope as movement_slope
from gradflow.studies._optimal_schedule import OptimalSchedule as OptimalSchedule
from gradflow.studies._optimal_schedule import optimal_schedule as optimal_schedule
from gradflow.studies._phase_diagram import phase_diagram as phase_diagram
from gradflow.studies._phase_map import phase_map as phase_map
from gradflow.studies._small_init import small_init as small_init
from gradflow.studies._two_directions import escape_slopes as escape_slopes
from gradflow.studies._two_directions import two_directions as two_directions
from gradflow.studies._vanishing_init import vanishing_init as vanishing_init

_WITH_OLD_TABLES = (
    "circle",
    "compare",
    "early_stage",
    "mean_field",
    "momentum",
    "phase_diagram",
    "small_init",
    "two_directions",
    "vanishing_init",
)
"""Studies whose tables have a name here as well, `small_init_table` for `gf.tables.small_init`; new ones have none."""


def __getattr__(name: str) -> _abc.Callable[..., str]:
    # The one import that runs up the order of the rooms: nothing in this room takes it, only a user of an old name.
    if not name.endswith("_table") or name.removesuffix("_table") not in _WITH_OLD_TABLES:
        raise AttributeError(f"module 'gradflow.studies' has no attribute {name!r}")
    from gradflow import tables

    return getattr(tables, name.removesuffix("_table"))


def __dir__() -> list[str]:
    return sorted({*globals(), *(f"{name}_table" for name in _WITH_OLD_TABLES)})
