"""The studies and their tables and figures, against runs of their own, closed forms and numpy."""

import itertools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import xarray as xr
from matplotlib.figure import Figure

import gradflow as gf
from gradflow import plot, studies, tables
from gradflow.limits._alignment import align
from gradflow.limits._small_start import predict_small_start
from gradflow.plot._legends import covering
from gradflow.studies import _escape_times, _small_init
from gradflow.studies._by_name import FORMER_NAMES, with_current_names
from gradflow.sweeps import _scheduler

# Whole studies, each with several programs to compile.
pytestmark = pytest.mark.slow

SCALES = [1e-3, 1e-4, 1e-5, 1e-6]
RTOL = 1e-3
LOSSES = {"square": gf.losses.square, "logistic": gf.losses.logistic}


@pytest.fixture(scope="module")
def digits():
    return gf.data.digits(classes=(0, 1), n=20, centre=True, unit_norm=True, labels="pm1")


def study(digits, **options):
    fixed = {"loss_names": list(LOSSES), "widths": [4], "seeds": [0, 1], "scales": SCALES, "rtol": RTOL, "saves": 121}
    return studies.small_init(digits, **(fixed | {"progress": False} | options))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("studies") / "small.zarr"


@pytest.fixture(scope="module")
def small(digits, store):
    return study(digits, store=store)


# Small initialisation


def start_of(loss, scale, seed, digits):
    problem = gf.EmpiricalRisk(*digits, LOSSES[loss])
    return problem, gf.models.TwoLayer(64, 4, init_scale=scale, key=jax.random.key(seed))


def test_predictions_for_two_neurons_and_orthogonal_inputs():
    """Each neuron has an input of its own, with `N = 1/4`: everything is known in closed form."""
    problem = gf.EmpiricalRisk(np.eye(2), np.array([1.0, -1.0]), gf.losses.square)
    computed = predict_small_start(problem)
    np.testing.assert_allclose(computed.values, 0.25)
    np.testing.assert_allclose(computed.escape.directions, np.eye(2), atol=1e-7)
    model = gf.models.TwoLayer(2, 3, key=jax.random.key(0))
    norms = np.array([1e-6, 2e-6, 1e-8])
    rows = np.array([[1, 0, 1], [1, 0, 1], [0, 1, -1]]) * norms[:, None] / np.sqrt(2)
    model = model.with_neuron_weights(jnp.asarray(rows))
    np.testing.assert_allclose(computed.time(model, 0.05), np.log(0.05 / (0.25 * np.sum(norms**2))))
    times, losses = computed.saddles(model)
    np.testing.assert_allclose(times, [0, -2 * np.log(np.sqrt(5) * 1e-6), -2 * np.log(1e-8)], rtol=1e-3)
    np.testing.assert_allclose(losses, [0.5, 0.25, 0], atol=1e-3)
    alone = model.with_neuron_weights(jnp.asarray(rows[:2]))
    assert len(computed.saddles(alone)[0]) == 2


def test_escapes_are_later_than_predicted_by_a_time_that_does_not_depend_on_the_scale(small):
    """The prediction leaves out the alignment."""
    late = (small.escape_time - small.predicted_time).sel(scale=SCALES[1:])
    assert np.all(late > 0)
    assert float((late.max("scale") - late.min("scale")).max()) < 0.02 * float(small.escape_time.min())
    assert np.all(small.aligned.sel(scale=1e-6) > 0.99)


@pytest.mark.slow
def test_escape_times_are_predicted_from_the_start(small):
    """Kumar & Haupt (2024): directions turn by a flow that does not know the scale. What is left vanishes with it."""
    off = np.abs(small.predicted_time_from_start / small.escape_time - 1)
    assert float(off.sel(scale=[s for s in SCALES if s <= 1e-3]).max()) < 0.01
    assert float(off.sel(scale=SCALES[-1]).max()) < 0.002


def test_alignment_of_two_neurons_and_orthogonal_inputs():
    """Each neuron has an input of its own and stays on its ray: `N(w(t)) = sum_j N_j |w_j|^2 exp(4 N_j t)`."""
    problem = gf.EmpiricalRisk(np.eye(2), np.array([1.0, -0.5]), gf.losses.square)
    rows = np.array([[1.0, 0, 1], [0, 2.0, -2]]) / np.sqrt(2)
    model = gf.models.TwoLayer(2, 2, key=jax.random.key(0)).with_neuron_weights(jnp.asarray(rows))
    alignment = align(problem, model, 2.0, saves=201, rtol=1e-8)
    rates, squares = np.array([0.25, 0.125]), np.array([1.0, 4.0])
    assert alignment.rate == pytest.approx(1.0, rel=1e-3)
    for scale in (1e-3, 1e-300):
        t = alignment.time(0.05, scale)
        log = np.logaddexp.reduce(np.log(rates * squares) + 4 * rates * t)
        assert log + 2 * np.log(scale) == pytest.approx(np.log(0.05), abs=1e-3)
    correlation = gf.NeuralCorrelation(problem)
    assert float(correlation(alignment.at(1e-4))) == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loss", list(LOSSES))
