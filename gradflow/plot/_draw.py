"""`draw`: the figure that belongs to a stored study."""

import xarray as xr
from matplotlib.figure import Figure

from gradflow._checks import fail
from gradflow.plot._compare import compare
from gradflow.plot._early_stage import early_stage, two_directions
from gradflow.plot._mean_field import mean_field
from gradflow.plot._momentum import momentum
from gradflow.plot._phase_diagram import phase_diagram
from gradflow.plot._small_init import small_init
from gradflow.plot._vanishing_init import circle, vanishing_init

FIGURES = {
    "small-init": small_init,
    "vanishing-init": vanishing_init,
    "circle": circle,
    "compare": compare,
    "mean-field": mean_field,
    "momentum": momentum,
    "phase-diagram": phase_diagram,
    "early-stage": early_stage,
    "two-directions": two_directions,
}


def draw(ds: xr.Dataset) -> Figure:
    """The figure of the study that wrote a data set, by its attribute `study`.

    **Arguments**: `ds`: what a study returned, or its store opened. **Returns** a matplotlib figure; see `save`.

    **Raises** `ValueError` for a data set that no study wrote.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.GradientDescent(lambda w: 0.5 * w**2, learning_rate=0.1)
    >>> ds = gf.compare(rule, jnp.array(1.0), [0.2, 0.1], 1.0, rtol=1e-5)
    >>> [ax.get_title() for ax in gf.plot.draw(ds).axes][0]
    'GradientDescent against its flow'
    """
    study = ds.attrs.get("study")
    if study not in FIGURES:
        listed = ", ".join(repr(name) for name in FIGURES)
        advice = (
            "An interrupted study gets it when it is run to its end;"
            " a plain sweep has no ready-made figure: use xarray's own `ds[name].plot()`."
        )
        raise fail("ds", f"carry the attribute `study`, one of {listed}", repr(study), advice)
    return FIGURES[study](ds)
