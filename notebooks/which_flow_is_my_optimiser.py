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
# # Which flow is my optimiser?
#
# Gradient descent with learning rate $\eta$ drives the sharpness of a network, the largest eigenvalue of the Hessian,
# up to $2/\eta$, and holds it there while it alternates from side to side: the edge of stability. Gradient flow knows
# nothing of that. What does describe the optimiser at the step sizes people use?
#
# The study `gf.studies.edge`, on the command line `gradflow edge`, holds each rule against every flow that is known for
# it. Here is a small version: one network, gradient descent, four of its flows.

# %%
import jax
import matplotlib.pyplot as plt

import gradflow as gf

jax.config.update("jax_enable_x64", True)

data = gf.data.digits(n=30, centre=True, labels="onehot")
flows = ("gradient flow", "edge", "descent-ascent 2", "central")
small = {"width": 6, "shares": (0.7,), "seeds": (0,), "steps": 80, "saves": 20}
ds = gf.studies.edge(data, rules=("gradient_descent",), flows=flows, **small, progress=False)
print(gf.tables.edge(ds))

# %% [markdown]
# ## The sharpness comes to the threshold and stays there
#
# A flow that describes the optimiser has to be compared with midpoints $(w_{k-1} + 2 w_k + w_{k+1})/4$, which do not
# alternate. At these the sharpness passes $2/\eta$ and is held near it; that of gradient flow goes on rising.

# %%
one = ds.isel(rule=0, share=0, seed=0)
relative = one.rule_eigenvalue.isel(pair=0) / one.threshold
of_flows = (one.eigenvalue.isel(pair=0) / one.threshold).assign_coords(case=ds.flow.values)

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.axhline(1, color="tab:red", linewidth=0.8)
left.plot(one.step, relative, color="0.6", linewidth=3, label="midpoints of descent")
distance = (one.distance / one.travelled).assign_coords(case=ds.flow.values)
for name in flows:
    left.plot(one.step, of_flows.sel(case=name), label=name)
    right.semilogy(one.step, distance.sel(case=name), label=name)
left.set(xlabel="step", ylabel="learning rate x sharpness / 2")
right.set(xlabel="step", ylabel="distance / distance travelled")
left.legend()
fig.tight_layout()

late = one.step > 60
print(f"late: descent {float(relative[late].mean()):.2f}, gradient flow {float(of_flows[0, late].mean()):.2f}")
assert abs(float(relative[late].mean()) - 1) < 0.1
assert float(of_flows[0, late].mean()) > 1.2

# %% [markdown]
# ## Which is it?
#
# The flow of centre and amplitude of order 2 stays within a hundredth of the distance travelled. Gradient flow is more
# than ten times as far off in the end. The central flow, the mean path, is held at the threshold from the start of the
# edge, while descent overshoots: its oscillation has to grow from a small seed first. The table calls that a delay.

# %%
mean = dict(zip(flows, ds.mean_distance[:, 0, 0].values, strict=True))
last = dict(zip(flows, ds.last_distance[:, 0, 0].values, strict=True))
reasons = dict(zip(flows, ds.reason[:, 0, 0].values.tolist(), strict=True))
print({name: f"{value:.2%}" for name, value in mean.items()})
assert mean["descent-ascent 2"] < 0.01
assert last["gradient flow"] > 10 * last["descent-ascent 2"]
assert reasons["gradient flow"] == "edge"
assert reasons["descent-ascent 2"] == "valid"
assert reasons["central"] == "delay"
assert float(of_flows.sel(case="central")[late].max()) < 1.01

# %% [markdown]
# ## What it costs, and what it says of the loss
#
# Gradients per step of descent, which itself takes one. The mean loss is predicted by the flows that know the
# oscillation; the loss of gradient flow is too low by a tenth, for it leaves the oscillation out.

# %%
cost = dict(zip(flows, (ds.gradients + 2 * ds.products)[:, 0, 0].values, strict=True))
off = dict(zip(flows, ds.loss_error[:, 0, 0].values, strict=True))
for name in flows:
    print(f"{name:<18} {cost[name]:6.1f} gradients per step, mean loss off by {off[name]:+.1%}")
assert abs(off["descent-ascent 2"]) < 0.03
assert off["gradient flow"] < -0.1
assert cost["gradient flow"] < cost["descent-ascent 2"]
