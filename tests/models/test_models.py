"""Architectures against NumPy formulas; sizes of their weights and outputs against the stated exponents; bad input."""

import itertools
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradflow as gf

# Written out by hand: (multiplier, standard deviation) of the input, hidden and output layer, width m, input size d.
TABLE = {
    "standard": lambda m, d: [(1, d**-0.5), (1, m**-0.5), (1, m**-0.5)],
    "ntk": lambda m, d: [(d**-0.5, 1), (m**-0.5, 1), (m**-0.5, 1)],
    "mean_field": lambda m, d: [(1, d**-0.5), (1 / m, 1), (1 / m, 1)],
    "mup": lambda m, d: [(m**0.5, (m * d) ** -0.5), (1, m**-0.5), (m**-0.5, m**-0.5)],
}
BUILD = {
    "TwoLayer": lambda **kw: gf.models.TwoLayer(3, 5, key=jax.random.key(0), **kw),
    "MLP": lambda **kw: gf.models.MLP(3, 5, key=jax.random.key(0), **kw),
    "DeepLinear": lambda **kw: gf.models.DeepLinear(3, 5, key=jax.random.key(0), **kw),
    "DiagonalLinear": lambda **kw: gf.models.DiagonalLinear(3, **kw),
}
X = np.array([0.3, -1.2, 0.7])


def relu(z):
    return np.maximum(z, 0)


def identity(z):
    return z


