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
# # Small initialisation: direction before norm, then saddle to saddle
#
# A network that starts small sits near a saddle, zero. While it is small its weights turn, to a direction that is known
# before training: a KKT point of the *neural correlation function* $N(u)$ on the unit sphere. The norm, still tiny,
# grows meanwhile at the rate $2N(u(t))$, and from then on like $e^{2Nt}$; when it is of order one the loss falls. What
# follows is a sequence of saddles, one feature at a time.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## Four features, in order
#
# A linear network of two layers, whose targets have four singular values. Started at a norm of $10^{-12}$, its loss is
# a staircase. In polar coordinates nothing is lost to underflow; `find_saddles` reads the sequence off the run. Each
# saddle, met, tells by its unstable direction when the run will leave it, at a rate that is the singular value: right
# to a time of the order of one over that rate, however small the start and long the wait.

# %%
strengths = np.array([1.0, 0.7, 0.45, 0.25])
problem = gf.EmpiricalRisk(np.eye(4), np.diag(strengths), gf.losses.square, reduction="sum")
model = gf.models.TwoLayer(4, 6, 4, activation=lambda z: z, key=jax.random.key(0))
start = gf.Polar(model, log_norm=np.log(1e-12))
ts = np.linspace(0, 150, 1501)
sol = gf.solve(gf.PolarFlow(problem), start, ts, observe={"loss": problem, "log": gf.observables.LogNorm()})
saddles = gf.find_saddles(sol, problem)
levels = 0.5 * np.cumsum(np.append(strengths, 0)[::-1] ** 2)[::-1]
assert len(saddles) == 5
for saddle, level in zip(saddles, levels, strict=True):
    print(f"entered at t = {saddle.entered:6.1f}, loss {saddle.loss:.4f}, predicted {level:.4f}")
assert max(abs(saddle.loss - level) for saddle, level in zip(saddles, levels, strict=True)) < 1e-3


def early(saddles):
    return np.array([(saddle.predicted - saddle.left) * saddle.rate for saddle in saddles[:-1]])


smaller = gf.Polar(model, log_norm=np.log(1e-24))
again = gf.solve(gf.PolarFlow(problem), smaller, 2 * ts, observe={"loss": problem})
by_size = early(saddles), early(gf.find_saddles(again, problem))
print("jumps come early by, in units of one over the rate:", np.round(by_size[0], 2), "from 1e-12,")
print("and", np.round(by_size[1], 2), "from 1e-24, where all times are twice as long")
# To the spacing of the times saved.
assert np.allclose(*by_size, atol=0.2)

fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
axes[0].plot(sol.ts, sol.observed["loss"], color="black")
for k, (saddle, level) in enumerate(zip(saddles, levels, strict=True)):
    axes[0].axhline(level, color="0.6", linestyle=":", label="predicted loss" if k == 0 else None)
    if k < 4:
        label = "predicted jump" if k == 0 else None
        axes[0].axvline(saddle.predicted, color="tab:red", linestyle="--", linewidth=0.8, label=label)
axes[0].legend()
axes[0].set(xlabel="flow time $t$", ylabel="loss", title="predicted levels and jumps")
axes[1].plot(sol.ts, np.asarray(sol.observed["log"]) / np.log(10), color="black")
axes[1].set(xlabel="flow time $t$", ylabel=r"$\log_{10}\|w\|$", title="norm of the weights")
plt.show()

# %% [markdown]
# ## Where neurons turn
#
# Two classes of digits and a ReLU network, its kinks rounded over an angle of 0.01. The neural correlation function
# needs no training; its KKT points of positive value are what neurons may turn to.

# %%
data = gf.data.digits(classes=(0, 1), n=100, centre=True, unit_norm=True, labels="pm1")
risk = gf.EmpiricalRisk(data.x, data.y, gf.losses.square, predict=gf.models.Smoothed(0.01))
relu = gf.models.TwoLayer(64, 8, key=jax.random.key(1))
correlation = gf.NeuralCorrelation(risk)
points = gf.theory.kkt_points(correlation, gf.models.TwoLayer(64, 1, key=jax.random.key(0)), starts=16)
print("values of the KKT points found:", np.round(points.values, 5))

# %% [markdown]
# Direction first: started at a norm of $e^{-60}$, this network is at a KKT point, by the relative residual there, long
# before anything of the loss is gone.

# %%
ts = np.linspace(0, 240, 481)
watch = {"loss": risk, "log": gf.observables.LogNorm(), "residual": gf.observables.KKTResidual(correlation)}
turning = gf.solve(gf.PolarFlow(risk), gf.Polar(relu, log_norm=-60.0), ts, observe=watch, rtol=1e-5)
loss, residual = np.asarray(turning.observed["loss"]), np.asarray(turning.observed["residual"])
aligned = int(np.argmax(residual < 0.01))
left = int(np.argmax(loss < 0.99 * loss[0]))
print(f"residual below 0.01 at t = {ts[aligned]:.1f}, with the loss at {loss[aligned] / loss[0]:.6f} of the first one;")
print(f"a hundredth of the loss is gone at t = {ts[left]:.1f}")
assert 0 < aligned < 0.7 * left

fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
axes[0].semilogy(ts[: left + 1], residual[: left + 1], color="black")
axes[0].axvline(ts[aligned], color="0.6", linestyle=":")
axes[0].set(xlabel="flow time $t$", ylabel="relative KKT residual", title="first the direction")
axes[1].plot(ts, np.asarray(turning.observed["log"]) / np.log(10), color="black")
axes[1].set(xlabel="flow time $t$", ylabel=r"$\log_{10}\|w\|$", title="the norm, then the loss")
twin = axes[1].twinx()
twin.plot(ts, loss, color="tab:red", linestyle="--")
twin.set_ylabel("loss (dashed)")
plt.show()

# %% [markdown]
# ## From any size
#
# The time of the escape is $\ln(1/\delta)/(2N)$ plus a constant, which depends on how the network aligns. The part that
# is integrated, until the direction rests, is the same for every $\delta$, and the rest is a formula: $\delta$ may be
# one that no floating-point number holds. At $\delta=e^{-60}$ a run all the way can check it.

# %%
options = {"rtol": 1e-6, "tolerance": 1e-4}
reached = gf.Until(gf.observables.LogNorm(), above=np.log(1e-3))
full = gf.solve(gf.PolarFlow(risk), gf.Polar(relu, -60.0), [1e3], until=reached, rtol=1e-6)
short = gf.first_escape(risk, gf.Polar(relu, -60.0), **options)
cost = int(full.stats["gradient_evaluations"])
print(f"|w| = 1e-3 at t = {float(full.t_final):.6f} in {cost} gradients all the way,")
print(f"and at t = {float(short.time):.6f} in {int(short.gradient_evaluations)} by `first_escape`")
assert full.status == "stopped"
assert abs(short.time / full.t_final - 1) < 1e-6

# %%
exponents = [10, 100, 300, 1000]
times = []
for exponent in exponents:
    log_norm = -exponent * np.log(10)
    escape = gf.first_escape(risk, gf.Polar(relu, log_norm), **options)
    times.append(float(escape.time))
    leading = gf.theory.escape(float(points.values[0]), log_norm).time
    print(f"delta = 1e-{exponent}: |w| = 1e-3 at t = {times[-1]:9.3f}; ln(1/delta) / (2 N) = {leading:9.3f};", end=" ")
    print(f"{int(escape.gradient_evaluations)} gradients")
slope = (times[-1] - times[0]) / (990 * np.log(10))
assert abs(2 * float(points.values[0]) * slope - 1) < 1e-4
