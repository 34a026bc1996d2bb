"""Expectations of activations over Gaussian fields, against quadratures and simulations that share no code."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special

import gradflow as gf
from gradflow.problems import _field_sums as sums
from gradflow.problems import activations
from gradflow.problems.activations import _base, _orthant

SMOOTH = {
    "erf": (lambda x: scipy.special.erf(x / np.sqrt(2)), lambda x: np.sqrt(2 / np.pi) * np.exp(-(x**2) / 2)),
    "square": (lambda x: x**2, lambda x: 2 * x),
}
KINDS = ["regular", "coincident", "rank two"]


def covariance(kind, seed, size=4):
    rng = np.random.default_rng(seed)
    if kind == "rank two":
        factor = rng.normal(size=(size, 2)) / 2
        return factor @ factor.T
    factor = rng.normal(size=(size, size)) / np.sqrt(2 * size)
    computed = factor @ factor.T
    pairs = [0, 1, 0, 1]
    return computed[np.ix_(pairs, pairs)] if kind == "coincident" else computed


def entries(C):
    return [[jnp.asarray(value) for value in row] for row in np.asarray(C)]


def gauss_hermite(C, nodes):
    """Points and weights of a tensor rule for fields of covariance `C`, singular or not."""
    values, vectors = np.linalg.eigh(C)
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    # Directions without variance need one point only.
    rules = [(z, w / np.sqrt(2 * np.pi)) if value > 1e-14 else (np.zeros(1), np.ones(1)) for value in values]
    grid = np.stack(np.meshgrid(*(rule[0] for rule in rules), indexing="ij"), axis=-1).reshape(-1, len(C))
    weights = np.prod(np.stack(np.meshgrid(*(rule[1] for rule in rules), indexing="ij"), axis=-1), axis=-1).ravel()
    return (grid * np.sqrt(np.maximum(values, 0))) @ vectors.T, weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_activations_against_gauss_hermite(name, kind):
    s, slope = SMOOTH[name]
    activation = activations.named(name)
    C = covariance(kind, 0)
    x, w = gauss_hermite(C, 36 if kind == "regular" else 60)
    a, b, c, d = x.T
    close = {"rtol": 0, "atol": 1e-10}
    np.testing.assert_allclose(activation.i2(entries(C)), w @ (s(a) * s(b)), **close)
    np.testing.assert_allclose(activation.j2(entries(C)), w @ (slope(a) * slope(b)), **close)
    np.testing.assert_allclose(activation.i3(entries(C)), w @ (slope(a) * b * s(c)), **close)
    np.testing.assert_allclose(activation.i4(entries(C)), w @ (slope(a) * slope(b) * s(c) * s(d)), **close)
    np.testing.assert_allclose(activation(jnp.asarray(a[:9])), s(a[:9]), rtol=1e-13)
    np.testing.assert_allclose(activation.derivative(jnp.asarray(a[:9])), slope(a[:9]), rtol=1e-13)


def over_the_circle(f, C, moment):
    """`E f(x)` for homogeneous `f`: an integral over the angle, exact between the kinks.

    `C` is the covariance of two fields, or a factor of two columns of that of more.
    """
    factor = np.linalg.cholesky(C) if len(C) == 2 else C
    kinks = [np.arctan2(-row[0], row[1]) for row in factor]
    edges = np.sort(np.concatenate([kinks, np.array(kinks) + np.pi]) % (2 * np.pi))
    z, w = np.polynomial.legendre.leggauss(40)
    total = 0.0
    for low, high in zip(edges, np.append(edges[1:], edges[0] + 2 * np.pi), strict=True):
        angle = low + (high - low) * (z + 1) / 2
        total += (high - low) / 2 * w @ f(*(factor @ np.stack([np.cos(angle), np.sin(angle)])))
    return moment * total / (2 * np.pi)


def test_relu_of_two_and_three_fields_against_an_angular_integral():
    relu, ramp = activations.ReLU(), lambda x: np.maximum(x, 0)
    C = covariance("regular", 1)
    two = C[:2, :2]
    # The mean square of the radius is two.
    np.testing.assert_allclose(
        relu.i2(entries(two)), over_the_circle(lambda x, y: ramp(x) * ramp(y), two, 2), rtol=1e-12
    )
    np.testing.assert_allclose(
        relu.j2(entries(two)), over_the_circle(lambda x, y: (x > 0) * (y > 0), two, 1), rtol=1e-12
    )
    # The middle field given the outer two is linear in them.
    outer = C[np.ix_([0, 2], [0, 2])]
    along = np.linalg.solve(outer, C[[0, 2], 1])
    expected = over_the_circle(lambda x, z: (x > 0) * (along[0] * x + along[1] * z) * ramp(z), outer, 2)
    np.testing.assert_allclose(relu.i3(entries(C[:3, :3])), expected, rtol=1e-11)


def test_relu_of_four_fields_against_simulation():
    """Within four standard errors of 10^6 samples."""
    relu, rng = activations.ReLU(), np.random.default_rng(0)
    for name, seed in [("regular", 0), ("regular", 1), ("coincident", 2)]:
        C = covariance(name, seed)
        x = rng.multivariate_normal(np.zeros(4), C, size=1_000_000, method="eigh")
        values = (x[:, 0] > 0) * (x[:, 1] > 0) * np.maximum(x[:, 2], 0) * np.maximum(x[:, 3], 0)
        error = np.std(values) / 1000
        assert abs(float(relu.i4(entries(C))) - np.mean(values)) <= 4 * error, name


def test_relu_of_four_dependent_fields_against_an_angular_integral():
    """Fields of rank two, to 1e-6; a start in the space of two teachers has no others."""
    relu = activations.ReLU()
    factors = np.random.default_rng(2).normal(size=(40, 4, 2)) / 2
    covariances = np.einsum("sia,sja->ijs", factors, factors)
    computed = relu.i4([[jnp.asarray(value) for value in row] for row in covariances])
    ramp = lambda x: np.maximum(x, 0)  # noqa: E731
    expected = [over_the_circle(lambda a, b, c, d: (a > 0) * (b > 0) * ramp(c) * ramp(d), f, 2) for f in factors]
    np.testing.assert_allclose(computed, expected, rtol=0, atol=1e-6)


def test_relu_of_four_fields_in_closed_form():
    """Symmetric under both exchanges; fields that coincide leave two; Sheppard's and the equicorrelated orthants."""
    relu = activations.ReLU()
    orders = [[0, 1, 2, 3], [1, 0, 2, 3], [0, 1, 3, 2], [0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 1], [0] * 4]
    given = [covariance("regular", seed) for seed in range(5)]
    stacked = np.stack([[C[np.ix_(order, order)] for order in orders] for C in given], axis=-1)
    computed = np.asarray(relu.i4([[jnp.asarray(stacked[:, i, j]) for j in range(4)] for i in range(4)]))
    np.testing.assert_allclose(computed[1:3], [computed[0]] * 2, rtol=0, atol=1e-10)
    left = [relu.i2(entries(C[:2, :2])) for C in given]
    np.testing.assert_allclose(computed[3:7], [left] * 4, rtol=0, atol=1e-7)
    np.testing.assert_allclose(computed[7], [C[0, 0] / 2 for C in given], rtol=0, atol=1e-7)
    half = np.full((4, 4), 0.5) + 0.5 * np.eye(4)
    assert float(_orthant.orthant4(entries(half))) == pytest.approx(1 / 5, abs=1e-14)
    assert float(_orthant.orthant4(entries(np.eye(4)))) == pytest.approx(1 / 16, abs=1e-16)


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", [1e-3, 1e-5, 1e-9])
def test_tables_are_as_good_as_the_nodes(accuracy):
    """Over four fields, where one is taken from a table."""
    reference = activations.named("erf")
    general = activations.Quadrature(lambda x: jax.scipy.special.erf(x / jnp.sqrt(2.0)), accuracy=accuracy)
    C, alike = entries(4 * covariance("regular", 3)), entries(np.full((4, 4), 4.0))
    assert abs(float(general.i4(C) - reference.i4(C))) < accuracy * float(reference.i4(alike))


