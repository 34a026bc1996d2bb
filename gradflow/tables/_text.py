"""`text`: the table that belongs to a stored study."""

import xarray as xr

from gradflow.studies._by_name import function_for, with_current_names


def text(ds: xr.Dataset) -> str:
    """The table of the study that wrote a data set, by its attribute `study`.

    **Arguments**: `ds`: what a study returned, or its store opened. **Returns** lines of text.

    **Raises** `ValueError` for a data set that no study wrote.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.GradientDescent(lambda w: 0.5 * w**2, learning_rate=0.1)
    >>> ds = gf.compare(rule, jnp.array(1.0), [0.2, 0.1], 1.0, rtol=1e-5)
    >>> gf.tables.text(ds) == gf.tables.compare(ds)
    True
    """
    advice = (
        "An interrupted study gets it when it is run to its end;"
        " a plain sweep has no ready-made table: `print(ds)` shows what it holds."
    )
    return function_for(ds, "gradflow.tables", advice)(with_current_names(ds))
