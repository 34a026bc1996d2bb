"""Saddles that hold little of the loss are found by default, and none where there are none."""

import jax
import numpy as np
import pytest

import gradflow as gf

LOG = 60.0
"""`ln(1 / alpha)` of the start of the diagonal networks."""


def staircase(gains, targets, rows=1500, **options):
    """Run of a diagonal network on orthogonal inputs, the saddles in the limit, and the times of its jumps.

    Where `beta_i` is alone, `beta' = 2 beta (b - k beta)`, with `b = g y` and `k = g^2`, from `alpha^2 / 2` on, and
    `-dL/dt = 2 beta (b - k beta)^2` is largest at `beta = b / (3 k)`: at `t = (ln(1/alpha) + ln(b/k) / 2) / b`.
    """
    gains, targets = np.array(gains), np.array(targets)
    problem = gf.EmpiricalRisk(np.diag(gains), targets, gf.losses.square, reduction="sum")
    limit = gf.theory.diagonal_saddles(np.diag(gains), targets, reduction="sum")
    ts = np.linspace(0, 1.4 * LOG * limit.times[-1], rows)
    start = gf.models.LogDiagonal(len(targets), log_scale=-LOG)
    sol = gf.solve(gf.LogDiagonalFlow(problem), start, ts, throw=False, **options)
    return problem, sol, limit, np.sort((LOG + np.log(targets / gains) / 2) / (gains * targets))


def designs(share):
    """The saddle that holds `share` of the loss is the last, the first, or in the middle."""
    small = np.sqrt(share)
    return {
        "last": ([1.0, 1.0], [1.0, small]),
        "first": ([1.0, 4 / small], [1.0, small]),
        "middle": ([2.0, 1.5 / small, 1.0], [1.5, small, 0.9]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.005, 1e-4])
@pytest.mark.parametrize("place", ["last", "first", "middle"])
def test_saddles_that_hold_little_of_the_loss(place, share):
    problem, sol, limit, times = staircase(*designs(share)[place])
    saddles = gf.find_saddles(sol, problem)
    assert len(saddles) == len(limit.times)
    falls = -np.diff([saddle.loss for saddle in saddles])
    np.testing.assert_allclose(falls, -np.diff(limit.losses), rtol=1e-2)
    np.testing.assert_allclose([saddle.entered for saddle in saddles[1:]], times, atol=float(sol.ts[1]))
    # With a number the fall counts against the first loss, as it says.
    merged = len(gf.find_saddles(sol, problem, drop=0.01))
    assert merged == len(saddles) - int(np.sum(-np.diff(limit.losses) < 0.01 * limit.losses[0]))


@pytest.mark.slow
@pytest.mark.parametrize("rtol", [0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("rows", [150, 3000])
def test_loose_tolerances_merge_small_saddles_and_invent_none(rtol, rows):
    for place, design in designs(1e-4).items():
        problem, sol, limit, times = staircase(*design, rows=rows, rtol=rtol)
        saddles = gf.find_saddles(sol, problem)
        assert len(saddles) <= len(limit.times), place
        width = float(sol.ts[1]) + 0.2 * times.max() * (rtol > 1e-2)
        assert all(np.min(np.abs(saddle.entered - times)) <= width for saddle in saddles[1:]), place


def predict_linear(w, x):
    return x @ w


@pytest.mark.slow
@pytest.mark.parametrize("solver", [gf.solvers.Tsit5(), gf.solvers.NDF(), gf.solvers.ROCK2()], ids=str)
@pytest.mark.parametrize("rtol", [0.1, 1e-2, 1e-5])
def test_sums_of_exponentials_have_none(solver, rtol):
    """Least squares decays with one rate per mode, here over three decades, to where errors of the solver are left."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 6)) * np.geomspace(0.1, 3.0, 6)
    for noise in (0.0, 0.1):
        y = x @ rng.normal(size=6) + noise * rng.normal(size=20)
        problem = gf.EmpiricalRisk(x, y, gf.losses.square, predict_linear)
        for ts in (np.linspace(0, 300, 2001), np.concatenate([[0.0], np.geomspace(1e-3, 1e4, 1000)])):
            sol = gf.solve(gf.GradientFlow(problem), np.zeros(6), ts, rtol=rtol, solver=solver)
            assert len(gf.find_saddles(sol, problem)) == 1


@pytest.mark.parametrize("learning_rate", [0.3, 0.03])
@pytest.mark.parametrize("batch_size", [1, 10])
def test_noise_of_mini_batches_makes_none(learning_rate, batch_size):
    """Stiff directions that fluctuate, and flat ones along which the loss keeps falling."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(200, 5)) * np.array([1, 1, 0.05, 0.05, 0.03])
        y = x @ np.array([0, 0, 5.0, 5.0, 5.0]) + 0.3 * rng.normal(size=200)
        problem = gf.EmpiricalRisk(x, y, gf.losses.square, predict_linear)
        rule = gf.SGD(problem, learning_rate, batch_size=batch_size, key=jax.random.key(seed))
        sol = gf.iterate(rule, np.zeros(5), 3000)
        assert len(gf.find_saddles(sol, problem)) == 1
