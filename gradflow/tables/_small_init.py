"""The small-initialisation study, as text."""

import numpy as np
import xarray as xr


def small_init(ds: xr.Dataset) -> str:
    """One block per loss, with one line per scale, and what the columns are.

    **Arguments**: `ds`: what `gradflow.studies.small_init` returned. **Returns** lines of text.

    >>> import gradflow as gf
    >>> data = gf.data.digits(classes=(0, 1), n=20, centre=True, unit_norm=True, labels="pm1")
    >>> few = {"loss_names": ["square"], "widths": [4], "seeds": [0], "scales": [1e-1], "rtol": 1e-3}
    >>> ds = gf.studies.small_init(data, **few, saves=21, progress=False)
    >>> gf.tables.small_init(ds).splitlines()[1].split()[0]
    'scale'
    """
    lines = []
    for loss in ds.loss.values:
        part = ds.sel(loss=loss)
        widths, seeds = (", ".join(str(int(value)) for value in ds[name].values) for name in ("width", "seed"))
        lines.append(f"{loss} loss, width {widths}, seed {seeds}, data: {ds.attrs['data']}")
        lines.append(
            f"{'scale':>9} {'escape time':>18} {'predicted':>9} {'leading order':>13} {'aligned':>8}"
            f" {'flow gradients':>15} {'flow error':>11} {'descent steps to match':>23}"
        )
        for scale in ds.scale.values:
            row = part.sel(scale=scale)
            times = row.escape_time.values
            spread = f"{np.nanmean(times):.2f}" if np.isfinite(times).any() else "not seen"
            spread += f" +- {np.nanstd(times):.2f}" if np.isfinite(times).sum() > 1 else ""
            cost = float(row.gradient_evaluations.mean())
            steps = float(row.descent_steps)
            needed = f"{steps:,.0f}" if np.isfinite(steps) else "-"
            # Older stores do not hold the first.
            whole = f"{float(row.predicted_time_from_start.mean()):.2f}" if "predicted_time_from_start" in row else "-"
            fore = f"{whole:>9} {float(row.predicted_time.mean()):13.2f}"
            fore += f" {f'{100 * float(row.aligned.mean()):.0f} %':>8}"
            lines.append(f"{scale:9.0e} {spread:>18} {fore} {cost:15.0f} {float(row.flow_error):11.1e} {needed:>23}")
        if "slope" in ds:
            slopes = ", ".join(
                f"{float(s):.3f} (width {int(w)})" for w, s in zip(ds.width.values, part.slope.values, strict=True)
            )
            lines.append(
                f"slope of the escape time against ln(1/scale): {slopes}; predicted {float(part.predicted_slope):.3f}"
            )
        predicted = np.isfinite(part.saddle_time.values)
        pairs = zip(part.saddle_time.values[predicted], part.saddle_loss.values[predicted], strict=True)
        saddles = ", ".join(f"{time:.1f} (loss {value:.3g})" for time, value in pairs)
        lines.append(f"saddles predicted from scale {ds.saddle_time.attrs['scale']:.0e}: {saddles}")
        lines.append("")
    failed = int(np.count_nonzero(ds.status.values != 0))
    lines.append(f"{ds.status.size} flows, {failed} did not reach the end")
    width, seed = ds.descent_steps.attrs["width"], ds.descent_steps.attrs["seed"]
    lines.append("escape time: the loss has fallen by a tenth; mean and standard deviation over widths and seeds")
    lines.append("predicted: from the start, with the time of alignment; exact for vanishing scales")
    lines.append("leading order: in ln(1/scale), without the time of alignment")
    lines.append("aligned: fraction of the neurons within 0.1 of a predicted direction at the escape")
    lines.append("flow gradients: gradients evaluated by the flow, mean over widths and seeds")
    lines.append(f"flow error: of the loss curve, over the initial loss (width {width}, seed {seed})")
    lines.append("descent steps to match: of gradient descent for that error, extrapolated from two learning rates;")
    lines.append("    a dash: it diverged at these, or its error did not fall")
    return "\n".join(lines)
