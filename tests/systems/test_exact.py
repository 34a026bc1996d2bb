"""The flow against closed forms and an integrator that shares no code."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

import gradflow as gf

# The tight ones have an explicit method of their own, and with it another program.
TOLERANCES = [1e-4, 1e-6, *(pytest.param(rtol, marks=pytest.mark.slow) for rtol in (1e-8, 1e-10))]


class Product(eqx.Module):
    """`(s - a w)^2 / 2`; the target is a leaf, so that one program serves every case."""

    s: jax.Array

    def __call__(self, params):
        return 0.5 * (self.s - product(params)) ** 2


def product(params):
    return params[0] * params[1]


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


@pytest.mark.parametrize("rtol", TOLERANCES)
def test_linear_regression_equals_matrix_exponential(quadratic, rtol):
    x, y = np.asarray(quadratic.x), np.asarray(quadratic.y)
    hessian, minimum = x.T @ x / len(y), np.linalg.lstsq(x, y, rcond=None)[0]
    start = np.ones(4)
    ts = np.linspace(0, 5, 11)
    sol = gf.solve(gf.GradientFlow(quadratic), jnp.asarray(start), ts, rtol=rtol)
    exact = np.stack([minimum + scipy.linalg.expm(-hessian * t) @ (start - minimum) for t in ts])
    assert np.max(np.linalg.norm(sol.params - exact, axis=1)) <= 10 * rtol * np.linalg.norm(start)


@pytest.mark.parametrize("rtol", TOLERANCES)
def test_linear_regression_from_zero(quadratic, rtol):
    """A start at exactly zero has no size of its own; the tolerance follows the growing state."""
    x, y = np.asarray(quadratic.x), np.asarray(quadratic.y)
    hessian, minimum = x.T @ x / len(y), np.linalg.lstsq(x, y, rcond=None)[0]
    ts = np.array([0.01, 1.0, 5.0])
    sol = gf.solve(gf.GradientFlow(quadratic), jnp.zeros(4), ts, rtol=rtol)
    for t, row in zip(ts, sol.params, strict=True):
        exact = minimum - scipy.linalg.expm(-hessian * t) @ minimum
        assert relative(row, exact) <= 10 * rtol


@pytest.mark.slow
@pytest.mark.parametrize("rtol", TOLERANCES)
@pytest.mark.parametrize("scale", [1e-1, 1e-6, 1e-12])
def test_saxe_mode_and_its_escape(scale, rtol):
    """Balanced scalar net `a w`: `c(t) = s / (1 + (s/c0 - 1) exp(-2 s t))`."""
    s, c0 = 2.0, scale**2
    half = np.log(s / c0 - 1) / (2 * s)
    ts = half * np.array([0.25, 0.5, 0.9, 1.0, 1.1, 1.5])
    flow = gf.GradientFlow(Product(jnp.array(s)))
    start = jnp.array([scale, scale])
    sol = gf.solve(flow, start, ts, rtol=rtol)
    exact = s / (1 + (s / c0 - 1) * np.exp(-2 * s * ts))
    assert np.max(np.abs(np.prod(sol.params, axis=1) / exact - 1)) <= 100 * rtol
    escape = gf.solve(flow, start, [2 * half], rtol=rtol, until=gf.Until(product, above=s / 2))
    assert escape.status == "stopped"
    assert abs(float(escape.t_final) / half - 1) <= 100 * rtol


@pytest.mark.parametrize("rtol", TOLERANCES)
def test_unbalanced_scalar_net(rtol):
    """`a w` with `k = a^2 - w^2` conserved: `c = |k|/2 sinh(log z)` with `z` in closed form."""
    s, a, w = 1.5, 0.9, 0.05
    k = a**2 - w**2
    big = np.sqrt(4 * s**2 + k**2)
    plus, minus = (2 * s + big) / abs(k), (2 * s - big) / abs(k)
    z0 = np.exp(np.arcsinh(2 * a * w / abs(k)))
    ts = np.linspace(0.1, 3, 8)
    e = (z0 - minus) / (plus - z0) * np.exp(big * ts)
    exact = abs(k) / 2 * np.sinh(np.log((minus + e * plus) / (1 + e)))
    sol = gf.solve(gf.GradientFlow(Product(jnp.array(s))), jnp.array([a, w]), ts, rtol=rtol)
    assert np.max(np.abs(np.prod(sol.params, axis=1) / exact - 1)) <= 10 * rtol


@pytest.mark.parametrize("rtol", TOLERANCES)
@pytest.mark.parametrize("scale", [0.1, 1e-6, 1e-12])
def test_diagonal_net_on_an_orthogonal_design(scale, rtol):
    """`beta = alpha^2 sinh(2 q)` coordinate by coordinate, unit gain."""
    b = np.array([1.0, -0.7, 2.0])
    problem = gf.EmpiricalRisk(np.eye(3), b, gf.losses.square, reduction="sum")
    model = gf.models.DiagonalLinear(3, init_scale=scale)
    # The solution is odd in `b`; the roots have the product -1, so the smaller comes from the larger exactly.
    c = scale**2
    big = np.sqrt(b**2 + c**2)
    plus = (np.abs(b) + big) / c
    minus = -1 / plus
    ts = np.linspace(0.2, 1.6, 8) * np.log(1 / scale)
    sol = gf.solve(gf.GradientFlow(problem), model, ts, rtol=rtol)
    for t, row in zip(ts, sol.params.u * sol.params.v, strict=True):
        log_e = np.log1p(-minus) - np.log(plus - 1) + 2 * big * t
        # z = (minus + E plus) / (1 + E), with E up to exp(100)
        fraction = 1 / (1 + np.exp(-log_e))
        z = minus * (1 - fraction) + plus * fraction
        exact = np.sign(b) * c / 2 * (z - 1 / z)
        assert np.max(np.abs(row / exact - 1)) <= 100 * rtol


@pytest.mark.slow
def test_deep_linear_against_scipy(key):
    """Three layers, end-to-end matrix, against DOP853 on the written-out equations."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
    model = gf.models.DeepLinear(3, 4, 2, depth=3, init_scale=0.5, key=key)
    shapes = [w.shape for w in model.weights]
    cuts = np.cumsum([int(np.prod(s)) for s in shapes])[:-1]

    def field(_, flat):
        first, second, third = (part.reshape(s) for part, s in zip(np.split(flat, cuts), shapes, strict=True))
        outer = (x @ (third @ second @ first).T - y).T @ x / len(x)
        gradients = [second.T @ third.T @ outer, third.T @ outer @ first.T, outer @ (second @ first).T]
        return -np.concatenate([g.ravel() for g in gradients])

    start = np.concatenate([np.asarray(w).ravel() for w in model.weights])
    ts = np.array([1.0, 3.0, 8.0])
    reference = scipy.integrate.solve_ivp(field, (0, 8), start, method="DOP853", t_eval=ts, rtol=1e-12, atol=1e-13)
    problem = gf.EmpiricalRisk(x, y, gf.losses.square)
    sol = gf.solve(gf.GradientFlow(problem), model, ts, rtol=1e-8)
    for row in range(3):
        computed = np.concatenate([np.asarray(w[row]).ravel() for w in sol.params.weights])
        assert relative(computed, reference.y[:, row]) <= 10 * 1e-8


