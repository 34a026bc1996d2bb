"""Figures of runs: what is drawn is what was computed, on axes that say so; phase portraits; animations; legends."""

import dataclasses
import html.parser
import itertools

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import gradflow as gf
from gradflow.plot._curves import geometric, spans_decades
from gradflow.plot._legends import clear_legends, covering
from gradflow.plot._plane import loss_on, plane_of

CURVATURES = np.array([1.0, 2.0, 3.0])
TS = np.linspace(0.0, 3.0, 31)


def bowl(w):
    return 0.5 * jnp.sum(jnp.asarray(CURVATURES[: w.size], w.dtype) * w**2)


def small(w):
    return w < 0.5


def itself(w):
    return w


OBSERVE = {"loss": bowl, "w": itself, "small": small}


@pytest.fixture(scope="module")
def flow():
    return gf.solve(gf.GradientFlow(bowl), jnp.ones(3), TS, observe=OBSERVE)


@pytest.fixture(scope="module")
def descent():
    return gf.iterate(gf.GradientDescent(bowl, 0.15), jnp.ones(3), 20, save_every=1, observe={"loss": bowl})


@pytest.fixture(scope="module")
def stopped():
    """A run that fails: descent at a learning rate that diverges."""
    observe = {"above": lambda w: w[0] > 1.1}
    rule = gf.GradientDescent(bowl, 4.0)
    return gf.iterate(rule, jnp.ones(1), 300, observe=observe, throw=False, save_every=2)


def texts(drawn):
    return " ".join(text.get_text() for text in drawn.findobj(matplotlib.text.Text))


# Runs


def test_curves_are_the_observables_and_axes_name_them(flow):
    drawn = flow.plot()
    loss, parts, share = sorted(drawn.axes, key=lambda ax: ("loss", "small: share of 3", "w").index(ax.get_ylabel()))
    assert {ax.get_xlabel() for ax in drawn.axes} == {"flow time t = k * learning_rate"}
    assert drawn.axes[0] is loss
    np.testing.assert_array_equal(loss.lines[0].get_data(), [TS, flow.observed["loss"]])
    assert (loss.get_yscale(), loss.get_xscale(), share.get_yscale()) == ("log", "linear", "log")
    np.testing.assert_array_equal([line.get_ydata() for line in share.lines], flow.observed["w"].T)
    np.testing.assert_array_equal(parts.lines[0].get_ydata(), np.asarray(flow.observed["small"]).mean(axis=1))
    message = texts(drawn)
    assert f"energy {float(flow.drift['energy']):.1e}" in message
    assert f"{int(flow.stats['gradient_evaluations'])} gradient evaluations" in message
    assert "status: ok" in message


def test_what_was_not_reached_is_not_drawn(stopped):
    """A Boolean is False in rows that were not reached, which is no observation."""
    drawn = gf.plot.solution(stopped)
    curve, end = drawn.axes[0].lines
    reached = int(stopped.saved)
    assert 1 < reached < stopped.ts.size
    np.testing.assert_array_equal(np.isnan(curve.get_ydata()), np.arange(stopped.ts.size) >= reached)
    assert curve.get_ydata()[1] == 1
    assert end.get_xdata()[0] == float(stopped.t_final)
    assert "status: diverged" in texts(drawn)


def test_iterates_are_dots_and_a_loss_that_was_not_observed_is_its_ends(descent):
    (line,) = descent.plot().axes[0].lines
    assert (line.get_marker(), line.get_linestyle()) == (".", "None")
    bare = gf.iterate(gf.GradientDescent(bowl, 0.15), jnp.ones(3), 20)
    first, last = bare.plot().axes[0].lines
    assert (float(first.get_ydata()[0]), float(last.get_ydata()[0])) == tuple(map(float, bare.loss))
    assert last.get_xdata()[0] == float(bare.t_final)


def test_members_of_a_batch_are_lines():
    def run(scale):
        return gf.iterate(gf.GradientDescent(bowl, 0.1), scale * jnp.ones(2), 4, observe={"loss": bowl}, save_every=1)

    batch = jax.vmap(run)(jnp.array([1.0, 2.0, 3.0]))
    (ax,) = batch.plot().axes
    np.testing.assert_array_equal([line.get_ydata() for line in ax.lines], batch.observed["loss"])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0", "1", "2"]
    assert covering(batch.plot()) == []


