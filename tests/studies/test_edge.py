"""The study of the edge of stability: its numbers against runs of `iterate` and `solve`, its table and figure."""

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow import plot, studies, tables
from gradflow._solution import Status
from gradflow.studies import _edge_runs
from gradflow.studies._edge_flows import FLOWS as FLOWS_OF
from gradflow.studies._edge_flows import WARM_UP, stops_being_valid

SIZE = {"width": 4, "shares": (0.7,), "seeds": (3,), "steps": 40, "saves": 10}
FLOWS = ("gradient flow", "descent-ascent 2")


@pytest.fixture(scope="module")
def digits():
    return gf.data.digits(n=20, centre=True, labels="onehot")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("edge") / "runs"


@pytest.fixture(scope="module")
def ds(digits, store):
    return studies.edge(digits, rules=("gradient_descent",), flows=FLOWS, **SIZE, store=store, progress=False)


def rows(tree):
    leaves = [np.asarray(leaf) for leaf in jax.tree_util.tree_leaves(tree) if np.ndim(leaf) > 0]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


@pytest.mark.slow
def test_numbers_are_those_of_iterate_and_solve(digits, ds):
    """Distances, mean loss, sharpness, the learning rate and where the flow stops being valid."""
    problem = gf.EmpiricalRisk(*digits, gf.losses.square)
    model = gf.models.MLP(64, 4, 10, depth=2, activation=jnp.tanh, init_scale=0.5, key=jax.random.key(3))
    one, eta = ds.isel(rule=0, share=0, seed=0), ds.learning_rate.item()
    see = {"loss": gf.observables.Loss(problem)}
    run = gf.iterate(gf.GradientDescent(problem, eta), model, 41, save_every=1, observe=see)
    path, losses = rows(run.params), np.asarray(run.observed["loss"])
    middle = (path[:-2] + 2 * path[1:-1] + path[2:]) / 4
    mean_loss = (losses[:-2] + 2 * losses[1:-1] + losses[2:]) / 4
    ks = one.step.values
    np.testing.assert_allclose(one.loss, mean_loss[ks - 1], rtol=1e-10)
    np.testing.assert_allclose(one.travelled, np.linalg.norm(middle[-1] - path[0]), rtol=1e-10)
    observe = see | {"sharpness": gf.observables.HessianEigenvalues(problem, 2)}
    flow = gf.solve(gf.GradientFlow(problem), model, eta * ks, rtol=1e-7, observe=observe)
    case = one.isel(case=0)
    distance = np.linalg.norm(rows(flow.params) - middle[ks - 1], axis=1)
    np.testing.assert_allclose(case.distance, distance, rtol=0.05, atol=2e-3 * float(one.travelled))
    np.testing.assert_allclose(case.mean_distance, np.mean(case.distance) / one.travelled, rtol=1e-12)
    np.testing.assert_allclose(case.predicted_loss.values, np.asarray(flow.observed["loss"]), rtol=1e-2)
    values = np.asarray(flow.observed["sharpness"])
    np.testing.assert_allclose(case.eigenvalue.values, values, rtol=1e-2)
    late = np.flatnonzero(ks > 20)
    assert float(case.loss_error) == pytest.approx(
        np.mean(np.asarray(flow.observed["loss"])[late]) / mean_loss[20:].mean() - 1, abs=0.01
    )
    # The learning rate is that whose threshold is the share of the largest sharpness by the end of gradient flow.
    top = max(values[:, 0].max(), float(gf.observables.Sharpness(problem)(model)))
    assert 2 / eta == pytest.approx(0.7 * top, rel=0.03)
    crossed = values[:, 0] > 0.995 * 2 / eta
    assert case.reason == "edge"
    assert float(case.valid_until) <= ks[np.argmax(crossed)]
    # Beyond the edge the flow of centre and amplitude follows, and gradient flow does not.
    assert float(ds.mean_distance[1, 0, 0]) < 0.5 * float(ds.mean_distance[0, 0, 0])
    assert ds.reason.values[1, 0, 0] == "valid"


