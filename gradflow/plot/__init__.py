"""Figures: each function reads a data set, or the result of a run, and returns a matplotlib figure.

A new figure is one file here, `_x.py` with a function `x` that belongs to the study in `studies/_x.py`, and one line
below; `draw` finds it by the attribute `study` of the data set. Nothing is run here, and no window opened:

>>> import matplotlib.figure, numpy as np, xarray as xr
>>> def decay(ds):
...     drawn = matplotlib.figure.Figure(figsize=(3.5, 2.5))
...     ax = drawn.subplots()
...     ax.semilogy(ds.time, ds.loss)
...     ax.set(xlabel="flow time $t$", ylabel="loss", title="decay")
...     return drawn
>>> t = np.array([0.0, 1.0])
>>> [ax.get_title() for ax in decay(xr.Dataset({"loss": ("time", np.exp(-t))}, {"time": t})).axes]
['decay']
"""

from gradflow.plot._animate import animate as animate
from gradflow.plot._circle import circle as circle
from gradflow.plot._compare import compare as compare
from gradflow.plot._draw import draw as draw
from gradflow.plot._early_stage import early_stage as early_stage
from gradflow.plot._edge import edge as edge
from gradflow.plot._mean_field import mean_field as mean_field
from gradflow.plot._members import members as members
from gradflow.plot._momentum import momentum as momentum
from gradflow.plot._phase import phase as phase
from gradflow.plot._phase_diagram import phase_diagram as phase_diagram
from gradflow.plot._small_init import small_init as small_init
from gradflow.plot._solution import solution as solution
from gradflow.plot._stored_run import stored_run as stored_run
from gradflow.plot._style import save as save
from gradflow.plot._two_directions import two_directions as two_directions
from gradflow.plot._vanishing_init import vanishing_init as vanishing_init