def test_bands_are_the_errors_that_a_run_estimates(flow):
    estimated = dataclasses.replace(flow, errors={"loss": jnp.asarray(0.25)})
    (band,) = estimated.plot().axes[0].collections
    edges = band.get_paths()[0].vertices
    at = edges[np.isclose(edges[:, 0], TS[7]), 1]
    np.testing.assert_allclose([at.min(), at.max()], float(flow.observed["loss"][7]) + np.array([-0.25, 0.25]))


def test_many_entries_are_summed_up():
    rule = gf.GradientDescent(bowl, 0.1)
    sol = gf.iterate(rule, jnp.ones(3), 5, observe={"many": lambda w: jnp.arange(101.0) * w[0]}, save_every=1)
    (ax,) = sol.plot().axes
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.median(sol.observed["many"], axis=1))
    assert "101 lines" in ax.get_ylabel()


def test_scales_suit_the_values():
    assert spans_decades(np.array([1e-3, np.nan, 1.0]))
    assert not spans_decades(np.array([0.0, 1e-3, 1.0]))
    assert not spans_decades(np.array([0.5, 1.0]))
    assert geometric(np.geomspace(1e-3, 1e2, 20))
    assert geometric(np.concatenate([[0.0], np.geomspace(1e-3, 1e2, 20)]))
    assert not geometric(np.linspace(0, 100, 201))


def test_a_run_shows_itself_in_a_notebook(flow):
    shown = flow._repr_html_()
    assert shown.count("<svg") == 1
    for name, text in flow.describe():
        assert name in shown
        assert text.split(",")[0] in shown or "->" in text
    assert "http" not in shown
    traced = []
    jax.eval_shape(lambda sol: traced.append(sol._repr_html_()), flow)
    assert traced == [None]


# Phase portraits


def test_two_parameters_are_drawn_as_they_are():
    sol = gf.iterate(gf.GradientDescent(bowl, 0.1), jnp.ones(2), 5, save_every=1)
    ax = gf.plot.phase(sol).axes[0]
    np.testing.assert_allclose(np.transpose(ax.lines[0].get_data()), sol.params)


def test_principal_components_are_those_of_the_covariance(flow, descent):
    """Against eigenvectors of the covariance of all points, and the shares of its eigenvalues."""
    ax = gf.plot.phase([flow, descent]).axes[0]
    points = np.concatenate([flow.params, descent.params])
    values, vectors = np.linalg.eigh(np.cov(points.T, bias=True))
    seen = np.abs((np.asarray(flow.params) - points.mean(axis=0)) @ vectors[:, :0:-1])
    np.testing.assert_allclose(np.abs(np.transpose(ax.lines[0].get_data())), seen, atol=1e-12)
    assert f"{100 * values[-1] / values.sum():.1f} % of the variance" in ax.get_xlabel()
    dots = ax.lines[3]
    assert (ax.lines[0].get_marker(), dots.get_marker(), dots.get_linestyle()) == ("None", ".", "None")


def test_given_directions_are_orthonormal_and_pass_through_the_end(flow):
    first, second = jnp.array([1.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0])
    ax = gf.plot.phase(flow, directions=(first, second)).axes[0]
    away = np.asarray(flow.params) - np.asarray(flow.params[-1])
    expected = away @ np.array([[1.0, 1.0, 0.0], [-1.0, 1.0, 0.0]]).T / np.sqrt(2)
    np.testing.assert_allclose(np.transpose(ax.lines[0].get_data()), expected, atol=1e-12)


def test_the_loss_is_that_of_the_plane(flow):
    path = np.asarray(flow.params)
    plane = plane_of([path], (np.array([1.0, 0, 0]), np.array([0, 0, 1.0])), ())
    x, y = np.array([-1.0, 0.0, 2.0]), np.array([0.5, 1.0])
    end = path[-1]
    exact = [[0.5 * ((end[0] + a) ** 2 + 2 * end[1] ** 2 + 3 * (end[2] + b) ** 2) for a in x] for b in y]
    np.testing.assert_allclose(loss_on(plane, x, y, bowl, flow), exact, rtol=1e-12)
    # The second weight alone leaves the plane, by most at the start, where all weights are one.
    assert plane.far == pytest.approx((1 - end[1]) / np.linalg.norm(1 - end))
    drawn = gf.plot.phase(flow, loss=bowl, resolution=5)
    assert [ax.get_ylabel() for ax in drawn.axes[1:] + drawn.axes[0].child_axes] == ["loss on the plane"]