def rough(a, b):
    return np.testing.assert_allclose(np.asarray(a), b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("out_size", [None, 1, 4])
def test_two_layer_equals_the_formula(name, out_size, key):
    model = gf.models.TwoLayer(3, 5, out_size, activation=jax.nn.relu, parametrisation=name, key=key)
    (first, _), _, (last, _) = TABLE[name](5, 3)
    w, a = np.asarray(model.weight), np.asarray(model.output)
    assert w.shape == (5, 3)
    assert a.shape == ((5,) if out_size is None else (out_size, 5))
    hidden = np.array([first * sum(w[j, i] * X[i] for i in range(3)) for j in range(5)])
    rough(model.preactivations(jnp.asarray(X)), hidden)
    rough(model(jnp.asarray(X)), last * (a @ relu(hidden)))
    rough(model.neuron_weights(), np.concatenate([w, np.atleast_2d(a).T], axis=1))
    rough(model.imbalance(), (np.atleast_2d(a) ** 2).sum(0) - (w**2).sum(1))
    np.testing.assert_array_equal(model.neurons(), w)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("use_bias", [True, False])
def test_mlp_equals_the_formula(name, depth, use_bias, key):
    model = gf.models.MLP(3, 5, 2, depth=depth, parametrisation=name, use_bias=use_bias, key=key)
    assert len(model.weights) == depth + 1
    assert [w.shape for w in model.weights] == [(5, 3)] + [(5, 5)] * (depth - 1) + [(2, 5)]
    if use_bias:
        assert all(not np.any(b) for b in model.biases)
        shifted = tuple(b + 0.1 * (i + 1) for i, b in enumerate(model.biases))
        model = eqx.tree_at(lambda m: m.biases, model, shifted)
    else:
        assert model.biases is None
    first, hidden, last = (multiplier for multiplier, _ in TABLE[name](5, 3))
    h, seen = X, []
    for i, w in enumerate(np.asarray(w) for w in model.weights):
        factor = first if i == 0 else last if i == depth else hidden
        z = factor * (w @ h) + (0.1 * (i + 1) if use_bias else 0)
        seen.append(z)
        h = np.tanh(z)
    rough(model(jnp.asarray(X)), seen[-1])
    rough(model.preactivations(jnp.asarray(X)), np.concatenate(seen[:-1]))


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_deep_linear_equals_the_formula(name, depth, key):
    model = gf.models.DeepLinear(3, 5, 2, depth=depth, parametrisation=name, key=key)
    ws = [np.asarray(w) for w in model.weights]
    assert [w.shape for w in ws] == [(5, 3)] + [(5, 5)] * (depth - 2) + [(2, 5)]
    first, hidden, last = (multiplier for multiplier, _ in TABLE[name](5, 3))
    product = np.linalg.multi_dot(ws[::-1]) * first * hidden ** (depth - 2) * last
    rough(model.end_to_end(), product)
    rough(model(jnp.asarray(X)), product @ X)
    pairs = [low @ low.T - up.T @ up for low, up in itertools.pairwise(ws)]
    rough(model.imbalance(), [np.sqrt((p**2).sum()) for p in pairs])
    rough(model.conserved()["balancedness"].value, pairs)


def test_diagonal_linear_equals_the_formula(key):
    model = gf.models.DiagonalLinear(3, init_scale=0.3)
    rough(model.u, 0.3 * np.sqrt(2) * np.ones(3))
    np.testing.assert_array_equal(model.v, np.zeros(3))
    model = eqx.tree_at(lambda m: m.v, model, jnp.array([1.0, -2.0, 0.5]))
    rough(model.beta(), 0.3 * np.sqrt(2) * np.array([1.0, -2.0, 0.5]))
    rough(model(jnp.asarray(X)), 0.3 * np.sqrt(2) * (np.array([1.0, -2.0, 0.5]) @ X))
    rough(model.imbalance(), 0.18 - np.array([1.0, 4.0, 0.25]))
    drawn = gf.models.DiagonalLinear(4, init_scale=0.3, law=gf.models.laws.sphere, key=key)
    assert float(jnp.linalg.norm(drawn.u)) == pytest.approx(0.3 * np.sqrt(2 * 4))
    assert len(np.unique(np.asarray(drawn.u))) == 4


@pytest.mark.parametrize("build", [gf.models.TwoLayer, gf.models.MLP, gf.models.DeepLinear])
def test_out_size_none_is_the_scalar_of_out_size_one(build, key):
    x = jnp.asarray(X)
    assert build(3, 5, key=key)(x).shape == ()
    assert build(3, 5, 1, key=key)(x).shape == (1,)
    assert float(build(3, 5, key=key)(x)) == float(build(3, 5, 1, key=key)(x)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_variance_of_every_layer(name):
    """Sample variance of `N` normal entries has the relative standard error `sqrt(2 / N)`; five of them are allowed."""
    scale = 0.01
    draws = jax.vmap(lambda k: gf.models.MLP(7, 30, 3, depth=2, init_scale=scale, parametrisation=name, key=k).weights)
    for weights, (_, std) in zip(
        jax.jit(draws)(jax.random.split(jax.random.key(1), 200)), TABLE[name](30, 7), strict=True
    ):
        values = np.asarray(weights).ravel()
        assert abs(np.mean(values)) <= 5 * scale * std / np.sqrt(values.size)
        assert abs(np.mean(values**2) / (scale * std) ** 2 - 1) <= 5 * np.sqrt(2 / values.size)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "exponent"), [("standard", 0), ("ntk", 0), ("mean_field", -1), ("mup", -1)])
def test_output_variance_against_width(name, exponent):
    """`Var f(x) = |x|^2 / d * m^exponent` for the linear two-layer net, for every width.

    Given the outer weights, f is Gaussian of variance proportional to their squared norm, so the fourth moment is
    `3 (1 + 2 / m)` squared variances, which gives the Monte-Carlo error.
    """
    draws, x = 4000, np.array([1.0, -2.0, 0.5])
    for width in (4, 64):

        def output(k, width=width):
            model = gf.models.TwoLayer(3, width, activation=identity, parametrisation=name, key=k)
            return model(jnp.asarray(x))

        values = np.asarray(jax.jit(jax.vmap(output))(jax.random.split(jax.random.key(2), draws)))
        expected = x @ x / 3 * float(width) ** exponent
        error = np.sqrt((3 * (1 + 2 / width) - 1) / draws)
        assert abs(np.mean(values**2) / expected - 1) <= 5 * error


def test_abc_shift_leaves_the_function_law_alone(key):
    """Multiplier up and standard deviation down by the same power of the width: the same function, to rounding."""
    base = gf.models.ntk
    shifted = gf.models.Parametrisation(
        "moved", tuple(a + 0.25 for a in base.a), tuple(b - 0.25 for b in base.b), 0.5, 0.0
    )
    for build in (gf.models.TwoLayer, gf.models.MLP):
        one, two = (build(3, 16, parametrisation=p, key=key)(jnp.asarray(X)) for p in (base, shifted))
        rough(one, float(two))


