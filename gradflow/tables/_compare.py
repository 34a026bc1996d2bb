"""A comparison between a rule and its flows, as text."""

import numpy as np
import xarray as xr

from gradflow._solution import Status
from gradflow.studies._compare import extrapolate_steps


def compare(ds: xr.Dataset) -> str:
    """One line per learning rate, and one per tolerance of the flow if there are any.

    A dash stands for what could not be measured, such as the gap of a rule that diverged.

    **Arguments**: `ds`: what `gradflow.studies.compare` or `discrete_gap` returned. **Returns** lines of text.

    >>> import gradflow as gf, jax.numpy as jnp
    >>> rule = gf.GradientDescent(lambda w: 0.5 * w**2, learning_rate=0.1)
    >>> print(gf.tables.compare(gf.compare(rule, jnp.array(1.0), [0.1], 1.0)).splitlines()[0].split()[:2])
    ['learning', 'rate']
    """
    columns = [f"gap to {name}" for name in ds.flow.values]
    widths = [max(16, len(column)) for column in columns]
    rule, horizon = ds.attrs["rule"], ds.attrs["horizon"]

    def row(values: np.ndarray, digits: str) -> str:
        shown = (f"{value:{digits}}" if np.isfinite(value) else "-" for value in values)
        return "".join(f" {text:>{width}}" for text, width in zip(shown, widths, strict=True))

    header = "".join(f" {column:>{width}}" for column, width in zip(columns, widths, strict=True))
    lines = [f"{'learning rate':>14} {'gradients':>10} {'status':>10}{header}"]
    for i, rate in enumerate(ds.learning_rate.values):
        cost, status = int(ds.gradient_evaluations[i]), Status(int(ds.status[i])).label
        lines.append(f"{rate:14.4g} {cost:10d} {status:>10}{row(ds.gap.values[i], '.3e')}")
    lines.append(f"{'measured order':>36}{row(ds.order.values, '.3f')}")
    lines.append(f"gap: largest distance from {rule} to the flow at equal times, over the distance the flow travels")
    since = f"from flow time {ds.attrs['after']:g} " if ds.attrs.get("after") else ""
    span = f"{since}until flow time {horizon:g}"
    lines.append(f"     {span}; its order is the slope between the two smallest learning rates")
    if "flow_rtol" in ds.coords:
        lines += ["", f"{'flow, rtol':>14} {'gradients':>10} {'error':>10} {'steps to match':>16}"]
        for tol, cost, error in zip(
            ds.flow_rtol.values, ds.loose_flow_gradient_evaluations.values, ds.flow_error.values, strict=True
        ):
            steps = extrapolate_steps(float(ds.steps[-1]), float(ds.gap[-1, 0]), float(ds.order[0]), float(error))
            needed = f"{steps:,.0f}" if np.isfinite(steps) else "-"
            lines.append(f"{tol:14.0e} {int(cost):10d} {error:10.1e} {needed:>16}")
        lines.append(f"error: of the flow, measured like the gap; reference: the flow at rtol {ds.attrs['rtol']:.0e}")
        lines.append(f"steps to match: of {rule}, for a gap as small, extrapolated with the measured order")
    return "\n".join(lines)
