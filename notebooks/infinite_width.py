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
# # The infinite-width limit, with an error bar
#
# In mean-field scaling a network averages over its nodes. As the width grows, training approaches a limit: a flow of
# laws of weights. Here the limit is computed by quadrature over the initial values, to a stated accuracy, and width
# infinity becomes one more value on the axis of widths.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf
from gradflow.models.nodes import Uniform

jax.config.update("jax_enable_x64", True)

x = np.linspace(-1, 1, 12)[:, None]
y = np.sin(2 * x[:, 0])
features = np.concatenate([x, np.ones_like(x)], axis=1)
problem = gf.EmpiricalRisk(features, y, gf.losses.square)
start = gf.models.MeanFieldStart(2, first=Uniform(-2, 2), middle=[Uniform(0, 2)], output=Uniform(-1, 1))
ts = np.linspace(0, 10, 41)

# %% [markdown]
# ## Width infinity
#
# The nodes are refined until two runs agree; what they differ by is the error bar. Quasi-random nodes, which share
# nothing with those of the default but the law, come with an error bar of their own, from the spread of replicates.

# %%
limit = gf.infinite_width(problem, start, ts, accuracy=1e-6)
predictions = np.asarray(limit.observed["predictions"])
print(f"predictions at width infinity, good to {float(limit.errors['predictions']):.0e}")
other = gf.infinite_width(problem, start, ts, accuracy=3e-3, rule=gf.models.nodes.Sobol())
apart, stated = np.max(np.abs(other.observed["predictions"] - predictions)), float(other.errors["predictions"])
print(f"quasi-random nodes: {apart:.1e} away, good to {stated:.1e}")
assert apart < stated + float(limit.errors["predictions"])

# %% [markdown]
# ## Finite widths
#
# Networks deviate from the limit by $N^{-1/2}$. How far is predicted from the limit alone, without drawing a network.
# $n$ seeds tell a deviation to about $1/\sqrt{2n}$, an eighth for 32; the tolerances are two of these.

# %%
widths, seeds = [16, 64, 256], 32


def build(width, seed):
    net, weights = start.at(width, jax.random.key(seed))
    return gf.MeanFieldFlow(problem, weights), net


def outputs(flow):
    return {"predictions": flow.predictions}


ds = gf.sweep(build, {"width": widths, "seed": range(seeds)}, ts, observe=outputs, progress=False)
predicted = gf.width_fluctuations(problem, start, ts)
deviations = ds.predictions.values - predictions
measured = np.sqrt(np.mean(deviations**2, axis=(1, 2, 3)))
expected = [float(jnp.sqrt(jnp.mean(predicted.std(width) ** 2))) for width in widths]
for width, measured_gap, predicted_gap in zip(widths, measured, expected, strict=True):
    print(f"width {width:3}: distance from the limit {measured_gap:.4f}, predicted {predicted_gap:.4f}")
slope = np.polyfit(np.log(widths), np.log(measured), 1)[0]
print(f"slope {slope:.2f}")
assert abs(slope + 0.5) < 0.13
assert np.allclose(measured, expected, rtol=0.25)

# %% [markdown]
# ## One picture

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
band = np.asarray(predicted.std(64))[-1]
axes[0].fill_between(x[:, 0], -band, band, color="0.85", label="predicted deviation")
for seed in range(6):
    label = "one network" if seed == 0 else None
    axes[0].plot(x[:, 0], deviations[1, seed, -1], color="tab:blue", linewidth=0.7, label=label)
axes[0].axhline(0, color="black", label="width infinity")
axes[0].set(xlabel="$x$", ylabel="prediction minus that of the limit")
axes[0].set_title(f"six networks of width 64 at t = {ts[-1]:g}")
axes[0].legend()
axes[1].loglog(widths, measured, "o", color="black", label="measured")
axes[1].loglog(widths, expected, "k--", linewidth=0.9, label="predicted")
axes[1].set(xlabel="width $N$", ylabel="distance from the limit", title=f"slope {slope:.2f}")
axes[1].set_xticks(widths, [str(width) for width in widths])
axes[1].tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
axes[1].legend()
plt.show()
