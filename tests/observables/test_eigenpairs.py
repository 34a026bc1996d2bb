"""Eigenpairs that are followed along a run: against dense eigendecompositions, at crossings, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf

SIZE = 40
BASE = np.linspace(-0.5, 0.6, SIZE)


def rotating(w):
    """A loss whose Hessian in all but the last parameter is a matrix that turns, with eigenvalues that cross."""
    x, s = w[:-1], w[-1]
    values = jnp.asarray(BASE).at[0].set(2 - s).at[1].set(1 + s).at[2].set(3 * s**2)
    noise = np.random.default_rng(0).normal(size=(2, SIZE, SIZE))
    basis = np.linalg.qr(noise[0])[0]
    turn = jax.scipy.linalg.expm(0.05 * s * jnp.asarray(noise[1] - noise[1].T) / SIZE**0.5)
    matrix = basis @ turn @ jnp.diag(values) @ turn.T @ basis.T
    return 0.5 * x @ matrix @ x - s


def dense(w, k):
    return np.linalg.eigvalsh(np.asarray(jax.hessian(rotating)(w)))[::-1][:k]


@pytest.mark.slow
def test_pairs_are_followed_through_crossings_and_a_new_one_from_below():
    """At `x = 0` the last parameter moves at unit speed, `s = t`: three eigenvalues cross, one of them from zero."""
    pairs, ts = gf.observables.HessianEigenpairs(rotating, 2, rtol=1e-5), np.linspace(0, 1.5, 31)
    start = jnp.zeros(SIZE + 1)
    sol = gf.solve(gf.GradientFlow(rotating), start, ts, observe={"pairs": pairs}, rtol=1e-4)
    eigenpairs = sol.observed["pairs"]
    exact = np.stack([dense(start.at[-1].set(t), 2) for t in ts])
    assert np.abs(eigenpairs.values - exact).max() < 2e-5 * exact.max()
    fresh = int(pairs(start).products)
    assert np.all(np.asarray(eigenpairs.bounds) <= 1e-5 * np.asarray(eigenpairs.values[:, :1]) * (1 + 1e-9))
    print("products:", np.asarray(eigenpairs.products), "fresh:", fresh)
    assert np.mean(np.asarray(eigenpairs.products)[1:]) < 0.75 * fresh


def test_vectors_are_those_of_the_preconditioned_hessian():
    weights = np.linspace(0.5, 2.0, 6)
    matrix = np.diag(np.arange(1.0, 7.0)) + 0.3
    pairs = gf.observables.HessianEigenpairs(
        lambda w: 0.5 * w @ matrix @ w, 2, preconditioner=lambda w: jnp.asarray(weights), rtol=1e-9, vectors=True
    )
    root = np.diag(weights**-0.5)
    values, vectors = np.linalg.eigh(root @ matrix @ root)
    eigenpairs = pairs(jnp.ones(6))
    assert np.allclose(eigenpairs.values, values[::-1][:2], rtol=1e-10)
    assert np.allclose(np.abs(eigenpairs.vectors @ vectors[:, ::-1][:, :2]), np.eye(2), atol=1e-7)


@pytest.mark.slow
def test_sharpness_along_a_run_of_a_network_is_that_of_each_row(small_mlp):
    problem, model = small_mlp
    sharpness = gf.observables.Sharpness(problem)
    see = {"S": sharpness, "pairs": gf.observables.HessianEigenpairs(problem, 1)}
    sol = gf.iterate(gf.GradientDescent(problem, 0.5), model, 40, save_every=4, observe=see)
    rows = [jax.tree_util.tree_map(lambda a, i=i: a[i] if eqx_array(a) else a, sol.params) for i in (0, 5, 10)]
    assert np.allclose(np.asarray(sol.observed["S"])[[0, 5, 10]], [float(sharpness(row)) for row in rows], rtol=1e-4)
    assert np.array_equal(sol.observed["S"], sol.observed["pairs"].values[:, 0])
    print("products:", np.asarray(sol.observed["pairs"].products))


def eqx_array(leaf):
    return hasattr(leaf, "dtype")


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`k` must be"):
        gf.observables.HessianEigenpairs(rotating, 0)


@pytest.mark.slow
def test_as_many_pairs_as_parameters_and_one_parameter():
    one = gf.observables.HessianEigenpairs(lambda w: 1.5 * w**2, 1)
    sol = gf.solve(gf.GradientFlow(lambda w: 1.5 * w**2), jnp.array(1.0), [0.0, 1.0], observe={"p": one})
    assert np.allclose(sol.observed["p"].values, 3)
