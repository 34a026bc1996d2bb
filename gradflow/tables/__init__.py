"""Text: each function reads the data set of a study and returns its table, as lines to be printed.

A new table is one file here, `_x.py` with a function `x` that belongs to the study in `studies/_x.py`, and one line
below; `text` finds it by the attribute `study` of the data set. Nothing is run here: what a table shows, a study has
computed. For a study `decay`, for instance:

>>> import numpy as np, xarray as xr
>>> def decay(ds):
...     lines = [f"{'time':>6} {'loss':>9}"]
...     lines += [f"{t:6.1f} {loss:9.2e}" for t, loss in zip(ds.time.values, ds.loss.values, strict=True)]
...     return "\\n".join([*lines, f"loss at the end: {ds.loss.values[-1]:.2e}"])
>>> t = np.array([0.0, 1.0])
>>> print(decay(xr.Dataset({"loss": ("time", np.exp(-t))}, {"time": t}, {"study": "decay"})))
  time      loss
   0.0  1.00e+00
   1.0  3.68e-01
loss at the end: 3.68e-01
"""

from gradflow.tables._circle import circle as circle
from gradflow.tables._compare import compare as compare
from gradflow.tables._early_stage import early_stage as early_stage
from gradflow.tables._edge import edge as edge
from gradflow.tables._mean_field import mean_field as mean_field
from gradflow.tables._momentum import momentum as momentum
from gradflow.tables._phase_diagram import phase_diagram as phase_diagram
from gradflow.tables._small_init import small_init as small_init
from gradflow.tables._text import text as text
from gradflow.tables._two_directions import two_directions as two_directions
from gradflow.tables._vanishing_init import vanishing_init as vanishing_init