@pytest.mark.slow
def test_table_and_figure(ds):
    text = gf.tables.text(ds)
    assert "seeds 3" in text
    assert f"{float(ds.mean_distance[1, 0, 0]):.2%}" in text
    assert "(edge)" in text
    assert "%*" not in text
    early = ds.assign(
        status=ds.status.where(ds.case != 1, int(Status.MAX_STEPS))
    )  # as if the second flow had not arrived
    assert f"{float(ds.mean_distance[1, 0, 0]):.2%}*" in gf.tables.text(early)
    drawn = plot.draw(ds)
    labels = [ax.get_ylabel() for ax in drawn.axes]
    assert labels == ["sharpness (1 / flow time)", "mean loss", "distance / distance travelled"]
    shown = [text.get_text() for text in drawn.axes[2].get_legend().get_texts()]
    assert shown == [*FLOWS, "midpoints of the rule"]
    np.testing.assert_allclose(drawn.axes[2].lines[1].get_ydata(), (ds.distance[1, 0, 0] / ds.travelled[0, 0, 0]))


@pytest.mark.slow
def test_resumes(digits, ds, store, monkeypatch):
    """With its store the study solves no flow again, and finds the same."""
    from gradflow.sweeps import _sweep

    def never(*_, **__):
        raise AssertionError("A run that the store holds is run again.")

    monkeypatch.setattr(_sweep, "_run_unit", never)
    again = studies.edge(digits, rules=("gradient_descent",), flows=FLOWS, **SIZE, store=store, progress=False)
    assert again.identical(ds)


@pytest.mark.slow
def test_refusals_are_named(digits):
    """The central flow refuses ReLU, and so the table says."""
    few = SIZE | {"rules": ("gradient_descent",), "flows": ("central",)}
    ds = studies.edge(digits, activation="relu", **few, progress=False)
    assert ds.reason.item() == "refused_kinks"
    assert ds.valid_until.item() == 0
    assert np.isnan(ds.distance).all()
    assert np.isfinite(ds.loss).all()
    assert "refused to start: the problem has kinks" in tables.edge(ds)


@pytest.mark.parametrize(
    ("flow", "largest", "second", "given", "expected"),
    [
        ("gradient flow", [0.5, 0.9, 1.1], [0.1, 0.1, 0.1], {}, (30.0, "edge")),
        ("gradient flow", [0.5, 0.6, 0.7], [0.1, 0.1, 0.1], {"kinks": True}, (np.inf, "valid")),
        ("principal", [0.4, 0.6, 0.8], [0.1, 0.1, 0.1], {}, (20.0, "half")),
        ("rod", [0.9, 1.0, 1.1], [0.5, 0.9, 1.05], {}, (30.0, "second")),
        ("descent-ascent 2", [0.9, 1.2, 1.1], [0.5, 1.1, 1.1], {}, (np.inf, "valid")),
        ("descent-ascent 2", [0.9, 1.2, 1.1], [0.5, 1.1, 1.1], {"kinks": True}, (0.0, "kinks")),
        ("descent-ascent 2", [0.9, 1.2, np.nan], [0.5, 1.1, np.nan], {"status": 2}, (20.0, "failed")),
        ("central", [0.9, 1.0, 1.0], [0.5, 0.5, 0.5], {"delay": 30.0}, (20.0, "delay")),
        ("central", [0.9, 1.0, 1.0], [0.5, 0.5, 0.5], {"delay": 3.0}, (np.inf, "valid")),
    ],
)
def test_where_a_flow_stops_being_valid(flow, largest, second, given, expected):
    threshold = 4.0
    eigenvalues = threshold * np.stack([largest, second], axis=1)
    how = {"status": 0, "delay": 0.0, "kinks": False} | given
    ends = stops_being_valid(FLOWS_OF["gradient_descent"][flow], np.array([10, 20, 30]), eigenvalues, threshold, **how)
    assert ends == expected


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rules": ("adam",)}, "`rules` must be one of"),
        ({"rules": ()}, "`rules` must be distinct values, at least one"),
        ({"flows": ("rod",), "rules": ("rmsprop",)}, "`flows` must name one of rmsprop"),
        ({"flows": ("rods",)}, "`flows` must be one of"),
        ({"shares": (0.7, 1.2)}, "`shares` must lie below 1"),
        ({"seeds": (1, 1)}, "`seeds` must be distinct"),
        ({"activation": "sine"}, "`activation` must be one of"),
        ({"steps": 10}, "`steps` must be"),
        ({"momentum": 1.0}, "`momentum` must"),
    ],
)
def test_bad_input(digits, options, match):
    with pytest.raises(ValueError, match=match):
        studies.edge(digits, **{"steps": 40, "saves": 10} | options, progress=False)


