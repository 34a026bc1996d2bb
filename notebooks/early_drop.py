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
# Wide or narrow, a ReLU network loses the same part of its loss, here about a sixth, within $1/\eta$ steps, if its
# data agree: $y_i y_j\, x_i\cdot x_j \ge 0$. The reason is who lives: neurons of the right sign that are active on a
# sample stay so.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf

jax.config.update("jax_enable_x64", True)

data = gf.data.correlated(20, 8)
problem = gf.EmpiricalRisk(data.x, data.y, gf.losses.exponential)
print(gf.theory.partition_condition(data.x, data.y))

# %% [markdown]
# ## The drop depends neither on the width nor on the learning rate
#
# Descent for $1/\eta$ steps, over widths and rates in one call. The drop is the mean over eight starts; a single one
# may be a few percent off at width 8, and is not at width 512.

# %%
widths, rates = [8, 32, 128, 512], [0.1, 0.02]


def build(rate, width, seed):
    return gf.GradientDescent(problem, rate), gf.models.mildly_parametrised(8, width, key=jax.random.key(seed))


axes = {"rate": rates, "width": widths, "seed": range(8)}
ds = gf.sweep(build, axes, [0.0, 1.0], observe={"loss": problem}, progress=False)
each = 1 - ds.loss[..., -1] / ds.loss[..., 0]
drop = each.mean("seed")
print(drop.to_series().unstack().round(4))
print("standard deviation over starts, by width:", np.round(each.std("seed").max("rate").values, 4))
assert float(each.min()) > 0.1
assert float(abs(drop / drop.mean() - 1).max()) < 0.03
assert float(abs(drop.sel(rate=0.1) / drop.sel(rate=0.02) - 1).max()) < 0.005

# %% [markdown]
# ## Who lives
#
# Every pair of a neuron and a sample is true or false (of the right sign for it or not), living or dead. Along the flow
# the true-living and the false-dead never lose a member.

# %%
model = gf.models.mildly_parametrised(8, 64, key=jax.random.key(0))
ts = np.linspace(0, 12, 121)
observe = {"loss": problem, "partition": gf.observables.NeuronPartition(data.x, data.y)}
sol = gf.solve(gf.GradientFlow(problem), model, ts, observe=observe)
partition = np.asarray(sol.observed["partition"]).reshape(len(ts), -1)
names = ["false-dead", "false-living", "true-dead", "true-living"]
shares = np.stack([np.mean(partition == code, axis=1) for code in range(4)])

fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
axes[0].stackplot(ts, shares, labels=names, colors=["0.85", "tab:orange", "0.6", "tab:blue"])
axes[0].set(xlabel="flow time $t$", ylabel="fraction of pairs", title="partition of neurons", ylim=(0, 1), xlim=(0, 12))
axes[0].legend(loc="center right")
axes[1].plot(ts, sol.observed["loss"], color="black")
axes[1].set(xlabel="flow time $t$", ylabel="exponential loss", title="loss")
plt.show()
events = gf.observables.switches(sol.ts, sol.observed["partition"])
print(f"{len(events.time)} switches, {events.violations} of them out of the true-living or the false-dead")
assert len(events.time) > 0
assert events.violations == 0

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
# One sample on its wrong side costs at least 1 / n: below that, every sample is on its right side.
fitted = np.asarray(end.observed["loss"]) < 1 / len(data.y)
margin = np.asarray(end.observed["margin"])[fitted]
fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
axes[0].loglog(late[1:], late[1:] * end.observed["loss"][1:], color="black")
axes[0].set(xlabel="flow time $t$", ylabel="$t$ times loss", title="in the end $t$ times the loss falls")
axes[1].semilogx(late[fitted], margin, color="black")
axes[1].set(xlabel="flow time $t$", ylabel="normalised margin", title="the margin grows")
plt.show()
assert np.all(np.diff(margin) > 0)
assert np.all(np.diff((late * end.observed["loss"])[late > 1e4]) < 0)
