"""Early training and two nearby directions: what theory says, measured; the studies, their tables and figures."""

import equinox as eqx
import numpy as np
import pytest
from matplotlib.figure import Figure

import gradflow as gf
from gradflow import plot, studies
from gradflow.plot._legends import covering
from gradflow.studies._early_stage import _within_span


@pytest.fixture(scope="module")
def toy():
    return studies.two_directions((0.1, 0.05, 0.025, 0.0125), horizon=1e4, steps=20_000, saves=241)


@pytest.mark.slow
def test_plateau_and_escape_of_two_directions(toy):
    """Plateau `2 sqrt(p) / (1 + p)`, escape time like the inverse square of the angle, the closer the smaller it is."""
    assert np.all(np.abs(toy.plateau_loss.values[1:] - 1) < 0.01)
    slopes = studies.escape_slopes(toy)
    np.testing.assert_allclose(slopes, -2, atol=0.15)
    assert np.all(np.diff(np.abs(slopes + 2)) < 0)
    off = np.abs(toy.phase_end.sel(phase="plateau") / toy.predicted_escape_time - 1).values
    print(f"escape time against the prediction: {off}")
    assert np.all(np.diff(off) < 0)
    assert off[-1] < 0.002
    # The whole curve from the plateau on, over four decades of the loss.
    far = toy.scaled_time.isel(angle=-1).values > 0.5
    np.testing.assert_allclose(toy.risk[-1, far], toy.predicted_risk[-1, far], rtol=0.01)


@pytest.mark.slow
def test_the_four_phases_come_in_order_and_neurons_slide_to_the_end(toy):
    ends = toy.phase_end.values
    assert np.all(np.isfinite(ends))
    assert np.all(np.diff(ends, axis=1) > 0)
    late = toy.scaled_time.values > 1
    assert np.all(toy.sliding.values[late] >= 9)
    assert np.all(np.diff(toy.risk.values, axis=1) < 0)
    # The direction tends to a KKT point of the maximum-margin problem.
    residual = toy.residual.values[-1]
    assert residual[-1, 0] < 2e-3
    assert residual[-1, 1] < 0.1
    assert np.all(np.diff(residual[-20:, 1]) < 0)


@pytest.mark.slow
def test_large_steps_kill_the_sliding_neurons_and_get_stuck(toy):
    assert toy.descent_alive.values[-1] == 0
    stuck = 1 / (1 + toy.attrs["ratio"])
    assert toy.descent_risk.values[-1] > stuck
    assert toy.flow_risk.values[-1] < 0.5 * stuck
    assert "negative neurons left" in studies.two_directions_table(toy)
    assert covering(plot.draw(toy)) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_law_of_escape_holds_for_another_ratio_and_other_starts(seed):
    ds = studies.two_directions((0.02,), ratio=8, seed=seed, horizon=100.0, steps=10, saves=241)
    assert abs(float(ds.phase_end.sel(phase="plateau")[0] / ds.predicted_escape_time[0]) - 1) < 0.01


def test_theory_of_two_directions_by_hand():
    theory = gf.theory.two_directions(4.0, 0.1, 0.5)
    assert theory.plateau == pytest.approx(0.8)
    assert float(theory.loss(np.array(theory.escape_time(0.25)))) == pytest.approx(0.6)
    twice = gf.theory.two_directions(4.0, 0.2, 0.5)
    assert theory.escape_time() / twice.escape_time() == pytest.approx(4, rel=0.01)
    for bad in ({"ratio": 0.0}, {"angle": -1.0}, {"share": np.nan}):
        with pytest.raises(ValueError, match="must be positive"):
            gf.theory.two_directions(**{"ratio": 2.0, "angle": 0.1, "share": 0.5} | bad)
    with pytest.raises(ValueError, match="`drop` must lie between 0 and 1"):
        theory.escape_time(1.0)


@pytest.fixture(scope="module")
def early():
    data = gf.data.correlated(20, 8)
    sizes = {"widths": (8, 64), "rates": (0.1, 0.01), "batches": (2,), "losses": ("exponential",)}
    return studies.early_stage(data, **sizes, horizon=1e4, saves=25)


@pytest.mark.slow
def test_the_early_drop_depends_neither_on_width_nor_on_rate(early):
    for dim in ("width", "rate"):
        drop = early[f"drop_{dim}"].values
        assert np.all(np.abs(drop / 0.16 - 1) < 0.05)
        assert drop.max() / drop.min() < 1.1
    ratio = early.drop_batch.values[0] / early.drop_rate.sel(rate=0.01).values[0]
    assert np.all(np.abs(ratio - 1) < 0.05)
    assert early.width_needed.values.tolist() == [8]
    assert float(early.uncovered.sel(width=64)[0]) == 0


@pytest.mark.slow
def test_the_study_counts_violations_where_there_are_any(early):
    assert early.violations.sel(data="given").values.tolist() == [0, 0, 0]
    assert np.all(early.events.values > 100)
    assert np.all(early.violations.sel(data="random labels").values > 100)
    assert early.attrs["condition"] == "holds"
    np.testing.assert_allclose(early.partition.sum("part"), 1)
    assert np.all(np.diff(early.partition.sel(part="true-living")) >= 0)
    ratio = (early.bound / early.norm).values
    assert np.all((ratio > 0.7) & (ratio <= 1))


