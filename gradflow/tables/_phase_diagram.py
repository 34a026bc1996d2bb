"""The phase diagram of one-pass SGD, as text."""

import numpy as np
import xarray as xr

from gradflow.studies._phase_diagram import GREEN_LIMIT, power_laws


def phase_diagram(ds: xr.Dataset) -> str:
    """SGD beside its equations in each region, plateaus, power laws, and the risk over the exponents.

    **Arguments**: `ds`: what `gradflow.studies.phase_diagram` returned. **Returns** lines of text.
    """
    lines = [
        f"{'region':>8} {'kappa+delta':>11} {'d':>7} {'g':>9} {'SGD at the end':>22} {'full':>9} {'truncated':>10}"
    ]
    for i, exponent in enumerate(ds.exponent.values):
        for j, dim in enumerate(ds.dim.values):
            last = ds.risk_sgd.values[i, j, :, -1]
            cells = f"{ds.region.values[i]!s:>8} {exponent:11.2f} {int(dim):7d} {ds.gamma_over_p.values[i, j]:9.3g}"
            spread = f"{np.mean(last):.3e} +- {np.std(last, ddof=1):.0e}"
            both = f"{ds.risk_full.values[i, j, -1]:9.3e} {ds.risk_truncated.values[i, j, -1]:10.3e}"
            lines.append(f"{cells} {spread:>22} {both}")
    lines.append("SGD: mean and standard deviation over seeds of the exact risk; full, truncated: order parameters")
    lines += ["", f"{'uninformed, d':>14} {'plateau':>10} {'length in t':>12} {'learnt at t':>12}"]
    for i, dim in enumerate(ds.start.values):
        columns = (ds[name].values[i] for name in ("plateau_start", "plateau_length_start", "learning_time_start"))
        height, length, learnt = (f"{value:.3g}" if np.isfinite(value) else "-" for value in columns)
        lines.append(f"{int(dim):14d} {height:>10} {length:>12} {learnt:>12}")
    off = np.abs(ds.settled_risk / ds.predicted_settled_risk - 1).values
    near = (ds.rate.values[:, None] <= 1) & (ds.noise.values[None, :] <= 1e-3) & (ds.noise.values[None, :] >= 1e-5)
    if near.any():
        worst = 100 * np.max(off[near])
        lines += [
            "",
            f"plateau against A g noise / (1 - 2 A g): off by at most {worst:.1f} % for g <= 1, 1e-5 <= noise <= 1e-3",
        ]
    slopes = power_laws(ds)
    lines.append(
        f"plateau grows like noise^{slopes['noise']:.3f}; at kappa + delta = 1/2 it falls like d^{slopes['dim']:.3f}"
    )
    lines.append(f"    (predicted: 1, and {slopes['predicted']:.3f} over the same d; {GREEN_LIMIT:.1f} for large d)")
    lines += ["", f"{'width':>8} {'kappa':>6} " + "".join(f"{name:>24}" for name in ("green", "blue", "orange"))]
    for i, kappa in enumerate(ds.kappa.values):
        cells = []
        for name in ("green", "blue", "orange"):
            mine = ds.final_risk_exponents.values[i, ds.region_exponents.values == name]
            cells.append(f"{np.nanmin(mine):.2e} ... {np.nanmax(mine):.2e}" if mine.size else "-")
        lines.append(f"{int(ds.width_exponents[i]):8d} {kappa:6.2f} " + "".join(f"{cell:>24}" for cell in cells))
    lines.append(f"    (risk at t = {float(ds.time[-1]):g} over the exponents, d = {ds.attrs['exponents_dim']})")
    codes = [ds[name].values for name in ("status", "status_start", "status_exponents")]
    failed, runs = sum(int(np.count_nonzero(code)) for code in codes), sum(code.size for code in codes)
    lines.append(
        f"maps: {ds.sizes['rate']} learning rates x {ds.sizes['noise']} noises, {ds.sizes['kappa']} widths x"
        f" {ds.sizes['kappa_plus_delta']} sums of exponents; {failed} of {runs} runs did not reach the end"
    )
    return "\n".join(lines)
