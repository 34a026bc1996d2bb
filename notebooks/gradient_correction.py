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
# # What Nesterov's gradient correction does
#
# Heavy ball and Nesterov's method differ by one term: Nesterov's takes the difference of two gradients along. In
# continuous time that term is $\sqrt{s}\,\nabla^2 L\,\dot X$, a damping in proportion to curvature. Low-resolution
# equations, without it, cannot tell the two methods apart.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import gradflow as gf

jax.config.update("jax_enable_x64", True)

curvatures = jnp.array([0.05, 0.2, 1.0])
s, mu = 0.04, 0.02


def problem(w):
    return 0.5 * jnp.sum(curvatures * w**2)


start, steps = jnp.ones(3), 500
NAMES = {"heavy_ball": "heavy ball", "nesterov": "Nesterov"}
rules = {"heavy_ball": gf.HeavyBall(problem, s, mu=mu), "nesterov": gf.Nesterov(problem, s, mu=mu)}

# %% [markdown]
# ## Two methods, three equations
#
# Each method beside its high-resolution equation, and the low-resolution one that both share.

# %%
runs = {name: gf.iterate(rule, start, steps, save_every=1) for name, rule in rules.items()}
ts = runs["nesterov"].ts
high = {
    "heavy_ball": gf.solve(gf.HeavyBallFlow(problem, mu, s), start, ts),
    "nesterov": gf.solve(gf.NesterovFlow(problem, mu, s), start, ts),
}
low = gf.solve(gf.HeavyBallFlow(problem, mu, s, resolution="low"), start, ts)

fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
for ax, name in zip(axes, runs, strict=True):
    ax.plot(ts, runs[name].params[:, 2], "o", markersize=2.5, color="0.6", label="method")
    ax.plot(ts, high[name].params[:, 2], color="black", label="high resolution")
    ax.plot(ts, low.params[:, 2], color="tab:red", linestyle="--", linewidth=0.9, label="low resolution")
    ax.set(title=f"{NAMES[name]}, mode of curvature 1", xlabel=r"$t = k\sqrt{s}$", ylabel="coordinate", xlim=(0, 30))
axes[0].legend()
plt.show()

# %%
gaps = {}
for name, run in runs.items():
    gaps[name] = [float(jnp.max(jnp.abs(run.params - flow.params))) for flow in (high[name], low)]
    print(f"{name:10}: largest gap to the high resolution {gaps[name][0]:.3f}, to the low one {gaps[name][1]:.3f}")
assert all(fine < coarse for fine, coarse in gaps.values())
assert gaps["nesterov"][1] > 5 * gaps["nesterov"][0]

# %% [markdown]
# ## Which is faster?
#
# As long as it oscillates, a mode of curvature $\lambda$ decays at $\sqrt\mu$ with the heavy ball, for any $\lambda$,
# and at $\sqrt\mu + \sqrt{s}\lambda/2$ with Nesterov's method. Beyond, both slow down, Nesterov's method more. So
# Nesterov wins while $\mu$ is below the smallest curvature, they tie at $\mu = \lambda_{\min}$, and above it the heavy
# ball is the faster one.

# %%
values = np.geomspace(0.005, 0.3, 60)
predicted = [gf.theory.faster_method(curvatures, float(value), s) for value in values]
fig, ax = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
ax.semilogx(values, [one.heavy_ball for one in predicted], color="black", label="heavy ball")
ax.semilogx(values, [one.nesterov for one in predicted], color="tab:red", linestyle="--", label="Nesterov")
ax.axvline(float(curvatures[0]), color="0.6", linestyle=":", label=r"$\mu=\lambda_{\min}$")


def measured(flow):
    """Minus the slope of the logarithm of the slowest coordinate, at its maxima where it oscillates."""
    times = np.linspace(40, 160, 2401)
    size = np.abs(np.asarray(gf.solve(flow, start, times, rtol=1e-9).params[:, 0]))
    peaks = 1 + np.flatnonzero((size[1:-1] > size[:-2]) & (size[1:-1] > size[2:]))
    chosen = peaks if len(peaks) > 2 else np.arange(len(times))
    return -np.polyfit(times[chosen], np.log(size[chosen]), 1)[0]


for value in (0.01, 0.03, 0.2):
    labels = ("heavy ball, measured", "Nesterov, measured") if value == 0.01 else (None, None)
    rates = [measured(flow(problem, value, s)) for flow in (gf.HeavyBallFlow, gf.NesterovFlow)]
    ax.plot([value], rates[:1], "ks", markersize=5, label=labels[0])
    ax.plot([value], rates[1:], "o", color="tab:red", markersize=5, label=labels[1])
    predicted_rates = gf.theory.faster_method(curvatures, value, s)
    assert np.allclose(rates, [predicted_rates.heavy_ball, predicted_rates.nesterov], rtol=0.004)
    assert ("heavy_ball" if rates[0] > rates[1] else "nesterov") == predicted_rates.name
    text = f"{predicted_rates.heavy_ball:.4f}, {predicted_rates.nesterov:.4f}"
    print(f"mu = {value}: measured {rates[0]:.4f}, {rates[1]:.4f}, predicted {text}: {predicted_rates.name}")
ax.set(xlabel=r"$\mu$", ylabel="rate of the slowest mode,\nper unit of flow time", title="which method is faster")
fig.legend(loc="outside right upper")
plt.show()
names = [gf.theory.faster_method(curvatures, value, s).name for value in (0.01, 0.05, 0.2)]
assert names == ["nesterov", "tie", "heavy_ball"]
