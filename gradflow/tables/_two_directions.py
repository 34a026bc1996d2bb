"""The study of two nearby directions, as text."""

import xarray as xr

from gradflow.studies._two_directions import escape_slopes


def two_directions(ds: xr.Dataset) -> str:
    """Ends of the phases and sliding neurons by angle, slopes of the escape time, and where descent sticks.

    **Arguments**: `ds`: what `gradflow.studies.two_directions` returned. **Returns** lines of text.
    """
    lines = [
        f"two directions, {ds.attrs['ratio']} copies to one, width {ds.attrs['width']}: ends of the phases",
        f"{'angle':>8} {'condensed':>10} {'escaped':>10} {'predicted':>10} {'separated':>11} {'law error':>10}"
        f" {'slide':>6} {'at end':>7} {'until t D^2':>12} {'stationarity':>13} {'slackness':>10} {'gradients':>10}",
    ]
    for angle in ds.angle.values:
        row = ds.sel(angle=angle)
        ends = [float(end) for end in row.phase_end]
        lines.append(
            f"{angle:8.4g} {ends[0]:10.4g} {ends[1]:10.4g} {float(row.predicted_escape_time):10.4g} {ends[2]:11.4g}"
            f" {float(row.law_error):10.2%} {int(row.sliding.max()):6d} {int(row.sliding[-1]):7d}"
            f" {float(row.slide_until):12.4g} {float(row.residual[-1, 0]):13.2g} {float(row.residual[-1, 1]):10.2g}"
            f" {int(row.gradient_evaluations):10d}"
        )
    slopes = escape_slopes(ds)
    if slopes.size:
        lines.append(
            f"slope of the escape time in the angle, from pair to pair: {', '.join(f'{s:.3f}' for s in slopes)}"
        )
    lines.append(f"plateau over 2 sqrt(p) / (1 + p): {', '.join(f'{float(v):.4f}' for v in ds.plateau_loss)}")
    lines.append(
        f"descent, step {ds.attrs['learning_rate']:g}, angle {float(ds.angle[0]):g}:"
        f" loss {float(ds.descent_risk[-1]):.3g}"
        f" at t = {float(ds.descent_time[-1]):.3g}, {int(ds.descent_alive[-1])} negative neurons left;"
        f" the flow {float(ds.flow_risk[-1]):.3g}, {int(ds.sliding[0, -1])} sliding"
    )
    return "\n".join(lines)