STEEP = 2.0


@pytest.mark.parametrize("kind", [*KINDS, "nearly rank two"])
@pytest.mark.parametrize("variance", [0.01, 1.0, 9.0])
def test_quadrature_keeps_its_accuracy_at_every_variance(variance, kind):
    """Of erf, in closed form: saturating fields of variance 9 are as good as linear ones of 0.01."""
    reference = activations.named("erf")
    general = activations.Quadrature(lambda x: jax.scipy.special.erf(STEEP * x / jnp.sqrt(2.0)), variance=9 / STEEP**2)
    C = covariance(kind.removeprefix("nearly "), 3) + (1e-4 * np.eye(4) if kind.startswith("nearly") else 0)
    sizes = np.sqrt(np.diag(C))
    C = variance * C / np.outer(sizes, sizes)
    alike = np.full((4, 4), variance)
    for part in ("i2", "j2", "k2", "i4"):
        factor = 1 if part == "i2" else STEEP**2
        computed, exact = getattr(general, part)(entries(C / STEEP**2)), factor * getattr(reference, part)(entries(C))
        size = factor * abs(float(getattr(reference, part)(entries(alike))))
        assert abs(float(computed - exact)) < 1e-5 * size, part
        assert computed.shape == ()


SMOOTHER = {
    "tanh": (np.tanh, jnp.tanh),
    "sigmoid": (scipy.special.expit, jax.nn.sigmoid),
    "softplus": (lambda x: np.logaddexp(0, x), jax.nn.softplus),
    "GELU": (lambda x: x * scipy.special.ndtr(x), lambda x: jax.nn.gelu(x, approximate=False)),
    "cubic": (lambda x: x + 0.2 * x**3, lambda x: x + 0.2 * x**3),
}


