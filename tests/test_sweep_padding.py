"""Widths in one program: padded members equal unpadded ones to rounding, and are not padded where they would not."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf

CIRCLE = gf.EmpiricalRisk(*gf.data.circle(8), gf.losses.square)
TS = [0.0, 1.0, 3.0]
WATCHED = {"risk": CIRCLE, "neurons": lambda model: jnp.linalg.norm(model.weights[0], axis=1)}
COUNTS = ["steps", "accepted", "gradient_evaluations", "hessian_vector_products", "status"]


def deep(width, seed):
    """Two hidden layers with biases, of an activation that is not zero at zero, and factors that know the width."""
    kind = {"depth": 2, "activation": jax.nn.sigmoid, "parametrisation": "ntk", "init_scale": 0.5}
    model = gf.models.MLP(2, width, **kind, key=jax.random.key(seed))
    model = eqx.tree_at(lambda m: m.biases, model, tuple(b + 0.1 * (seed + 1) for b in model.biases))
    return gf.GradientFlow(CIRCLE), model


def descent(width, seed):
    flow, model = deep(width, seed)
    return gf.GradientDescent(flow.problem, 0.02), model


def programs(ds):
    return json.loads(ds.attrs["runs"])[0]["programs"]


SOLVERS = {
    "Tsit5": gf.solvers.Tsit5(),
    "ROCK2": pytest.param(gf.solvers.ROCK2(), marks=pytest.mark.slow),
    "default": pytest.param(None, marks=pytest.mark.slow),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_padded_members_equal_unpadded_ones_to_rounding(solver):
    """The same steps, and all values to rounding, though added neurons would have gradients of their own."""
    options = {"observe": WATCHED, "solver": solver, "save_params": True, "progress": False}
    axes = {"width": [5, 8], "seed": range(2)}
    padded = gf.sweep(deep, axes, TS, **options)
    alone = gf.sweep(deep, axes, TS, pad=False, **options)
    assert (programs(padded), programs(alone)) == (1, 2)
    for name in COUNTS:
        np.testing.assert_array_equal(padded[name], alone[name])
    for name in ("risk", "neurons", "params", "loss_last", "t_final"):
        np.testing.assert_allclose(padded[name], alone[name], rtol=1e-11, atol=1e-13)
    assert float(padded.drift_energy.max()) < 1e-4
    assert np.isnan(padded.neurons[0, :, :, 5:]).all()
    assert not np.isnan(padded.neurons[1]).any()


def test_rules_are_padded_likewise():
    options = {"observe": WATCHED, "progress": False}
    axes = {"width": [5, 8], "seed": range(2)}
    padded = gf.sweep(descent, axes, TS, **options)
    assert programs(padded) == 1
    for i, width in enumerate(axes["width"]):
        sol = gf.iterate(*descent(width, 1), 150, observe=WATCHED, save_every=50)
        np.testing.assert_allclose(padded.risk[i, 1], sol.observed["risk"][np.array([0, 1, 3])], rtol=1e-12)


class Mean(eqx.Module):
    """Divides by the number of neurons that it sees."""

    weight: jax.Array

    def __call__(self, x):
        return jnp.mean(jnp.tanh(self.weight @ x))


def averaged(width):
    return gf.GradientFlow(CIRCLE), Mean(jax.random.normal(jax.random.key(0), (width, 2)))


def test_models_that_look_at_their_width_are_not_padded():
    ds = gf.sweep(averaged, {"width": [5, 7]}, TS, observe={"risk": CIRCLE}, solver=gf.solvers.Tsit5(), progress=False)
    assert programs(ds) == 2
    for width, risk in zip((5, 7), ds.risk, strict=True):
        sol = gf.solve(*averaged(width), TS, observe={"risk": CIRCLE}, solver=gf.solvers.Tsit5())
        np.testing.assert_allclose(risk, sol.observed["risk"], rtol=1e-12)
    with pytest.raises(ValueError, match="but is True, but zeros added at width=5 change the derivative"):
        gf.sweep(averaged, {"width": [5, 7]}, TS, pad=True, progress=False)


def test_observables_that_count_neurons_are_not_padded():
    """Even though the flow itself would not mind."""

    def share(model):
        return jnp.mean(jnp.linalg.norm(model.weights[0], axis=1) > 0)

    with pytest.raises(ValueError, match="change the observable 'share'"):
        gf.sweep(deep, {"width": [5, 8], "seed": [0]}, TS, observe={"share": share}, pad=True, progress=False)


def test_data_of_different_sizes_are_not_padded():
    """Zeros are samples as good as any others."""

    def build(samples):
        problem = gf.EmpiricalRisk(*gf.data.circle(samples), gf.losses.square)
        return gf.GradientFlow(problem), deep(4, 0)[1]

    with pytest.raises(ValueError, match="zeros added at samples=5 change"):
        gf.sweep(build, {"samples": [5, 8]}, TS, pad=True, progress=False)


def test_widths_are_taken_together_up_to_powers_of_two():
    """One program for 3 and 4, one for 5 to 8."""
    ds = gf.sweep(deep, {"width": [3, 4, 5, 8], "seed": [0]}, [0.0, 0.1], solver=gf.solvers.Heun(), progress=False)
    assert programs(ds) == 2
    assert (ds.status == 0).all()
