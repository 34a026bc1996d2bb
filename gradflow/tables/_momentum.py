"""The momentum study, as text."""

import numpy as np
import xarray as xr

from gradflow._solution import Status
from gradflow.studies._momentum import movement_slope


def momentum(ds: xr.Dataset) -> str:
    """Rates and winners beside the predictions, movement against width, gaps to the flows and their cost.

    **Arguments**: `ds`: what `gradflow.studies.momentum` returned. **Returns** lines of text.
    """
    s, steps = ds.attrs["learning_rate"], ds.attrs["steps"]
    low, high = float(ds.eigenvalue[0]), float(ds.eigenvalue[-1])
    lines = [
        f"{ds.attrs['data']}, {ds.attrs['samples']} samples; tangent kernel from {low:.3g} to {high:.3g},"
        f" learning rate {s:.3g}, {steps} steps",
        "",
        f"{'mu / min':>12} {'method':>12} {'rate':>10} {'predicted':>10} {'faster':>12} {'predicted':>12}",
    ]
    for i, ratio in enumerate(ds.ratio.values):
        for j, name in enumerate(ds.momentum.values):
            verdict = f" {ds.winner.values[i]:>12} {ds.predicted_winner.values[i]:>12}" if j == 0 else ""
            rates = f"{float(ds.final_rate[j, i]):10.4g} {float(ds.predicted_final_rate[j, i]):10.4g}"
            lines.append(f"{ratio:12g} {name:>12} {rates}{verdict}")
    lines += [
        "rate: of the residuals, per unit of t = k sqrt(s), over the second half of the run; widest network",
        "predicted: of the slowest mode of the tangent kernel at the start",
        "",
        f"{'width':>12} {'method':>18} {'movement':>10} {'distance':>10} {'linear error':>13} {'final loss':>11}",
    ]
    middle = ds.isel(ratio=ds.sizes["ratio"] // 2)
    slope = movement_slope(middle)
    for i, name in enumerate(ds.rule.values):
        for j, width in enumerate(ds.width.values):
            part = middle.isel(rule=i, width=j)
            ended = Status(int(part.status)).label
            loss = f"{float(part.loss[-1]):11.3g}" if ended == "ok" else f"{ended:>11}"
            cells = f"{float(part.movement):10.3g} {float(part.distance):10.3g} {float(part.linear_error):13.2%}"
            lines.append(f"{width:12d} {name:>18} {cells} {loss}")
        if np.isfinite(slope.values[i]):
            lines.append(f"{'':12} {'':>18} largest movement of a neuron ~ width^{float(slope[i]):.2f}")
    lines += [
        f"mu / min = {float(middle.ratio):g}; linear error: of the predictions of the linearised flow",
        "",
        f"{'method':>12} {'resolution':>11} {'gap':>10} {'gradients':>10} {'of the method':>14}",
    ]
    for i, name in enumerate(ds.momentum.values):
        for j, resolution in enumerate(ds.resolution.values):
            gap = float(middle.flow_gap[i, j].max())
            cost = int(middle.flow_gradient_evaluations[i, j])
            lines.append(f"{name:>12} {resolution:>11} {gap:10.2e} {cost:10d} {steps:14d}")
    width = ds.width.values[0]
    lines.append(f"gap: largest distance from the method to its flow, over the distance travelled; width {width}")
    return "\n".join(lines)
