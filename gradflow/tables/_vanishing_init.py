"""The study of vanishing initialisation, as text."""

import numpy as np
import xarray as xr


def vanishing_init(ds: xr.Dataset) -> str:
    """One line per network and start, and a summary of directions and saddles.

    **Arguments**: `ds`: what `gradflow.studies.vanishing_init` returned. **Returns** lines of text.
    """
    about = ds.attrs
    lines = [f"data: {about['data']}; {about['loss']} loss; ReLU smoothed over {about['smoothing']:g}"]
    lines.append(f"{'width':>6} {'seed':>5} {'scale':>8} {'escape':>10} {'predicted':>10} {'gradients':>10}")
    for width in ds.width.values:
        for seed in ds.seed.values:
            for exponent in ds.exponent.values:
                row = ds.sel(width=width, seed=seed, exponent=exponent)
                lines.append(
                    f"{width:6d} {seed:5d} {f'1e-{exponent:g}':>8} {float(row.escape_time):10.3f}"
                    f" {float(row.predicted_time):10.3f} {int(row.gradient_evaluations):10d}"
                )
    if "slope" in ds:
        off = np.abs(ds.slope / ds.predicted_slope - 1).values
        lines.append(f"slope of the escape time against the predicted 1/(2 N): off by {np.nanmax(off):.1e} at most")
    off = np.abs(ds.cartesian_time / ds.escape_time - 1).values
    if np.isfinite(off).any():
        lines.append(
            f"plain coordinates at rtol 1e-3, atol 1e-6: escape time off by up to {100 * np.nanmax(off):.0f} %"
        )
    exponent = -float(ds.log) / np.log(10)
    lines.append(
        f"at the escape from 1e-{exponent:g}: {int(ds.aligned.sum())} neurons have grown and point where predicted,"
        f" {int(ds.collapsed.sum())} have shrunk or stayed, of {int(np.sum(ds.width.values)) * ds.sizes['seed']};"
        f" relative KKT residual {float(ds.residual.min()):.1e} to {float(ds.residual.max()):.1e}"
    )
    saddles = ", ".join(
        f"{t:.1f} (loss {v:.3g})" for t, v in zip(ds.saddle_time.values, ds.saddle_loss.values, strict=True)
    )
    lines.append(f"saddles predicted by alternating gradient flow, from 1e-{exponent:g}, first network: {saddles}")
    lines.append("escape: |w| = 1e-2. predicted: to leading order in ln(1/scale), without the time of alignment")
    return "\n".join(lines)
