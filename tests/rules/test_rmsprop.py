"""RMSProp against optax, and the thresholds of all rules against their iterates on a quadratic."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradflow as gf

partial = functools.partial


@pytest.mark.parametrize(
    "options", [{}, {"decay": 0.99, "eps": 1e-3, "initial_scale": 0.5}, {"eps_in_sqrt": False, "bias_correction": True}]
)
def test_rmsprop_is_that_of_optax(small_mlp, options):
    problem, model = small_mlp
    ours = gf.iterate(gf.RMSProp(problem, 1e-2, **options), model, 20, save_every=5)
    theirs = gf.iterate(gf.OptaxRule(problem, partial(optax.rmsprop, **options), 1e-2), model, 20, save_every=5)
    for a, b in zip(*(flat(sol.params) for sol in (ours, theirs)), strict=True):
        assert jnp.allclose(a, b, rtol=1e-12, atol=1e-14)
    assert int(ours.stats["gradient_evaluations"]) == 20


def flat(params):
    return jax.tree_util.tree_leaves(eqx.filter(params, eqx.is_inexact_array))


def test_the_scalar_form_is_the_plain_one_for_one_parameter_and_a_common_scale_for_more():
    quadratic = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 3.0])[: w.size] * w**2)  # noqa: E731
    one = [gf.iterate(make(quadratic, 0.05), jnp.ones(1), 7).final for make in (gf.RMSProp, gf.ScalarRMSProp)]
    assert jnp.array_equal(*one)
    w, nu = np.array([1.0, 2.0]), 0.25
    for _ in range(7):
        g = np.array([1.0, 3.0]) * w
        nu = 0.9 * nu + 0.1 * np.sum(g**2)
        w = w - 0.05 * g / np.sqrt(nu + 1e-8)
    rule = gf.ScalarRMSProp(quadratic, 0.05, initial_scale=0.25)
    assert np.allclose(gf.iterate(rule, jnp.array([1.0, 2.0]), 7).final, w, rtol=1e-13)


QUADRATIC_RULES = {
    "descent": lambda p: gf.GradientDescent(p, 0.1),
    "polyak": lambda p: gf.HeavyBall(p, 0.1, momentum=0.8),
    "heavy ball, mu": lambda p: gf.HeavyBall(p, 0.1, mu=0.5),
    "nesterov": lambda p: gf.Nesterov(p, 0.1, momentum=0.8),
    "optax.sgd": lambda p: gf.OptaxRule(p, optax.sgd, 0.1),
    "optax.sgd, nesterov": lambda p: gf.OptaxRule(p, partial(optax.sgd, momentum=0.5, nesterov=True), 0.1),
    "rmsprop": lambda p: gf.RMSProp(p, 0.1, eps=1.0),
    "scalar rmsprop": lambda p: gf.ScalarRMSProp(p, 0.1, eps=1.0),
    "optax.rmsprop": lambda p: gf.OptaxRule(p, partial(optax.rmsprop, eps=1.0), 0.1),
    "optax.adam": lambda p: gf.OptaxRule(p, partial(optax.adam, eps=1.0), 0.1),
}
"""Those with a memory have `D = 1` as long as gradients are far below `eps`."""


@pytest.mark.parametrize("name", QUADRATIC_RULES)
def test_iterates_on_a_quadratic_turn_unstable_at_the_threshold(name):
    build = QUADRATIC_RULES[name]
    threshold = gf.theory.stability_threshold(build(lambda w: w**2))
    for factor, grows in ((0.99, False), (1.01, True)):
        rule = build(lambda w, factor=factor: 0.5 * factor * threshold * w**2)
        run = gf.iterate(rule, jnp.array(1e-100), 300, save_every=100)
        # Late steps alone: Adam's correction of its bias lowers the threshold of the first few tens of them.
        assert bool(abs(run.params[3]) > abs(run.params[2])) is grows


def test_rules_without_a_known_threshold_are_refused(key):
    problem = gf.EmpiricalRisk(np.eye(2), np.ones(2), gf.losses.square, predict=lambda w, x: x @ w)
    rules = [
        gf.SGD(problem, 0.1, batch_size=1, key=key),
        gf.OptaxRule(problem, optax.adam(0.1), 0.1),
        gf.OptaxRule(problem, lambda rate: optax.rmsprop(rate, eps=1e-6), 0.1),
        gf.OptaxRule(problem, partial(optax.rmsprop, centered=True), 0.1),
    ]
    for rule in rules:
        with pytest.raises(ValueError, match="`rule` must be one whose threshold is known"):
            gf.theory.stability_threshold(rule)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"decay": 1.0}, r"`decay` must lie in \[0, 1\)"),
        ({"eps": -1.0}, "`eps` must not be negative"),
        ({"initial_scale": np.nan}, "`initial_scale` must not be negative"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
    ],
)
def test_constants_out_of_range_are_refused(options, match):
    for make in (gf.RMSProp, gf.ScalarRMSProp):
        with pytest.raises(ValueError, match=match):
            make(lambda w: w @ w, **({"learning_rate": 0.1} | options))
