"""The study of infinite width, as text."""

import xarray as xr

from gradflow.studies._mean_field import power_of_width


def mean_field(ds: xr.Dataset) -> str:
    """Deviation and bias by depth and width beside the prediction, their slopes, SGD, and rules of nodes.

    **Arguments**: `ds`: what `gradflow.studies.mean_field` returned. **Returns** lines of text.
    """
    lines = [
        f"data: {ds.attrs['data']}, {ds.sizes['sample']} samples; tanh, mean-field scaling, to t = {ds.time[-1]:g}"
    ]
    unmet = "" if bool(ds.get("limit_converged", True)) else "; the accuracy asked for was not reached"
    lines.append(f"limit of two hidden layers: predictions to {float(ds.limit_error):.1e} (estimate{unmet})")
    lines.append(f"{'depth':>5} {'width':>6} {'deviation':>10} {'predicted':>9} {'bias':>9} {'noise':>9}")
    for depth in ds.depth.values:
        for width in ds.width.values:
            row = ds.sel(depth=depth, width=width)
            predicted = f"{float(row.predicted_deviation):9.2e}" if depth == 2 else " " * 9
            lines.append(
                f"{depth:5d} {width:6d} {float(row.deviation):10.2e} {predicted} {float(row.bias):9.2e}"
                f" {float(row.bias_noise):9.2e}"
            )
    for depth in ds.depth.values if ds.sizes["width"] > 1 else []:
        row = ds.sel(depth=depth)
        resolved = (row.bias > 3 * row.bias_noise).values
        line = f"slope of the deviation, depth {depth}: {float(row.slope):+.2f} (theory -1/2)"
        if resolved.sum() > 1:
            slope = power_of_width(row.width.values[resolved], row.bias.values[resolved])
            line += f"; of the bias, where it exceeds its noise: {slope:+.2f} (-1)"
        lines.append(line)
    cells = ", ".join(f"{n}: {d:.1e}" for n, d in zip(ds.sgd_width.values, ds.sgd_deviation.values, strict=True))
    slope = f"; slope {float(ds.sgd_slope):+.2f} (theory -1/2)" if ds.sizes["sgd_width"] > 1 else ""
    lines.append(f"deviation of SGD by width: {cells}{slope}")
    for rule in ds.rule.values if ds.sizes["node_count"] else []:
        row = ds.sel(rule=rule)
        cells = ", ".join(f"{n}: {e:.1e}" for n, e in zip(row.nodes_used.values, row.node_error.values, strict=True))
        lines.append(f"error by nodes of the first layer, {rule}: {cells}")
    return "\n".join(lines)