def test_bad_targets():
    data = gf.data.digits(classes=(0, 1), n=10, labels="pm1")
    with pytest.raises(ValueError, match="targets of shape"):
        studies.edge(data, progress=False)


def test_compare_from_the_start_of_a_late_flow():
    """`compare` holds a flow that starts after some steps against the rule from there on."""
    problem = lambda w: 0.25 * jnp.sum((w**2 - 1.0) ** 2)  # noqa: E731
    rule, start = gf.HeavyBall(problem, 0.1, momentum=0.5), jnp.array([0.1, 2.0])
    late = {"late": lambda r: gf.MomentumDescentAscentFlow(r.problem, r.learning_rate, r.momentum, warm_up=8)}
    ds = gf.compare(rule, start, [0.05], 3.0, late, rtol=1e-6, saves=30)
    flow = late["late"](rule.with_learning_rate(0.05))
    times = ds.t.values[0]
    begun = times >= float(flow.t0)
    assert 0 < begun.sum() < begun.size
    assert np.array_equal(np.isfinite(ds.distance.values[0, 0]), begun)
    run = gf.iterate(rule.with_learning_rate(0.05), start, int(ds.steps[0]), save_every=1)
    sol = gf.solve(flow, start, times[begun], rtol=1e-6)
    iterates = np.asarray(run.params)[np.round(times / float(run.ts[1])).astype(int)]
    np.testing.assert_allclose(ds.distance.values[0, 0][begun], np.linalg.norm(iterates[begun] - sol.params, axis=1))
    with pytest.raises(ValueError, match="`horizon` must lie beyond the start of every flow"):
        gf.compare(rule, start, [0.05], 0.5, late)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [gf.RMSProp, gf.ScalarRMSProp])
def test_learning_rates_of_adaptive_rules_meet_their_share(digits, rule):
    """After the warm-up, of the threshold for the largest eigenvalue of `D^-1/2 H D^-1/2`, by a dense Hessian."""
    problem = gf.EmpiricalRisk(*digits, gf.losses.square)
    model = gf.models.MLP(64, 4, 10, depth=2, activation=jnp.tanh, init_scale=0.5, key=jax.random.key(3))
    _, unflatten = jax.flatten_util.ravel_pytree(eqx.filter(model, eqx.is_inexact_array))
    static = eqx.filter(model, eqx.is_inexact_array, inverse=True)

    def loss(w):
        return problem(eqx.combine(unflatten(w), static))

    for share in (0.6, 0.8):
        rate = _edge_runs._adaptive_rate(lambda eta: rule(problem, eta), [model], share)
        run = gf.iterate(rule(problem, rate), model, WARM_UP + 1, save_every=1, observe={"nu": _edge_runs.Memory()})
        point = jax.flatten_util.ravel_pytree(jax.tree.map(lambda leaf: leaf[WARM_UP], weights(run.params)))[0]
        memory = [jnp.ravel(leaf[WARM_UP + 1]) for leaf in run.observed["nu"]]
        root = (jnp.concatenate(memory) + 1e-8) ** -0.25 * jnp.ones_like(point)  # the default `eps`
        hessian = jax.hessian(loss)(point) * jnp.outer(root, root)
        assert rate * np.linalg.eigvalsh(hessian)[-1] / 2 == pytest.approx(share, rel=0.02)


def weights(model):
    return eqx.filter(model, eqx.is_inexact_array)
