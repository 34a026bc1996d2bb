"""ReLU networks from vanishing initialisation: directions in several forms, the dichotomy, the study, its figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import gradflow as gf
from gradflow import plot, studies
from gradflow.plot._legends import covering

pytestmark = pytest.mark.slow


def units(rows):
    rows = np.asarray(rows)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_directions_of_relu_neurons_agree_between_forms(seed):
    """Smoothed runs tend to one another in proportion to the smoothing, and to the raw one neuron by neuron.

    Time is half of an escape from 1e-30; directions at smoothing 0.003 stand in for the limit, with an error of about a
    tenth of that at 0.03 if errors are of first order.
    """
    rng = np.random.default_rng(seed)
    x, y = units(rng.normal(size=(8, 3))), np.where(rng.random(8) < 0.5, -1.0, 1.0)
    model = gf.models.TwoLayer(3, 6, key=jax.random.key(seed))
    start = gf.Polar.of(gf.Polar(model, -30 * np.log(10)).ordinary(), neurons=True)

    def directions(predict, flow=gf.NeuronPolarFlow, begin=start, rtol=1e-4):
        problem = gf.EmpiricalRisk(x, y, gf.losses.square, predict=predict, reduction="sum")
        sol = gf.solve(flow(problem), begin, [15.0], rtol=rtol, save_params=False)
        return units(sol.final.direction.neuron_weights())

    limit = directions(gf.models.Smoothed(jnp.asarray(0.003)))
    smoothed = {s: directions(gf.models.Smoothed(jnp.asarray(s))) for s in (0.03, 0.01)}
    off = {s: np.max(np.linalg.norm(computed - limit, axis=1)) for s, computed in smoothed.items()}
    # (0.03 - 0.003) / (0.01 - 0.003) = 3.9 at first order
    assert 2.5 < off[0.03] / off[0.01] < 6
    assert off[0.01] < 0.01
    raw = np.max(np.linalg.norm(directions(None) - limit, axis=1))
    assert raw < 0.005
    # Polar coordinates of the whole resolve neurons of 1e-11 of the norm: errors are relative to each.
    predict, rtol = gf.models.Smoothed(jnp.asarray(0.01)), 1e-6
    whole = directions(predict, gf.PolarFlow, gf.Polar(model, -30 * np.log(10)), rtol)
    assert np.max(np.linalg.norm(whole - directions(predict, rtol=rtol), axis=1)) < 1e-4


def test_dichotomy_of_neurons_on_two_orthogonal_inputs():
    """Labels (1, 1): a neuron that sees an input and whose output weight `a` is positive grows.

    The rate is 1 along the input if it sees one, and `sqrt(2)` along the sum if it sees both. It stays small if it sees
    none, or if `a` is negative and longer than what sees: `a^2 - |w|^2` is conserved, so `a` keeps its sign.
    """
    problem = gf.EmpiricalRisk(np.eye(2), np.ones(2), gf.losses.square, reduction="sum")
    model = gf.models.TwoLayer(2, 24, key=jax.random.key(0))
    start = gf.Polar.of(gf.Polar(model, -300.0).ordinary(), neurons=True)
    sol = gf.solve(gf.NeuronPolarFlow(problem), start, [150.0])
    grown = np.asarray(sol.final.log_norm - start.log_norm)
    weight, a = np.asarray(model.weight), np.asarray(model.output)
    sees = weight > 0
    seeing = np.linalg.norm(weight * sees, axis=1)
    stays = ~sees.any(axis=1) | ((a < 0) & (-a > seeing))
    one, both = ((a > 0) & (sees.sum(axis=1) == count) for count in (1, 2))
    assert min(stays.sum(), one.sum(), both.sum()) > 0
    assert np.max(np.abs(grown[stays])) < 5
    # What a start has of the growing direction moves the logarithm by O(1).
    np.testing.assert_allclose(grown[one], 150, atol=5)
    np.testing.assert_allclose(grown[both], 150 * np.sqrt(2), atol=5)
    towards = np.asarray(sol.final.direction.neuron_weights())[both]
    np.testing.assert_allclose(towards, np.tile([0.5, 0.5, np.sqrt(0.5)], (len(towards), 1)), atol=1e-6)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    data = gf.data.digits(classes=(0, 1), n=20, centre=True, unit_norm=True, labels="pm1")
    few = {"exponents": (4, 12, 300), "widths": (3,), "seeds": (0,), "saves": 61, "rounds": 1, "progress": False}
    few |= {"loss": "logistic"}  # the example of the study is of square loss
    store = tmp_path_factory.mktemp("study") / "runs.zarr"
    return data, few, store, studies.vanishing_init(data, **few, store=store)


def test_study_measures_what_theory_predicts(study):
    *_, ds = study
    assert (ds.status == 1).all()
    np.testing.assert_allclose(ds.slope, ds.predicted_slope, rtol=1e-4)
    # To leading order the time is predicted up to what alignment takes, which does not depend on the size.
    late = (ds.escape_time - ds.predicted_time).values
    assert np.all(late > 0)
    assert late[0, 0, 1] == pytest.approx(late[0, 0, 2], rel=0.05)
    # Plain coordinates with fixed tolerances are late at 1e-12.
    off = (ds.cartesian_time / ds.escape_time - 1).values[0, 0]
    assert off[1] > 0.05
    assert np.isnan(off[2])
    assert int(ds.aligned.sum() + ds.collapsed.sum()) <= 3
    assert float(ds.angle.max()) < 0.1
    assert float(ds.saddle_time[1]) == pytest.approx(float(ds.predicted_time[0, 0, 1]), rel=0.25)  # measured: 0.2


def test_study_resumes_and_is_told_and_drawn(study, tmp_path):
    data, few, store, ds = study
    assert store.with_name("runs-paths.zarr").is_dir()
    again = studies.vanishing_init(data, **few, store=store)
    np.testing.assert_array_equal(again.escape_time, ds.escape_time)
    np.testing.assert_array_equal(again.neuron_angle, ds.neuron_angle)
    table = studies.vanishing_init_table(ds)
    assert "1e-300" in table
    assert "logistic loss" in table
    drawn = plot.draw(ds)
    assert covering(drawn) == []
    assert isinstance(drawn, Figure)
    assert plot.save(drawn, tmp_path / "a.png").stat().st_size > 10_000


def test_circle_in_the_settings_of_the_source():
    """Descent and flow share their curves; neurons turn to the KKT point before the loss falls."""
    ds = studies.circle_illustration(gf.data.circle(50), width=8, steps=8000, saves=81)
    assert ds.risk.values[1, -1] < 0.01 * ds.risk.values[1, 0]
    gap = np.max(np.abs(ds.risk.values[0] - ds.risk.values[1])) / ds.risk.values[1, 0]
    assert gap < 0.03
    assert "KKT points" in studies.circle_table(ds)
    assert covering(plot.draw(ds)) == []
    small = np.flatnonzero(ds.norm.values[1] < 0.1)[-1]

    def away(row):
        turns = ds.polar_angle.values[1, row][:, None] - ds.kkt_angle.values
        return np.min(np.abs(np.angle(np.exp(1j * turns))), axis=1)

    assert np.median(away(small)) < 0.5 * np.median(away(0))
    with pytest.raises(ValueError, match="have inputs in the plane"):
        studies.circle_illustration(gf.data.orthogonal_inputs(3, 3))


def test_study_refuses_class_indices_and_sizes_above_one():
    with pytest.raises(ValueError, match="have targets of floats"):
        studies.vanishing_init(gf.data.digits(classes=(0, 1), n=10, labels="index"))
    data = gf.data.orthogonal_inputs(3, 3)
    with pytest.raises(ValueError, match=r"have targets \+1 and -1 for logistic loss"):
        studies.vanishing_init((np.eye(2), np.array([1.0, 2.0])), loss="logistic")
    with pytest.raises(ValueError, match="`loss` must be one of 'square', 'logistic'"):
        studies.vanishing_init(data, loss="hinge")
    with pytest.raises(ValueError, match="`saves` must be an integer of at least 2, but is 1"):
        studies.vanishing_init(data, saves=1)
    with pytest.raises(ValueError, match="`saves` must be an integer of at least 2, but is 1"):
        studies.circle_illustration(gf.data.circle(4), saves=1)
    with pytest.raises(ValueError, match="`exponents` must be positive"):
        studies.vanishing_init(data, exponents=(-1,))
