"""The figure of the illustration on the circle."""

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from gradflow.plot._legends import clear_legends
from gradflow.plot._style import STYLE, figure


def circle(ds: xr.Dataset) -> Figure:
    """Loss, norm and polar angles of neurons over iterations: gradient descent, its flow, and the KKT angles.

    **Arguments**: `ds`: what `gradflow.studies.circle_illustration` returned.

    **Returns** a matplotlib figure; see `save`.
    """
    with matplotlib.rc_context(STYLE):
        drawn = figure(figsize=(8, 2.6))
        loss, norm, angles = drawn.subplots(1, 3)
        iterations = ds.time.values / ds.attrs["learning_rate"]
        styles = {"descent": {"color": "0.6", "linewidth": 3.0}, "flow": {"color": "black", "linewidth": 1.0}}
        names = {"descent": "gradient descent", "flow": "gradient flow"}
        for method in ds.run.values:
            row = ds.sel(run=method)
            loss.plot(iterations, row.risk, label=names[str(method)], **styles[str(method)])
            norm.plot(iterations, row.norm, **styles[str(method)])
            width = 1.6 if method == "descent" else 0.5
            for j in range(ds.sizes["neuron"]):
                degrees = np.rad2deg(row.polar_angle[:, j])
                angles.plot(iterations, degrees, color=styles[str(method)]["color"], linewidth=width)
        for k, angle in enumerate(np.rad2deg(ds.kkt_angle.values)):
            angles.axhline(angle, color="tab:red", linestyle="--", linewidth=0.9, label=None if k else "KKT points")
        # Twice as far as the loss takes to fall to a hundredth.
        done = np.flatnonzero(ds.risk.values[-1] < 0.01 * ds.risk.values[-1, 0])
        last = 2 * iterations[done[0]] if done.size else iterations[-1]
        for ax in (loss, norm, angles):
            ax.set_xlim(0, min(last, iterations[-1]))
        angles.legend(loc="upper right")
        loss.legend(loc="upper right")
        loss.set(title="training loss", xlabel="iterations", ylabel="loss", ylim=(0, None))
        norm.set(title="norm of the weights", xlabel="iterations", ylabel=r"$\|w\|$", yscale="log")
        angles.set(title="angles of the neurons", xlabel="iterations", ylabel="degrees", ylim=(-180, 180))
        angles.set_yticks([-180, -90, 0, 90, 180])
        return clear_legends(drawn)