@pytest.mark.parametrize("name", SMOOTHER)
def test_quadrature_of_common_activations(name):
    """Expectations over two fields as adaptive quadrature has them, at correlations 0.6 and 1."""
    theirs, ours = SMOOTHER[name]
    general = activations.named(ours)

    def slope(x, h=1e-5):
        return (theirs(x + h) - theirs(x - h)) / (2 * h)

    def expect(f, variance):
        weighed = lambda z: f(np.sqrt(variance) * z) * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)  # noqa: E731
        return scipy.integrate.quad(weighed, -12, 12, points=[0], limit=400, epsabs=1e-12)[0]

    z, w = np.polynomial.hermite_e.hermegauss(120)
    for variance in (0.25, 4.0):
        alike = entries(np.full((4, 4), variance))
        for part, f in {
            "i2": lambda x: theirs(x) ** 2,
            "j2": lambda x: slope(x) ** 2,
            "i4": lambda x: (slope(x) * theirs(x)) ** 2,
        }.items():
            assert float(getattr(general, part)(alike)) == pytest.approx(expect(f, variance), rel=2e-5), part
        # By parts: E s'' s = E x s' s / variance - E s' s'.
        curved = expect(lambda x: x * slope(x) * theirs(x), variance) / variance
        curved -= expect(lambda x: slope(x) ** 2, variance)
        assert float(general.k2(alike)) == pytest.approx(curved, abs=2e-5 * expect(lambda x: slope(x) ** 2, variance))
        C = variance * np.array([[1, 0.6], [0.6, 1]])

        def inner(x, C=C, variance=variance):
            points = 0.6 * np.asarray(x)[..., None] + np.sqrt(variance * (1 - 0.36)) * z
            return theirs(points) @ w / np.sqrt(2 * np.pi)

        crossed = expect(lambda x, inner=inner: theirs(x) * inner(x), variance)
        assert float(general.i2(entries(C))) == pytest.approx(crossed, rel=5e-5)


@pytest.mark.parametrize("name", [pytest.param("tanh", marks=pytest.mark.slow), "softplus"])
def test_the_estimate_of_the_quadrature_error_holds(name):
    """At least a third of the true error, in and out of the range of variances that the nodes were chosen for."""
    ours = SMOOTHER[name][1]
    narrow = activations.Quadrature(ours, accuracy=1e-4, variance=1.0)
    wide = activations.Quadrature(ours, accuracy=1e-6, variance=36.0)
    assert narrow.rule.nodes < wide.rule.nodes / 2
    for variance in (0.1, 1.0, 4.0, 36.0):
        alike = entries(np.full((4, 4), variance))
        parts = [(getattr(narrow, part)(alike), getattr(wide, part)(alike)) for part in ("i2", "j2", "i4")]
        true = max(abs(float(a / b) - 1) for a, b in parts)
        reported = float(narrow.error(jnp.asarray([variance])))
        assert reported > true / 3 or true < 1e-6
        assert reported < 1e-4 or variance > 1
    assert reported > 1e-4
    assert "off by" in narrow.complaint(reported)
    assert narrow.complaint(1e-5) == ""


