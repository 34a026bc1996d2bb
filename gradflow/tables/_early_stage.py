"""The study of early training, as text."""

import numpy as np
import xarray as xr

from gradflow._solution import Status


def early_stage(ds: xr.Dataset) -> str:
    """Loss drops by loss, samples without a living neuron, forbidden switches, and the late phase.

    **Arguments**: `ds`: what `gradflow.studies.early_stage` returned. **Returns** lines of text.
    """
    lines = [
        f"loss drop within 1/eta steps, at width {ds.attrs['middle_width']} and eta {ds.attrs['middle_rate']:g}",
        f"{'loss':<14} {'over widths':>20} {'over rates':>20} {'SGD / descent':>20} {'width needed':>13}",
    ]
    for name in ds.loss.values:
        row = ds.sel(loss=name)
        middle = float(row.drop_rate.sel(rate=ds.attrs["middle_rate"]))
        spans = [f"{float(v.min()):.4g} ... {float(v.max()):.4g}" for v in (row.drop_width, row.drop_rate)]
        ratio = row.drop_batch / middle
        lines.append(
            f"{name!s:<14} {spans[0]:>20} {spans[1]:>20}"
            f" {f'{float(ratio.min()):.3f} ... {float(ratio.max()):.3f}':>20} {float(row.width_needed):13g}"
        )
    narrow, wide = int(ds.width[0]), int(ds.width[-1])
    left = [
        f"{name} {float(row[0]):g}, {float(row[-1]):g}" for name, row in zip(ds.loss.values, ds.uncovered, strict=True)
    ]
    lines.append(
        f"samples without a living neuron of their class then, at widths {narrow} and {wide}: {'; '.join(left)}"
    )
    lines.append(
        f"condition for monotone sets: {ds.attrs['condition']}; labels shuffled: {ds.attrs['control_condition']}"
    )
    for data_name in ds["data"].values:
        row = ds.sel(data=data_name)
        text = ", ".join(
            f"{path} {int(row.violations.sel(path=path))} of {int(row.events.sel(path=path))}"
            for path in ds.path.values
        )
        lines.append(f"switches out of true-living or false-dead, {data_name}: {text}")
    for name in ds.late_loss.values:
        row = ds.sel(late_loss=name)
        risk = row.risk.values
        last = int(np.flatnonzero(np.isfinite(risk))[-1])
        t = float(ds.late_time[last])
        note = "" if float(row.margin[last]) > 0 else " (not separated: no maximum-margin problem)"
        left = int(row.uncovered_late[last])
        note += f"; {left} samples without a living neuron of their class" if left else ""
        lines.append(
            f"{name}: t * loss = {t * risk[last]:.3g} at t = {t:.2g} ({Status(int(row.late_status)).label},"
            f" {int(row.late_gradient_evaluations)} gradients), at most {np.nanmax(ds.late_time.values * risk):.3g};"
            f" normalised margin {float(row.margin[last]):.3g}, KKT residual {float(row.residual[last, 0]):.2g},"
            f" {float(row.residual[last, 1]):.2g}{note}"
        )
    return "\n".join(lines)
