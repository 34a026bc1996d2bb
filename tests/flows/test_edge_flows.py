"""Flows at the edge of stability against closed forms of quadratics, the series they stand for, and descent itself."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf

EIGENVALUES = np.array([0.3, 1.0, 2.2])  # with a learning rate of one: slow, in between, beyond the threshold
AMPLITUDE = np.array([0.4, 0.5, 1e-3])
CENTRE = np.array([1.0, -0.7, 0.3])
BOSH = gf.solvers.Bosh3()  # quick to compile
SEEN = {
    "a": gf.observables.Amplitude(),
    "variance": gf.observables.Variance(),
    "loss": gf.observables.MeanLoss(),
}


class Quadratic(eqx.Module):
    """`sum_i lambda_i w_i^2 / 2`."""

    eigenvalues: jax.Array

    def __call__(self, w):
        return 0.5 * jnp.sum(self.eigenvalues.astype(w.dtype) * w**2)


class Valley(eqx.Module):
    """`(y + x) x^2 / 2 - eps (x + y)`: it gets steeper along its floor, until descent bounces between its walls."""

    eps: jax.Array

    def __call__(self, w):
        x, y = w
        return (y + x) * x**2 / 2 - self.eps.astype(w.dtype) * (x + y)


def bumpy(w):
    """Smooth, neither convex nor quadratic."""
    x, y = w
    return (y + x) * x**2 / 2 - 0.1 * (x + y) + 0.05 * y**2 + 0.3 * jnp.cos(x * y)


QUADRATIC = Quadratic(jnp.asarray(EIGENVALUES))


def rates(order, x):
    """The rate per step that the flow of an order gives to `z_{k+1} = (1 + x) z_k`: the series of the logarithm."""
    return sum((x, -(x**2) / 2, x**3 / 3)[:order])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_modes_of_a_quadratic(order):
    """Centre and amplitude separate, and each mode moves at the rate that a series of the logarithm gives."""
    flow = gf.DescentAscentFlow(QUADRATIC, 1.0, order, amplitude=AMPLITUDE)
    ts = np.array([0.0, 1.0, 3.0])
    sol = gf.solve(flow, CENTRE, ts, rtol=1e-9, observe=SEEN, solver=gf.solvers.Dopri8())
    centre = CENTRE * np.exp(np.outer(ts, rates(order, -EIGENVALUES)))
    amplitude = AMPLITUDE * np.exp(np.outer(ts, rates(order, EIGENVALUES - 2)))
    np.testing.assert_allclose(sol.params, centre, rtol=2e-8, atol=2e-8)
    np.testing.assert_allclose(sol.observed["a"], amplitude, rtol=2e-8, atol=2e-8)
    np.testing.assert_allclose(sol.observed["variance"], np.sum(amplitude**2, axis=1), rtol=2e-7)
    mean = np.sum(EIGENVALUES * (centre**2 + amplitude**2), axis=1) / 2  # of both sides of a parabola
    np.testing.assert_allclose(sol.observed["loss"], mean, rtol=2e-7)


def test_the_start_gives_each_mode_its_share():
    """`(eta lambda / 2)^m` of a mode alternates; where that exceeds one, scaling makes it one for a single mode."""
    below = np.array([0.3, 1.0, 1.9])
    for order, m in ((1, 2), (2, 2), (3, 3)):
        flow = gf.DescentAscentFlow(Quadratic(jnp.asarray(below)), 1.0, order)
        state = flow.init(jnp.asarray(CENTRE), None)
        np.testing.assert_allclose(flow.amplitude(state), CENTRE * (below / 2) ** m, rtol=1e-12)
        np.testing.assert_allclose(state.centre, CENTRE * (1 - (below / 2) ** m), rtol=1e-12)
        beyond = gf.DescentAscentFlow(Quadratic(jnp.array([3.0])), 1.0, order)
        state = beyond.init(jnp.ones(1), None)
        np.testing.assert_allclose(beyond.amplitude(state), 1.0, rtol=1e-12)


def test_the_split_of_iterates():
    """Three iterates of a quadratic: modes of multiplier -1 are all amplitude, those of multiplier 1 all centre."""
    iterates = [np.array([1.0, (-1.0) ** k, 0.5**k]) for k in range(5)]
    for k in (1, 2, 3):
        centre, amplitude = gf.flows.split_iterates(*iterates[k - 1 : k + 2], k=k)
        np.testing.assert_allclose(centre[:2], [1, 0])
        np.testing.assert_allclose(amplitude[:2], [0, 1])
        np.testing.assert_allclose(centre + (-1) ** k * amplitude, iterates[k])
    model = gf.models.MLP(2, 3, key=jax.random.key(0))
    centre, amplitude = gf.flows.split_iterates(model, model, model)
    assert eqx.tree_equal(centre, model)
    flow = gf.DescentAscentFlow(gf.EmpiricalRisk(np.eye(2), np.ones(2), gf.losses.square), 0.1, amplitude=amplitude)
    state = flow.init(*gf.split_params(centre))
    assert jax.tree_util.tree_structure(state.direction) == jax.tree_util.tree_structure(state.centre)


@pytest.mark.slow
def test_orders_below_the_edge():
    """Measured against the iterates, once what alternated at the start is gone; the last two slopes."""
    names = {f"order {p}": lambda rule, p=p: gf.DescentAscentFlow(bumpy, rule.learning_rate, p) for p in (1, 2, 3)}
    rule = gf.GradientDescent(bumpy, 0.1)
    how = {"flows": names, "after": 1.0, "rtol": 1e-11, "solver": gf.solvers.Dopri8()}
    ds = gf.compare(rule, jnp.array([0.8, 1.2]), [0.1, 0.05, 0.025, 0.0125], 2.0, **how)
    for p in (1, 2, 3):
        np.testing.assert_allclose(ds.local_order.sel(flow=f"order {p}")[-2:], p, atol=0.15)


@pytest.fixture(scope="module")
def valley():
    """Descent in the valley, past its edge: midpoints, variances, mean losses."""
    problem, eta, steps, start = Valley(jnp.asarray(0.01)), 0.3, 600, jnp.array([0.1, 6.5])
    see = {"loss": gf.observables.Loss(problem)}
    run = gf.iterate(gf.GradientDescent(problem, eta), start, steps, save_every=1, observe=see)
    w, losses = np.asarray(run.params), np.asarray(run.observed["loss"])
    middle = (w[:-2] + 2 * w[1:-1] + w[2:]) / 4
    variance = np.sum(((2 * w[1:-1] - w[:-2] - w[2:]) / 4) ** 2, axis=1)
    return (
        problem,
        eta,
        start,
        eta * np.arange(steps + 1),
        middle,
        variance,
        (losses[:-2] + 2 * losses[1:-1] + losses[2:]) / 4,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flow", "distance", "averages"),
    [
        (lambda *args: gf.DescentAscentFlow(*args, order=1), 0.35, 0.05),  # measured: 0.300, 2.4 % and 3.8 %
        (lambda *args: gf.DescentAscentFlow(*args, order=2), 0.05, 0.005),  # 0.0296, 0.03 % and 0.03 %
        (lambda *args: gf.DescentAscentFlow(*args, order=3), 0.05, 0.005),  # 0.0362, 0.05 % and 0.10 %
        (gf.RodFlow, 0.35, 0.05),  # 0.310, 2.5 % and 4.1 %
        (gf.EdgeFlow, 0.35, 0.05),  # 0.318, 2.7 % and 4.3 %
    ],
    ids=["order 1", "order 2", "order 3", "rod", "edge"],
)
def test_the_valley(valley, flow, distance, averages):
    """The largest distance over all steps, in units of `sqrt(eps)`, and averages once descent is at the edge."""
    problem, eta, start, ts, middle, variance, loss = valley
    sol = gf.solve(flow(problem, eta), start, ts, rtol=1e-6, observe=SEEN)
    away = np.linalg.norm(np.asarray(sol.params)[1:-1] - middle, axis=1)
    assert np.max(away) / np.sqrt(0.01) < distance
    late = slice(200, None)
    seen = {name: np.asarray(sol.observed[name])[1:-1][late] for name in ("variance", "loss")}
    assert abs(seen["variance"].mean() / variance[late].mean() - 1) < averages
    assert abs(seen["loss"].mean() - loss[late].mean()) < averages * np.abs(loss[late]).mean()


@pytest.mark.parametrize("size", [1e-3, 1e-30, 1e-300])
def test_an_amplitude_keeps_its_growth_however_small(size):
    """In float64 down to where numbers end: the field at a quadratic is known, and so is that at a cubic term."""
    flow = gf.DescentAscentFlow(Valley(jnp.asarray(0.01)), 0.3, 1, rounding=0)
    centre, direction = jnp.array([0.1, 6.5]), jnp.array([0.6, 0.8])
    state = gf.flows.SplitState(centre, direction, jnp.log(jnp.asarray(size)))
    rate = flow.vector_field(jnp.zeros(()), state, None)
    hessian = np.array([[6.5 + 3 * 0.1, 0.1], [0.1, 0.0]])
    velocity = (0.3 * hessian - 2 * np.eye(2)) @ direction / 0.3
    np.testing.assert_allclose(rate.log_size, direction @ velocity, rtol=1e-5)
    np.testing.assert_allclose(rate.direction, velocity - (direction @ velocity) * direction, rtol=1e-5)


def test_float32_grows_from_what_underflows_and_says_what_it_resolves():
    """An amplitude of 1e-60, far below the smallest number of float32, decays and grows as it should."""
    flow = gf.DescentAscentFlow(QUADRATIC, 1.0, 1, rounding=0)
    state = flow.init(jnp.asarray(CENTRE, jnp.float32), None)._replace(
        direction=jnp.array([0, 0, 1], jnp.float32), log_size=jnp.float32(-138.0)
    )
    rate = flow.vector_field(jnp.zeros(()), state, None)
    np.testing.assert_allclose(rate.log_size, 0.2, atol=3e-3)
    start, ts = jnp.asarray([1.0, 0.5], jnp.float32), [0.0, 60.0]
    with pytest.warns(gf.PrecisionWarning, match="amplitude"):
        sol = gf.solve(
            gf.DescentAscentFlow(Quadratic(jnp.array([0.5, 1.0])), 1.0, rounding=0), start, ts, rtol=1e-3, solver=BOSH
        )
    assert sol.status == "ok"
    # -1 - 1/2 a step along the mode of eigenvalue one; the other decays faster.
    np.testing.assert_allclose(sol.state.log_size, np.log(0.5 / 4) - 1.5 * 60, rtol=0.01)


def test_an_amplitude_falls_to_the_rounding_of_the_iterates():
    """`|a|^2` falls by `2 x` a step, and gains the square of the error; the centre stays where the loss is flat."""
    problem, start = Quadratic(jnp.array([0.0, 1.5])), jnp.array([8.0, 0.0])
    for unit in (2.0**-52, 1e-7):
        error = 0.2 * unit * 8 / np.sqrt(2)
        flow = gf.DescentAscentFlow(problem, 1.0, 1, amplitude=jnp.array([0.0, 1.0]), rounding=unit)
        state = gf.solve(flow, start, [150.0], solver=BOSH, rtol=1e-4).state
        np.testing.assert_allclose(state.log_size, np.log(error / np.sqrt(2 * 0.5)), atol=1e-2)
    ours, theirs = (gf.DescentAscentFlow(problem, 1.0, rounding=unit) for unit in (None, 2.0**-52))
    assert ours.noise(start, jnp.asarray(1e-16)) == theirs.noise(start, jnp.asarray(1e-16))


def test_gradients_are_counted_as_they_are():
    calls = []

    @jax.custom_vjp
    def loss(w):
        return jnp.sum(w**4) / 4

    def gradient(w, cotangent):
        jax.debug.callback(lambda: calls.append(1))
        return (cotangent * w**3,)

    loss.defvjp(lambda w: (loss(w), w), gradient)
    sol = gf.solve(gf.DescentAscentFlow(loss, 0.1, 2), jnp.ones(2), [1.0], solver=BOSH)
    jax.effects_barrier()
    assert int(sol.stats["gradient_evaluations"]) == len(calls)
    assert int(sol.stats["hessian_vector_products"]) == 0


@pytest.mark.slow
def test_vmap_equals_a_loop_and_a_continued_run_the_whole():
    problem, start, solver = Valley(jnp.asarray(0.01)), jnp.array([0.1, 6.5]), BOSH

    @jax.jit
    @jax.vmap
    def last(eta):
        return gf.solve(gf.DescentAscentFlow(problem, eta), start, [30.0], rtol=1e-4, solver=solver).final

    etas = jnp.array([0.25, 0.3])
    alone = [gf.solve(gf.DescentAscentFlow(problem, eta), start, [30.0], rtol=1e-4, solver=solver) for eta in etas]
    np.testing.assert_allclose(last(etas), jnp.stack([sol.final for sol in alone]), rtol=1e-9)
    half = gf.solve(gf.DescentAscentFlow(problem, etas[1]), start, [15.0], rtol=1e-4, solver=solver)
    continued = gf.solve(gf.DescentAscentFlow(problem, etas[1]), half, [30.0], rtol=1e-4, solver=solver)
    # The half way point cuts a step, so that the two runs differ by their tolerance.
    np.testing.assert_allclose(continued.final, alone[1].final, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(continued.state.log_size, alone[1].state.log_size, rtol=1e-2)


@pytest.mark.slow
def test_sweeps_over_learning_rates_and_widths(tmp_path):
    """Members of other widths are padded; each is what it is alone."""
    x, y = gf.data.correlated(6, 4, dtype="float64")
    problem = gf.EmpiricalRisk(x, y, gf.losses.square)

    def build(width, learning_rate):
        model = gf.models.TwoLayer(4, width, activation=jnp.tanh, key=jax.random.key(0))
        return gf.DescentAscentFlow(problem, learning_rate), model

    axes, ts = {"width": [3, 4], "learning_rate": [0.1, 0.5]}, [0.0, 5.0]
    see = {"variance": gf.observables.Variance()}
    ds = gf.sweep(build, axes, ts, observe=see, rtol=1e-5, store=tmp_path / "store.zarr")
    assert np.all(ds.status == 0) or set(np.ravel(ds.status)) == {"ok"}
    alone = gf.solve(*build(3, 0.5), ts, observe=see, rtol=1e-5)
    np.testing.assert_allclose(ds.variance.sel(width=3, learning_rate=0.5), alone.observed["variance"], rtol=1e-3)


def test_a_start_at_rest_has_no_amplitude():
    with jax.debug_nans(True):
        sol = gf.solve(gf.DescentAscentFlow(QUADRATIC, 1.0), jnp.zeros(3), [5.0], observe=SEEN, solver=BOSH)
    assert sol.status == "ok"
    assert float(sol.observed["variance"][-1]) == 0
    np.testing.assert_array_equal(sol.final, 0)


def test_derivatives_of_a_run_are_those_of_its_closed_form():
    """Forward mode, through both the centre and the amplitude."""
    problem = Quadratic(jnp.array([1.0]))

    def last(eta):
        flow = gf.DescentAscentFlow(problem, eta, 1, amplitude=jnp.array([0.5]))
        sol = gf.solve(flow, jnp.ones(1), [1.0], rtol=1e-8, solver=BOSH, observe={"a": gf.observables.Amplitude()})
        return sol.final[0], sol.observed["a"][0, 0]

    (centre, amplitude), slopes = jax.jvp(last, (jnp.asarray(0.5),), (jnp.ones(()),))
    np.testing.assert_allclose([centre, amplitude], [np.exp(-1), 0.5 * np.exp(1 - 2 / 0.5)], rtol=1e-6)
    np.testing.assert_allclose(slopes, [0, 0.5 * np.exp(-3) * 2 / 0.25], rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("unchecked")
def test_arguments_that_are_refused():
    flow = gf.DescentAscentFlow
    with pytest.raises(ValueError, match=r"`order` must be 1, 2 or 3, but is 4"):
        flow(QUADRATIC, 1.0, order=4)
    for flow_class in (flow, gf.RodFlow, gf.EdgeFlow):
        for rate in (0.0, -1.0, np.inf, np.ones(2)):
            with pytest.raises(ValueError, match="`learning_rate` must be"):
                flow_class(QUADRATIC, rate)
        with pytest.raises(ValueError, match="`problem` must be"):
            flow_class(gf.GradientDescent(QUADRATIC, 0.1), 0.1)
        with pytest.raises(ValueError, match="`problem` must"):
            gf.solve(flow_class(lambda w: w, 0.1), jnp.ones(2), [1.0])
    data = gf.EmpiricalRisk(np.eye(2), np.ones(2), gf.losses.square)
    noisy = gf.SGD(data, 0.1, batch_size=1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="`problem` must be"):
        flow(noisy, 0.1)
    with pytest.raises(ValueError, match="`rounding` must not be negative"):
        flow(QUADRATIC, 1.0, rounding=-1.0)
    with pytest.raises(ValueError, match="`amplitude` must be finite"):
        flow(QUADRATIC, 1.0, amplitude=jnp.array([np.nan]))
    with pytest.raises(ValueError, match="`amplitude` must have the shapes"):
        gf.solve(flow(QUADRATIC, 1.0, amplitude=jnp.ones(2)), jnp.ones(3), [1.0])
    for seen in SEEN.values():
        with pytest.raises(ValueError, match="`observe` must"):
            gf.solve(gf.GradientFlow(QUADRATIC), jnp.ones(3), [1.0], observe={"seen": seen})
        with pytest.raises(ValueError, match="`observe` must"):
            seen(jnp.ones(3))


def test_means_of_functions_over_the_alternation():
    flow = gf.DescentAscentFlow(QUADRATIC, 1.0, 1, amplitude=AMPLITUDE)
    see = {"cube": gf.observables.IterateMean(lambda w: w**3), "a": gf.observables.Amplitude()}
    sol = gf.solve(flow, CENTRE, [0.0, 0.5], observe=see, solver=BOSH)
    c, a = np.asarray(sol.params), np.asarray(sol.observed["a"])
    np.testing.assert_allclose(sol.observed["cube"], c**3 + 3 * c * a**2, rtol=1e-12)
