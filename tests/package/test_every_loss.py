"""Every loss through every flow and rule: twenty short steps of each lower the loss."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradflow as gf
from gradflow._tree import join, split

STEPS, STEP = 20, 0.02
SIGNED = (gf.losses.exponential, gf.losses.hinge, gf.losses.logistic, gf.losses.square)


class OneOf(eqx.Module):
    """One of all losses, chosen at run time, so that a program serves them all; targets are signs, two per sample."""

    index: jax.Array

    def __call__(self, prediction, target):
        classes = lambda p, y: gf.losses.cross_entropy(p, (y + 1) / 2)  # noqa: E731
        return jax.lax.switch(self.index, (*SIGNED, classes), prediction, target)


def problem_and_model(index):
    x, y = gf.data.correlated(6, 4, dtype="float64")
    model = gf.models.TwoLayer(4, 5, 2, key=jax.random.key(0))
    return gf.EmpiricalRisk(x, jnp.stack([y, -y], axis=1), OneOf(index)), model


FLOWS = {
    "DescentAscentFlow": lambda p: gf.DescentAscentFlow(p, 0.01),
    "EdgeFlow": lambda p: gf.EdgeFlow(p, 0.01),
    "RodFlow": lambda p: gf.RodFlow(p, 2 * STEP),  # its half-difference follows the gradient within a step of descent
    "GradientFlow": gf.GradientFlow,
    "HeavyBallFlow": lambda p: gf.HeavyBallFlow(p, 0.1, 0.01),
    "MomentumFlow": lambda p: gf.MomentumFlow(p, 0.01, 0.9),
    "ModifiedFlow": lambda p: gf.ModifiedFlow(p, 0.01),
    "NesterovFlow": lambda p: gf.NesterovFlow(p, 0.1, 0.01),
    "NesterovConvexFlow": lambda p: gf.NesterovConvexFlow(p, 0.01),
    "NeuronPolarFlow": gf.NeuronPolarFlow,
    "PolarFlow": gf.PolarFlow,
    "PrincipalFlow": lambda p: gf.PrincipalFlow(p, 0.01, iterations=2),
    "SGDFlow": lambda p: gf.SGDFlow(p, 0.01, 2, order=2),
    "SecondOrderFlow": lambda p: gf.SecondOrderFlow(p, 1.0),
}
RULES = {
    "GradientDescent": lambda p: gf.GradientDescent(p, STEP),
    "HeavyBall": lambda p: gf.HeavyBall(p, STEP, mu=0.1),
    "Nesterov": lambda p: gf.Nesterov(p, STEP),
    "OptaxRule": lambda p: gf.OptaxRule(p, functools.partial(optax.sgd, momentum=0.5), STEP),
    "SGD": lambda p: gf.SGD(p, STEP, batch_size=6, key=jax.random.key(1), sampling="epochs"),
}


def over_losses(run):
    first, last = jax.jit(jax.vmap(run))(jnp.arange(len(SIGNED) + 1))
    assert np.all(np.isfinite(last))
    assert np.all(last < first)
    return first - last


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOWS)
def test_every_flow_takes_every_loss(name):
    def run(index):
        problem, model = problem_and_model(index)
        flow = FLOWS[name](problem)
        trainable, frozen = split(model)
        state = flow.init(trainable, frozen)

        def step(k, state):
            rate = flow.vector_field(flow.t0 + (k + 1) * STEP, state, frozen)
            return jax.tree_util.tree_map(lambda a, b: a + STEP * b, state, rate)

        ahead = jax.lax.fori_loop(0, STEPS, step, state)
        return problem(join(flow.params(state), frozen)), problem(join(flow.params(ahead), frozen))

    over_losses(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_every_rule_takes_every_loss(name):
    def run(index):
        problem, model = problem_and_model(index)
        rule = RULES[name](problem)
        trainable, frozen = split(model)
        state = rule.init(trainable, frozen)
        ahead = jax.lax.fori_loop(0, STEPS, lambda k, s: rule.step(k, s, frozen)[0], state)
        return problem(model), problem(join(rule.params(ahead), frozen))

    drops = over_losses(run)
    if name in ("GradientDescent", "SGD"):  # full batches
        assert np.all(drops > 0.01)