@pytest.mark.slow
def test_kinks_count_and_are_told_of():
    """`k2` of a kink is what integration by parts makes of it; the accuracy reached is named."""
    with pytest.warns(UserWarning, match="good to .* at variance 9, with 256 nodes per field, and not to 1e-05"):
        general = activations.Quadrature(jax.nn.relu)
    reference = activations.named("relu")
    C = entries(covariance("regular", 0))
    for part in ("i2", "j2", "k2", "i3", "i4"):
        assert abs(float(getattr(general, part)(C) - getattr(reference, part)(C))) < general.promised, part
    assert 1e-5 < general.promised < 0.05
    assert general.nonsmooth
    assert not activations.Quadrature(jnp.tanh).nonsmooth


def test_activations_with_parameters_and_under_a_trace():
    """A module with arrays, a function of a traced number, its derivative, and a global that changes."""

    class Scaled(eqx.Module):
        scale: jax.Array

        def __call__(self, x):
            return jnp.tanh(self.scale * x)

    C = entries([[1.0, 0.5], [0.5, 2.0]])
    doubled = activations.Quadrature(lambda x: jnp.tanh(2 * x)).i2(C)

    def traced(scale):
        return activations.Quadrature(lambda x: jnp.tanh(scale * x)).i2(C)

    np.testing.assert_allclose(activations.Quadrature(Scaled(jnp.asarray(2.0))).i2(C), doubled, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(traced)(2.0), doubled, rtol=1e-6)
    ahead, behind = (float(activations.Quadrature(Scaled(jnp.asarray(s))).i2(C)) for s in (2.001, 1.999))
    assert float(jax.grad(traced)(2.0)) == pytest.approx((ahead - behind) / 0.002, rel=1e-4)
    reference = {"steepness": 1.0}

    def fn(x):
        return jnp.tanh(reference["steepness"] * x)

    few = activations.Quadrature(fn).rule.nodes
    reference["steepness"] = 2.0
    assert activations.Quadrature(fn).rule.nodes > 1.5 * few


def test_what_is_no_activation_is_refused():
    with pytest.raises(ValueError, match="`fn` must be elementwise, but is not"):
        activations.Quadrature(jnp.sum)
    with pytest.raises(ValueError, match="`fn` must be finite, with its moments"):
        activations.Quadrature(lambda x: jnp.exp(x**2))
    with pytest.raises(ValueError, match="`fn` must be continuous"):
        activations.Quadrature(jnp.sign)
    with pytest.raises(ValueError, match="`accuracy` must be positive"):
        activations.Quadrature(jnp.tanh, accuracy=0.0)
    with pytest.raises(ValueError, match="`variance` must be positive"):
        activations.Quadrature(jnp.tanh, variance=-1.0)


def CUBIC(x):  # noqa: N802
    return x + 0.2 * x**3


LONGER = [pytest.param(name, marks=pytest.mark.slow) for name in ("relu", "cubic")]


def test_kinks_that_one_field_does_not_show():
    """`|x|` has smooth moments, but those of two fields have kinks: `E sign x sign y = (2 / pi) asin rho`."""
    with pytest.warns(UserWarning, match="kinks"):
        general = activations.Quadrature(jnp.abs)
    C = entries([[1.0, 0.5], [0.5, 1.0]])
    assert abs(float(general.j2(C)) - 1 / 3) < general.promised
    assert abs(float(general.k2(C)) - 2 * np.sqrt(0.75) / np.pi) < 2 * general.promised


