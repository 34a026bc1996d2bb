"""Rates and winners for `mu` anywhere, against roots of polynomials written down from the methods themselves."""

import numpy as np
import pytest

from gradflow.theory import faster_method, momentum_rates

METHODS = ("heavy_ball", "nesterov")


def polynomial(lam, mu, s, method, resolution):
    """Coefficients, from `X'' + 2 sqrt(mu) X' + sqrt(s) H X' + (1 + r) H X`, or from one step of the rule."""
    r, nesterov = np.sqrt(mu * s), method == "nesterov"
    if resolution == "low":
        return [1, 2 * np.sqrt(mu), lam]
    if resolution == "high":
        return [1, 2 * np.sqrt(mu) + nesterov * np.sqrt(s) * lam, (1 + r) * lam]
    # w'' = w' + beta (w' - w) - s lam w', and for Nesterov's method - beta s lam (w' - w) besides.
    beta = (1 - r) / (1 + r)
    change = beta * (1 - nesterov * s * lam)
    return [1, -(1 + change - s * lam), change]


def rate(lam, mu, s, method, resolution):
    """Of the slower root, and what rounding may do to it: roots close to each other are the worse conditioned."""
    roots = np.roots(polynomial(lam, mu, s, method, resolution)).astype(complex)
    size = np.max(np.abs(roots))
    error = 1e-14 * size**2 / max(abs(roots[0] - roots[1]), 1e-8 * size)
    if resolution == "discrete":
        return -np.log(size) / np.sqrt(s), error / size / np.sqrt(s)
    return np.min(-roots.real), error


def problems(number, seed):
    """Three eigenvalues, steps up to one over the largest, and `mu` from far below the smallest to far above all."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        lam = np.sort(np.exp(rng.uniform(-4, 2, size=3)))
        yield lam, np.exp(rng.uniform(-4, 9)) * lam[0], np.exp(rng.uniform(-4, 0)) / lam[-1]


@pytest.mark.parametrize("resolution", ["high", "low", "discrete"])
def test_rates_at_any_mu(resolution):
    above, negative = 0, 0
    for lam, mu, s in problems(400, seed=0):
        above, negative = above + (mu > lam[-1]), negative + (mu * s > 1)
        for method in METHODS:
            computed = momentum_rates(lam, mu, s, method, resolution)
            for one, value in zip(computed, lam, strict=True):
                expected, error = rate(value, mu, s, method, resolution)
                assert abs(one - expected) <= error + 1e-13 * abs(expected)
    # The cases that matter are among them.
    assert min(above, negative) > 50


def test_rates_of_iterates_beyond_one_over_the_curvature_and_of_flat_directions():
    """`s lambda` above one, up to beyond the limit of stability, where the root nearest to -1 decides, or grows."""
    for x in (1.0, 1.2, 1.9, 2.5, 4.0):
        for mu in (0.0, 0.1, 1.3, 30.0):
            for method in METHODS:
                computed = float(momentum_rates(x, mu, 1.0, method, "discrete"))
                # Nesterov's method solves this mode in one step: both roots are zero.
                if (x, method) == (1.0, "nesterov"):
                    assert computed == np.inf
                    continue
                expected, error = rate(x, mu, 1.0, method, "discrete")
                assert abs(computed - expected) <= error + 1e-13
    for resolution in ("high", "low", "discrete"):
        for method in METHODS:
            assert momentum_rates([0.0, 1.0], 5.0, 0.1, method, resolution)[0] == 0
        assert faster_method([0.0, 1.0], 5.0, 0.1, resolution).name == "tie"
    # A slow mode keeps its digits: the heavy ball of large mu is gradient descent, at lambda / (2 sqrt(mu)).
    assert momentum_rates(1e-14, 1.0, 1e-6, "heavy_ball", "discrete") == pytest.approx(0.5e-14, rel=1e-3)


@pytest.mark.parametrize("resolution", ["high", "low", "discrete"])
def test_the_winner_at_any_mu(resolution):
    """As the closed forms say, and as the roots do."""
    names = []
    for lam, mu, s in problems(400, seed=1):
        x = s * lam[0]
        change = lam[0] if resolution == "high" else lam[0] * (4 - 3 * x) / (2 - x) ** 2
        wins = mu < change or (resolution == "discrete" and mu * s > 1)
        expected = "tie" if resolution == "low" else METHODS[int(wins)]
        names.append(faster_method(lam, mu, s, resolution).name)
        assert names[-1] == expected
        slow, fast = (min(rate(value, mu, s, method, resolution)[0] for value in lam) for method in METHODS)
        if resolution != "low" and abs(slow - fast) > 1e-6 * fast:
            assert names[-1] == METHODS[int(fast > slow)]
    assert set(names) == ({"tie"} if resolution == "low" else set(METHODS))


def test_ties_lie_where_they_are_said_to():
    lam = np.array([0.5, 2.0])
    for s in (0.01, 0.2, 0.5):
        x = s * lam[0]
        tie = lam[0] * (4 - 3 * x) / (2 - x) ** 2
        for resolution, mu in (("high", lam[0]), ("discrete", tie), ("discrete", 1 / s)):
            assert faster_method(lam, mu, s, resolution).name == "tie"
            sides = [faster_method(lam, mu * factor, s, resolution).name for factor in (0.999, 1.001)]
            assert sides == list(METHODS[::-1] if mu < 1 / s else METHODS)
        # Between critical damping and the smallest eigenvalue Nesterov's flow is overdamped, and still the faster one.
        between = lam[0] - s * lam[0] ** 2 / 8
        assert faster_method(lam, between, s).name == "nesterov"


@pytest.mark.parametrize("resolution", ["high", "low", "discrete"])
def test_crossover_is_the_critical_damping_of_its_own_polynomial(resolution):
    """Where the roots of Nesterov's polynomial turn real, by bisection."""
    for min_eigenvalue, s in ((0.5, 0.2), (1.0, 0.01), (0.3, 1.9)):
        low, high = 0.05 * min_eigenvalue, 3 * min_eigenvalue
        for _ in range(60):
            mu = (low + high) / 2
            a, b, c = polynomial(min_eigenvalue, mu, s, "nesterov", resolution)
            low, high = (mu, high) if b**2 - 4 * a * c < 0 else (low, mu)
        computed = faster_method([min_eigenvalue, 1.0], 0.1, s, resolution).crossover
        assert computed == pytest.approx(low, rel=1e-12)
    # Beyond s lambda = 4 the high-resolution flow is overdamped at every mu.
    assert faster_method([1.0], 0.1, 5.0).crossover == 0


def test_numbers_that_are_not_finite_are_refused():
    for name, numbers in (("mu", (np.inf, 0.1)), ("mu", (np.nan, 0.1)), ("s", (1.0, np.inf))):
        with pytest.raises(ValueError, match=f"`{name}` must be finite"):
            momentum_rates([1.0], *numbers, "nesterov")
