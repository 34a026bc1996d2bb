# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The flow of your own model
#
# A model, a loss and some data make a gradient flow, $\dot\theta = -\nabla L(\theta)$: the path that gradient descent
# follows as its learning rate goes to zero. Here is one from nothing, its picture, and how far gradient descent
# deviates from it.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## Any Equinox model, or any function of a pytree
#
# Two classes of handwritten digits, and a small network written on the spot. The floating-point arrays in it flow;
# everything else is carried along.


# %%
class Net(eqx.Module):
    first: jax.Array
    second: jax.Array

    def __call__(self, x):
        return self.second @ jnp.tanh(self.first @ x)


data = gf.data.digits(classes=(3, 8), n=100, centre=True, unit_norm=True, labels="pm1")
key_first, key_second = jax.random.split(jax.random.key(0))
net = Net(1e-4 * jax.random.normal(key_first, (32, 64)), 1e-4 * jax.random.normal(key_second, (32,)))

problem = gf.EmpiricalRisk(data.x, data.y, loss=gf.losses.square)
flow = gf.GradientFlow(problem)

# %% [markdown]
# ## Solve it
#
# Observables are functions of the parameters, evaluated during the solve.

# %%
ts = np.linspace(0, 150, 101)
observe = {
    "loss": gf.observables.Loss(problem),
    "accuracy": gf.observables.Accuracy(problem),
    "norm": gf.observables.ParameterNorm(),
    "sharpness": gf.observables.Sharpness(problem),
}
sol = gf.solve(flow, net, ts, rtol=1e-5, observe=observe)
sol

# %% [markdown]
# The line `drift` answers the question "is this the flow, or the solver's error?": along the exact flow, the loss plus
# the integral of the squared gradient does not change.

# %%
assert sol.status == "ok"
assert float(sol.drift["energy"]) < 1e-3

fig, axes = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
for ax, name, label in zip(
    axes, ("loss", "norm", "sharpness"), ("training loss", "norm of the weights", "sharpness"), strict=True
):
    ax.plot(sol.ts, sol.observed[name])
    ax.set(xlabel="flow time $t$", ylabel=label)
axes[1].set_yscale("log")
plt.show()

# %% [markdown]
# The start is small, and zero is a saddle: the loss waits while the norm grows exponentially, then falls. When exactly?

# %%
half = 0.5 * float(problem(net))
escape = gf.solve(flow, net, [ts[-1]], until=gf.Until(problem, below=half))
print(f"half of the loss is gone at t = {float(escape.t_final):.4f}")
assert escape.status == "stopped"
assert abs(float(problem(escape.final)) / half - 1) < 1e-6

# %% [markdown]
# ## The gap to gradient descent
#
# `compare` runs the rule at several learning rates on the same stretch of flow time and measures the order of the gap.

# %%
rule = gf.GradientDescent(problem, learning_rate=0.1)
gap = gf.compare(rule, net, learning_rates=[0.4, 0.2, 0.1, 0.05], horizon=60.0)
print(gf.tables.compare(gap))
assert abs(float(gap.order[0]) - 1) < 0.1

# %%
gf.plot.draw(gap)

# %% [markdown]
# Gradient descent halves its error by doubling its steps. How many would it need to come as close as the flow at
# `rtol=1e-5` does, on the same stretch up to $t=60$?

# %%
exact = gf.solve(flow, net, np.linspace(0, 60, 31), rtol=1e-9)
ours = gf.solve(flow, net, np.linspace(0, 60, 31), rtol=1e-5)


def flat(params):
    return np.concatenate([np.reshape(leaf, (31, -1)) for leaf in jax.tree.leaves(params)], axis=1)


travelled = np.linalg.norm(flat(exact.params) - flat(exact.params)[0], axis=1).max()
error = np.linalg.norm(flat(ours.params) - flat(exact.params), axis=1).max() / travelled
steps = gf.studies.steps_to_match(gap, error)
gradients = int(ours.stats["gradient_evaluations"])
print(f"flow: {gradients} gradients, error {error:.1e}; gradient descent for that error: {steps:,.0f} steps")
assert steps > 10 * gradients

# %% [markdown]
# ## Plain functions, Flax, optax
#
# Parameters may be any pytree with a function `predict(params, x)`: a module sees one sample, `predict` all of them.
# This is how a Flax model comes in, `predict=lambda params, x: module.apply(params, x)`. And the rule beside the flow
# may be any optax optimiser.

# %%
import optax


def predict(params, x):
    return jnp.tanh(x @ params["first"].T) @ params["second"]


plain = gf.EmpiricalRisk(data.x, data.y, loss=gf.losses.square, predict=predict)
params = {"first": net.first, "second": net.second}
same = gf.solve(gf.GradientFlow(plain), params, [60.0], rtol=1e-5)
assert np.allclose(same.final["second"], gf.solve(flow, net, [60.0], rtol=1e-5).final.second, atol=1e-10)

momentum = gf.OptaxRule(plain, lambda rate: optax.sgd(rate, momentum=0.9), learning_rate=0.02)
ours = gf.iterate(gf.HeavyBall(plain, 0.02, momentum=0.9), params, 300).final
assert np.allclose(gf.iterate(momentum, params, 300).final["first"], ours["first"], atol=1e-12)