def test_escape_times_are_those_of_runs_that_stop_there(small, digits, loss):
    """The logarithm of the loss that is gone is interpolated between save times `h` apart.

    That is wrong by `h^2 / 8` times its second derivative, in time by that over its first; both are measured around the
    escape. A relative error of the weights `e` moves the escape by `e` times the slope, and `e` is some tolerances.
    """
    h = float(small.time[1] - small.time[0])
    growth = float(small.predicted_slope.sel(loss=loss))
    for scale in (SCALES[0], SCALES[-1]):
        for seed in (0, 1):
            problem, model = start_of(loss, scale, seed, digits)
            first = float(problem(model))
            until = gf.Until(problem, below=0.9 * first)
            run = gf.solve(gf.GradientFlow(problem), model, [float(small.time[-1])], rtol=1e-5, until=until)
            assert run.status == "stopped"
            exact = float(run.t_final)
            ts = exact + np.linspace(-h, h, 121)
            fine = gf.solve(gf.GradientFlow(problem), model, ts, rtol=1e-5, observe={"risk": problem})
            log = np.log(1 - np.asarray(fine.observed["risk"]) / first)
            slope = np.gradient(log, ts)
            bound = h**2 / 8 * np.max(np.abs(np.gradient(slope, ts)[3:-3])) / np.min(slope)
            computed = float(small.escape_time.sel(loss=loss, width=4, scale=scale, seed=seed))
            assert abs(computed - exact) <= bound + 10 * RTOL * growth


def largest_correlation(x, z):
    """`max |mean_i z_i relu(w . x_i)|` over unit `w`, by quasi-Newton ascent from many random starts."""

    def objective(w):
        size = np.linalg.norm(w)
        value, gradient = z @ np.maximum(x @ w, 0) / len(z), (z * (x @ w > 0)) @ x / len(z)
        return -value / size, -gradient / size + value * w / size**3

    rng = np.random.default_rng(0)
    starts = rng.normal(size=(50, x.shape[1]))
    return -min(scipy.optimize.minimize(objective, start, jac=True, method="BFGS").fun for start in starts)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "residual"), [("square", 1.0), ("logistic", 0.5)])
def test_slope_of_the_escape_time_is_the_one_predicted(small, digits, loss, residual):
    """Kumar & Haupt: `T = s ln(1/scale) + O(1)`, with `s` one over the largest correlation.

    Neurons of the other sign grow at `rho < 1` times the rate. When the first escape, what the others contribute has
    the relative size `scale^(2 (1 - rho))`, which moves `T` by `s/2` times as much. Together with the errors of single
    escape times (the test above) this bounds the error of a least-squares slope.
    """
    x, y = (np.asarray(part) for part in digits)
    rates = [largest_correlation(x, sign * residual * y) for sign in (1, -1)]
    predicted, rho = 1 / max(rates), min(rates) / max(rates)
    assert rho < 1
    assert float(small.predicted_slope.sel(loss=loss)) == pytest.approx(predicted, rel=1e-6)
    h = float(small.time[1] - small.time[0])
    error = predicted / 2 * max(SCALES) ** (2 * (1 - rho)) + h / 20 + 10 * RTOL * predicted
    centred = np.log(1 / np.array(SCALES)) - np.mean(np.log(1 / np.array(SCALES)))
    bound = error * np.sum(np.abs(centred)) / np.sum(centred**2)
    assert bound < 0.05 * predicted
    assert abs(float(small.slope.sel(loss=loss, width=4)) - predicted) <= bound
    fitted = np.polyfit(centred, small.escape_time.sel(loss=loss, width=4).mean("seed"), 1)[0]
    assert float(small.slope.sel(loss=loss, width=4)) == pytest.approx(fitted, rel=1e-10)


