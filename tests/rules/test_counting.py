"""Gradients that optax transforms evaluate by themselves are counted: told and evaluated agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradflow as gf
from gradflow.rules._counting import marked, run_counted


def counted_valley():
    """Rosenbrock's function, with a derivative that says on the host whenever it is evaluated."""
    seen = {"gradients": 0}

    def tell(_):
        seen["gradients"] += 1

    @jax.custom_vjp
    def loss(w):
        return 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2

    def backward(w, slope):
        jax.debug.callback(tell, w[0])
        return (slope * jnp.array([-400 * w[0] * (w[1] - w[0] ** 2) - 2 * (1 - w[0]), 200 * (w[1] - w[0] ** 2)]),)

    loss.defvjp(lambda w: (loss(w), w), backward)
    return loss, seen


def sharpness_aware(rho):
    """A transform that takes a second gradient, of the loss that it is given, a little uphill."""

    def update(gradient, state, params, *, value_fn, **_):
        uphill = params + rho * gradient / (1e-12 + optax.tree.norm(gradient))
        return -0.001 * jax.grad(value_fn)(uphill), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def averaged(samples):
    """A mean of gradients at neighbouring points, in a loop of fixed length."""

    def update(gradient, state, params, *, value_fn, **_):
        def one(total, k):
            return total + jax.grad(value_fn)(params + 0.01 * k), None

        total, _ = jax.lax.scan(one, gradient, jnp.arange(samples))
        return -0.001 / (samples + 1) * total, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def every_other():
    """A second gradient at every other step."""

    def update(gradient, count, params, *, value_fn, **_):
        second = jax.lax.cond(count % 2 == 0, jax.grad(value_fn), jnp.zeros_like, params)
        return -0.0005 * (gradient + second), count + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), int), update)


BACKTRACKING = functools.partial(optax.scale_by_backtracking_linesearch, max_backtracking_steps=15, decrease_factor=0.5)
TRANSFORMS = {
    "plain": optax.sgd(1e-3),
    "adam": optax.adam(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2)),
    "lbfgs": optax.lbfgs(),
    "lbfgs with backtracking": optax.lbfgs(linesearch=BACKTRACKING(store_grad=True)),
    "zoom": optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(max_linesearch_steps=10)),
    "backtracking": optax.chain(optax.sgd(1.0), BACKTRACKING()),
    "backtracking, gradient kept": optax.chain(optax.sgd(1.0), BACKTRACKING(store_grad=True)),
    "polyak": optax.polyak_sgd(max_learning_rate=1e-2),
    "sharpness-aware": sharpness_aware(0.01),
    "averaged": averaged(3),
    "every other": every_other(),
    "lookback": optax.contrib.schedule_free_sgd(1e-3),
}


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_told_and_evaluated_agree(name):
    loss, seen = counted_valley()
    rule = gf.OptaxRule(loss, TRANSFORMS[name], learning_rate=1.0)
    sol = gf.iterate(rule, jnp.array([-1.2, 1.0]), 12, save_every=12, throw=False)
    jax.effects_barrier()
    assert int(sol.stats["gradient_evaluations"]) == seen["gradients"]
    assert int(sol.stats["steps"]) == 12


KNOWN = {"plain": 12, "polyak": 12, "sharpness-aware": 24, "averaged": 48, "every other": 18}


@pytest.mark.parametrize("name", list(KNOWN))
def test_counts_that_are_known_beforehand(name):
    loss, _ = counted_valley()
    sol = gf.iterate(gf.OptaxRule(loss, TRANSFORMS[name], learning_rate=1.0), jnp.array([-1.2, 1.0]), 12)
    assert int(sol.stats["gradient_evaluations"]) == KNOWN[name]


def test_a_step_that_is_not_taken_counts_as_well():
    def loss(w):
        return jnp.sum(w**2)

    def update(gradient, state, params, *, value_fn, **_):
        return jnp.inf * jax.grad(value_fn)(params), state

    transform = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    sol = gf.iterate(gf.OptaxRule(loss, transform, learning_rate=1.0), jnp.ones(2), 5, throw=False)
    assert (sol.status, int(sol.stats["steps"])) == ("nonfinite", 1)
    assert int(sol.stats["gradient_evaluations"]) == 2


def test_what_cannot_be_counted_is_said():
    """Forward mode through the loss: nothing is known, and the run is right all the same."""

    def update(gradient, state, params, *, value_fn, **_):
        _, slope = jax.jvp(value_fn, (params,), (gradient,))
        return -0.1 * gradient * jnp.sign(slope), state

    transform = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    sol = gf.iterate(gf.OptaxRule(lambda w: 0.5 * jnp.sum(w**2), transform, learning_rate=0.1), jnp.ones(2), 10)
    np.testing.assert_allclose(sol.final, 0.9**10)
    assert int(sol.stats["gradient_evaluations"]) == -1
    assert "gradient evaluations not reported" in repr(sol)


