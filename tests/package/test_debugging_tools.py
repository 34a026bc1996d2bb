"""Everything public runs under the settings with which JAX users look for mistakes, and computes what it computes."""

import contextlib
import functools
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import surface
from jax.experimental.compilation_cache import compilation_cache

import gradflow as gf

SETTINGS = {
    "jax_debug_nans": (jax.debug_nans, True),
    "jax_numpy_dtype_promotion": (jax.numpy_dtype_promotion, "strict"),
    "jax_disable_jit": (jax.disable_jit, True),
    "jax_check_tracer_leaks": (jax.checking_leaks, True),
}
TOGETHER, WITHOUT_JIT = "nans, promotion and leaks", "without jit"
TOOLS = {
    TOGETHER: ("jax_debug_nans", "jax_numpy_dtype_promotion", "jax_check_tracer_leaks"),
    WITHOUT_JIT: ("jax_disable_jit",),
}
QUICK = {
    (TOGETHER, "flows", "GradientFlow"),
    (TOGETHER, "rules", "SGD"),
    (WITHOUT_JIT, "observables", "MaxMarginResidual"),
}
"""What runs by default; all else is left to the slow tests."""
LONG = {
    (WITHOUT_JIT, "flows", "FluctuationFlow"),
    (WITHOUT_JIT, "flows", "OrderParameterFlow, tanh"),
    (WITHOUT_JIT, "limits", "alternating_flow"),
    (WITHOUT_JIT, "limits", "neuron_pursuit"),
}
"""Left out: without `jit` their runs take minutes, in many short programs, none of them of their own."""
ROUNDING = 1e-13
"""What is left of differences of numbers of order one, such as a drift, is compared with nothing finer than this."""
UNSET = {"jax_numpy_dtype_promotion": "standard"}
MOST_MAPS = 10_000
"""Memory maps, of the 65,530 that Linux allows a process, from which on programs are dropped."""


@pytest.fixture(scope="module", autouse=True)
def kept_programs(tmp_path_factory):
    """Settings change what JAX remembers a program by, not the program: it is taken from a file then."""
    cache = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in cache}
    for settings in (cache, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if settings is cache:
            yield


def drop_programs():
    """Without `jit` every operation is a program of its own, which entries share as far as memory maps allow."""
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@contextlib.contextmanager
def tool(name):
    """All settings of a tool."""
    with contextlib.ExitStack() as stack:
        for one in TOOLS[name]:
            stack.enter_context(setting(one))
        yield


@contextlib.contextmanager
def setting(name):
    """Here and in the threads of a sweep, which see the global value alone."""
    context, value = SETTINGS[name]
    jax.config.update(name, value)
    try:
        with context() if context is jax.checking_leaks else context(value):
            yield
    finally:
        jax.config.update(name, UNSET.get(name, False))


def entries():
    """Both tools for one entry after the other, so that they share its run without tools."""
    names = [(name, *entry) for entry in surface.names() for name in TOOLS]
    return [pytest.param(*n, marks=() if n in QUICK else pytest.mark.slow) for n in names if n not in LONG]


@functools.lru_cache(maxsize=1)
def plain_call(room, name):
    """What an entry computes without tools."""
    return surface.call(room, name, "float64")


def statuses(result):
    """How all runs in a result ended."""
    runs = jax.tree_util.tree_leaves(result, is_leaf=lambda node: isinstance(node, gf.Solution))
    return {run.status for run in runs if isinstance(run, gf.Solution)}


def numbers(result):
    """The floating-point arrays of a result, those of data sets among them."""
    if hasattr(result, "data_vars"):
        result = {name: value.values for name, value in result.data_vars.items()}
    leaves = jax.tree_util.tree_leaves(result)
    return [np.asarray(leaf) for leaf in leaves if eqx.is_inexact_array_like(leaf)]


@pytest.mark.parametrize(("settings", "room", "name"), entries())
def test_everything_runs(settings, room, name):
    """The numbers are those of a run without the settings: to rounding where one program is compiled, as loosely as
    steps of tolerance 1e-3 allow where operations are rounded one by one."""
    with tool(settings):
        computed = surface.call(room, name, "float64")
    assert statuses(computed) <= {"ok", "stopped"}
    plain = plain_call(room, name)
    assert statuses(computed) == statuses(plain)
    for a, b in zip(numbers(computed), numbers(plain), strict=True):
        assert a.dtype == b.dtype
        size = np.max(np.abs(b), initial=0.0, where=np.isfinite(b))
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * size + ROUNDING)
    drop_programs()