@pytest.mark.slow
def test_flow_error_and_descent_steps_are_what_they_say(small, digits):
    """The error against a flow at a thirtieth of the tolerance, and two runs of gradient descent against the same."""
    ts = small.time.values
    for loss in LOSSES:
        problem, model = start_of(loss, 1e-3, 0, digits)
        observe = {"risk": problem}
        exact = np.asarray(
            gf.solve(
                gf.GradientFlow(problem), model, ts, rtol=RTOL / 30, observe=observe, solver=gf.solvers.Tsit5()
            ).observed["risk"]
        )
        computed = small.sel(loss=loss, width=4, scale=1e-3, seed=0)
        error = np.max(np.abs(computed.risk.values - exact)) / exact[0]
        assert float(computed.flow_error) == pytest.approx(error, rel=1e-3)
        assert int(computed.flow_gradient_evaluations) == int(computed.gradient_evaluations)
        gaps = []
        for every in (8, 16):
            rule = gf.GradientDescent(problem, float(ts[1]) / every)
            run = gf.iterate(rule, model, every * (ts.size - 1), save_every=every, observe=observe, save_params=False)
            gaps.append(np.max(np.abs(np.asarray(run.observed["risk"]) - exact)) / exact[0])
        order = np.log2(gaps[0] / gaps[1])
        # The steps are coarse, and first order is only just coming into sight.
        assert 0.7 < order < 1.3
        assert float(computed.descent_steps) == pytest.approx(
            16 * (ts.size - 1) * (gaps[1] / error) ** (1 / order), rel=1e-2
        )


@pytest.mark.slow
def test_a_resumed_study_equals_the_first_and_runs_nothing(small, digits, store, monkeypatch):
    xr.testing.assert_identical(gf.sweeps.open_store(store), small)

    def refuse(*arguments, **options):
        raise AssertionError("something ran")

    monkeypatch.setattr(_scheduler, "run_segment", refuse)
    monkeypatch.setattr(_small_init, "iterate_to", refuse)
    xr.testing.assert_identical(study(digits, store=store), small)
    with pytest.raises(ValueError, match=r"rtol: 0.001 -> 0.01"):
        study(digits, store=store, rtol=1e-2)
    other = gf.data.digits(classes=(2, 3), n=20, centre=True, unit_norm=True, labels="pm1")
    with pytest.raises(ValueError, match="data, models or observables"):
        study(other, store=store, rtol=RTOL)


@pytest.mark.slow
def test_a_study_interrupted_after_its_sweep_goes_on_from_there(digits, tmp_path, monkeypatch):
    few = {"loss_names": ["square"], "seeds": [0], "scales": [1e-2, 1e-3], "saves": 31, "store": tmp_path / "a.zarr"}
    with monkeypatch.context() as patched:

        def interrupt(*arguments, **options):
            raise KeyboardInterrupt

        patched.setattr(_small_init, "iterate_to", interrupt)
        with pytest.raises(KeyboardInterrupt):
            study(digits, **few)
    part = gf.sweeps.open_store(tmp_path / "a.zarr")
    assert (part.status == 0).all()
    with pytest.raises(ValueError, match="An interrupted study gets it when it is run to its end"):
        plot.draw(part)
    resumed = study(digits, **few)
    whole = study(digits, **(few | {"store": None}))
    for name in whole.data_vars:
        np.testing.assert_array_equal(resumed[name], whole[name])
    xr.testing.assert_identical(gf.sweeps.open_store(tmp_path / "a.zarr"), resumed)
    plot.draw(resumed)


def test_crossings_between_save_times():
    """Exactly exponential growth is interpolated exactly; what never gets there has no time of escape."""
    ts = np.linspace(0, 10, 11)
    failed = 1e-3 * np.exp(ts)
    assert _escape_times._crossing(ts, failed, 0.1) == pytest.approx(np.log(100), rel=1e-12)
    assert _escape_times._crossing(ts, failed, failed[4]) == pytest.approx(4.0, rel=1e-12)
    assert np.isnan(_escape_times._crossing(ts, 1e-9 * failed, 0.1))
    # Nothing is lost, in rounding, at the save time before.
    assert _escape_times._crossing(ts, np.where(ts < 5, 0.0, 0.5), 0.1) == 5.0
    assert np.isnan(_escape_times._slope(np.array([1.0, 2.0]), np.array([1.0, np.nan])))
    assert _escape_times._slope(np.array([1.0, 2.0, 4.0]), np.array([1.0, np.nan, 7.0])) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_names": ["cubic"]}, "`loss_names` must be one of 'square', 'logistic', 'exponential', but is 'cubic'"),
        ({"loss_names": []}, "`loss_names` must be a list of names"),
        ({"loss_names": "square"}, "`loss_names` must be a list of names"),
        ({"loss_names": ["square", "square"]}, r"`axes\['loss'\]` must hold each value once"),
        ({"scales": [0.1, 0.0]}, "`scales` must be positive.*Zero is a saddle"),
        ({"scales": []}, "`scales` must hold at least one value"),
        ({"widths": [0]}, "At loss=square, width=0, .*`width` must be an integer of at least 1"),
        ({"seeds": []}, r"`axes\['seed'\]` must be a non-empty"),
        ({"saves": 1}, "`saves` must be an integer of at least 2"),
        ({"rtol": -1.0}, "`rtol` must be positive"),
    ],
    ids=str,
)
def test_bad_options_of_small_init(digits, options, message):
    with pytest.raises(ValueError, match=message):
        study(digits, **options)


