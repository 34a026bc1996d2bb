"""Conjugate residuals against direct solves and the best in the Krylov space, and the methods that rest on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

import gradflow as gf
from gradflow.flows import AbstractFlow
from gradflow.solvers._conjugate_residual import RECALLED, conjugate_residual


@jax.jit
def solve_systems(matrix, r, tolerance, min_iterations=0, max_iterations=300, size=1.0):
    def one(matrix, r):
        norm = lambda v: jnp.sqrt(jnp.mean((v / size) ** 2))  # noqa: E731
        unit, counts = jnp.ones((), r.dtype), (jnp.asarray(min_iterations), jnp.asarray(max_iterations))
        return conjugate_residual(lambda p: matrix @ p, unit, r, norm, tolerance, unit, *counts)

    return jax.vmap(one)(matrix, r)


def systems(real, imaginary, count=40, size=20, seed=0):
    """Random `H` with eigenvalues `real +- i imaginary` in bases that are a little off orthogonal."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        basis = np.linalg.qr(rng.normal(size=(size, size)))[0] + 0.05 * rng.normal(size=(size, size)) / size**0.5
        blocks = np.zeros((size, size))
        for j in range(0, size, 2):
            a, b = real(rng), imaginary(rng)
            blocks[j : j + 2, j : j + 2] = [[a, b], [-b, a]]
        matrix, r = basis @ blocks @ np.linalg.inv(basis), rng.normal(size=size)
        made.append((matrix, r, np.linalg.solve(np.eye(size) + matrix, r)))
    return [np.stack(part) for part in zip(*made, strict=True)]