@pytest.mark.slow
def test_the_study_is_told_and_drawn(early, tmp_path):
    table = studies.early_stage_table(early)
    assert "given: descent 0 of" in table
    drawn = plot.draw(early)
    assert covering(drawn) == []
    assert isinstance(drawn, Figure)
    assert plot.save(drawn, tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_study_takes_classes_and_data_that_cannot_be_told_apart():
    x = np.repeat(np.random.default_rng(0).normal(size=(6, 3)), 2, axis=0)  # every input twice, with another label
    clash = gf.data.Dataset(x, np.tile([0, 1, 2, 0], 3), name="clash")
    few = {"rates": (0.1,), "batches": (2,), "runs": 2, "horizon": 100.0, "saves": 5}
    ds = studies.early_stage(clash, widths=(8,), **few)
    assert ds.loss.values.tolist() == ["cross-entropy", "square"]
    assert np.all(ds.drop_width > 0)
    assert np.all(np.isnan(ds.residual.values))
    table = studies.early_stage_table(ds)
    assert "not separated" in table
    assert "two classes only" in table
    assert covering(plot.draw(ds)) == []


@pytest.mark.slow
def test_what_lies_outside_the_span_of_the_inputs_does_not_matter(key):
    """Descent in six dimensions against descent in the two that the inputs span, with projected weights."""
    x = np.random.default_rng(0).normal(size=(3, 6))
    x[2] = x[0] + x[1]
    within = _within_span(x)
    assert within.shape == (3, 2)
    np.testing.assert_allclose(within @ within.T, x @ x.T, atol=1e-12)
    assert _within_span(x[:, :2]).shape == (3, 2)
    model = gf.models.mildly_parametrised(6, 5, key=key)
    inside = eqx.tree_at(lambda m: m.weight, model, model.weight @ np.linalg.pinv(x) @ within)
    computed = [
        gf.iterate(gf.GradientDescent(gf.EmpiricalRisk(inputs, np.array([1.0, -1.0, 1.0]), gf.losses.exponential), 0.1),
                   start, 20, save_params=False).loss[1]
        for inputs, start in ((x, model), (within, inside))
    ]  # fmt: skip
    np.testing.assert_allclose(computed[1], computed[0], rtol=1e-12)


def test_bad_input_is_refused():
    data = gf.data.correlated(4, 2)
    with pytest.raises(ValueError, match="`losses` must be one of 'exponential', 'logistic', 'square', 'hinge'"):
        studies.early_stage(data, losses=("cross-entropy",))
    with pytest.raises(ValueError, match="`widths` must be an integer of at least 1"):
        studies.early_stage(data, widths=(0,))
    with pytest.raises(ValueError, match="`rates` must hold at least one value, but is empty"):
        studies.early_stage(data, rates=())
    with pytest.raises(ValueError, match="`saves` must be an integer of at least 2, but is 1"):
        studies.early_stage(data, saves=1)
    with pytest.raises(ValueError, match="`saves` must be an integer of at least 2, but is 1"):
        studies.two_directions((0.1,), saves=1)
    with pytest.raises(ValueError, match=r"labels \+1 and -1"):
        studies.early_stage(gf.data.Dataset(np.ones((2, 2)), np.array([0.5, 1.0])))
    for x, message in ((np.zeros((2, 2)), "samples other than zero"), (np.full((2, 2), np.nan), "must be finite")):
        with pytest.raises(ValueError, match=message):
            studies.early_stage(gf.data.Dataset(x, np.array([1.0, -1.0])))
    with pytest.raises(ValueError, match="`angles` must be a decreasing sequence"):
        studies.two_directions((0.1, 0.2))
    with pytest.raises(ValueError, match="`ratio` must be an integer of at least 2"):
        studies.two_directions((0.1,), ratio=1)
    with pytest.raises(ValueError, match="`angle` must lie between 0 and pi"):
        gf.data.two_directions(angle=0.0)


def test_made_data_are_what_they_say():
    for seed in range(3):
        x, y = gf.data.correlated(15, 6, seed=seed, dtype="float64")
        assert gf.theory.partition_condition(x, y).holds
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1)
        assert np.sum(y) == 1
    x, y = gf.data.two_directions(3, 2, angle=0.3, dtype="float64")
    np.testing.assert_allclose(np.arccos(x[0] @ x[-1]), 0.3)
    assert y.tolist() == [1, 1, 1, -1, -1]


def test_the_start_is_not_balanced(key):
    model = gf.models.mildly_parametrised(8, 400, kappa=0.1, key=key)
    np.testing.assert_allclose(np.abs(model.output), 400**-0.5)
    size = float(np.std(model.weight)) * (400 * 8) ** 0.5
    assert size == pytest.approx(0.1, rel=0.05)
    assert set(np.sign(model.output)) == {-1.0, 1.0}