@pytest.mark.parametrize("name", BUILD)
def test_init_scale_may_be_traced(name):
    scales = jnp.array([1e-12, 1e-3, 2.0])
    batch = eqx.filter_vmap(lambda s: BUILD[name](init_scale=s))(scales)
    base = eqx.filter(BUILD[name](), eqx.is_array)
    for i, scale in enumerate(scales):
        jax.tree_util.tree_map(lambda b, a, i=i, scale=scale: rough(b[i], scale * a), batch, base)
        alone = BUILD[name](init_scale=float(scale))
        jax.tree_util.tree_map(lambda b, a, i=i: rough(b[i], a), batch, alone)


@pytest.mark.parametrize(
    ("model", "degree"),
    [
        (lambda k: gf.models.TwoLayer(3, 5, 2, activation=jax.nn.relu, key=k), 2),
        (lambda k: gf.models.TwoLayer(3, 5, 2, activation=jax.nn.leaky_relu, parametrisation="mup", key=k), 2),
        (lambda k: gf.models.DeepLinear(3, 5, 2, depth=2, key=k), 2),
        (lambda k: gf.models.DeepLinear(3, 5, 2, depth=4, parametrisation="ntk", key=k), 4),
        (lambda k: gf.models.MLP(3, 5, 2, depth=3, activation=jax.nn.relu, use_bias=False, key=k), 4),
        (lambda k: eqx.tree_at(lambda m: m.v, gf.models.DiagonalLinear(3), jax.random.normal(k, (3,))), 2),
    ],
)
def test_degree_of_homogeneity(model, degree, key):
    model = model(key)
    larger = jax.tree_util.tree_map(lambda leaf: 3 * leaf, model)
    assert np.any(np.asarray(model(jnp.asarray(X))))
    rough(larger(jnp.asarray(X)), 3.0**degree * np.asarray(model(jnp.asarray(X))))


@pytest.mark.slow
@pytest.mark.parametrize("law", ["normal", "uniform", "sphere", "orthogonal"])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6), (5, 1), (1, 5)])
def test_laws_have_variance_one(law, shape):
    """Mean zero, variance one, entry by entry; the error of the mean of 8000 draws is measured from the draws."""
    draw = getattr(gf.models.laws, law)
    keys = jax.random.split(jax.random.key(3), 8000)
    values = np.asarray(jax.jit(jax.vmap(lambda k: draw(k, shape, jnp.float64)))(keys))
    for moment, expected in ((values, 0), (values**2, 1)):
        error = moment.std(axis=0) / np.sqrt(len(values))
        assert np.all(np.abs(moment.mean(axis=0) - expected) <= 5 * error + 1e-12)
    single = draw(jax.random.key(0), shape, jnp.float32)
    assert single.dtype == jnp.float32
    assert single.shape == shape


def test_laws_differ_in_what_they_keep(key):
    uniform = np.asarray(gf.models.laws.uniform(key, (100, 100), jnp.float64))
    assert np.max(np.abs(uniform)) <= np.sqrt(3)
    assert np.max(np.abs(uniform)) > 1.73
    normal = np.asarray(gf.models.laws.normal(key, (100, 100), jnp.float64))
    assert abs(np.mean(normal**4) - 3) <= 5 * np.sqrt(96 / normal.size)  # the variance of z^4 is 105 - 9
    sphere = np.asarray(gf.models.laws.sphere(key, (50, 7), jnp.float64))
    rough((sphere**2).sum(1), 7 * np.ones(50))
    signs = np.asarray(gf.models.laws.sphere(key, (50, 1), jnp.float64))
    assert set(np.unique(signs)) == {-1.0, 1.0}
    for rows, columns in ((3, 8), (8, 3), (5, 5)):
        w = np.asarray(gf.models.laws.orthogonal(key, (rows, columns), jnp.float64))
        gram = w @ w.T if rows <= columns else w.T @ w
        rough(gram, max(rows, columns) * np.eye(min(rows, columns)))


