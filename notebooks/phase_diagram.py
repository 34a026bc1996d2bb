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
# The 60,000 steps of SGD below become some two hundred evaluations of it.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## SGD and its equations
#
# Four teacher units (erf), $p=6$ student units, $d=500$ inputs, $\gamma/p=0.5$ with $\gamma$ the learning rate; step
# $k$ of SGD sits at $t=k\gamma/(pd)$. Nothing is fitted.

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
# With the learning rate $\gamma \sim d^{-\delta}$ and the number of students $p \sim d^{\kappa}$, the sum of the
# exponents decides what happens when $d$ is infinite. Green, $\kappa+\delta>0$: the risk goes to zero, noise or not.
# Blue, $\kappa+\delta=0$: it stays on a plateau in proportion to the noise. Orange, down to $-1/2$: nothing is learnt.
# Red, from there on: steps are of the size of what they change, and no differential equation holds.
#
# Each region keeps some terms of the equations and drops others. Here are the three systems, from a start that knows
# the space of the teacher. Eight students, two for each teacher: six cannot share four teachers equally, and some risk
# would stay without any noise.

# %%
noise, risks = 1e-3, {}
start = task.order_parameters(task.informed(8, jax.random.key(0)))
print(f"at the start the risk is {float(flow.risk(start)):.1e}; at t = 10,000 it is")
for kappa, delta in ((0.0, 0.5), (0.0, 0.0), (0.0, -0.25)):
    region = gf.theory.phase_region(kappa=kappa, delta=delta)
    truncated = gf.OrderParameterFlow(task, gamma_over_p=0.5, terms=region.terms)
    risks[region.name] = float(truncated.risk(gf.solve(truncated, start, [1e4], rtol=1e-4).final))
    print(f"  kappa + delta = {region.exponent:5}: {risks[region.name]:.1e}  ({region.name}: {region.title})")
print(f"the predicted plateau: {gf.theory.plateau(0.5, noise):.1e}")
assert risks["green"] < 0.1 * risks["blue"]
assert abs(risks["blue"] / gf.theory.plateau(0.5, noise) - 1) < 0.03
assert risks["orange"] > float(flow.risk(start))

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
rate_edges, noise_edges = (
    np.geomspace(v[0], v[-1] * v[1] / v[0], len(v) + 1) / (v[1] / v[0]) ** 0.5 for v in (rates, noises)
)
drawn = ax.pcolormesh(rate_edges, noise_edges, np.log10(risk), cmap="viridis")
fig.colorbar(drawn, label=r"$\log_{10}$ risk at $t=1000$")
ax.set(xscale="log", yscale="log", xlabel=r"learning rate $\gamma/p$", ylabel="variance of the noise")
ax.set_title("two teachers, four students")
plt.show()
print(f"{risk.size} systems, {int(ds.gradient_evaluations.sum()):,d} evaluations")
# More noise, more risk; and where noise is large and the learning rate small, the plateau is in proportion to both.
assert np.all(np.diff(risk.values, axis=0) > 0)
by_noise = np.log(risk.values[-1, 0] / risk.values[-2, 0]) / np.log(noises[-1] / noises[-2])
by_rate = np.log(risk.values[-1, 1] / risk.values[-1, 0]) / np.log(rates[1] / rates[0])
print(f"power of the noise {by_noise:.2f}, of the learning rate {by_rate:.2f}")
assert np.allclose([by_noise, by_rate], 1, atol=0.1)
