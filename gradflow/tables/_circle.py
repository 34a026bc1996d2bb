"""What the illustration on the circle shows, as text."""

import numpy as np
import xarray as xr

from gradflow.studies._circle import SMALL


def circle(ds: xr.Dataset) -> str:
    """Angles of the KKT points, how many neurons point there while small, and how far descent is from its flow.

    **Arguments**: `ds`: what `gradflow.studies.circle_illustration` returned. **Returns** lines of text.
    """
    risk = ds.risk.values
    kkt = np.rad2deg(ds.kkt_angle.values)
    small = np.flatnonzero(ds.norm.sel(run="flow").values < SMALL)
    row = int(small[-1]) if small.size else 0
    angle, norm = ds.polar_angle.sel(run="flow").values[row], float(ds.norm.sel(run="flow")[row])
    nearest = np.min(np.abs(np.angle(np.exp(1j * (angle[:, None] - ds.kkt_angle.values)))), axis=1)
    gap = float(np.max(np.abs(risk[0] - risk[1])) / risk[1, 0])
    return "\n".join(
        [
            f"width {ds.attrs['width']}, scale {ds.attrs['scale']:g}, learning rate {ds.attrs['learning_rate']:g}",
            f"KKT points of one neuron at {', '.join(f'{a:.1f}' for a in kkt)} degrees",
            f"at |w| = {norm:.1e}, t = {float(ds.time[row]):.3f}: "
            f"{int(np.sum(nearest < 0.05))} of {angle.size} neurons within 0.05 of one of them",
            f"loss {risk[1, 0]:.4g} -> {risk[1, -1]:.4g} along the flow, {risk[0, -1]:.4g} by descent",
            f"gap between the two loss curves: {gap:.1e} of the first loss at most",
        ]
    )