@pytest.mark.parametrize("law", ["normal", "uniform", "sphere", "orthogonal"])
def test_models_use_the_law_and_scale_it(law, key):
    draw = getattr(gf.models.laws, law)
    first, second = jax.random.split(key)
    model = gf.models.TwoLayer(3, 5, law=draw, init_scale=1e-3, key=key)
    rough(model.weight, 1e-3 * 3**-0.5 * np.asarray(draw(first, (5, 3), jnp.float64)))
    rough(model.output, 1e-3 * 5**-0.5 * np.asarray(draw(second, (1, 5), jnp.float64))[0])


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, jnp.float64), (1e-200, jnp.float64), (1e-30, jnp.float32)])
@pytest.mark.parametrize("out_size", [None, 4])
def test_balanced(scale, dtype, out_size, key):
    """Both norms of every neuron agree, down to sizes whose squares underflow; signs and directions stay."""
    model, free = (
        gf.models.TwoLayer(3, 6, out_size, balanced=b, init_scale=scale, dtype=dtype, key=key) for b in (True, False)
    )
    norm = lambda v: np.linalg.norm(np.asarray(v, float) / scale, axis=0)  # noqa: E731
    eps = float(jnp.finfo(dtype).eps)
    outgoing = np.atleast_2d(model.output)
    np.testing.assert_allclose(norm(outgoing), norm(model.weight.T), rtol=10 * eps)
    np.testing.assert_allclose(
        np.asarray(outgoing, float) / scale / norm(outgoing),
        np.atleast_2d(np.asarray(free.output, float)) / scale / norm(np.atleast_2d(free.output)),
        rtol=10 * eps,
    )
    np.testing.assert_array_equal(model.weight, free.weight)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("dtype", [jnp.float32, np.dtype("float32"), "float32", jnp.float64, None, jnp.float16])
def test_dtype_reaches_all_weights_and_the_output(name, dtype):
    expected = jnp.dtype(jnp.float64 if dtype is None else dtype)
    model = BUILD[name](dtype=dtype)
    leaves = jax.tree_util.tree_leaves(model)
    assert {leaf.dtype for leaf in leaves} == {expected}
    assert model(jnp.asarray(X, expected)).dtype == expected


