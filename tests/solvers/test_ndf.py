"""NDF and Automatic: tables, order, stability, linear solves, exactness, counts, saddles, failures, the switch."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf
from gradflow._conserved import Conserved
from gradflow._solution import Status
from gradflow._tree import split
from gradflow.flows import AbstractFlow
from gradflow.runs import _adaptive
from gradflow.runs._adaptive import AdaptiveRun, advance, begin
from gradflow.solvers import _differences
from gradflow.solvers._conjugate_gradient import conjugate_gradient

ROWS = 8
ORDERS = [1, 2, 3, 4, 5]
KAPPA = {1: -0.1850, 2: -1 / 9, 3: -0.0823, 4: -0.0415, 5: 0.0}  # Shampine & Reichelt 1997, table 1

pytestmark = pytest.mark.slow


def table_of(points):
    """Backward differences of points `(ROWS, ...)`, the newest first, by Pascal's triangle."""
    points, rows = np.asarray(points), []
    while len(points):
        rows.append(points[0])
        points = points[:-1] - points[1:]
    return np.stack(rows)


def polynomials(order):
    """A few polynomials of that degree, one per column."""
    coefficients = np.random.default_rng(order).normal(size=(order + 1, 3))
    return lambda t: np.polynomial.polynomial.polyval(np.asarray(t), coefficients, tensor=True).T