@pytest.mark.slow
@pytest.mark.parametrize(("room", "name"), surface.names())
def test_strict_promotion_in_single_precision(room, name):
    """With times in float64 where that is enabled; the rooms that compute most run where it is not, too."""
    promoting = ("solvers", "Kvaerno3"), ("flows", "FixedSteps")  # within diffrax, of times and states
    with setting("jax_numpy_dtype_promotion"):
        if (room, name) not in promoting:
            assert statuses(surface.call(room, name, "float32")) <= {"ok", "stopped"}
        if room in ("flows", "solvers"):
            with jax.enable_x64(False):
                computed = surface.call(room, name, "float32")
            assert statuses(computed) <= {"ok", "stopped"}
            leaves = jax.tree_util.tree_leaves(computed)
            assert not any(leaf.dtype == np.float64 for leaf in leaves if isinstance(leaf, jax.Array))


def sour(w):
    """Finite at its start, and NaN below one half."""
    return jnp.sum(jnp.where(w > 0.5, w, jnp.nan * w) ** 2)


def test_a_nan_of_the_user_is_still_found():
    with setting("jax_debug_nans"), pytest.raises(FloatingPointError):
        jax.jit(sour)(jnp.zeros(2))
    assert gf.solve(gf.GradientFlow(sour), jnp.ones(2), [5.0], throw=False).status == "nonfinite"


def test_mixed_types_of_the_user_are_still_refused():
    def loss(w):
        return jnp.sum(jnp.arange(2) * w)

    with setting("jax_numpy_dtype_promotion"), pytest.raises(jax.dtypes.TypePromotionError):
        gf.solve(gf.GradientFlow(loss), jnp.ones(2), [1.0])


@pytest.mark.parametrize("debugging", [False, True])
def test_rows_not_reached_are_nan(debugging):
    """A run that `until` ends early is a good one, with rows that it does not reach."""
    loss = lambda w: 0.5 * jnp.sum(w**2)  # noqa: E731
    observe = {"norm": gf.observables.ParameterNorm(), "twice": lambda w: jnp.asarray([2, 2]) * (w.size)}
    until = gf.Until(loss, below=0.3)
    with setting("jax_debug_nans") if debugging else contextlib.nullcontext():
        flow = gf.solve(gf.GradientFlow(loss), jnp.ones(2), [0.1, 0.2, 5.0, 9.0], observe=observe, until=until)
        rule = gf.iterate(gf.GradientDescent(loss, 0.1), jnp.ones(2), 100, save_every=10, observe=observe, until=until)
    for sol in (flow, rule):
        assert sol.status == "stopped"
        reached = sol.reached
        assert 0 < reached.sum() < reached.size
        for values in (np.asarray(sol.params)[:, 0], np.asarray(sol.observed["norm"])):
            np.testing.assert_array_equal(np.isnan(values), ~reached)
        twice = np.asarray(sol.observed["twice"])
        assert twice.dtype.kind == "i"
        np.testing.assert_array_equal(twice, np.where(reached[:, None], [[4, 4]], 0))


@pytest.mark.slow
def test_rows_not_reached_are_nan_under_vmap_and_in_a_sweep():
    """One member ends early, one does not."""
    loss = lambda w: 0.5 * jnp.sum(w**2)  # noqa: E731
    until, ts = gf.Until(loss, below=0.3), [0.2, 0.4]

    def run(scale):
        return gf.solve(gf.GradientFlow(loss), scale * jnp.ones(2), ts, until=until)

    batch = jax.vmap(run)(jnp.array([0.7, 3.0]))
    np.testing.assert_array_equal(batch.saved, [1, 2])
    np.testing.assert_array_equal(np.isnan(np.asarray(batch.params)[..., 0]), [[False, True], [False, False]])
    with setting("jax_debug_nans"):
        ds = gf.sweep(
            lambda scale: (gf.GradientFlow(loss), scale * jnp.ones(2)),
            {"scale": [0.7, 3.0]},
            ts,
            observe={"norm": gf.observables.ParameterNorm()},
            until=until,
            save_params=True,
            progress=False,
        )
    for values in (ds.norm.values, ds.params.values[..., 0]):
        np.testing.assert_array_equal(np.isnan(values), [[False, True], [False, False]])