def test_keys_decide_and_layers_are_independent():
    one, same, other = (gf.models.MLP(5, 5, 5, depth=3, key=jax.random.key(s)) for s in (0, 0, 1))
    assert eqx.tree_equal(one, same)
    assert not eqx.tree_equal(one, other)
    drawn = [np.asarray(w) for w in one.weights]
    assert all(not np.array_equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize(
    ("build", "conserved"),
    [
        (lambda act: gf.models.TwoLayer(3, 5, activation=act, key=jax.random.key(0)), [True, True, True, False, False]),
        (lambda act: gf.models.DeepLinear(3, 5, key=jax.random.key(0)), [True] * 5),
        (lambda act: gf.models.DiagonalLinear(3), [True] * 5),
    ],
)
def test_what_is_declared_conserved(build, conserved):
    for activation, expected in zip(
        [jax.nn.relu, jax.nn.leaky_relu, identity, jnp.tanh, jnp.square], conserved, strict=True
    ):
        assert ("balancedness" in build(activation).conserved()) == expected


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_scale": -0.1}, "Argument `init_scale` must be positive, but is -0.1. Zero is a saddle"),
        ({"init_scale": 0}, "`init_scale` must be positive, but is 0"),
        ({"init_scale": np.nan}, "`init_scale` must be positive"),
        ({"init_scale": np.inf}, "`init_scale` must be positive"),
        ({"init_scale": True}, "`init_scale` must be positive"),
        ({"init_scale": "small"}, "`init_scale` must be positive"),
        ({"init_scale": np.array([1e-2, 1e-3, 1e-4])}, r"must be a scalar, but is of shape \(3,\). Use jax.vmap"),
        ({"init_scale": 1e-50, "dtype": jnp.float32}, "must be at least 1.2e-38 in float32, but is 1e-50"),
        ({"dtype": int}, "`dtype` must be a real floating-point type, but is int64"),
        ({"dtype": complex}, "`dtype` must be a real floating-point type, but is complex128"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_scales_and_types(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        BUILD[name](**arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda k: gf.models.TwoLayer(0, 5, key=k), "`in_size` must be an integer of at least 1, but is 0"),
        (lambda k: gf.models.TwoLayer(3, 0, key=k), "`width` must be an integer of at least 1, but is 0"),
        (lambda k: gf.models.TwoLayer(3, 5, 0, key=k), "`out_size` must be .* Use None for a scalar output"),
        (lambda k: gf.models.TwoLayer(3, 5, parametrisation="mfp", key=k), "be one of 'standard', 'ntk', 'mean_field'"),
        (lambda k: gf.models.MLP(-1, 5, key=k), "`in_size` must be an integer of at least 1, but is -1"),
        (lambda k: gf.models.MLP(3, 0, key=k), "`width`"),
        (lambda k: gf.models.MLP(3, 5, 0, key=k), "`out_size`"),
        (lambda k: gf.models.MLP(3, 5, depth=0, key=k), "`depth` must be .* at least 1, but is 0. It counts hidden"),
        (lambda k: gf.models.MLP(3, 5, parametrisation="", key=k), "`parametrisation` must be one of"),
        (lambda k: gf.models.DeepLinear(0, 5, key=k), "`in_size`"),
        (lambda k: gf.models.DeepLinear(3, 0, key=k), "`width`"),
        (lambda k: gf.models.DeepLinear(3, 5, 0, key=k), "`out_size`"),
        (lambda k: gf.models.DeepLinear(3, 5, depth=1, key=k), "`depth` must be an integer of at least 2, but is 1"),
        (lambda k: gf.models.DeepLinear(3, 5, parametrisation="x", key=k), "`parametrisation` must be one of"),
        (lambda k: gf.models.DiagonalLinear(0), "`in_size`"),
        (lambda k: gf.models.LogDiagonal(3, log_scale=np.zeros(2)), r"`log_scale` must be a scalar or of shape \(3,\)"),
        (lambda k: gf.models.MeanFieldNet((), jnp.ones(3)), "`layers` must hold at least the first layer"),
        (lambda k: gf.models.as_nodes(gf.models.OneLayer(2, 3, key=k)), "`model` must be a gradflow"),
        (lambda k: gf.models.nodes.Sobol(4, seed=-1), "`seed` must be an integer of at least 0, but is -1"),
        (lambda k: gf.models.nodes.MonteCarlo(4, seed=-1), "`seed` must be an integer of at least 0, but is -1"),
        (lambda k: gf.models.DiagonalLinear(3, law=gf.models.laws.normal), "`key` must be given with a law"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_sizes_and_names(build, message, key):
    with pytest.raises(ValueError, match=message):
        build(key)


@pytest.mark.slow
def test_wrong_types_get_the_same_grammar_without_the_shape_checker():
    script = """
import jax, gradflow as gf
key = jax.random.key(0)
cases = [
    (lambda: gf.models.TwoLayer(2.5, 4, key=key), "`in_size` must be an integer of at least 1, but is the float 2.5"),
    (lambda: gf.models.TwoLayer(2, True, key=key), "Argument `width` must be an integer of at least 1, but is True."),
    (lambda: gf.models.TwoLayer(2, 4, activation="relu", key=key), "`activation` must be callable as"),
    (lambda: gf.models.MLP(2, 4, activation=None, key=key), "`activation` must be callable as activation(array)"),
    (lambda: gf.models.TwoLayer(2, 4, law="sphere", key=key), "`law` must be callable as law(key, shape, dtype)"),
    (lambda: gf.models.DeepLinear(2, 4, law="sphere", key=key), "`law` must be callable as law(key, shape, dtype)"),
    (lambda: gf.models.DiagonalLinear(2, law="sphere", key=key), "`law` must be callable as law(key, shape, dtype)"),
    (lambda: gf.models.TwoLayer(2, 4, parametrisation=3, key=key), "`parametrisation` must be one of 'standard'"),
]
for build, message in cases:
    try:
        build()
    except ValueError as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError(message)
assert gf.models.TwoLayer(2, 4, key=jax.random.PRNGKey(0)).weight.dtype == "float32"
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done", done.stderr