def test_what_does_not_flow_stays_as_it_is():
    start = {"held": jnp.array([2.0]), "w": jnp.ones(2)}
    loss = lambda p: p["held"][0] * jnp.sum(p["w"] ** 2)  # noqa: E731
    chosen = {"held": False, "w": True}
    sol = gf.iterate(gf.GradientDescent(loss, 0.1), start, 3, save_every=1, trainable=chosen)
    along = {"held": jnp.array([1.0]), "w": jnp.array([0.0, 1.0])}
    drawn = gf.plot.phase(sol, directions=(jnp.array([1.0, 0.0]), along), loss=loss, resolution=3)
    plane = plane_of([np.asarray(sol.params["w"])], (jnp.array([1.0, 0.0]), along), sol.held)
    values = loss_on(plane, np.zeros(1), np.zeros(1), loss, sol)
    assert values[0, 0] == pytest.approx(float(loss(sol.final)))
    assert len(drawn.axes[0].lines) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda flow, descent: gf.plot.solution(1.0), "`sol` must be what gradflow.solve"),
        (lambda flow, descent: gf.plot.solution(flow, columns=0), "`columns` must"),
        (lambda flow, descent: jax.eval_shape(lambda s: [gf.plot.solution(s), 0][1], flow), "`sol` must be concrete"),
        (lambda flow, descent: gf.plot.phase([]), "`sols` must hold at least one run"),
        (lambda flow, descent: gf.plot.phase(flow, labels=["a", "b"]), "`labels` must name each of 1 runs"),
        (lambda flow, descent: gf.plot.phase(flow, directions=np.eye(3)[0]), "`directions` must be a pair"),
        (lambda flow, descent: gf.plot.phase(flow, directions=(np.eye(3)[0],) * 2), "`directions` must span a plane"),
        (lambda flow, descent: gf.plot.phase(flow, directions=(np.zeros(3), np.eye(3)[0])), "finite and not zero"),
        (lambda flow, descent: gf.plot.phase(flow, directions=(np.ones(2), np.ones(3))), "the 3 entries"),
        (lambda flow, descent: gf.plot.phase(flow, loss=itself, resolution=2), "`loss` must return a scalar"),
        (lambda flow, descent: gf.plot.phase(flow, loss=3.0), "`loss` must be callable"),
        (lambda flow, descent: gf.animate(flow, "a.mp4"), "`path` must end with .gif or .html"),
        (lambda flow, descent: gf.animate(flow, "a.gif", seconds=0.0), "`seconds` must be positive"),
        (lambda flow, descent: gf.animate(flow, "a.gif", frames=0), "`frames` must"),
    ],
)
def test_what_cannot_be_drawn_is_refused(flow, descent, call, message):
    with pytest.raises(ValueError, match=f"^Argument .*{message}"):
        call(flow, descent)


@pytest.mark.slow
def test_runs_that_share_no_space_are_refused(flow):
    rule = gf.GradientDescent(bowl, 0.1)
    two = gf.iterate(rule, jnp.ones(2), 2, save_every=1)
    for sols, message in [
        ([flow, two], "runs of one model"),
        (gf.iterate(rule, jnp.ones(3), 2, save_params=False), "hold parameters"),
        (gf.iterate(rule, jnp.ones(1), 2), "at least two parameters"),
        (gf.iterate(rule, jnp.zeros(3), 2, save_every=1), "must move"),
        (jax.vmap(lambda w: gf.iterate(rule, w, 2))(jnp.ones((2, 3))), "single runs"),
    ]:
        with pytest.raises(ValueError, match=f"^Argument `sols` must .*{message}|^Argument `sols` {message}"):
            gf.plot.phase(sols)


# Animations