@pytest.mark.parametrize("order", ORDERS)
def test_tables_of_polynomials_are_exact(order):
    """Values within and beyond the points, other spacings, and one point more."""
    p, h, at = polynomials(order), 0.3, 1.7
    table = table_of(p(at - h * np.arange(ROWS)))
    np.testing.assert_allclose(table[order + 1 :], 0, atol=1e-12)
    junk = table.copy()
    junk[order + 1 :] = 7.0  # rows past the order must not enter
    k = jnp.asarray(order)
    for s in (-2.5, -1.0, -0.3, 0.0, 0.4, 1.0, 3.0):
        row = _differences.weights(jnp.asarray(s), k, ROWS)
        np.testing.assert_allclose(row @ junk, p(at + s * h), rtol=1e-11, atol=1e-12)
    for factor in (0.3, 1.0, 2.5):
        matrix = _differences.change_of_spacing(jnp.asarray(factor), k, ROWS)
        wanted = table_of(p(at - factor * h * np.arange(ROWS)))
        wanted[order + 1 :] = 7.0
        np.testing.assert_allclose(matrix @ junk, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("order", ORDERS)
def test_append_gives_the_differences_of_the_points(order):
    """The correction is what the new point is off the extrapolation; rows up to two past the order are right."""
    points = np.random.default_rng(order).normal(size=(ROWS + 1, 3))
    old, new = table_of(points[1:]), table_of(points[:-1])
    correction = points[0] - old[: order + 1].sum(axis=0)
    computed = _differences.append(jnp.asarray(old), jnp.asarray(correction), jnp.asarray(order))
    np.testing.assert_allclose(computed[: order + 3], new[: order + 3], rtol=1e-12, atol=1e-12)


class Plain(AbstractFlow):
    """`y' = rate(t, y)`, with a symmetric Jacobian or not."""

    rate: Any

    symmetric_jacobian: ClassVar[bool] = True

    def init(self, trainable, frozen):
        return trainable

    def vector_field(self, t, state, frozen):
        return self.rate(t, state)

    def params(self, state):
        return state


class Lopsided(Plain):
    symmetric_jacobian: ClassVar[bool] = False


FIRST = {1: 48, 2: 48, 3: 24, 4: 12, 5: 11}  # steps of the coarsest run
MATRIX = np.array([[3.0, 1.0, 0.5], [1.0, 2.0, -0.5], [0.5, -0.5, 5.0]])
SIZE, TIGHT = 1e3, 1e-13


class Decoupled(eqx.Module):
    """Problems of size a thousand side by side, each of which runs as it would alone."""

    power: jax.Array

    def __call__(self, t, y):
        return {
            "linear": -jnp.asarray(MATRIX) @ y["linear"],
            "cubic": -(y["cubic"] ** 3) / SIZE**2,
            "robinson": -50 * (y["robinson"] - SIZE * jnp.cos(t)) - SIZE * jnp.sin(t),
            "quadrature": SIZE * jnp.cos(t),
            "one": SIZE * jnp.ones_like(t),
            "clock": SIZE * self.power * t ** (self.power - 1),
        }


def exact(t, power):
    values, basis = np.linalg.eigh(MATRIX)
    at_size = {
        "linear": basis @ (np.exp(-values * t) * (basis.T @ np.ones(3))),
        "cubic": 1 / np.sqrt(1 + 2 * t),
        "robinson": np.cos(t),
        "quadrature": np.sin(t),
        "one": float(t),
        "clock": float(t) ** power,
    }
    return jax.tree_util.tree_map(lambda v: jnp.asarray(SIZE * v), at_size)


def history_of(method, points, h, order):
    """What `NDF` would keep after such points, the newest first."""
    size = len(points[0])
    start = Plain(lambda t, y: y)
    fresh = method.begin(at(start, 0.0), jnp.zeros(size), jnp.zeros(size), jnp.asarray(h))
    where = lambda s: (s.table, s.order, s.age)  # noqa: E731
    return eqx.tree_at(where, fresh, (jnp.asarray(table_of(np.stack(points))), jnp.asarray(order), jnp.asarray(99)))


def at(flow, t):
    return gf.solvers.Field(flow, None, jnp.asarray(t), jnp.asarray(1.0))


@eqx.filter_jit
def march(method, flow, y, history, t, h, steps):
    """Equal steps of one order by hand, without error control; the state, and whether every step could be solved."""
    control = gf.solvers.StepControl(jnp.asarray(TIGHT), None)
    scale = jax.tree_util.tree_map(jnp.ones_like, y)
    k = history.order

    def step(i, carry):
        y, history, solved = carry
        tried = method.step(at(flow, t + i * h), y, h, control, scale, history, jnp.asarray(True))
        return tried.y1, eqx.tree_at(lambda s: s.order, tried.accepted, k), solved & jnp.isfinite(tried.ratio)

    return jax.lax.fori_loop(0, steps, step, (y, history, jnp.asarray(True)))


def start_of(method, order, t, h):
    points = [exact(t - j * h, order) for j in range(ROWS)]
    return points[0], history_of(method, [jax.flatten_util.ravel_pytree(p)[0] for p in points], h, order)


@pytest.mark.parametrize("linearise", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_order_by_halvings(order, linearise):
    """From exact values at t = 1 to t = 2. `y' = 1` and `y' = k t^(k - 1)`, which probes stage times, are exact."""
    method, flow = gf.solvers.NDF(linearise=linearise), Plain(Decoupled(jnp.asarray(float(order))))
    errors, wanted = {name: [] for name in exact(1.0, 1)}, exact(2.0, order)
    for n in FIRST[order] * 2 ** np.arange(5):
        y, history = start_of(method, order, 1.0, 1 / n)
        y, _, solved = march(method, flow, y, history, jnp.asarray(1.0), jnp.asarray(1 / n), jnp.asarray(n))
        assert bool(solved)
        for name in errors:
            errors[name].append(float(np.max(np.abs(y[name] - wanted[name]))))
    for name in ("linear", "cubic", "robinson", "quadrature"):
        slopes = np.log2(np.array(errors[name][:-1]) / np.array(errors[name][1:]))
        assert np.all(np.abs(slopes[-2:] - order) < 0.15), (name, slopes, errors[name])
    assert max(errors["one"]) < 1e-10 * SIZE, errors
    assert max(errors["clock"]) < 1e-10 * SIZE, errors


@pytest.mark.parametrize("order", ORDERS)
def test_local_error_and_its_estimate_have_their_published_constants(order):
    """`(kappa gamma_k + 1/(k+1)) h^(k+1) y^(k+1)`: the estimate; over `(1 - kappa) gamma_k`: the error of a step."""
    h, k = 0.03, order
    points = np.exp(-h * np.arange(ROWS))[:, None]
    method, flow = gf.solvers.NDF(), Plain(lambda t, y: jnp.exp(t)[None])
    control = gf.solvers.StepControl(jnp.asarray(1e-5), None)
    history, y = history_of(method, list(points), h, order), jnp.ones(1)
    tried = method.step(at(flow, 0.0), y, jnp.asarray(h), control, jnp.ones(1), history, jnp.asarray(True))
    gamma = sum(1 / m for m in range(1, k + 1))
    constant, term = KAPPA[k] * gamma + 1 / (k + 1), h ** (k + 1)
    error = constant / ((1 - KAPPA[k]) * gamma) * term
    assert float(tried.y1[0] - np.exp(h)) == pytest.approx(error, rel=0.1, abs=0)
    # What is compared with one: the estimate over 0.3 rtol (rtol / 1e-4)^0.1 (|y| + scale). The new point lies off by
    # its own error too.
    tolerance = 0.3 * 1e-5 * 0.1**0.1 * 2
    assert float(tried.ratio) == pytest.approx(constant * (term + error) / tolerance, rel=0.1, abs=0)


@pytest.mark.parametrize("order", ORDERS)
def test_tables_do_not_grow_on_the_negative_axis(order):
    """The linear map from table to table on `y' = -lambda y` has no eigenvalue outside the unit circle."""
    method = gf.solvers.NDF()
    units = np.eye(order + 1, ROWS)
    first = history_of(method, [np.zeros(1)] * ROWS, 1.0, order)

    @jax.jit
    @jax.vmap
    def amplify(rate):
        def one(column):
            history = eqx.tree_at(lambda s: s.table, first, column[:, None])
            _, stepped, solved = march(method, Plain(Decay(rate)), column[:1], history, zero, zero + 1, jnp.asarray(1))
            return stepped.table[: order + 1, 0], solved

        zero = jnp.zeros(())
        return jax.vmap(one)(jnp.asarray(units))

    rates = np.geomspace(1e-2, 1e6, 33)
    maps, solved = amplify(jnp.asarray(rates))
    assert np.all(solved)
    radii = np.abs(np.linalg.eigvals(np.asarray(maps))).max(axis=1)
    assert np.all(radii < 1), radii
    np.testing.assert_allclose(radii[0], np.exp(-1e-2), rtol=1e-3)
    assert radii[-1] < 0.3  # to zero like a root of 1 / (h lambda)


class Decay(eqx.Module):
    rate: jax.Array

    def __call__(self, t, y):
        return -self.rate * y


def systems(draw, count=60, size=30, seed=0):
    """Random `H` with drawn eigenvalues, right-hand sides, solutions of `(I + H) x = r`, smallest eigenvalues."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        basis, values, r = np.linalg.qr(rng.normal(size=(size, size)))[0], draw(rng, size), rng.normal(size=size)
        matrix = basis * values @ basis.T
        made.append((matrix, r, np.linalg.solve(np.eye(size) + matrix, r), 1 + values.min()))
    return [np.stack(part) for part in zip(*made, strict=True)]


@jax.jit
def solve_systems(matrix, r, sizes, tolerance, smallest, min_iterations=0, max_iterations=300):
    def one(matrix, r, sizes, smallest):
        norm = lambda v: jnp.sqrt(jnp.mean((v / sizes) ** 2))  # noqa: E731
        unit, counts = jnp.ones((), r.dtype), (jnp.asarray(min_iterations), jnp.asarray(max_iterations))
        return conjugate_gradient(lambda p: matrix @ p, unit, r, norm, tolerance, smallest, *counts)

    return jax.vmap(one)(matrix, r, sizes, smallest)


def outliers(rng, size):
    return np.r_[10 ** rng.uniform(0, 4, 5), rng.uniform(-0.9, 0.5, size - 5)]


SPECTRA = {
    "definite": lambda rng, size: np.geomspace(1e-2, 10 ** rng.uniform(0, 5), size),
    "outliers": outliers,
    "nearly singular": lambda rng, size: np.r_[-0.93, rng.uniform(-0.5, 10 ** rng.uniform(0, 3), size - 1)],
}


@pytest.mark.parametrize("name", SPECTRA)
def test_conjugate_gradients_bound_their_error(name):
    """In the Euclidean norm without exception; in a weighted one to the ratio of the weights, most often to one."""
    matrix, r, x, smallest = systems(SPECTRA[name])
    weights = np.exp(np.random.default_rng(1).normal(size=r.shape))
    for tolerance in (1e-1, 1e-2, 1e-4, 1e-8):
        for sizes in (np.ones_like(r), weights):
            computed = solve_systems(matrix, r, sizes, jnp.asarray(tolerance), 0.9 * smallest)
            assert np.all(computed.converged & ~computed.negative)
            ratio = np.sqrt(np.mean(((computed.x - x) / sizes) ** 2, axis=1)) / tolerance
            spread = sizes.max(axis=1) / sizes.min(axis=1)
            assert np.max(ratio / spread) <= 1 + 1e-6
            assert np.median(ratio) <= 1
            residual = r - computed.x - np.einsum("nij,nj->ni", matrix, computed.x)
            np.testing.assert_allclose(computed.residual, residual, rtol=0, atol=1e-9 * np.abs(matrix).max())
            assert computed.products.max() <= 100
            # The bound is of use: it is not a hundred times too large.
            assert name != "definite" or np.median(ratio) > 0.05
    assert np.all(computed.stiffest <= np.linalg.norm(matrix, 2, axis=(1, 2)) * (1 + 1e-9))
    assert np.all(-computed.curvature >= np.minimum(smallest - 1, 0) - 1e-9)


@pytest.mark.parametrize("lowest", [-0.99, -1.02, -1.5, -30.0])
def test_conjugate_gradients_flag_indefinite_matrices(lowest):
    """Rayleigh quotients below 0.05 count as negative. The curvature reported is one that the matrix has."""

    def draw(rng, size):
        bad = int(rng.integers(1, 4))
        return np.r_[np.full(bad, lowest), rng.uniform(0, 10 ** rng.uniform(0, 3), size - bad)]

    matrix, r, _, _ = systems(draw, count=100)
    computed = solve_systems(matrix, r, np.ones_like(r), jnp.asarray(1e-6), np.full(len(r), 0.1))
    assert np.all(computed.negative)
    assert not np.any(computed.converged)
    assert np.all((computed.curvature > 0.95 - 1e-9) & (computed.curvature <= -lowest + 1e-9))


def test_conjugate_gradients_at_the_edges():
    """A zero right-hand side costs nothing, or one product where that is asked for; a spent budget is not met."""
    matrix, r, _, smallest = systems(SPECTRA["definite"], count=5)
    ones, tolerance = np.ones_like(r), jnp.asarray(1e-6)
    for min_iterations in (0, 1):
        computed = solve_systems(matrix, 0 * r, ones, tolerance, smallest, min_iterations)
        assert np.all(computed.converged)
        assert not np.any(computed.x)
        assert not np.any(computed.products)
    computed = solve_systems(matrix, 1e-9 * r, ones, tolerance, smallest, 1)
    assert np.all(computed.converged)
    assert np.all(computed.products == 1)
    computed = solve_systems(matrix, r, ones, tolerance, smallest, 0, 3)
    assert np.all(computed.products == 3)
    assert not np.any(computed.converged | computed.negative)
    none = solve_systems(matrix, r, ones, tolerance, smallest, 1, 0)
    assert not np.any(none.converged)
    assert not np.any(none.products)
    np.testing.assert_allclose(none.residual, r)
    failed = solve_systems(np.nan * matrix, r, ones, tolerance, smallest)
    assert not np.any(failed.converged)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_conjugate_gradients_in_float32_at_any_size(size):
    matrix, r, x, smallest = systems(lambda rng, n: np.geomspace(0.1, 100, n), count=10)
    single = [jnp.asarray(part, jnp.float32) for part in (matrix, size * r, size * np.ones_like(r), smallest)]
    matrix, r, sizes, smallest = single
    computed = solve_systems(matrix, r, sizes, jnp.asarray(1e-3, jnp.float32), 0.9 * smallest)
    assert computed.x.dtype == jnp.float32
    assert np.all(computed.converged)
    assert np.sqrt(np.mean((np.asarray(computed.x, float) / size - x) ** 2, axis=1)).max() <= 1e-3


class Bowl(eqx.Module):
    rates: jax.Array

    def __call__(self, w):
        return 0.5 * jnp.sum(self.rates * w * w)


RATES = np.geomspace(1e-3, 1e3, 12)
START = np.random.default_rng(0).normal(size=12)
TIMES = np.array([1e-3, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0])
LINEARISED = gf.solvers.NDF(linearise=True)


@pytest.mark.parametrize("solver", [gf.solvers.NDF(), LINEARISED, None], ids=["NDF", "linearised", "default"])
def test_stiff_quadratic_against_its_solution(solver):
    """Condition 1e6, at the end and at save times inside steps; the drift of the energy falls with the tolerance."""
    wanted = START * np.exp(-RATES * TIMES[:, None])
    distance = np.linalg.norm(wanted - START, axis=1)
    loss, drifts, programs = 0.5 * np.sum(RATES * wanted[-1] ** 2), [], None
    flow = gf.GradientFlow(Bowl(jnp.asarray(RATES)))
    for rtol in (1e-3, 1e-5, 1e-7):
        sol = gf.solve(flow, jnp.asarray(START), TIMES, solver=solver, rtol=rtol)
        programs = programs or _adaptive.advance._cached._cache_size()
        assert np.all(np.linalg.norm(sol.params - wanted, axis=1) <= 10 * rtol * distance)
        assert float(sol.loss[1]) == pytest.approx(loss, rel=10 * rtol)
        drifts.append(float(sol.drift["energy"]))
        assert int(sol.stats["steps"]) < 1000  # the many that explicit methods take: 1e5 / 3.3
        if solver is LINEARISED:
            assert int(sol.stats["hessian_vector_products"]) > int(sol.stats["steps"])
            assert int(sol.stats["gradient_evaluations"]) < 2 * int(sol.stats["steps"])
        else:
            assert int(sol.stats["hessian_vector_products"]) == 0
    assert drifts[0] > 10 * drifts[1] > 100 * drifts[2] > 0
    assert drifts[2] < 10 * rtol
    assert _adaptive.advance._cached._cache_size() == programs


@pytest.mark.parametrize("solver", [gf.solvers.NDF(), None], ids=["NDF", "default"])
def test_until_is_located_inside_a_step(solver):
    rates = jnp.array([0.1, 1e3])
    until = gf.Until(lambda w: w[0], below=0.3)
    sol = gf.solve(gf.GradientFlow(Bowl(rates)), jnp.ones(2), [50.0], solver=solver, rtol=1e-6, until=until)
    assert sol.status == "stopped"
    assert float(sol.final[0]) == pytest.approx(0.3, rel=1e-12)
    assert float(sol.t_final) == pytest.approx(-10 * np.log(0.3), rel=1e-5)


class Counter:
    """Counts on the host; equal to none but itself."""

    def __init__(self):
        self.gradients, self.products = [], []


class Counted(eqx.Module):
    """`-grad` of a quartic, that counts how often it is evaluated, and its Jacobian applied."""

    curvature: jax.Array
    counter: Any = eqx.field(static=True)

    def __call__(self, t, w):
        counter = self.counter

        @jax.custom_jvp
        def gradient(w, curvature):
            jax.debug.callback(lambda: counter.gradients.append(1))
            return -curvature * w - w**3

        @gradient.defjvp
        def product(primals, tangents):
            (w, curvature), (dw, _) = primals, tangents
            jax.debug.callback(lambda dw: counter.products.append(1), dw)
            return gradient(w, curvature), -(curvature + 3 * w**2) * dw

        return gradient(w, self.curvature)


@pytest.mark.parametrize("name", ["NDF", "linearised", "Automatic", "default"])
def test_reported_counts_equal_counted_ones(name):
    """Rejected steps and the search for a first step included."""
    solver = {"NDF": gf.solvers.NDF(), "linearised": LINEARISED, "Automatic": gf.solvers.Automatic()}.get(name)
    if name == "Automatic":
        solver = gf.solvers.Automatic(gf.solvers.Dopri5(), LINEARISED)
    counter = Counter()
    flow = Plain(Counted(jnp.array([1.0, 400.0]), counter))
    sol = gf.solve(flow, jnp.array([30.0, 20.0]), [0.1, 3.0], solver=solver)
    jax.effects_barrier()
    assert int(sol.stats["gradient_evaluations"]) == len(counter.gradients)
    assert int(sol.stats["hessian_vector_products"]) == len(counter.products)
    assert (len(counter.products) > 0) == (name in ("linearised", "Automatic"))
    assert int(sol.stats["rejected"]) > 0
    assert int(sol.stats["steps"]) == int(sol.stats["accepted"] + sol.stats["rejected"])


class Riding(Plain):
    """A flow with quadratures of which it does not tell how they follow from the rate."""

    def init(self, trainable, frozen):
        return trainable, {"integral": jnp.zeros(())}

    def vector_field(self, t, state, frozen):
        rate = self.rate(t, state[0])
        return rate, {"integral": jnp.sum(rate**2)}

    def params(self, state):
        return state[0]

    def controlled(self, state):
        return state[0]

    def conserved(self, state, frozen):
        """The integral itself, so that it is reported."""
        return {"integral": Conserved(state[1]["integral"], jnp.ones(()))}


def test_quadratures_ride_along_at_one_evaluation_each():
    counter = Counter()
    flow = Riding(Counted(jnp.array([1.0, 400.0]), counter))
    sol = gf.solve(flow, jnp.array([1.0, 1.0]), [3.0], solver=gf.solvers.NDF(), rtol=1e-6)
    jax.effects_barrier()
    assert int(sol.stats["gradient_evaluations"]) == len(counter.gradients)
    energy = lambda w: np.sum(0.5 * np.array([1.0, 400.0]) * w**2 + 0.25 * w**4)  # noqa: E731
    fallen = energy(np.ones(2)) - energy(np.asarray(sol.final))
    assert float(sol.drift["integral"]) == pytest.approx(fallen, rel=1e-4)


class Modes(eqx.Module):
    """`(s - a b)^2 / 2` for a few `s`: smooth escape, then stiff decay at rates `2 s`; data and start are leaves."""

    s: jax.Array

    def __call__(self, p):
        return 0.5 * jnp.sum((self.s - p["a"] * p["b"]) ** 2)


STRENGTHS = jnp.array([40.0, 3.0, 0.3])


def end_of_modes(scale, strengths, solver, rtol):
    start = {"a": scale * jnp.array([1.0, 0.5, 2.0]), "b": scale * jnp.array([1.5, -1.0, 0.5])}
    sol = gf.solve(gf.GradientFlow(Modes(strengths)), start, [0.3, 20.0], solver=solver, rtol=rtol)
    return jnp.concatenate([sol.final["a"], sol.params["b"][0]]), sol.code, sol.stats["gradient_evaluations"]


@pytest.mark.parametrize(
    "solver",
    [pytest.param(gf.solvers.NDF(), marks=pytest.mark.slow), gf.solvers.Automatic()],
    ids=["NDF", "Automatic"],
)
def test_batch_agrees_with_a_loop_and_nothing_is_traced_twice(solver):
    """Members differ in how long they take to escape, and so in steps, orders and the time of the switch."""
    traces = []

    def run(scale, rtol):
        traces.append(1)
        return end_of_modes(scale, STRENGTHS, solver, rtol)

    scales, rtol = jnp.geomspace(1e-6, 1, 64), jnp.asarray(1e-6)
    one = jax.jit(run)
    alone = [one(scale, rtol) for scale in scales]
    assert len(traces) == 1
    assert len({int(evaluations) for _, _, evaluations in alone}) > 30
    final, code, _ = jax.jit(jax.vmap(run, in_axes=(0, None)))(scales, rtol)
    assert not np.any(code)
    for together, (single, _, _) in zip(final, alone, strict=True):
        np.testing.assert_allclose(together, single, rtol=0, atol=10 * float(rtol) * np.abs(single).max())
    assert len(traces) == 2
    one(scales[24] / 2, jnp.asarray(1e-4))
    assert len(traces) == 2


@pytest.mark.parametrize(
    "solver",
    [pytest.param(gf.solvers.NDF(), marks=pytest.mark.slow), pytest.param(LINEARISED, marks=pytest.mark.slow), None],
    ids=["NDF", "linearised", "default"],
)
def test_forward_mode_matches_differences(solver):
    """With respect to the scale of the start and to a leaf of the data."""

    @jax.jit
    def final(x):
        return end_of_modes(x[0], x[1] * STRENGTHS, solver, jnp.asarray(1e-9))[0]

    @jax.jit
    def exact(x):
        return end_of_modes(x[0], x[1] * STRENGTHS, gf.solvers.Dopri8(), jnp.asarray(1e-12))[0]

    x, h = jnp.array([0.2, 1.1]), 1e-4
    derivative = np.asarray(jax.jit(jax.jacfwd(final))(x))
    for i in range(2):
        step = h * jnp.eye(2)[i]
        numeric = (8 * (exact(x + step) - exact(x - step)) - exact(x + 2 * step) + exact(x - 2 * step)) / (12 * h)
        size = np.abs(numeric).max()
        np.testing.assert_allclose(derivative[:, i], numeric, rtol=0, atol=1e-6 * size)


def escape(w):
    return 0.5 * w["in"] ** 2 - 0.5 * w["out"] ** 2 + 0.25 * w["out"] ** 4


@pytest.mark.parametrize("solver", [gf.solvers.NDF(), None], ids=["NDF", "default"])
def test_escape_from_a_saddle(solver):
    """From 1e-8 beside it, in closed form: `out^2 = 1 / (1 + (1 / w^2 - 1) exp(-2 t))`"""
    ts = np.array([1.0, 10.0, 17.0, 18.5, 20.0, 40.0])
    start = {"in": jnp.array(1.0), "out": jnp.array(1e-8)}
    for rtol in (1e-4, 1e-7):
        sol = gf.solve(gf.GradientFlow(escape), start, ts, solver=solver, rtol=rtol)
        assert sol.status == "ok"
        np.testing.assert_allclose(sol.params["in"], np.exp(-ts), rtol=0, atol=10 * rtol)
        wanted = 1 / np.sqrt(1 + (1e16 - 1) * np.exp(-2 * ts))
        np.testing.assert_allclose(sol.params["out"], wanted, rtol=0, atol=10 * rtol)
        assert int(sol.stats["steps"]) < 600


@pytest.mark.parametrize("solver", [gf.solvers.NDF(), None], ids=["NDF", "default"])
def test_field_that_stops_being_finite(solver):
    """Not a number below zero, which the flow reaches at t = 1; what was reached before is kept."""
    flow = gf.GradientFlow(lambda w: jnp.sum(w + 0 * jnp.sqrt(w)))
    sol = gf.solve(flow, jnp.ones(1), [0.5, 3.0], solver=solver, throw=False)
    assert sol.status == "nonfinite"
    assert float(sol.params[0, 0]) == pytest.approx(0.5, rel=1e-5)
    assert np.isnan(float(sol.params[1, 0]))
    assert float(sol.t_final) == pytest.approx(1.0, abs=1e-3)
    assert int(sol.stats["steps"]) < 200


def test_tolerance_that_cannot_be_met_ends_the_run():
    """A jump of the field that no step can cross, and a solution that blows up."""
    jump = gf.GradientFlow(lambda w: jnp.sum(jnp.where(w > 0.5, w, jnp.nan * w)))
    sol = gf.solve(jump, jnp.ones(1), [3.0], solver=gf.solvers.NDF(), throw=False)
    assert sol.status == "nonfinite"
    blow = gf.GradientFlow(lambda w: -jnp.sum(w**3) / 3)
    sol = gf.solve(blow, jnp.ones(1), [0.5, 2.0], solver=gf.solvers.NDF(), throw=False)
    assert sol.status == "step_underflow"
    assert float(sol.t_final) == pytest.approx(1.0, abs=1e-4)
    assert float(sol.params[0, 0]) == pytest.approx(2.0, rel=1e-4)
    assert int(sol.stats["steps"]) < 10_000


@pytest.mark.parametrize(("solver", "dtype"), [(None, jnp.float32), (gf.solvers.NDF(), jnp.float32)])
def test_starts_of_all_sizes(solver, dtype):
    """Zero gradient, one parameter, a small state; the answer keeps the type."""
    flow = gf.GradientFlow(Bowl(jnp.asarray([300.0], dtype)))
    for size in (0.0, 1e-30, 1.0):
        sol = gf.solve(flow, jnp.asarray([size], dtype), [0.01, 2.0], solver=solver, rtol=1e-4)
        assert sol.status == "ok"
        assert sol.final.dtype == dtype
        if size == 0:
            assert np.all(np.asarray(sol.params) == 0)
            assert int(sol.stats["gradient_evaluations"]) < 100
        assert float(sol.params[0, 0]) == pytest.approx(size * np.exp(-3), rel=1e-3, abs=0)
        assert abs(float(sol.final[0])) <= 1e-3 * size


def weights_of(model):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree_util.tree_leaves(eqx.filter(model, eqx.is_array))])


@pytest.mark.slow
def test_float32_on_a_network(small_mlp):
    """As accurate as the library promises, at no more than three times the gradients of float64."""
    problem, model = small_mlp
    rtol, ends, evaluations = 1e-4, [], []
    for dtype, tolerance in ((jnp.float64, 1e-8), (jnp.float64, rtol), (jnp.float32, rtol)):
        cast = jax.tree_util.tree_map(
            lambda x, d=dtype: x.astype(d) if eqx.is_inexact_array(x) else x, (problem, model)
        )
        solver = gf.solvers.NDF()
        sol = gf.solve(gf.GradientFlow(cast[0]), cast[1], [30.0], solver=solver, rtol=tolerance, save_params=False)
        assert sol.status == "ok"
        ends.append(weights_of(sol.final).astype(float))
        evaluations.append(int(sol.stats["gradient_evaluations"]))
    distance = np.linalg.norm(ends[0] - weights_of(model))
    for end in ends[1:]:
        assert np.linalg.norm(end - ends[0]) <= 10 * rtol * distance
    assert evaluations[2] <= 3 * evaluations[1]
    assert evaluations[1] < evaluations[0]


@pytest.mark.slow
def test_fixed_order_is_kept():
    """Each order reaches the solution with more steps the lower it is; `max_order` does not go past its own."""
    flow, steps = gf.GradientFlow(Bowl(jnp.array([1.0, 30.0]))), []
    for solver in (gf.solvers.NDF(1), gf.solvers.NDF(2), gf.solvers.NDF(4), gf.solvers.NDF(max_order=2)):
        sol = gf.solve(flow, jnp.ones(2), [2.0], solver=solver, rtol=1e-3)
        assert float(sol.final[0]) == pytest.approx(np.exp(-2), abs=1e-2)
        steps.append(int(sol.stats["steps"]))
    assert steps[0] > 2 * steps[1] > 2 * steps[2]
    assert steps[3] < 1.3 * steps[1]


def watch(flow, start, ts, solver, rtol=1e-5, max_attempts=3000):
    """Runs step by step: time, whether implicit, and the method's state after each."""
    setup = AdaptiveRun(
        flow, None, start, jnp.asarray(ts), {}, solver, gf.solvers.StepControl(jnp.asarray(rtol), None), None,
        jnp.asarray(max_attempts), False,
    )  # fmt: skip
    carry, seen = begin(setup), []
    while int(carry.code) == Status.RUNNING:
        carry = advance(setup, carry, jnp.asarray(1))
        seen.append((float(carry.t), bool(carry.method_state.implicit), carry))
    return seen


def test_default_is_explicit_on_a_short_run():
    """Its gradients are those of `Tsit5` at a tolerance between the given one and the tightest that it starts with."""
    flow = gf.GradientFlow(Bowl(jnp.array([1.0, 3.0])))
    run = lambda solver, rtol: gf.solve(flow, jnp.ones(2), [1.0], solver=solver, rtol=rtol)  # noqa: E731
    sol = run(None, 1e-5)
    evaluations = int(sol.stats["gradient_evaluations"])
    assert evaluations == 2 + 6 * int(sol.stats["steps"])
    loose, tight = (int(run(gf.solvers.Tsit5(), rtol).stats["gradient_evaluations"]) for rtol in (1e-5, 0.03e-5))
    assert loose <= evaluations <= tight + 6


def test_default_switches_on_a_long_stiff_run_and_is_continuous_there():
    flow, start, end = gf.GradientFlow(Bowl(jnp.array([1.0, 1e3]))), jnp.ones(2), 5.0
    seen = watch(flow, start, [end], gf.solvers.Automatic())
    modes = [implicit for _, implicit, _ in seen]
    switch = modes.index(True)
    assert 3 <= switch + 1 < 40
    assert all(modes[switch:])
    at = seen[switch][0]
    ts = np.r_[at * (1 + np.array([-1e-3, -1e-12, 0, 1e-12, 1e-3])), end]
    sol = gf.solve(flow, start, ts)
    wanted = np.exp(-np.outer(ts, [1.0, 1e3]))
    np.testing.assert_allclose(sol.params, wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(sol.params[1:4], sol.params[jnp.array([2, 2, 2])], rtol=0, atol=1e-9)
    explicit = gf.solve(flow, start, ts, solver=gf.solvers.Tsit5())
    assert 5 * int(sol.stats["gradient_evaluations"]) < int(explicit.stats["gradient_evaluations"])


def test_default_stays_explicit_where_steps_are_short_for_the_sake_of_accuracy():
    """A jump from one saddle to another, hundreds of gradients, but only some twenty units of `1 / stiffness`."""
    flow = gf.GradientFlow(lambda w: jnp.sum(w**3 / 3 - w**2 / 2))
    start, ts = jnp.array([1e-2, 1e-4]), [20.0]
    seen = watch(flow, start, ts, gf.solvers.Automatic(), rtol=1e-6)
    assert not any(implicit for _, implicit, _ in seen)
    lengths = np.diff([t for t, _, _ in seen])
    assert 5 * 20 / lengths[3] > 35 * 1e-6 ** (-1 / 6)  # so short that the run looked long
    run = lambda solver: gf.solve(flow, start, ts, solver=solver, rtol=1e-6)  # noqa: E731
    sol, other = run(None), run(gf.solvers.NDF())
    odds = start / (1 - start) * np.exp(20.0)
    wanted = odds / (1 + odds)
    error, errors = (float(jnp.max(jnp.abs(s.final - wanted))) for s in (sol, other))
    assert error <= min(1e-6, errors / 3)
    assert int(sol.stats["gradient_evaluations"]) < 1.2 * int(other.stats["gradient_evaluations"])


class Kinks(eqx.Module):
    """The field jumps at each of many places along the way."""

    places: jax.Array

    def __call__(self, w):
        return 50.0 * jnp.mean(jnp.abs(w[0] - self.places)) + 0.5 * jnp.sum(jnp.array([0.01, 300.0]) * w**2)


def test_default_returns_to_the_explicit_method_where_the_field_jumps():
    flow = gf.GradientFlow(Kinks(jnp.linspace(-0.2, 1.8, 200)))
    seen = watch(flow, jnp.array([2.0, 1.0]), [0.2], gf.solvers.Automatic(), rtol=1e-4)
    modes = np.array([implicit for _, implicit, _ in seen])
    turns = np.flatnonzero(modes[1:] != modes[:-1]) + 1
    assert modes[turns[0]]
    assert len(turns) >= 2
    assert not modes[turns[1]]
    carry = seen[-1][2]
    assert int(carry.code) == 0
    assert float(carry.method_state.budget) >= 8


@pytest.mark.parametrize("max_order", [3, 5])
def test_history_at_the_switch_is_that_of_the_explicit_step(max_order):
    """Four differences at an eighth of the step, of a quartic that Tsit5 and its dense output nearly reproduce."""
    method = gf.solvers.Automatic(implicit=gf.solvers.NDF(max_order=max_order))
    flow = Plain(lambda t, y: 4 * t[None] ** 3 - 0.01 * (y - t**4))  # were it not stiff at all, nothing would switch
    field, y, h = at(flow, 1.0), jnp.ones(1), jnp.asarray(0.4)
    control, rate = gf.solvers.StepControl(jnp.asarray(1e-2), None), jnp.full(1, 4.0)
    mode = method.begin(field, y, rate, h)
    field = eqx.tree_at(lambda f: f.progress, field, jnp.asarray(1e-4))  # nearly all of the run lies ahead
    mode = eqx.tree_at(lambda m: m.steps, mode, jnp.asarray(10))
    attempt = eqx.filter_jit(lambda mode: method.attempt(field, y, h, control, y, mode))
    tried = attempt(mode)
    history = tried.accepted.history
    assert bool(tried.accepted.implicit)
    assert float(tried.ratio) <= 1
    assert float(tried.factor * h) == pytest.approx(0.05)
    assert float(history.spacing) == pytest.approx(0.05)
    assert int(history.order) == min(4, max_order)
    wanted = table_of((1.4 - 0.05 * np.arange(5))[:, None] ** 4)
    np.testing.assert_allclose(history.table[:5], wanted, rtol=1e-3, atol=1e-4)
    assert not np.any(history.table[5:])


def test_rejected_steps_leave_the_history_alone():
    """A step far too long is refused; its table, spacing and order are those of before."""
    method, flow = gf.solvers.NDF(), Plain(lambda t, y: -(y**3))
    history = history_of(method, list(1 / np.sqrt(1 - 0.02 * np.arange(ROWS))[:, None]), 0.01, 3)
    control, y, yes = gf.solvers.StepControl(jnp.asarray(1e-6), None), jnp.ones(1), jnp.asarray(True)
    step = jax.jit(lambda h: method.step(at(flow, 0.0), y, h, control, y, history, yes))
    good, bad = step(jnp.asarray(0.01)), step(jnp.asarray(1.0))
    assert float(good.ratio) <= 1 < float(bad.ratio)
    assert 0.05 < float(bad.factor) < 0.9
    for tried in (good, bad):
        for name in ("table", "quadratures", "spacing", "order", "age"):
            assert np.array_equal(getattr(tried.rejected, name), getattr(history, name))
    assert int(good.accepted.age) == int(history.age) + 1
    assert not np.array_equal(good.accepted.table, history.table)


def test_flow_that_oscillates_is_integrated_explicitly():
    class Turning(Lopsided):
        oscillatory: ClassVar[bool] = True

    flow = Turning(lambda t, y: jnp.stack([y[1], -y[0]]))
    sol = gf.solve(flow, jnp.array([1.0, 0.0]), [1.0])
    assert not sol.method.startswith(("Automatic", "NDF"))
    np.testing.assert_allclose(sol.final, [np.cos(1), -np.sin(1)], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0}, "`order` must be an order from 1 to 5, but is 0"),
        ({"order": 6}, "`order` must be an order from 1 to 5, but is 6"),
        ({"max_order": 0}, "`max_order` must be an order from 1 to 5, but is 0"),
        ({"max_products": 0}, "`max_products` must be an integer of at least 1, but is 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gf.solvers.NDF(**options)


def test_other_methods_are_no_halves_of_automatic():
    for explicit in (gf.solvers.Heun(), gf.solvers.Kvaerno3(), 5):  # the last stage of Heun's is not the next first
        with pytest.raises(ValueError, match="`explicit` must be an explicit diffrax solver whose last stage"):
            gf.solvers.Automatic(explicit)
    with pytest.raises(ValueError, match=r"`implicit` must be a gradflow\.solvers\.NDF, but is of type Kvaerno3"):
        gf.solvers.Automatic(implicit=gf.solvers.Kvaerno3())


RELU = gf.models.TwoLayer(2, 3, key=jax.random.key(0))
ONES = gf.EmpiricalRisk(jnp.eye(2), jnp.ones(2), gf.losses.square)


@pytest.mark.parametrize(
    ("model", "kinked"),
    [
        (RELU, True),
        (gf.models.MLP(2, 3, activation=lambda z: jax.nn.leaky_relu(z, 0.2), key=jax.random.key(0)), True),
        (gf.models.TwoLayer(2, 3, activation=lambda z: z, key=jax.random.key(0)), False),
        (gf.models.MLP(2, 3, key=jax.random.key(0)), False),
        ({"activation": jnp.ones(2)}, False),
    ],
    ids=["ReLU", "leaky", "linear", "tanh", "other"],
)
def test_networks_with_kinks_are_known(model, kinked):
    assert gf.GradientFlow(ONES).kinked(*split(model)) == kinked


def test_kinks_get_a_stabilised_method_unless_smoothed_or_integrated_to_many_digits():
    flow = gf.GradientFlow(ONES)
    assert gf.solve(flow, RELU, [0.1]).method == "Hybrid"
    assert isinstance(gf.solvers.default_solver(1e-8, flow, kinked=True), gf.solvers.Automatic)
    smoothed = gf.GradientFlow(gf.EmpiricalRisk(ONES.x, ONES.y, ONES.loss, predict=gf.models.Smoothed(0.1)))
    assert not smoothed.kinked(*split(RELU))