@pytest.mark.parametrize("labels", ["index", "onehot"])
def test_targets_other_than_signs_are_refused(labels):
    data = gf.data.digits(classes=(0, 1), n=20, labels=labels)
    with pytest.raises(ValueError, match=r"must have targets \+1 and -1, .*labels=\"pm1\""):
        studies.small_init(data, progress=False)


# Rules against flows


@pytest.fixture(scope="module")
def least_squares():
    """A quadratic by its numbers, and as a problem: the rule and the flow are known in the eigenbasis."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(12, 4)), rng.normal(size=12)
    values, vectors = np.linalg.eigh(x.T @ x / 12)
    minimum, start = np.linalg.lstsq(x, y, rcond=None)[0], np.ones(4)
    problem = gf.EmpiricalRisk(x, y, gf.losses.square, predict=linear)
    return problem, jnp.asarray(start), values, vectors.T @ (start - minimum)


def linear(w, x):
    return x @ w


def descent_at(values, away, rate, ks):
    return (1 - rate * values) ** np.asarray(ks)[:, None] * away


def flow_at(values, away, ts):
    return np.exp(-np.outer(ts, values)) * away


def test_gap_on_a_quadratic_equals_the_one_worked_out(least_squares):
    problem, start, values, away = least_squares
    rates = [0.02, 0.005, 0.01, 0.04, 0.0025]
    ds = studies.compare(gf.GradientDescent(problem, 9.0), start, rates, 3.0, saves=20)
    assert ds.learning_rate.values.tolist() == sorted(rates, reverse=True)
    assert ds.steps.values.tolist() == ds.gradient_evaluations.values.tolist() == [75, 150, 300, 600, 1200]
    gaps = []
    for i, rate in enumerate(ds.learning_rate.values):
        ts = ds.t.values[i]
        ks = np.round(ts / rate)
        assert (ts[0], ts[-1]) == (0.0, pytest.approx(3.0, rel=1e-12))
        np.testing.assert_allclose(ts, ks * rate, rtol=1e-12)
        exact = flow_at(values, away, ts)
        distance = np.linalg.norm(descent_at(values, away, rate, ks) - exact, axis=1)
        travelled = np.max(np.linalg.norm(exact - away, axis=1))
        # The flow is solved to 1e-8 of the state.
        np.testing.assert_allclose(ds.distance[i, 0], distance, rtol=1e-7, atol=1e-7 * np.linalg.norm(start))
        gaps.append(np.max(distance) / travelled)
    np.testing.assert_allclose(ds.gap[:, 0], gaps, rtol=1e-4)
    orders = np.diff(np.log(gaps)) / np.diff(np.log(ds.learning_rate.values))
    assert np.isnan(ds.local_order[0, 0])
    np.testing.assert_allclose(ds.local_order[1:, 0], orders, rtol=1e-3)
    assert float(ds.order[0]) == float(ds.local_order[-1, 0])
    assert abs(float(ds.order[0]) - 1) <= 0.05
    assert (ds.status == 0).all()
    assert (ds.flow_status == 0).all()


class Quadratic(eqx.Module):
    """`sum_i h_i w_i^2 / 2`; a module, so that one program serves all learning rates."""

    h: jax.Array

    def __call__(self, w):
        return 0.5 * jnp.sum(self.h * w**2)


def test_flows_of_ones_own(least_squares):
    """The exact flow of gradient descent to second order, and one at half the speed, which it does not follow."""
    _, _, values, away = least_squares
    hessian = jnp.asarray(values)

    def quadratic(h):
        return gf.GradientFlow(Quadratic(h))

    flows = {
        "modified": lambda rule: quadratic(hessian + rule.learning_rate * hessian**2 / 2),
        "half": lambda rule: quadratic(hessian / 2),
    }
    rule = gf.GradientDescent(quadratic(hessian).problem, 0.1)
    ds = studies.compare(rule, jnp.asarray(away), [0.04, 0.02, 0.01], 3.0, flows, saves=10)
    assert ds.flow.values.tolist() == ["modified", "half"]
    assert abs(float(ds.order.sel(flow="modified")) - 2) <= 0.1
    assert abs(float(ds.order.sel(flow="half"))) <= 0.1
    ts = ds.t.values[-1]
    distance = np.linalg.norm(
        descent_at(values, away, 0.01, np.round(ts / 0.01)) - flow_at(values / 2, away, ts), axis=1
    )
    np.testing.assert_allclose(ds.distance[-1, 1], distance, rtol=1e-6, atol=1e-7)
    # Second order: four times the steps for a sixteenth of the gap.
    sixteenth = float(ds.gap[-1, 0]) / 16
    assert studies.steps_to_match(ds, sixteenth) == pytest.approx(4 * int(ds.steps[-1]), rel=0.1)
    table = studies.compare_table(ds)
    assert "gap to modified" in table
    assert "gap to half" in table


@pytest.mark.slow
def test_order_one_for_a_network_on_digits(small_mlp):
    problem, model = small_mlp
    ds = studies.compare(gf.GradientDescent(problem, 1.0), model, [0.04, 0.02, 0.01], 2.0)
    np.testing.assert_allclose(ds.local_order[1:, 0], 1, atol=0.05)


def test_a_rule_that_diverges_is_reported(least_squares):
    problem, start, values, _ = least_squares
    rates = [3 / values[-1], 0.02, 0.01]
    rule = gf.GradientDescent(problem, 0.1)
    ds = studies.compare(rule, start, rates, 200 * rates[0], rtol=1e-6)
    names = dict(zip(ds.status.attrs["flag_values"], ds.status.attrs["flag_meanings"].split(), strict=True))
    assert [names[int(code)] for code in ds.status] == ["diverged", "ok", "ok"]
    assert np.isnan(ds.gap.values[:, 0]).tolist() == [True, False, False]
    assert np.isfinite(float(ds.order[0]))
    line = studies.compare_table(ds).splitlines()[1].split()
    assert line[2:] == ["diverged", "-"]
    drawn = plot.compare(ds)
    assert covering(drawn) == []
    assert any(text.get_text() == "diverged" for text in drawn.axes[0].texts)
    # Only one rate is left: no order, no steps.
    ds = studies.compare(rule, start, rates[:2], 200 * rates[0], rtol=1e-6)
    assert np.isnan(float(ds.order[0]))
    assert np.isnan(studies.steps_to_match(ds, 1e-3))
    assert "nan" not in studies.compare_table(ds)
    plot.compare(ds)


@pytest.mark.parametrize("error", [1e-2, 3e-4, 1e-5])
def test_steps_to_match_are_the_steps_that_it_takes(least_squares, error):
    """Gradient descent with that many steps, in numpy. The gap is of first order up to terms of second."""
    problem, start, values, away = least_squares
    ds = studies.compare(gf.GradientDescent(problem, 0.1), start, [0.02, 0.01], 3.0, saves=1000)
    steps = studies.steps_to_match(ds, error)
    count = round(steps)
    rate = 3.0 / count
    ks = np.arange(count + 1)
    exact = flow_at(values, away, ks * rate)
    distance = np.linalg.norm(descent_at(values, away, rate, ks) - exact, axis=1)
    gap = np.max(distance) / np.max(np.linalg.norm(exact - away, axis=1))
    # An order measured as 1 + d is wrong by d times the logarithm of the stretch that is extrapolated.
    stretch = abs(np.log(float(ds.gap[-1, 0]) / error))
    tolerance = 0.02 + abs(float(ds.order[0]) - 1) * stretch
    assert tolerance < 0.3
    assert gap == pytest.approx(error, rel=tolerance)


def test_whole_steps_that_fit_into_the_horizon():
    """A rate that divides the horizon takes its last step in spite of rounding; one that does not stops short."""
    rule = gf.GradientDescent(Quadratic(jnp.ones(1)), 1.0)
    ds = studies.compare(rule, jnp.ones(1), [0.1, 0.3], 0.9, rtol=1e-5, saves=50)
    assert ds.steps.values.tolist() == [3, 9]
    assert ds.sizes["save"] == 4
    ds = studies.compare(rule, jnp.ones(1), [0.4], 0.9, rtol=1e-5)
    assert float(ds.t[0, -1]) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": []}, "`learning_rates` must be distinct numbers, at least one"),
        ({"learning_rates": [0.1, 0.1]}, "`learning_rates` must be distinct numbers"),
        ({"learning_rates": [0.1, -0.2]}, "`learning_rates` must be positive"),
        ({"horizon": 0.05}, "`horizon` must hold at least one step .* learning rate 0.1"),
        ({"horizon": -1.0}, "`horizon` must be positive, but is -1"),
        ({"flows": {}}, "`flows` must name at least one flow"),
        ({"saves": 0}, "`saves` must be an integer of at least 1"),
        ({"rtol": 0.0}, "`rtol` must be positive"),
        ({"params": jnp.array([jnp.nan])}, "`params` must be finite"),
    ],
    ids=str,
)
def test_bad_options_of_compare(changes, message):
    rule = gf.GradientDescent(lambda w: 0.5 * jnp.sum(w**2), 1.0)
    fixed = {"rule": rule, "params": jnp.ones(1), "learning_rates": [0.1], "horizon": 1.0}
    with pytest.raises(ValueError, match=message):
        studies.compare(**(fixed | changes))


def test_a_rule_without_a_known_limit_needs_flows():
    import optax

    rule = gf.OptaxRule(lambda w: 0.5 * jnp.sum(w**2), optax.adabelief, learning_rate=0.1)
    assert not rule.orders
    with pytest.raises(ValueError, match="None for a rule without a known continuous limit"):
        studies.compare(rule, jnp.ones(1), [0.1], 1.0)


@pytest.mark.parametrize("error", [0.0, -1.0, np.nan])
def test_steps_to_match_wants_a_positive_error(error):
    ds = xr.Dataset(
        {"gap": (("learning_rate", "flow"), [[0.1]]), "order": ("flow", [1.0]), "steps": ("learning_rate", [9])}
    )
    with pytest.raises(ValueError, match="`error` must be positive"):
        studies.steps_to_match(ds, error)


@pytest.fixture(scope="module")
def discrete():
    data = gf.data.digits(n=30, labels="onehot")
    return data, studies.discrete_gap(data, width=3, depth=1, horizon=4.0, rates=3, rtol=1e-6, progress=False)


def rows(params, row):
    return np.concatenate([np.ravel(leaf[row]) for leaf in jax.tree_util.tree_leaves(params)])


@pytest.mark.slow
def test_sharpness_loss_and_costs_along_the_flow(discrete):
    """The largest eigenvalue of the whole Hessian, and runs of the flow at the tolerances of the table."""
    data, ds = discrete
    problem = gf.EmpiricalRisk(*data, gf.losses.square)
    model = gf.models.MLP(64, 3, 10, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    exact = gf.solve(gf.GradientFlow(problem), model, ds.time.values, rtol=1e-7)
    for row in (0, 25, 50):
        now = jax.tree_util.tree_map(lambda leaf, row=row: leaf[row], exact.params)
        flat, back = jax.flatten_util.ravel_pytree(now)
        hessian = jax.hessian(lambda w, back=back: problem(back(w)))(flat)
        assert float(ds.sharpness[row]) == pytest.approx(scipy.linalg.eigvalsh(hessian)[-1], rel=1e-4)
        assert float(ds.loss[row]) == pytest.approx(float(problem(now)), rel=1e-5)
    np.testing.assert_allclose(ds.learning_rate, 1.8 / float(ds.sharpness.max()) / 2.0 ** np.arange(3), rtol=1e-12)
    assert ds.flow_rtol.values.tolist() == [1e-2, 1e-3, 1e-4]
    for i, rtol in enumerate(ds.flow_rtol.values):
        loose = gf.solve(gf.GradientFlow(problem), model, ds.time.values, rtol=rtol)
        assert int(ds.loose_flow_gradient_evaluations[i]) == int(loose.stats["gradient_evaluations"])
        there, here = (np.stack([rows(run.params, k) for k in range(51)]) for run in (exact, loose))
        error = np.max(np.linalg.norm(here - there, axis=1)) / np.max(np.linalg.norm(there - there[0], axis=1))
        # The references are of the tolerances 1e-6 and 1e-7.
        assert float(ds.flow_error[i]) == pytest.approx(error, rel=0.01, abs=1e-5)
    assert (ds.attrs["data"], ds.attrs["width"], ds.attrs["depth"]) == ("digits", 3, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": -1.0}, "`horizon` must be positive"),
        ({"rates": 0}, "`rates` must be an integer of at least 1"),
        ({"width": 0}, "`width` must be an integer of at least 1"),
    ],
    ids=str,
)
def test_bad_options_of_discrete_gap(options, message):
    with pytest.raises(ValueError, match=message):
        studies.discrete_gap(gf.data.digits(n=10, labels="onehot"), **options)


# Tables


def numbers(line):
    return [float(word.replace(",", "")) for word in re.findall(r"-?[\d,]+\.?\d*(?:e[+-]\d+)?", line)]


@pytest.mark.slow
def test_table_of_the_comparison_holds_the_numbers(discrete):
    _, ds = discrete
    lines = studies.compare_table(ds).splitlines()
    assert lines[0].split()[:4] == ["learning", "rate", "gradients", "status"]
    for i in range(3):
        rate, cost, *gaps = numbers(lines[1 + i])
        assert rate == pytest.approx(float(ds.learning_rate[i]), rel=1e-3)
        assert cost == int(ds.gradient_evaluations[i])
        assert gaps == pytest.approx(ds.gap[i].values.tolist(), rel=1e-3)
        assert len(gaps) == 2
        assert " ok " in lines[1 + i]
    assert lines[4].split()[:2] == ["measured", "order"]
    assert numbers(lines[4]) == pytest.approx(ds.order.values.tolist(), abs=1e-3)
    top = next(i for i, line in enumerate(lines) if "steps to match" in line)
    for i in range(3):
        rtol, cost, error, steps = numbers(lines[top + 1 + i])
        assert (rtol, cost) == (float(ds.flow_rtol[i]), int(ds.loose_flow_gradient_evaluations[i]))
        assert error == pytest.approx(float(ds.flow_error[i]), rel=0.05)
        # First order: as many more steps as the gap at the smallest learning rate is larger.
        ratio = float(ds.gap[-1, 0]) / float(ds.flow_error[i])
        assert steps == pytest.approx(int(ds.steps[-1]) * ratio ** (1 / float(ds.order[0])), abs=0.5)
    assert "until flow time 4;" in studies.compare_table(ds)
    assert max(len(line) for line in lines) <= 120


@pytest.mark.slow
def test_table_of_small_init_holds_the_numbers(small):
    table = studies.small_init_table(small)
    blocks = table.split("\n\n")
    assert len(blocks) == 3
    for block, loss in zip(blocks, LOSSES, strict=False):
        part, lines = small.sel(loss=loss), block.splitlines()
        assert lines[0] == f"{loss} loss, width 4, seed 0, 1, data: digits"
        for line, scale in zip(lines[2:], SCALES, strict=False):
            row = part.sel(scale=scale)
            times = row.escape_time.values.ravel()
            computed = numbers(line.replace("+-", " ").replace("%", ""))
            shown, mean, spread, predicted, leading, aligned, cost, error, steps = computed
            assert shown == scale
            assert mean == pytest.approx(np.mean(times), abs=0.006)
            assert spread == pytest.approx(np.std(times), abs=0.006)
            assert predicted == pytest.approx(float(row.predicted_time_from_start.mean()), abs=0.006)
            assert leading == pytest.approx(float(row.predicted_time.mean()), abs=0.006)
            assert aligned == pytest.approx(100 * float(row.aligned.mean()), abs=0.5)
            assert cost == pytest.approx(float(row.gradient_evaluations.mean()), abs=0.5)
            assert error == pytest.approx(float(row.flow_error), rel=0.05)
            assert steps == pytest.approx(float(row.descent_steps), abs=0.5)
        assert f"{float(part.slope[0]):.3f} (width 4); predicted {float(part.predicted_slope):.3f}" in lines[6]
    assert blocks[2].startswith("16 flows, 0 did not reach the end")
    assert "width 4, seed 0" in blocks[2]
    worse = small.copy(deep=True)
    worse["status"][0, 0, 0, 0] = 2
    worse["escape_time"][0, 0, 0] = np.nan
    worse["descent_steps"][0, 1] = np.nan
    lines = studies.small_init_table(worse).splitlines()
    assert "not seen" in lines[2]
    assert lines[3].split()[-1] == "-"
    assert "16 flows, 1 did not reach the end" in lines


# Figures


def check_figure(drawn):
    """Every axis is labelled and shows something, and pyplot knows nothing of it."""
    assert isinstance(drawn, Figure)
    assert plt.get_fignums() == []
    for ax in drawn.axes:
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        assert ax.get_title()
        assert ax.lines
        assert np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all()
        assert ax.get_xlim()[0] < ax.get_xlim()[1]
        assert ax.get_ylim()[0] < ax.get_ylim()[1]


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def drawn_lines(ax, points):
    """The curves of that many points, markers without lines left out."""
    return [line for line in ax.lines if len(line.get_xdata()) == points and line.get_linestyle() != "None"]


def overlapping(drawn, axis):
    """Whether labels of ticks run into one another."""
    boxes = [t.get_window_extent() for t in axis.get_ticklabels(which="both") if t.get_text() and t.get_visible()]
    along = 0 if axis.axis_name == "x" else 1
    spans = sorted((box.get_points()[0][along], box.get_points()[1][along]) for box in boxes)
    return any(left[1] > right[0] for left, right in itertools.pairwise(spans))


@pytest.mark.slow
def test_figure_of_small_init(small, tmp_path):
    drawn = plot.draw(small)
    assert covering(drawn) == []
    check_figure(drawn)
    assert len(drawn.axes) == 8
    for row, loss in enumerate(LOSSES):
        part = small.sel(loss=loss)
        member = part.sel(width=4, seed=0)
        risk, norm, angle, escape = drawn.axes[4 * row : 4 * row + 4]
        assert loss in risk.get_title()
        *curves, marks = risk.lines
        for lines, name in ((curves, "risk"), (norm.lines, "norm")):
            for line, scale in zip(lines, SCALES, strict=True):
                np.testing.assert_array_equal(line.get_ydata(), member[name].sel(scale=scale))
        seen = part.saddle_time.values <= float(small.time[-1])
        np.testing.assert_array_equal(marks.get_xydata(), np.stack([part.saddle_time, part.saddle_loss], 1)[seen])
        assert norm.get_yscale() == "log"
        neurons = drawn_lines(angle, small.sizes["time"])
        np.testing.assert_allclose([n.get_ydata() for n in neurons], np.rad2deg(member.angle.sel(scale=1e-6)).T)
        (marker,) = [line for line in angle.lines if len(line.get_xdata()) == 2]
        assert float(marker.get_xdata()[0]) == float(member.escape_time.sel(scale=1e-6))
        assert "1e-06" in angle.get_title()
        fitted, predicted, leading = drawn_lines(escape, 4)
        rise = np.diff(fitted.get_ydata()) / np.diff(np.log(1 / np.array(SCALES)))
        np.testing.assert_allclose(rise, float(part.slope[0]), rtol=1e-10)
        mean = {name: part[name].mean(("width", "seed")) for name in ("predicted_time_from_start", "predicted_time")}
        np.testing.assert_array_equal(predicted.get_ydata(), mean["predicted_time_from_start"])
        np.testing.assert_array_equal(leading.get_ydata(), mean["predicted_time"])
        shown = legend_of(escape)
        assert shown == [
            f"width 4, slope {float(part.slope[0]):.2f}",
            "predicted",
            f"leading order, slope {float(part.predicted_slope):.2f}",
        ]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["1e-03", "1e-04", "1e-05", "1e-06"]
    for name in ("a.png", "b.pdf", "deep/c.svg"):
        path = plot.save(drawn, tmp_path / name)
        assert path.stat().st_size > 5000
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "b.pdf").read_bytes()[:4] == b"%PDF"
    assert plt.get_fignums() == []


@pytest.mark.slow
def test_figure_of_small_init_without_any_escape(small):
    """A horizon too short: nothing to fit, and the rest is drawn all the same."""
    nothing = small.copy(deep=True)
    nothing["escape_time"][:] = np.nan
    nothing["slope"][:] = np.nan
    drawn = plot.small_init(nothing)
    drawn.canvas.draw()


@pytest.mark.slow
def test_figure_of_the_comparison(discrete, tmp_path):
    _, ds = discrete
    drawn = plot.draw(ds)
    check_figure(drawn)
    left, right = drawn.axes
    for k in range(2):
        np.testing.assert_array_equal(left.lines[k].get_xdata(), ds.learning_rate)
        np.testing.assert_array_equal(left.lines[k].get_ydata(), ds.gap[:, k])
        np.testing.assert_array_equal(right.lines[k].get_xdata(), ds.gradient_evaluations)
        np.testing.assert_array_equal(right.lines[k].get_ydata(), ds.gap[:, k])
    np.testing.assert_array_equal(right.lines[2].get_xdata(), ds.loose_flow_gradient_evaluations)
    np.testing.assert_array_equal(right.lines[2].get_ydata(), ds.flow_error)
    assert legend_of(left) == [f"gap to order {k + 1}, slope {float(ds.order[k]):.2f}" for k in range(2)]
    assert legend_of(right) == [*(f"GradientDescent, gap to order {k}" for k in (1, 2)), "the flow, by tolerance"]
    assert {ax.get_xscale() + ax.get_yscale() for ax in drawn.axes} == {"loglog"}
    drawn.canvas.draw()
    for ax in drawn.axes:
        for axis in (ax.xaxis, ax.yaxis):
            assert not overlapping(drawn, axis)
            shown = [t for t in axis.get_ticklabels() if t.get_text()]
            assert len(shown) >= 2
    assert plot.save(drawn, tmp_path / "a.png").stat().st_size > 5000


def test_data_sets_of_earlier_versions_get_the_current_names():
    for study, names in FORMER_NAMES.items():
        old = xr.Dataset({name: ("x", [1.0]) for name in names} | {"risk": ("x", [2.0])}, attrs={"study": study})
        new = with_current_names(old)
        assert set(new) == {*names.values(), "risk"}
        xr.testing.assert_identical(with_current_names(new), new)
    unknown = xr.Dataset({"share": ("x", [1.0])})
    xr.testing.assert_identical(with_current_names(unknown), unknown)


@pytest.mark.parametrize(
    ("show", "advice"), [(plot.draw, "no ready-made figure"), (tables.text, "no ready-made table")]
)
def test_figures_and_tables_are_refused_for_what_no_study_wrote(show, advice):
    message = f"must carry the attribute `study`, one of 'circle', 'compare', 'early-stage', .*{advice}"
    for attrs in ({}, {"study": "style"}, {"study": "no-such-study"}):
        with pytest.raises(ValueError, match=message):
            show(xr.Dataset({"a": ("x", [1.0])}, attrs=attrs))
