"""The law of the loss on two nearby directions against the equations of its outputs, and who slides until when."""

import numpy as np
import pytest
import scipy.integrate

import gradflow as gf

ANGLES = np.array([0.4, 0.2, 0.1, 0.05, 0.025])


def excess(ratio, angle, positive, sliding):
    """By how much the loss ends above the law, from the outputs `f+` and `f-` on the two inputs.

    Positive neurons follow `r+ x+ - r- x-`; of those of negative sign on the kink of `x+` the part of `x-` along it.
    """
    cos, sin = np.cos(angle), np.sin(angle)

    def residuals(outputs):
        return np.array([ratio * np.exp(-outputs[0]), np.exp(outputs[1])]) / (1 + ratio)

    def field(_, outputs):
        plus, minus = residuals(outputs)
        return [positive * (plus - minus * cos), positive * (plus * cos - minus) - sliding * minus * sin**2]

    end = 1e4 / angle**2
    start = 2 * [np.log(ratio) / 2]
    outputs = scipy.integrate.solve_ivp(field, (0, end), start, method="LSODA", rtol=1e-11, atol=1e-13).y[:, -1]
    return (
        np.sum(residuals(outputs)) / gf.theory.two_directions(ratio, angle, positive + sliding).loss(np.array(end)) - 1
    )


@pytest.mark.parametrize(("ratio", "positive", "sliding"), [(3, 3 / 32, 9 / 32), (8, 0.25, 0.25), (1.5, 0.05, 0.4)])
def test_the_law_holds_to_second_order_in_the_angle(ratio, positive, sliding):
    off = np.array([excess(ratio, angle, positive, sliding) for angle in ANGLES])
    orders = np.diff(np.log(off)) / np.diff(np.log(ANGLES))
    np.testing.assert_allclose(orders, 2, atol=0.02)
    np.testing.assert_allclose(off, sliding / positive * ANGLES**2 / 4, rtol=0.02)
    if sliding == 3 * positive:
        np.testing.assert_allclose(off[[0, 2, 4]], [0.12, 0.0075, 0.0005], rtol=0.07)


def test_the_study_measures_the_error_of_the_law():
    ds = gf.studies.two_directions((0.2, 0.1, 0.05), horizon=100.0, steps=10, saves=241)
    error = ds.law_error.values
    for i in range(3):
        after = ds.scaled_time.values[i] > float(ds.phase_end[i, 1]) * float(ds.angle[i]) ** 2
        assert error[i] == np.max(np.abs(ds.risk.values[i] / ds.predicted_risk.values[i] - 1)[after])
    # Slopes of 2.04 and 1.80: smoothing and the beginning of the plateau count besides the law itself.
    assert np.all(np.abs(np.diff(np.log(error)) / np.diff(np.log(ds.angle.values)) - 2) < 0.35)
    assert f"{error[-1]:.2%}" in gf.studies.two_directions_table(ds)


@pytest.mark.slow
def test_whether_neurons_slide_to_the_end_depends_on_the_start():
    """Over the first starts: some to the end, others leave the kink, and the table says which."""
    left = []
    for seed in range(6):
        ds = gf.studies.two_directions((0.1,), horizon=100.0, steps=10, saves=121, seed=seed)
        counts, scaled = ds.sliding.values[0], ds.scaled_time.values[0]
        until = float(ds.slide_until[0])
        assert counts[scaled <= until][-1] > 0
        assert not counts[scaled > until].any()
        left.append(until < scaled[-1])
        assert left[-1] == (counts[-1] == 0)
        row = gf.studies.two_directions_table(ds).splitlines()[2].split()
        assert (int(row[6]), int(row[7]), row[8]) == (counts.max(), counts[-1], f"{until:.4g}")
    assert 0 < sum(left) < 6
