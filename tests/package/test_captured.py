"""Functions of the user that read a global: every public function that compiles sees that the global has changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf

SCALE = 1.0
X = np.random.default_rng(0).normal(size=(5, 2))
Y = X @ np.array([1.0, -2.0])
WEIGHTS = jnp.array([0.3, -0.4])


def loss(p, y):
    return SCALE * 0.5 * (p - y) ** 2


def predict(w, x):
    return SCALE * (x @ w)


def linear(w, x):
    return x @ w


def activation(z):
    return SCALE * jnp.tanh(z)


def scaled_loss(reduction="mean"):
    return gf.EmpiricalRisk(X, Y, loss, linear, reduction=reduction)


def scaled_model():
    return gf.EmpiricalRisk(X, Y, gf.losses.square, predict)


def first_jump():
    problem = gf.EmpiricalRisk(jnp.eye(2), jnp.array([1.0, -2.0]), loss, reduction="sum")
    return 1 / gf.alternating_flow(problem, gf.models.DiagonalLinear(2), -100.0, rounds=1).times[1]


def largest_correlation():
    problem = gf.EmpiricalRisk(X, Y, loss)
    net = gf.models.TwoLayer(2, 1, init_scale=1.0, key=jax.random.key(0))
    return gf.theory.kkt_points(gf.NeuralCorrelation(problem, degree=2), net, starts=8, key=jax.random.key(1)).values[0]


def observed_sharpness():
    """Within a program that is compiled anew: the program inside it has to be so, too."""
    problem = scaled_loss()
    observe = {"sharpness": gf.observables.Sharpness(problem)}
    sol = gf.solve(gf.GradientFlow(problem), WEIGHTS, [0.0, 1e-3], observe=observe, solver=gf.solvers.Tsit5())
    return sol.observed["sharpness"][0]


def linear_rate():
    """`f(t) = exp(-K t) f(0)` for the linearised model with `y = 0`, and `K` goes with the square of its scale."""
    problem = gf.EmpiricalRisk(X, 0 * Y, gf.losses.square, predict, reduction="sum")
    return jnp.trace(gf.LinearisedFlow(problem, WEIGHTS).kernel)


def population_risk():
    """Of a student that knows nothing of its teacher, in a form that is quadratic in the activation."""
    problem = gf.TeacherStudent(jnp.eye(1, 3) * 3**0.5, gf.problems.activations.Quadrature(activation))
    return problem(jnp.array([[0.0, 1.0, 0.0]]))


CASES = {
    "Sharpness": (lambda: gf.observables.Sharpness(scaled_loss())(WEIGHTS), 1),
    "HessianEigenvalues": (lambda: gf.observables.HessianEigenvalues(scaled_loss(), 2)(WEIGHTS)[0], 1),
    "NTK": (lambda: gf.observables.NTK(scaled_model())(WEIGHTS)[0, 0], 2),
    "NTKEigenvalues": (lambda: gf.observables.NTKEigenvalues(scaled_model())(WEIGHTS)[0], 2),
    "Sharpness of a run": (observed_sharpness, 1),
    "LinearisedFlow": (linear_rate, 2),
    "TeacherStudent": (population_risk, 2),
    "alternating_flow": (first_jump, 1),
    "kkt_points": (largest_correlation, 1),
}


LONGEST = ("Sharpness of a run", "alternating_flow")
"""Cases that are left to the slow tests."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONGEST else []) for n in CASES])
def test_a_global_that_changes_is_seen(name, monkeypatch):
    """Each number is a power of the scale that the global holds."""
    measure, power = CASES[name]
    before = float(measure())
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    np.testing.assert_allclose(float(measure()), 2.0**power * before, rtol=1e-5)
