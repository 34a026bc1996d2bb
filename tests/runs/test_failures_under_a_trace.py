"""Runs that fail where no error can be raised give NaN for their end, and the others of a batch are left alone."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf

FLOW = gf.GradientFlow(lambda w: 0.5 * jnp.sum(w**2))
RULE = gf.GradientDescent(lambda w: 0.5 * jnp.sum(w**2), learning_rate=2.5)
TOO_FEW = 2


def decay(w, max_steps=1000, throw=True, ts=(1.0,)):
    return gf.solve(FLOW, w, jnp.asarray(ts), max_steps=max_steps, throw=throw, solver=gf.solvers.Tsit5())


@pytest.mark.parametrize("run", [lambda w: decay(w, TOO_FEW), lambda w: gf.iterate(RULE, w, 200)])
def test_a_run_that_failed_has_no_end(run):
    sol = jax.jit(run)(jnp.ones(2))
    assert sol.status in ("max_steps", "diverged")
    assert np.all(np.isnan(sol.final))
    assert np.isnan(sol.loss[1])
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree_util.tree_leaves(sol.state))
    assert float(sol.loss[0]) == 1.0
    assert int(sol.stats["steps"]) > 0


def test_without_throw_the_part_that_was_computed_stays():
    sol = jax.jit(lambda w: decay(w, TOO_FEW, throw=False))(jnp.ones(2))
    assert sol.status == "max_steps"
    assert np.all(np.isfinite(sol.final))
    assert np.isfinite(sol.loss[1])


def test_only_the_members_that_failed_are_lost():
    sol = jax.vmap(decay)(jnp.ones((3, 2)), jnp.array([1000, TOO_FEW, 1000]))
    assert list(sol.status) == ["ok", "max_steps", "ok"]
    np.testing.assert_allclose(sol.final[jnp.array([0, 2])], np.exp(-1.0), rtol=1e-5)
    assert np.all(np.isnan(sol.final[1]))


def test_counts_among_the_parameters_stay():
    def loss(p):
        return 0.5 * jnp.sum(p["w"] ** 2)

    params = {"w": jnp.ones(2), "n": jnp.arange(3)}
    sol = jax.jit(lambda p: gf.solve(gf.GradientFlow(loss), p, [1.0], max_steps=TOO_FEW))(params)
    assert np.all(np.isnan(sol.final["w"]))
    assert sol.final["n"].tolist() == [0, 1, 2]


def test_derivatives_of_a_failed_run_are_not_numbers():
    run = jax.jit(lambda w: decay(w, TOO_FEW).final)
    assert np.all(np.isnan(jax.jvp(run, (jnp.ones(2),), (jnp.ones(2),))[1]))


@pytest.mark.parametrize("ts", [[1.0, 0.5], [0.5, jnp.nan], [-1.0, 1.0], [1.0, 1.0], [0.0, jnp.inf]])
@pytest.mark.parametrize("throw", [True, False])
def test_traced_times_that_are_no_times(ts, throw):
    def run(ts):
        observe = {"norm": gf.observables.ParameterNorm()}
        return gf.solve(FLOW, jnp.ones(2), ts, observe=observe, throw=throw, solver=gf.solvers.Tsit5())

    sol = jax.jit(run)(jnp.asarray(ts))
    assert sol.status == "invalid_times"
    assert not np.any(sol.reached)
    assert np.all(np.isnan(sol.observed["norm"]))
    assert np.all(np.isnan(sol.params))
    assert np.all(np.isnan(sol.final)) == throw


@pytest.mark.parametrize("ts", [[1.0, 0.5], [0.5, jnp.nan], [-1.0, 1.0]])
def test_traced_times_of_a_stochastic_flow(ts, key):
    problem = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), gf.losses.square, lambda w, x: x @ w)
    flow = gf.SGDFlow(problem, 0.1, batch_size=1)
    observe = {"norm": gf.observables.ParameterNorm()}

    def run(ts, throw):
        return gf.solve(flow, jnp.ones(2), ts, key=key, observe=observe, throw=throw)

    sol = jax.jit(run, static_argnums=1)(jnp.asarray(ts), False)
    assert sol.status == "invalid_times"
    assert not np.any(sol.reached)
    assert np.all(np.isnan(sol.observed["norm"]))
    assert np.all(np.isnan(sol.params))
    assert np.all(np.isnan(jax.jit(run, static_argnums=1)(jnp.asarray(ts), True).final))


@pytest.mark.parametrize("run", [decay, lambda w: gf.iterate(RULE, w, 3)])
def test_reverse_mode_names_the_way_that_works(run):
    for fn in (lambda w: run(w).final.sum(), jax.jit(lambda w: run(w).loss[1])):
        with pytest.raises(RuntimeError, match=r"forward mode.*gradflow\.split_params"):
            jax.grad(fn)(jnp.ones(2))


def test_the_way_that_works():
    """The recipe of the message: `theta(1) = theta(0) exp(-1)`."""

    def final(params):
        trainable, frozen = gf.split_params(params)
        control = diffrax.PIDController(rtol=1e-8, atol=1e-10)
        state = FLOW.init(trainable, frozen)
        sol = diffrax.diffeqsolve(
            FLOW.terms(), diffrax.Tsit5(), 0.0, 1.0, 0.1, state, args=frozen, stepsize_controller=control
        )
        end = jax.tree_util.tree_map(lambda leaf: leaf[-1], sol.ys)
        return gf.join_params(FLOW.params(end), frozen)

    np.testing.assert_allclose(jax.grad(lambda w: final(w).sum())(jnp.ones(2)), np.exp(-1.0), rtol=1e-7)
