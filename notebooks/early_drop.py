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
# # Early drop, and the partition of neurons
#
# Wide or narrow, a ReLU network loses a good part of its loss within $1/\eta$ steps, if its data agree:
# $y_i y_j\, x_i\cdot x_j \ge 0$. The reason is who lives: neurons of the right sign that are active on a sample stay
# so.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf

jax.config.update("jax_enable_x64", True)

data = gf.data.correlated(20, 8, dtype="float64")
problem = gf.EmpiricalRisk(data.x, data.y, gf.losses.exponential)
print(gf.theory.partition_condition(data.x, data.y))

# %% [markdown]
# ## The drop depends neither on the width nor on the learning rate
#
# Descent for $1/\eta$ steps, all widths in one program.

# %%
widths, rates = [8, 32, 128, 512], [0.1, 0.02]


def build(rate, width):
    return gf.GradientDescent(problem, rate), gf.models.mild_two_layer(8, width, key=jax.random.key(0))


ds = gf.sweep(build, {"rate": rates, "width": widths}, [0.0, 1.0], observe={"loss": problem}, progress=False)
drop = 1 - ds.loss[..., -1] / ds.loss[..., 0]
print(drop.to_series().unstack().round(4))
assert float(drop.std("width").max()) < 0.1 * float(drop.mean())
assert float(abs(drop.sel(rate=0.1) / drop.sel(rate=0.02) - 1).max()) < 0.1

# %% [markdown]
# ## Who lives
#
# Every pair of a neuron and a sample is true or false (of the right sign for it or not), living or dead. Along the flow
# the true-living and the false-dead never lose a member.

# %%
model = gf.models.mild_two_layer(8, 64, key=jax.random.key(0))
ts = np.linspace(0, 12, 121)
observe = {"loss": problem, "partition": gf.observables.NeuronPartition(data.x, data.y)}
sol = gf.solve(gf.GradientFlow(problem), model, ts, observe=observe)
partition = np.asarray(sol.observed["partition"]).reshape(len(ts), -1)
names = ["false-dead", "false-living", "true-dead", "true-living"]
shares = np.stack([np.mean(partition == code, axis=1) for code in range(4)])

fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
axes[0].stackplot(ts, shares, labels=names, colors=["0.85", "tab:orange", "0.6", "tab:blue"])
axes[0].set(xlabel="flow time $t$", ylabel="share of pairs", title="partition of neurons", ylim=(0, 1), xlim=(0, 12))
axes[0].legend(loc="center right")
axes[1].plot(ts, sol.observed["loss"], color="black")
axes[1].set(xlabel="flow time $t$", ylabel="exponential loss", title="loss")
plt.show()
for code in (0, 3):
    members = partition == code
    assert not np.any(members[:-1] & ~members[1:]), names[code]

# %% [markdown]
# ## And in the end
#
# The loss of exponential type falls like $1/t$ or faster. Steps grow with time, so that $t=10^8$ is near.

# %%
late = np.concatenate([[0], np.geomspace(0.1, 1e8, 46)])
watch = {"loss": problem, "margin": gf.observables.NormalisedMargin(problem)}
end = gf.solve(gf.GradientFlow(problem), model, late, observe=watch, rtol=1e-4, solver=gf.solvers.Tsit5())
cost, product = int(end.stats["gradient_evaluations"]), float(late[-1] * end.observed["loss"][-1])
print(f"{cost} gradients; t * loss at the end: {product:.3f}")
fitted = np.asarray(end.observed["loss"]) < 1 / len(data.y)
margin = np.asarray(end.observed["margin"])[fitted]
fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
axes[0].loglog(late[1:], late[1:] * end.observed["loss"][1:], color="black")
axes[0].set(xlabel="flow time $t$", ylabel="$t$ times loss", title="the loss falls like $1/t$")
axes[1].semilogx(late[fitted], margin, color="black")
axes[1].set(xlabel="flow time $t$", ylabel="normalised margin", title="the margin grows")
plt.show()
assert np.all(np.diff(margin) > 0)