SPECTRA = {
    "real": (lambda rng: 10 ** rng.uniform(-2, 2), lambda rng: 0.0),
    "damped oscillations": (lambda rng: 10 ** rng.uniform(-1, 2), lambda rng: 10 ** rng.uniform(-1, 2)),
    "oscillations": (lambda rng: 0.0, lambda rng: 3 * rng.uniform()),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_residual_meets_the_tolerance_and_bounds_the_error_of_a_contraction(name):
    matrix, r, x = systems(*SPECTRA[name])
    for tolerance in (1e-1, 1e-3, 1e-8):
        computed = solve_systems(matrix, r, jnp.asarray(tolerance))
        residual = r - computed.x - np.einsum("nij,nj->ni", matrix, computed.x)
        fine = np.asarray(computed.converged & ~computed.negative)
        # A step along the residual may run into a direction that is not positive where the basis is not orthogonal.
        assert np.mean(fine) > (0.99 if name == "oscillations" else 0.8)
        np.testing.assert_allclose(computed.residual, residual, rtol=0, atol=1e-9 * np.abs(matrix).max())
        assert np.all(np.sqrt(np.mean(residual[fine] ** 2, axis=1)) <= tolerance * (1 + 1e-6))
        inverse = np.linalg.norm(np.linalg.inv(np.eye(20) + matrix), 2, axis=(1, 2))
        error = np.sqrt(np.mean((np.asarray(computed.x) - x) ** 2, axis=1))
        assert np.all(error[fine] <= tolerance * inverse[fine] * (1 + 1e-6))
        assert np.all(np.asarray(computed.products)[fine] <= 21)


def test_iterates_are_the_best_of_the_krylov_space():
    """The least residual over `span(r, A r, ..., A^(k-1) r)`, by least squares."""
    matrix, r, _ = systems(*SPECTRA["damped oscillations"], count=5)
    for k in (1, 2, 5, 10):
        computed = solve_systems(matrix, r, jnp.asarray(1e-12), 0, k)
        for i in range(len(r)):
            a, space = np.eye(20) + matrix[i], [r[i]]
            while len(space) < k:
                space.append(a @ space[-1] / np.linalg.norm(space[-1]))
            image = a @ np.linalg.qr(np.stack(space, axis=1))[0]
            smallest = np.linalg.norm(r[i] - image @ np.linalg.lstsq(image, r[i], rcond=None)[0])
            assert np.linalg.norm(computed.residual[i]) == pytest.approx(smallest, rel=1e-6)


def test_more_directions_than_are_kept():
    matrix, r, x = systems(*SPECTRA["real"], count=10, size=4 * RECALLED)
    computed = solve_systems(matrix, r, jnp.asarray(1e-6))
    fine = np.asarray(computed.converged)
    assert np.mean(fine) > 0.8
    assert np.max(computed.products) > RECALLED
    np.testing.assert_allclose(np.asarray(computed.x)[fine], x[fine], rtol=0, atol=1e-4)


@pytest.mark.parametrize("lowest", [-1.5, -30.0])
def test_directions_that_are_not_positive_are_flagged(lowest):
    """At loose tolerances one may not be met; then what is returned is as good as it claims."""

    def real(rng):
        return lowest if rng.uniform() < 0.1 else 10 ** rng.uniform(-1, 2)

    matrix, r, x = systems(real, SPECTRA["real"][1], count=200)
    bad = np.linalg.eigvals(matrix).real.min(axis=1) < -1
    matrix, r, x = matrix[bad], r[bad], x[bad]
    assert len(r) > 100
    assert np.all(solve_systems(matrix, r, jnp.asarray(1e-8)).negative)
    for tolerance in (0.3, 0.1, 0.01):
        computed = solve_systems(matrix, r, jnp.asarray(tolerance))
        error = np.sqrt(np.mean((np.asarray(computed.x) - x) ** 2, axis=1))
        assert np.all(error[np.asarray(computed.converged)] <= 3 * tolerance)


def test_at_the_edges():
    matrix, r, _ = systems(*SPECTRA["real"], count=5)
    for min_iterations in (0, 1):
        computed = solve_systems(matrix, 0 * r, jnp.asarray(1e-6), min_iterations)
        assert np.all(computed.converged)
        assert not np.any(computed.x)
        assert not np.any(computed.products)
    computed = solve_systems(matrix, r, jnp.asarray(1e-6), 0, 3)
    assert np.all(computed.products == 3)
    assert not np.any(computed.converged)
    failed = solve_systems(np.nan * matrix, r, jnp.asarray(1e-6))
    assert not np.any(failed.converged | failed.finite)
    single = [jnp.asarray(a, jnp.float32) for a in (matrix, 1e-30 * r)]
    small = solve_systems(*single, jnp.asarray(1e-3, jnp.float32), size=jnp.asarray(1e-30, jnp.float32))
    assert small.x.dtype == jnp.float32
    residual = 1e-30 * r - np.einsum("nij,nj->ni", np.eye(20) + matrix, np.asarray(small.x, float))
    assert np.all(np.sqrt(np.mean(residual[np.asarray(small.converged)] ** 2, axis=1)) < 2e-33)
    assert np.mean(small.converged) >= 0.8


class Linear(AbstractFlow):
    """`y' = -A y`"""

    matrix: jax.Array

    def init(self, trainable, frozen):
        return trainable

    def vector_field(self, t, state, frozen):
        return -self.matrix @ state

    def params(self, state):
        return state


@pytest.mark.slow
def test_stiff_flow_without_symmetry():
    """Against the matrix exponential: as accurate as asked for, at a small part of the explicit method's cost."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(12, 12)) / 12**0.5 + 2 * np.eye(12)
    matrix = basis @ np.diag(np.geomspace(0.1, 1e3, 12)) @ np.linalg.inv(basis)
    flow, start, end = Linear(jnp.asarray(matrix)), jnp.ones(12), 20.0
    exact = expm(-matrix * end) @ np.ones(12)
    distance = np.linalg.norm(exact - np.ones(12))
    for rtol in (1e-3, 1e-6):
        costs = []
        for solver in (None, gf.solvers.NDF(), gf.solvers.Tsit5()):
            sol = gf.solve(flow, start, [end], solver=solver, rtol=rtol)
            assert np.linalg.norm(np.asarray(sol.final) - exact) <= 10 * rtol * distance
            costs.append(int(sol.stats["gradient_evaluations"]))
        assert max(costs[:2]) < costs[2] / 5


@pytest.mark.slow
@pytest.mark.parametrize("turning", [0.0, 0.3])
def test_saddle_is_left_on_time_though_the_way_out_is_far_below_the_tolerance(turning):
    """`1e-10` in one direction beside ones in all others; `out^2 = 1 / (1 + (1 / w^2 - 1) exp(-2 t))`.

    Steps grow far beyond what the instability allows, were it not for the negative curvature that the linear solves
    meet; and the tolerance says nothing of how well it is followed. With `turning`, the other directions rotate into
    one another, and the Jacobian is not symmetric.
    """
    size, rng = 20, np.random.default_rng(0)
    basis = jnp.asarray(np.linalg.qr(rng.normal(size=(size, size)))[0])
    others = np.diag(np.geomspace(0.05, 50, size - 1))
    for j in range(size - 2):
        others[j, j + 1], others[j + 1, j] = turning, -turning

    class Saddle(Linear):
        symmetric_jacobian = turning == 0

        def vector_field(self, t, state, frozen):
            u = state @ basis
            return -basis @ jnp.append(self.matrix @ u[:-1], u[-1] ** 3 - u[-1])

    w, ts = 1e-10, np.array([15.0, 21.0, 25.0, 60.0])
    start = basis @ jnp.ones(size).at[-1].set(w)
    exact = -0.5 * np.log(1 / w**2 - 1) + ts
    for solver in (gf.solvers.NDF(), None):
        for rtol, late in ((1e-2, 0.1), (1e-4, 0.01)):
            sol = gf.solve(Saddle(jnp.asarray(others)), start, ts, solver=solver, rtol=rtol)
            u = np.abs(np.asarray(sol.params @ basis)[:, -1])
            delay = exact[:3] - 0.5 * np.log(1 / (1 / u[:3] ** 2 - 1))
            assert np.all(np.abs(delay) < late * ts[:3])
            assert u[3] == pytest.approx(1, abs=10 * rtol)
            assert int(sol.stats["gradient_evaluations"]) < 1500
