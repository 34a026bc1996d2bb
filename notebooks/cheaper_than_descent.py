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
# # The flow is cheaper than gradient descent
#
# Gradient flow, $\dot\theta = -\nabla L(\theta)$, is what gradient descent becomes as its learning rate goes to zero.
# One would think that it is the more expensive of the two. For the same error it is the other way round: gradient
# descent has to keep its learning rate below $2/\mathrm{sharpness}$ however slowly the network still moves, and is a
# method of order one. An implicit method takes long steps as soon as the fast directions have settled.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf

jax.config.update("jax_enable_x64", True)

data = gf.data.digits(n=200, centre=True, unit_norm=True, labels="onehot")
net = gf.models.MLP(64, 32, 10, depth=2, activation=jnp.tanh, key=jax.random.key(0))
problem = gf.EmpiricalRisk(data.x, data.y, loss=gf.losses.square)
flow, horizon = gf.GradientFlow(problem), 400.0


def flat(params):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(eqx.filter(params, eqx.is_array))])


# %% [markdown]
# ## What is the right answer?
#
# A run at a tolerance far below those compared, and one by a method that shares no formula with it. That the two agree
# is what the errors below stand on. `print` shows the drift of the energy, loss plus integral of the squared gradient,
# which is constant on the exact flow.

# %%
exact = gf.solve(flow, net, [horizon], rtol=1e-9, max_steps=10**6)
other = gf.solve(flow, net, [horizon], rtol=1e-8, solver=gf.solvers.Tsit5(), max_steps=10**6)
travelled = np.linalg.norm(flat(exact.final) - flat(net))


def error(sol):
    return np.linalg.norm(flat(sol.final) - flat(exact.final)) / travelled


print(exact)
print(f"the two differ by {error(other):.0e} of the distance travelled")
assert error(other) < 1e-6

# %% [markdown]
# ## Error against gradients
#
# The flow at four tolerances; gradient descent at a learning rate close to the largest that is stable, and at smaller
# ones; and an explicit Runge-Kutta method. All are billed by the gradient.

# %%
runs = {"flow, default solver": [], "flow, explicit Tsit5": [], "gradient descent": []}
for rtol in (1e-3, 1e-4, 1e-5, 1e-6):
    runs["flow, default solver"].append(gf.solve(flow, net, [horizon], rtol=rtol))
for rtol in (1e-4, 1e-6):
    sol = gf.solve(flow, net, [horizon], rtol=rtol, solver=gf.solvers.Tsit5(), max_steps=10**6)
    runs["flow, explicit Tsit5"].append(sol)
sharpness = float(gf.observables.Sharpness(problem)(exact.final))
for learning_rate in 1 / sharpness / np.array([0.55, 1.0, 2.0]):
    steps = round(horizon / learning_rate)
    rule = gf.GradientDescent(problem, horizon / steps)
    runs["gradient descent"].append(gf.iterate(rule, net, steps, save_every=steps))
# The reference is good enough to tell all of these apart.
assert error(other) < 0.1 * min(error(sol) for sols in runs.values() for sol in sols)

fig, ax = plt.subplots(figsize=(4.5, 3), layout="constrained")
for (name, sols), marker in zip(runs.items(), "os^", strict=True):
    costs = [int(sol.stats["gradient_evaluations"]) for sol in sols]
    ax.loglog(costs, [error(sol) for sol in sols], marker + "-", label=name)
    print(f"{name:22}" + "".join(f"{cost:>9,d}: {error(sol):.0e}" for cost, sol in zip(costs, sols, strict=True)))
ax.set(xlabel="gradients", ylabel="error / distance travelled")
ax.set_title(f"tanh network on digits, t = {horizon:g}, sharpness {sharpness:.1f}")
ax.legend()
plt.show()

# %%
descent, ours = runs["gradient descent"][1], runs["flow, default solver"][0]
assert error(ours) < error(descent)
ratio = int(descent.stats["gradient_evaluations"]) / int(ours.stats["gradient_evaluations"])
worse = error(descent) / error(ours)
print(f"gradient descent at 1/sharpness: {ratio:.0f} times the gradients, {worse:.0f} times the error")
assert ratio > 5
# The order of gradient descent: half the learning rate, half the error.
assert abs(np.log2(error(descent) / error(runs["gradient descent"][2])) - 1) < 0.1
