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
WATCHED = {"risk": CIRCLE}
COUNTS = ["steps", "accepted", "gradient_evaluations", "hessian_vector_products"]


def deep(width, seed):
    """Two hidden layers with biases, of an activation that is not zero at zero, and factors that know the width."""
    settings = {"depth": 2, "activation": jax.nn.sigmoid, "parametrisation": "ntk", "init_scale": 0.5}
    model = gf.models.MLP(2, width, **settings, key=jax.random.key(seed))
    model = eqx.tree_at(lambda m: m.biases, model, tuple(b + 0.1 * (seed + 1) for b in model.biases))
    return gf.GradientFlow(CIRCLE), model


def shallow(width, seed):
    settings = {"activation": jax.nn.sigmoid, "parametrisation": "ntk", "init_scale": 0.5}
    return gf.GradientFlow(CIRCLE), gf.models.TwoLayer(2, width, **settings, key=jax.random.key(seed))


def descent(width, seed):
    flow, model = shallow(width, seed)
    return gf.GradientDescent(flow.problem, 0.02), model


def programs(ds):
    return json.loads(ds.attrs["runs"])[0]["programs"]


CASES = {
    "shallow": (shallow, gf.solvers.Tsit5()),
    "deep": pytest.param(deep, gf.solvers.Tsit5(), marks=pytest.mark.slow),
    "ROCK2": pytest.param(shallow, gf.solvers.ROCK2(), marks=pytest.mark.slow),
    "default": pytest.param(shallow, None, marks=pytest.mark.slow),
}


def neurons(model):
    return jnp.linalg.norm(model.weight if hasattr(model, "weight") else model.weights[0], axis=1)


@pytest.mark.parametrize(("build", "solver"), CASES.values(), ids=CASES)
def test_padded_members_equal_unpadded_ones_to_rounding(build, solver):
    """The same steps, and all values to rounding, though added neurons would have gradients of their own."""
    options = {"observe": {"risk": CIRCLE, "neurons": neurons}, "solver": solver}
    ds = gf.sweep(build, {"width": [5, 8], "seed": range(2)}, TS, save_params=True, progress=False, **options)
    assert programs(ds) == 1
    for width, seed in ((5, 1), (8, 0)):
        computed, sol = ds.sel(width=width, seed=seed), gf.solve(*build(width, seed), TS, **options)
        assert [int(computed[name]) for name in COUNTS] == [int(sol.stats[name]) for name in COUNTS]
        close = {"rtol": 1e-11, "atol": 1e-13}
        np.testing.assert_allclose(computed.risk, sol.observed["risk"], **close)
        np.testing.assert_allclose(computed.neurons[:, :width], sol.observed["neurons"], **close)
        flat = np.concatenate([np.asarray(leaf).reshape(3, -1) for leaf in flowing(sol.params)], axis=1)
        np.testing.assert_allclose(computed.params[:, : flat.shape[1]], flat, **close)
        assert np.isnan(computed.params[:, flat.shape[1] :]).all()
        assert np.isnan(computed.neurons[:, width:]).all()
        assert float(computed.drift_energy) == pytest.approx(float(sol.drift["energy"]), abs=1e-12)


def flowing(params):
    return jax.tree_util.tree_leaves(eqx.filter(params, eqx.is_inexact_array))


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


@pytest.mark.slow
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
        return jnp.mean(jnp.linalg.norm(model.weight, axis=1) > 0)

    with pytest.raises(ValueError, match="change the observable 'share'"):
        gf.sweep(shallow, {"width": [5, 8], "seed": [0]}, TS, observe={"share": share}, pad=True, progress=False)


def test_data_of_different_sizes_are_not_padded():
    """Zeros are samples as good as any others."""

    def build(samples):
        problem = gf.EmpiricalRisk(*gf.data.circle(samples), gf.losses.square)
        return gf.GradientFlow(problem), shallow(4, 0)[1]

    with pytest.raises(ValueError, match="zeros added at samples=5 change"):
        gf.sweep(build, {"samples": [5, 8]}, TS, pad=True, progress=False)


@pytest.mark.slow
def test_widths_are_taken_together_up_to_powers_of_two():
    """One program for 3 and 4, one for 5 to 8."""
    ds = gf.sweep(shallow, {"width": [3, 4, 5, 8], "seed": [0]}, [0.0, 0.1], solver=gf.solvers.Heun(), progress=False)
    assert programs(ds) == 2
    assert (ds.status == 0).all()
