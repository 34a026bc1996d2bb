"""`draw`: the figure that belongs to a stored study or run."""

import xarray as xr
from matplotlib.figure import Figure

from gradflow.plot._stored_run import stored_run
from gradflow.stores._run_store import KIND as RUN
from gradflow.studies._by_name import function_for, with_current_names


def draw(ds: xr.Dataset) -> Figure:
    """The figure of the study that wrote a data set, by its attribute `study`, or of a run that is kept in a store.

    **Arguments**: `ds`: what a study returned, or a store opened. **Returns** a matplotlib figure; see `save`.

    **Raises** `ValueError` for a data set that no study wrote.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.GradientDescent(lambda w: 0.5 * w**2, learning_rate=0.1)
    >>> ds = gf.compare(rule, jnp.array(1.0), [0.2, 0.1], 1.0, rtol=1e-5)
    >>> [ax.get_title() for ax in gf.plot.draw(ds).axes][0]
    'GradientDescent against its flow'
    """
    if RUN in ds.attrs:
        return stored_run(ds)
    advice = (
        "An interrupted study gets it when it is run to its end;"
        " a plain sweep has no ready-made figure: use xarray's own `ds[name].plot()`."
    )
    return function_for(ds, "gradflow.plot", advice)(with_current_names(ds))