@pytest.mark.slow
def test_energy_identity_and_balancedness_fall_with_the_tolerance(key):
    """Loss plus the integral of the squared gradient, and `|a|^2 - |w|^2`, are constant up to the tolerance."""
    x, y = np.asarray(gf.data.linear_regression(30, 5, condition=4.0).x), np.linspace(-1, 1, 30)
    problem = gf.EmpiricalRisk(x, y, gf.losses.square)
    model = gf.models.TwoLayer(5, 6, activation=lambda z: z, init_scale=0.3, key=key)
    drift = {name: [] for name in ("energy", "balancedness")}
    for rtol in (1e-3, 1e-5, 1e-7):
        sol = gf.solve(gf.GradientFlow(problem), model, [10.0], rtol=rtol)
        for name, values in drift.items():
            values.append(float(sol.drift[name]))
    for values in drift.values():
        assert values[1] < values[0]
        assert values[2] < values[0] / 100
        assert all(value <= 10 * rtol for value, rtol in zip(values, (1e-3, 1e-5, 1e-7), strict=True))


def test_energy_identity_by_quadrature(quadratic):
    """The same identity from observables alone, with Simpson's rule over saved gradient norms."""
    ts = np.linspace(0, 4, 401)
    observe = {"loss": gf.observables.Loss(quadratic), "gradient": gf.observables.GradientNorm(quadratic)}
    sol = gf.solve(gf.GradientFlow(quadratic), jnp.ones(4), ts, rtol=1e-9, observe=observe)
    failed = float(sol.observed["loss"][0] - sol.observed["loss"][-1])
    assert scipy.integrate.simpson(np.asarray(sol.observed["gradient"]) ** 2, x=ts) == pytest.approx(failed, rel=1e-7)


def test_fixed_absolute_tolerance_gets_the_escape_wrong_and_ours_does_not():
    """The trap that `atol=None` exists for: a start far below a fixed absolute tolerance."""
    s, scale = 1.0, 1e-12
    half = np.log(s / scale**2 - 1) / (2 * s)
    flow = gf.GradientFlow(Product(jnp.array(s)))
    start = jnp.array([scale, scale])
    until = gf.Until(product, above=s / 2)
    scaled = gf.solve(flow, start, [10 * half], rtol=1e-3, until=until)
    fixed = gf.solve(flow, start, [10 * half], rtol=1e-3, atol=1e-6, until=until)
    assert abs(float(scaled.t_final) / half - 1) < 1e-2
    assert abs(float(fixed.t_final) / half - 1) > 5e-2


def test_jax_transformations_of_the_exact_solution():
    """Forward-mode derivative of the final state in the initial one: `exp(-t)` on a quadratic."""
    flow = gf.GradientFlow(lambda w: 0.5 * w**2)

    def final(w):
        return gf.solve(flow, w, [1.0], rtol=1e-9).final

    value, slope = jax.jvp(final, (jnp.array(2.0),), (jnp.array(1.0),))
    assert float(value) == pytest.approx(2 * np.exp(-1), rel=1e-8)
    assert float(slope) == pytest.approx(np.exp(-1), rel=1e-8)
