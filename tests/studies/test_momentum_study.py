"""The momentum study, its figure and table, and `compare` for momentum rules."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow import plot, studies
from gradflow.plot._legends import covering


@pytest.fixture(scope="module")
def digits():
    return gf.data.digits(classes=(0, 1), n=10, centre=True, unit_norm=True, labels="pm1")


@pytest.fixture(scope="module")
def ds(digits):
    return studies.momentum(digits, widths=(32, 2048), ratios=(0.05, 4.0), saves=50, progress=False)


@pytest.mark.slow
def test_study(digits, ds):
    """Losses fall, predictions of the linearised flow hold in the wide network, and so do the rates of its modes."""
    assert dict(ds.sizes) == {
        "rule": 3,
        "ratio": 2,
        "width": 2,
        "save": ds.sizes["save"],
        "momentum": 2,
        "mode": 10,
        "resolution": 2,
    }
    assert (ds.status == 0).all()
    assert float((ds.loss[..., -1] / ds.loss[..., 0]).max()) < 0.2
    assert (
        ds.loss.sel(rule="gradient_descent").isel(ratio=0) == ds.loss.sel(rule="gradient_descent").isel(ratio=1)
    ).all()
    # The kernel of the study at the start is the one of the model that it names.
    model = gf.models.SignedTwoLayer(64, 2048, key=jax.random.key(0))
    values = np.linalg.eigvalsh(gf.theory.relu_gram(digits.x, model.weight))
    np.testing.assert_allclose(ds.eigenvalue, values, rtol=1e-10)
    assert ds.attrs["learning_rate"] == pytest.approx(0.25 / max(values[-1], _top(digits, 32)), rel=1e-10)
    # Nesterov's method is the faster one for small mu only, as predicted.
    assert ds.predicted_winner.values[0] == ds.winner.values[0] == "nesterov"
    assert "nesterov" not in (ds.predicted_winner.values[1], ds.winner.values[1])
    error = np.abs(ds.measured_rate / ds.predicted_rate - 1)
    assert float(error.median()) < 0.05
    wide, narrow = ds.linear_error.isel(width=1), ds.linear_error.isel(width=0)
    assert (wide < narrow).all()
    assert float(wide.max()) < 0.1
    gap = ds.flow_gap.max("save")
    assert (gap.sel(resolution="high") < gap.sel(resolution="low")).all()


def _top(digits, width):
    model = gf.models.SignedTwoLayer(64, width, key=jax.random.key(0))
    return np.linalg.eigvalsh(gf.theory.relu_gram(digits.x, model.weight))[-1]


@pytest.mark.slow
def test_table_and_figure(ds):
    table = studies.momentum_table(ds)
    assert "nesterov" in table
    assert "nan" not in table
    assert f"width^{float(studies.movement_slope(ds.isel(ratio=1))[1]):.2f}" in table
    drawn = plot.draw(ds)
    assert covering(drawn) == []
    assert len(drawn.axes) == 6
    assert all(ax.get_xlabel() and ax.get_ylabel() and ax.get_title() for ax in drawn.axes)
    single = studies.momentum_table(ds.isel(width=[1]))
    assert "width^" not in single


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": []}, "`widths` must be distinct values, at least one"),
        ({"widths": (0,)}, "`widths` must be an integer of at least 1"),
        ({"ratios": (1.0, 1.0)}, "`ratios` must be distinct values"),
        ({"ratios": (-1.0,)}, "`ratios` must be positive"),
        ({"ratios": (1e9,)}, "`ratios` must be at most .*, the condition of the kernel"),
        ({"steps": 3}, "`steps` must be an integer of at least 10"),
        ({"saves": 1}, "`saves` must be an integer of at least 8"),
    ],
    ids=str,
)
def test_bad_options(digits, options, message):
    with pytest.raises(ValueError, match=message):
        studies.momentum(digits, **({"widths": (64,)} | options), progress=False)


def test_kernels_without_full_rank_are_refused(digits):
    with pytest.raises(ValueError, match="must have a tangent kernel of full rank"):
        studies.momentum((np.repeat(digits.x, 2, 0), np.repeat(digits.y, 2)), widths=(64,), progress=False)
    with pytest.raises(ValueError, match=r"must have targets \+1 and -1"):
        studies.momentum((digits.x, np.arange(10.0)), progress=False)


# Rules against flows


class Quadratic(eqx.Module):
    """`sum_i h_i w_i^2 / 2`."""

    h: jax.Array

    def __call__(self, w):
        return 0.5 * jnp.sum(self.h * w**2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [gf.HeavyBall, gf.Nesterov])
def test_compare_measures_both_resolutions(kind):
    rule = kind(Quadratic(jnp.array([0.5, 2.0])), 0.1, mu=0.5)
    ds = gf.compare(rule, jnp.ones(2), [2e-4, 1e-4, 5e-5], 2.0, rtol=1e-9)
    assert ds.flow.values.tolist() == ["low resolution", "high resolution"]
    assert abs(float(ds.order[0]) - 0.5) <= 0.03
    assert abs(float(ds.order[1]) - 0.99) <= 0.03


@pytest.mark.slow
def test_compare_of_fixed_momentum_after_its_transient():
    rule = gf.HeavyBall(Quadratic(jnp.array([0.5, 2.0])), 0.1, momentum=0.5)
    ds = gf.compare(rule, jnp.ones(2), [0.02, 0.01, 0.005], 4.0, rtol=1e-9, after=2.0)
    assert ds.flow.values.tolist() == ["order 1", "second order ODE", "order 2"]
    np.testing.assert_allclose(ds.order, [1, 2, 2], atol=0.1)


def test_after_lies_within_the_horizon():
    rule = gf.GradientDescent(Quadratic(jnp.ones(1)), 0.1)
    with pytest.raises(ValueError, match="`after` must lie between 0 and the horizon, but is 2"):
        gf.compare(rule, jnp.ones(1), [0.1], 1.0, after=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gradient_descent", "heavy_ball", "nesterov"])
def test_discrete_gap_of_every_rule(rule):
    data = gf.data.digits(n=20, labels="onehot")
    ds = studies.discrete_gap(data, rule=rule, width=3, depth=1, horizon=20.0, rates=3, rtol=1e-7, progress=False)
    assert (ds.status == 0).all()
    second = float(ds.order.sel(flow="order 2"))
    assert abs(second - 2) <= 0.4
    assert (ds.gap.sel(flow="order 2")[-1] < ds.gap.sel(flow="order 1")[-1]).all()