@pytest.mark.parametrize("kind", ["function", "risk", "custom rule"])
def test_a_loss_that_a_transform_has_from_elsewhere_is_not_passed_over(kind):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))
    risk = gf.EmpiricalRisk(x, jnp.ones(6), gf.losses.square, predict=lambda w, x: x @ w)
    problem = {"function": lambda w: jnp.sum(w**2), "risk": risk, "custom rule": counted_valley()[0]}[kind]

    def update(gradient, state, params):
        return -0.001 * jax.grad(problem)(params + 0.01 * gradient), state

    transform = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    sol = gf.iterate(gf.OptaxRule(problem, transform, learning_rate=0.1), jnp.ones(2), 4)
    assert int(sol.stats["gradient_evaluations"]) == -1
    plain = gf.iterate(gf.OptaxRule(problem, optax.lbfgs(), learning_rate=0.1), jnp.ones(2), 4)
    assert int(plain.stats["gradient_evaluations"]) >= 4


@pytest.mark.slow
def test_the_run_is_that_of_optax_itself():
    loss, _ = counted_valley()
    rule = gf.OptaxRule(loss, optax.lbfgs(), learning_rate=1.0)
    sol = gf.iterate(rule, jnp.array([-1.2, 1.0]), 8)
    transform, w = optax.lbfgs(), jnp.array([-1.2, 1.0])
    state = transform.init(w)
    for _ in range(8):
        value, gradient = jax.value_and_grad(loss)(w)
        updates, state = transform.update(gradient, state, w, value=value, grad=gradient, value_fn=loss)
        w = w + updates
    np.testing.assert_allclose(sol.final, w, rtol=1e-9)


@pytest.mark.slow
def test_batches_count_each_for_itself():
    loss, _ = counted_valley()
    rule = gf.OptaxRule(loss, optax.lbfgs(), learning_rate=1.0)
    starts = jnp.array([[-1.2, 1.0], [2.0, 0.5], [0.0, 30.0]])
    batch = jax.vmap(lambda w: gf.iterate(rule, w, 12, throw=False))(starts)
    single = [int(gf.iterate(rule, w, 12, throw=False).stats["gradient_evaluations"]) for w in starts]
    assert len(set(single)) > 1
    assert batch.stats["gradient_evaluations"].tolist() == single


def test_derivatives_through_a_run_with_a_line_search():
    def end(scale):
        rule = gf.OptaxRule(lambda w: scale * jnp.sum(w**2) + w[0], sharpness_aware(0.01), learning_rate=1.0)
        return gf.iterate(rule, jnp.array([1.0, -2.0]), 5).final

    slope = jax.jacfwd(end)(2.0)
    np.testing.assert_allclose(slope, (end(2.0 + 1e-5) - end(2.0 - 1e-5)) / 2e-5, rtol=1e-6)


def test_comparisons_and_sweeps_tell_the_count():
    def transform(eta):
        return optax.chain(sharpness_aware(0.01), optax.scale(eta))

    def loss(w):
        return jnp.sum(w**4) / 4

    rule = gf.OptaxRule(loss, transform, learning_rate=0.1, limit=gf.GradientFlow)
    ds = gf.compare(rule, jnp.ones(2), [0.1, 0.05], 1.0)
    assert (ds.gradient_evaluations == 2 * ds.steps).all()
    swept = gf.sweep(lambda scale: (rule, scale * jnp.ones(2)), {"scale": [1.0, 2.0]}, [0.0, 1.0], progress=False)
    assert (swept.gradient_evaluations == 2 * swept.steps).all()


def test_loops_within_loops_are_counted():
    def loss(w):
        return jnp.sum(w**2)

    def run(w):
        fn = marked(loss)

        def inner(k, v):
            return jax.lax.while_loop(lambda u: jnp.sum(u) > 1, lambda u: u - 0.25 * jax.jit(jax.grad(fn))(u), v + k)

        return jax.lax.fori_loop(0, 3, inner, w) + fn(w)

    computed, count = jax.jit(lambda w: run_counted(run, w))(jnp.array([4.0]))
    v, expected = 4.0, 0
    for k in range(3):
        v += k
        while v > 1:
            v, expected = v / 2, expected + 1
    assert int(count) == expected
    np.testing.assert_allclose(computed, v + 16.0)
