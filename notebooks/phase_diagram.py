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
# # Phase diagram of high-dimensional SGD
#
# A student network learns from a teacher by one-pass SGD, a fresh sample at every step, in many dimensions. All that
# counts then are overlaps of weights, *order parameters*, which obey a closed system of differential equations.
# Millions of steps of SGD become a fraction of a second.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## SGD and its equations
#
# Four teacher units of erf, six students, 500 inputs. Nothing is fitted.

# %%
task = gf.TeacherStudent.orthogonal(500, 4, noise=1e-3)
weights = task.uninformed(6, jax.random.key(0))
flow = gf.OrderParameterFlow(task, gamma_over_p=0.5)
rule = gf.OnePassSGD(task, gamma_over_p=0.5, key=jax.random.key(1))
sgd = gf.iterate(rule, weights, 60_000, save_every=600, observe={"risk": task})
sol = gf.solve(flow, task.order_parameters(weights), sgd.ts, observe={"risk": flow.risk})

fig, ax = plt.subplots(figsize=(4.5, 2.8), layout="constrained")
ax.loglog(sgd.ts[1:], sgd.observed["risk"][1:], color="0.6", linewidth=3, label="one run of SGD, 60,000 steps")
ax.loglog(sol.ts[1:], sol.observed["risk"][1:], color="black", linewidth=1, label="order parameters")
ax.set(xlabel=r"$t = k\,\gamma/(p\,d)$", ylabel="excess risk", title="a committee of erf units")
ax.legend()
plt.show()
gap = np.abs(np.log(sgd.observed["risk"] / sol.observed["risk"]))
print(
    f"{int(sol.stats['gradient_evaluations'])} evaluations; SGD within {np.max(gap):.2f} in the logarithm of the risk"
)
assert np.max(gap) < 0.5

# %% [markdown]
# ## Regions
#
# With the learning rate $\gamma \sim d^{-\delta}$ and the number of students $p \sim d^{\kappa}$, the exponents decide
# whether the risk goes to zero, as in the green region, or stays on a plateau that the noise sets, as in the blue and
# orange ones.

# %%
for kappa, delta in ((0.0, 0.5), (0.0, 0.0), (0.0, -0.25), (0.3, -0.1)):
    print(f"kappa = {kappa}, delta = {delta}: {gf.theory.phase_region(kappa=kappa, delta=delta).name}")
assert gf.theory.phase_region(kappa=0.0, delta=0.5).name == "green"

# %% [markdown]
# ## A map
#
# The risk at $t = 1000$ over learning rate and label noise: 48 systems in one call.

# %%
rates, noises = np.geomspace(0.05, 4, 8), np.geomspace(1e-5, 1e-1, 6)
ds = gf.studies.phase_map(
    rates=rates, noises=noises, units=2, width=4, horizon=1e3, saves=31, rtol=1e-3, progress=False
)
risk = ds.risk.isel(time=-1).transpose("noise", "rate")
fig, ax = plt.subplots(figsize=(4.5, 3), layout="constrained")
drawn = ax.pcolormesh(rates, noises, np.log10(risk), shading="nearest", cmap="viridis")
fig.colorbar(drawn, label=r"$\log_{10}$ risk at $t=1000$")
ax.set(xscale="log", yscale="log", xlabel=r"learning rate $\gamma/p$", ylabel="variance of the noise")
plt.show()
print(f"{risk.size} systems, {int(ds.gradient_evaluations.sum()):,d} evaluations")
# More noise, more risk; and at small learning rates the plateau is in proportion to both.
assert np.all(np.diff(risk.values, axis=0) > 0)
small = float(risk[-1, 0]) / float(risk[-2, 0])
assert abs(np.log(small) / np.log(noises[-1] / noises[-2]) - 1) < 0.1
