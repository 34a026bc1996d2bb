"""The study of the edge of stability, as text."""

import numpy as np
import xarray as xr

from gradflow._solution import Status

PRODUCT = 2
"""Gradients that a product with the Hessian costs."""
EARLY = "*"
"""Marks what is a mean over a part of the run."""


def edge(ds: xr.Dataset) -> str:
    """Every flow beside its rule: distance, error of the mean loss, cost, and where it stops being valid and why.

    **Arguments**: `ds`: what `gradflow.studies.edge` returned. **Returns** lines of text; every number is the median
    over seeds, and where two more follow, they are the smallest and the largest.
    """
    seeds = ", ".join(str(seed) for seed in ds.seed.values)
    lines = [
        f"{ds.attrs['data']}, {ds.attrs['samples']} samples; {ds.attrs['activation']} network with two hidden layers of"
        f" width {ds.attrs['width']}; {ds.attrs['steps']} steps; seeds {seeds}: median (smallest ... largest)"
    ]
    for i, rule in enumerate(ds.rule.values):
        for j, share in enumerate(ds.share.values):
            lines += ["", _about_rule(ds.isel(rule=i, share=j), str(rule), float(share)), _HEAD]
            cases = ds.isel(case=np.flatnonzero(ds.of_rule.values == rule), share=j)
            lines += [_row(cases.isel(case=k)) for k in range(cases.sizes["case"])]
    reasons = sorted({str(reason) for reason in ds.reason.values.ravel()} - {"valid"})
    lines += [
        "",
        "distance: mean over the steps from where the flow starts, to (w_{k-1} + 2 w_k + w_{k+1}) / 4, over the",
        f"distance travelled; {EARLY}: with runs that ended early, as far as they came;",
        "last: of the last step; loss, sharpness: errors of the means over the second half; gradients: per step, a",
        f"product with the Hessian counts as {PRODUCT}; left: step at which a twentieth of the distance travelled is",
        "reached; valid until: step, and what the theory of the flow gives as the reason, for most seeds",
        *(f"{reason}: {ds.reason.attrs[f'reason_{reason}']}" for reason in reasons),
    ]
    return "\n".join(lines)


_HEAD = (
    f"{'flow':<24} {'distance':>25} {'last':>8} {'loss':>8} {'sharpness':>9} {'gradients':>9} {'left':>5}  valid until"
)


def _about_rule(ds: xr.Dataset, rule: str, share: float) -> str:
    """What a rule does at one learning rate."""
    relative = (ds.rule_eigenvalue.isel(pair=0) / ds.threshold).isel(save=slice(ds.sizes["save"] // 2, None))
    return (
        f"{rule.replace('_', ' ')}, learning rate {float(ds.learning_rate):.3g} (share {share:g}): late sharpness over"
        f" the threshold {_spread(relative.mean('save'), '.2f')}, travelled {_spread(ds.travelled, '.3g')}"
    )


def _row(case: xr.Dataset) -> str:
    early = EARLY if bool((case.status > Status.STOPPED).any()) else ""
    cells = [
        f"{case.flow.values!s:<24}",
        f"{_spread(case.mean_distance, '.2%') + early:>25}",
        _cell(case.last_distance, "8.2%"),
    ]
    cells += [_cell(case.loss_error, "+8.1%"), _cell(case.sharpness_error, "+9.1%")]
    cells += [_cell(case.gradients + PRODUCT * case.products, "9.1f"), _cell(case.departure, "5.0f")]
    names, counts = np.unique(case.reason.values, return_counts=True)
    reason = str(names[np.argmax(counts)])
    until = case.valid_until.values[case.reason.values == reason]
    verdict = "the end" if reason == "valid" else f"{np.median(until):.0f} ({reason})"
    late = float(np.nanmax(case.delay.values)) if np.isfinite(case.delay.values).any() else 0.0
    return " ".join(cells) + f"  {verdict}" + (f", by up to {late:.0f} steps" if reason == "delay" else "")


def _spread(values: xr.DataArray, form: str) -> str:
    """Median, smallest and largest over seeds."""
    finite = values.values[np.isfinite(values.values)]
    if not finite.size:
        return "-"
    if finite.size == 1:
        return f"{finite[0]:{form}}"
    return f"{np.median(finite):{form}} ({finite.min():{form}} ... {finite.max():{form}})"


def _cell(values: xr.DataArray, form: str) -> str:
    finite = values.values[np.isfinite(values.values)]
    width = int(form.lstrip("+").split(".")[0])
    return f"{np.median(finite):{form}}" if finite.size else f"{'-':>{width}}"