@pytest.mark.parametrize("name", ["erf", "square", *LONGER])
def test_sums_over_units_against_loops(name):
    """Every sum against a plain loop over single expectations, and derivatives that are finite at singular fields."""
    activation = activations.Quadrature(CUBIC, accuracy=1e-10) if name == "cubic" else activations.named(name)
    p, k = 2, 2
    factor = np.random.default_rng(4).normal(size=(p, k))
    C = np.block([[factor @ factor.T, factor], [factor.T, np.eye(k)]]) / 2  # an informed start: rank two
    c = np.array([-0.5, -0.7, 1.0, 0.5])
    n = p + k

    def pick(*index):
        return entries(C[np.ix_(index, index)])

    i2 = [[activation.i2(pick(a, b)) for b in range(n)] for a in range(n)]
    learn = [[sum(c[a] * activation.i3(pick(j, b, a)) for a in range(n)) for b in range(n)] for j in range(p)]
    every = [(j, m, a, b) for j in range(p) for m in range(j, p) for a in range(n) for b in range(n)]
    # One call for all of them: the entries stacked along their last axis.
    stacked = [[jnp.asarray([C[index[u], index[v]] for index in every]) for v in range(4)] for u in range(4)]
    weights = np.array([c[a] * c[b] for *_, a, b in every])
    squares = (np.asarray(activation.i4(stacked)) * weights).reshape(-1, n * n).sum(axis=1)

    def computed(scale):
        fields, weights = scale * jnp.asarray(C), jnp.asarray(c)
        return (
            sums.population_risk(activation, fields, weights),
            sums.correlation_with_residual(activation, fields, weights, p),
            sums.learning_terms(activation, fields, weights, p),
            sums.square_terms(activation, fields, weights, p),
            sums.slope_products(activation, fields, p),
        )

    values, slopes = jax.jit(lambda s: jax.jvp(computed, (s,), (s,)))(jnp.ones(()))
    expected = (
        c @ np.array(i2) @ c / 2,
        np.array(i2)[:p] @ c,
        np.array(learn),
        squares,
        [activation.j2(pick(j, m)) for j in range(p) for m in range(j, p)],
    )
    for ours, theirs in zip(values, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 if name == "relu" else 1e-9)
    assert all(np.all(np.isfinite(leaf)) for leaf in slopes)
    jacobian = jax.jit(jax.jacfwd(lambda fields: sums.square_terms(activation, fields, jnp.asarray(c), p)))
    assert np.all(np.isfinite(jacobian(jnp.asarray(C))))


@pytest.mark.slow
def test_blocks_of_pairs_are_one_sum(monkeypatch):
    """Sums in blocks of three pairs, the last of which is incomplete; and the closed form of `x^2`."""
    factor = np.random.default_rng(0).normal(size=(6, 9)) / 3
    C, c = jnp.asarray(factor @ factor.T), jnp.asarray([-0.3, -0.2, -0.4, -0.1, 0.5, 0.7])
    general = lambda a: activations.AbstractActivation.squares(a, C, c, *sums.triangle(4))  # noqa: E731
    for activation in (activations.Erf(), activations.Square()):
        whole = general(activation)
        with monkeypatch.context() as patch:
            patch.setattr(_base, "BLOCK", 3 * 21 * activation.scratch)
            np.testing.assert_allclose(general(activation), whole, rtol=1e-13)
        np.testing.assert_allclose(sums.square_terms(activation, C, c, 4), whole, rtol=1e-12)


@pytest.mark.slow
def test_units_of_length_zero_and_single_precision():
    for name in ("erf", "square", "relu"):
        activation = activations.named(name)
        zero = np.zeros((4, 4))
        zero[1:, 1:] = covariance("regular", 0, size=3)
        computed = jax.jvp(
            lambda s, a=activation, z=zero: a.i4(s * jnp.asarray(z)[:, :, None]), (jnp.ones(()),), (jnp.ones(()),)
        )
        assert np.all(np.isfinite(computed)), name
        C = covariance("regular", 0)
        single = activation.i4([[value.astype(jnp.float32) for value in row] for row in entries(C)])
        assert single.dtype == jnp.float32
        np.testing.assert_allclose(single, activation.i4(entries(C)), rtol=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_names_of_activations():
    assert isinstance(activations.named("erf"), activations.Erf)
    relu = activations.ReLU()
    assert activations.named(relu) is relu
    with pytest.raises(ValueError, match="`activation` must be one of 'erf', 'relu', 'square', but is 'sine'"):
        activations.named("sine")
    with pytest.raises(ValueError, match="`fn` must be callable"):
        gf.problems.activations.Quadrature(3)