def test_an_animation_shows_every_run_on_one_clock(flow, descent, tmp_path):
    path = gf.animate([flow, descent], tmp_path / "new" / "runs.gif", frames=4, seconds=2.0)
    with Image.open(path) as image:
        assert image.n_frames == 4
        assert image.info["duration"] == 500
        inks = []
        for frame in range(4):
            image.seek(frame)
            inks.append(int((np.asarray(image.convert("L"), float) < 128).sum()))
    assert inks == sorted(inks)
    assert inks[0] < inks[-1]


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.links = []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_a_page_with_an_animation_needs_nothing_else(flow, tmp_path):
    text = gf.animate(flow, tmp_path / "runs.html", frames=3).read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.links == []
    assert text.count("data:image/webp;base64,") == 3
    assert "http" not in text


# Sweeps, and legends


def test_members_of_a_sweep_are_lines_over_time(tmp_path):
    observe = {"norm": gf.observables.ParameterNorm()}
    axes = {"scale": [1.0, 2.0], "rate": [0.1, 0.2]}
    build = lambda scale, rate: (gf.GradientDescent(bowl, rate), scale * jnp.ones(2))  # noqa: E731
    ds = gf.sweep(build, axes, [0.0, 0.2, 0.4], observe=observe, progress=False)
    (ax,) = gf.plot.members(ds).axes
    rows = [line.get_ydata() for line in ax.lines]
    np.testing.assert_array_equal(rows, ds.norm.values.reshape(4, 3))
    colours = [line.get_color() for line in ax.lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert ax.get_xlabel() == "flow time t = k * learning_rate"
    (ends,) = gf.plot.members(ds.drop_vars("norm")).axes
    np.testing.assert_array_equal(ends.lines[1].get_ydata(), ds.loss_last.values.ravel())
    with pytest.raises(ValueError, match="observable over time, or with a loss"):
        gf.plot.members(ds.drop_vars(["norm", "loss_last"]))


def covered(kind):
    drawn = Figure(figsize=(3, 2.2), layout="constrained")
    ax = drawn.subplots()
    x = np.linspace(0, 1, 300)
    if kind == "line":
        ax.plot(x, np.sin(60 * x), label="curve")
    elif kind == "points":
        ax.plot(*np.meshgrid(x[::20], x[::20]), "k.", label="_")
        ax.lines[0].set_label("points")
    elif kind == "bars":
        ax.bar(range(8), np.full(8, 1.0), label="bars")
    else:
        ax.errorbar(x[::5], 0 * x[::5], np.ones(60), fmt="none", label="errors")
    ax.set(xlabel="x", ylabel="y")
    ax.legend(loc="center")
    return drawn


@pytest.mark.parametrize("kind", ["line", "points", "bars", "errors"])
def test_legends_leave_what_they_covered(kind):
    drawn = covered(kind)
    assert len(covering(drawn)) == 1
    labels = [text.get_text() for text in drawn.axes[0].get_legend().get_texts()]
    clear_legends(drawn)
    assert covering(drawn) == []
    legend = drawn.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == labels
    others = [drawn.axes[0].xaxis.label.get_window_extent(), drawn.axes[0].yaxis.label.get_window_extent()]
    assert not any(legend.get_window_extent().overlaps(box) for box in others)


def test_rules_say_what_their_clocks_do():
    """The text of the unit is computed at the numbers of the rule, and is the time of its iterates."""
    s, m, alpha, k = 0.1, 0.5, 3.0, 7
    names = {"k": k, "learning_rate": s, "s": s, "momentum": m, "alpha": alpha, "sqrt": np.sqrt}
    rules = [
        gf.GradientDescent(bowl, s),
        gf.HeavyBall(bowl, s, mu=0.1),
        gf.HeavyBall(bowl, s, momentum=m),
        gf.Nesterov(bowl, s),
        gf.Nesterov(bowl, s, mu=0.1),
        gf.Nesterov(bowl, s, momentum=m),
    ]
    for rule, resolution in itertools.product(rules, ("high", "low")):
        for unit in (rule.time_unit, *([rule.flow(1, resolution).time_unit] if hasattr(rule, "alpha") else [])):
            formula = (
                unit.removeprefix("t = ").replace("k sqrt", "k * sqrt").replace("k s", "k * s").replace(") s", ") * s")
            )
            assert eval(formula, {}, names) == pytest.approx(float(rule.time(k))), unit
