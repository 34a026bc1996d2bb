"""A store never answers for another computation: what is refused, by which name, and what is not refused."""

import importlib.util
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import gradflow as gf
from gradflow.programs import code_of
from gradflow.sweeps import _identity, _scheduler
from gradflow.sweeps._checkpoint import Checkpoint
from gradflow.sweeps._part import load_or_compute
from gradflow.sweeps._slots import SlotState

SOURCE = """
import functools
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import gradflow as gf

CONSTANT = 1.0
TABLE = {"rate": 1.0}
CALLS = []


def helper(w):
    return CONSTANT * TABLE["rate"] * jnp.sum(w**2)


def loss(w, weight=0.5):
    total = weight * helper(w)
    return total


def norm(w):
    CALLS.append(w.shape)
    return jnp.sqrt(jnp.sum(w**2))


def first(w):
    return w[0]


class Scaled:
    def __init__(self, factor):
        self.factor, self.calls = factor, 0

    def __call__(self, w):
        self.calls += 1
        return self.factor * w

    def twice(self, w):
        return 2 * self.factor * w


class Module(eqx.Module):
    factor: float

    def __call__(self, w):
        return self.factor * jnp.sum(w)


def power(exponent, w):
    return w**exponent


def start(seed):
    return jax.random.normal(jax.random.key(seed), (3,))


DATA = np.array([1.0, -2.0, 3.0])
decayed = lambda w: loss(w) + 0.1 * jnp.sum(w**2)
fitted = (lambda data: lambda w: loss(w) + jnp.sum((w - data) ** 2))(DATA)
late = lambda w: loss(w) + jnp.sum(jnp.where(w > 1e6, w, 0.0))
LOSSES = {"plain": loss, "decayed": decayed, "fitted": fitted, "late": late}


def build(seed):
    return gf.GradientFlow(LOSSES[NAME]), start(seed)


def build_rule(seed):
    return gf.OptaxRule(loss, optax.adam(0.1, b1=0.9), learning_rate=0.1), start(seed)


def run(store, name="plain", rule=False, **options):
    global NAME
    NAME = name
    observe = {"norm": norm, "object": Scaled(2.0), "method": Scaled(2.0).twice, "module": Module(2.0)}
    observe |= {"partial": functools.partial(power, 2)}
    until = gf.Until(first, above=1e3)
    what = {"observe": observe, "until": until, "solver": gf.solvers.Tsit5(), "progress": False} | options
    return gf.sweep(build_rule if rule else build, {"seed": [0, 1]}, [0.0, 0.5], store=store, **what)
"""


def module_of(folder, source=SOURCE):
    """A module of the user's own, in a file."""
    path = folder / "study.py"
    path.write_text(source)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    spec = importlib.util.spec_from_file_location("study", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["study"] = module
    spec.loader.exec_module(module)
    return module


def edited(folder, *pairs):
    source = SOURCE
    for old, new in pairs:
        assert old in source
        source = source.replace(old, new)
    return module_of(folder, source)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Finished stores of the source as it is: by name of the loss, and one of a rule."""
    folder = tmp_path_factory.mktemp("stores")
    module = module_of(folder)
    names = ("plain", "decayed", "fitted", "late")
    computed = {name: module.run(folder / f"{name}.zarr", name) for name in names}
    return folder, computed | {"rule": module.run(folder / "rule.zarr", rule=True)}


def resume(stores, module, name):
    return module.run(stores[0] / f"{name}.zarr", "plain" if name == "rule" else name, name == "rule")


# Edit, store, what the message names.
CHANGED = {
    "global constant": ("CONSTANT = 1.0", "CONSTANT = 3.0", "plain", "vector field at seed=0"),
    "entry of a global table": ('{"rate": 1.0}', '{"rate": 2.0}', "plain", "loss at seed=0"),
    "default argument": ("weight=0.5", "weight=0.7", "plain", "code of loss or vector field"),
    "body of a helper": ('TABLE["rate"] * jnp.sum(w**2)', 'TABLE["rate"] * jnp.sum(w**4)', "plain", "vector field"),
    "weight decay in a lambda": ("0.1 * jnp.sum", "0.2 * jnp.sum", "decayed", "vector field"),
    "captured data": ("[1.0, -2.0, 3.0]", "[1.0, -2.0, 3.5]", "fitted", "vector field"),
    "what no look shows": ("w > 1e6, w", "w > 1e6, w**2", "late", "code of loss or vector field"),
    "observable": ("jnp.sqrt(jnp.sum(w**2))", "jnp.sum(w**2)", "plain", "observable 'norm' at seed=0"),
    "object": ('"object": Scaled(2.0)', '"object": Scaled(2.1)', "plain", "observable 'object'"),
    "bound method": ("Scaled(2.0).twice", "Scaled(2.1).twice", "plain", "observable 'method'"),
    "equinox module": ("Module(2.0)", "Module(2.1)", "plain", "observable 'module'"),
    "partial": ("power, 2", "power, 3", "plain", "observable 'partial'"),
    "start": ("jax.random.normal(", "jax.random.uniform(", "plain", "numbers of the start"),
    "function of until": ("    return w[0]", "    return w[1]", "plain", "code of function of until"),
    "value of until": ("above=1e3", "above=1e4", "plain", "until: "),
    "moment of Adam, which its first step does not know": ("b1=0.9", "b1=0.8", "rule", "step at seed=0"),
    "solver": ("Tsit5()", "Tsit5(scan_kind='lax')", "plain", "code of solver"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_change_is_refused_by_name(stores, change, tmp_path):
    old, new, name, message = CHANGED[change]
    module = edited(tmp_path, (old, new))
    with pytest.raises(ValueError, match="must hold the same sweep in order to be resumed") as error:
        resume(stores, module, name)
    assert message in str(error.value)
    assert "resume=False" in str(error.value)
    xr.testing.assert_identical(gf.sweeps.open_store(stores[0] / f"{name}.zarr"), stores[1][name])


def test_only_what_changed_is_named(stores, tmp_path):
    module = edited(tmp_path, ("jnp.sqrt(jnp.sum(w**2))", "jnp.sum(w**2)"))
    with pytest.raises(ValueError, match="observable 'norm'") as error:
        resume(stores, module, "plain")
    message = str(error.value).split("with changes (")[1].split("Use another path")[0]
    assert message.startswith("observable 'norm' at seed=0: size ")
    assert message.endswith("; code of observable 'norm'). ")
    assert message.count(";") == 1


SAME = {
    "nothing": ("CONSTANT", "CONSTANT"),
    "comment": ("    return w[0]", "    # The first.\n\n    return w[0]"),
    "docstring": ("    return w[0]", '    """The first weight."""\n    return w[0]'),
    "local variable": ("total", "whole"),
    "name of a function": ("helper", "assistant"),
    "name of a global": ("CONSTANT", "STRENGTH"),
    "class of another name": ("Scaled", "Multiplied"),
    "another function": ("def first", "def unused(w):\n    return 7 * w\n\n\ndef first"),
}


def test_everything_that_computes_the_same_at_once(stores, tmp_path):
    edits = [edit for name, edit in SAME.items() if name != "docstring"]
    xr.testing.assert_identical(resume(stores, edited(tmp_path, *edits), "plain"), stores[1]["plain"])


@pytest.mark.slow
@pytest.mark.parametrize("change", SAME)
def test_what_computes_the_same_is_resumed(stores, change, tmp_path):
    """From a file in another place each time."""
    module = edited(tmp_path, SAME[change])
    xr.testing.assert_identical(resume(stores, module, "plain"), stores[1]["plain"])


def test_what_functions_remember_is_no_part_of_them(stores, tmp_path):
    module = module_of(tmp_path)
    module.CALLS.extend(range(100))
    xr.testing.assert_identical(resume(stores, module, "plain"), stores[1]["plain"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "fitted", "rule"])
def test_another_process_resumes(stores, name, tmp_path):
    """With other hashes of strings, and in another folder."""
    (tmp_path / "study.py").write_text(SOURCE)
    arguments = f"{str(stores[0] / name) + '.zarr'!r}, {'plain' if name == 'rule' else name!r}, {name == 'rule'}"
    line = f"import jax; jax.config.update('jax_enable_x64', True); import study; study.run({arguments})"
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", line], cwd=tmp_path, env=environment, check=True)


@pytest.mark.slow
def test_an_interrupted_sweep_of_other_code_is_not_gone_on_with(tmp_path, monkeypatch):
    """Interrupted in the middle of the second member, one attempt after another, with the first one stored."""
    module, real, second = module_of(tmp_path), _scheduler.run_segment, []

    def interrupted(fixed, pending, state, budget, mesh):
        second.extend([1] * bool((state.member_ids == 1).all()))
        if len(second) > 1:
            raise KeyboardInterrupt
        return real(fixed, pending, state, 0 * budget + 1, mesh)

    monkeypatch.setattr(_scheduler, "run_segment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.run(tmp_path / "a.zarr", batch=1)
    monkeypatch.setattr(_scheduler, "run_segment", real)
    stored = gf.sweeps.open_store(tmp_path / "a.zarr").status.values >= 0
    np.testing.assert_array_equal(stored, [True, False])
    with pytest.raises(ValueError, match="vector field"):
        edited(tmp_path, ("CONSTANT = 1.0", "CONSTANT = 3.0")).run(tmp_path / "a.zarr", batch=1)
    assert (module_of(tmp_path).run(tmp_path / "a.zarr", batch=1).status == 0).all()


def test_unfinished_members_belong_to_one_sweep(tmp_path):
    one, none = jnp.ones(()), jnp.zeros((), int)
    ids = jnp.zeros(1, int)
    counts = {"next": none, "num_finished": none, "steps": none, "num_evaluations": none}
    state = SlotState(per_member=one, carry=one, member_ids=ids, finished=one, finished_ids=ids, **counts)
    blank = SlotState(per_member=0 * one, carry=0 * one, member_ids=ids, finished=one, finished_ids=ids, **counts)
    Checkpoint(tmp_path / "a.npz", "this").save([state])
    assert float(Checkpoint(tmp_path / "a.npz", "this").load([blank], {0})[0].carry) == 1.0
    assert float(Checkpoint(tmp_path / "a.npz", "that").load([blank], {0})[0].carry) == 0.0


def test_a_global_that_changes_between_sweeps_is_seen(tmp_path):
    """Without a store: a compiled program is not used again for the same function with other constants.

    `w' = -c w`, so that the norm falls like `exp(-c t)`.
    """
    module = module_of(tmp_path)
    for constant in (1.0, 3.0):
        module.CONSTANT = constant
        ds = module.run(None)
        fallen = ds.norm.values[:, 1] / ds.norm.values[:, 0]
        np.testing.assert_allclose(fallen, np.exp(-0.5 * constant), rtol=1e-4)


# Other machines, other versions


@pytest.mark.parametrize(("shift", "refused"), [(1e-16, False), (1e-9, True)])
def test_rounding_on_another_machine(stores, shift, refused, tmp_path, monkeypatch):
    module = edited(tmp_path, ("(3,))", f"(3,)) * (1 + 2 * {shift})"), ("3.0]", f"3.0 * (1 + 2 * {shift})]"))
    with pytest.raises(ValueError, match="numbers of the start"):
        resume(stores, module, "fitted")
    monkeypatch.setattr(_identity, "machine", lambda: {"node": "elsewhere"})
    if refused:
        with pytest.raises(ValueError, match=r"numbers of the start.*numbers that functions close over"):
            resume(stores, module, "fitted")
    else:
        xr.testing.assert_identical(resume(stores, module, "fitted"), stores[1]["fitted"])


def test_under_another_python_numbers_decide(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(_identity, "DIALECT", "another")
    old, new, *_ = CHANGED["what no look shows"]
    xr.testing.assert_identical(resume(stores, edited(tmp_path, (old, new)), "late"), stores[1]["late"])
    with pytest.raises(ValueError, match="vector field"):
        resume(stores, edited(tmp_path, ("CONSTANT = 1.0", "CONSTANT = 3.0")), "late")


def test_observables_that_draw_anew_say_nothing(tmp_path):
    """What is drawn while a function is traced is another constant in each process."""
    rng = np.random.default_rng(0)
    observe = {"noisy": lambda w: jnp.sum(w) + rng.random()}
    module = module_of(tmp_path)
    first = module.run(tmp_path / "a.zarr", observe=observe)
    xr.testing.assert_identical(module.run(tmp_path / "a.zarr", observe=observe), first)


def test_a_store_without_an_identity_is_read_and_not_resumed(stores, tmp_path):
    module = module_of(tmp_path)
    ds = gf.sweeps.open_store(stores[0] / "plain.zarr")
    gf.sweeps.write_dataset(ds, tmp_path / "a.zarr")
    xr.testing.assert_identical(gf.sweeps.open_store(tmp_path / "a.zarr"), ds)
    with pytest.raises(ValueError, match=r"another version of gradflow wrote.*open_store.*resume=False"):
        module.run(tmp_path / "a.zarr")
    assert (module.run(tmp_path / "a.zarr", resume=False).status == 0).all()


def test_a_point_that_a_function_refuses_does_not_stop_a_sweep(tmp_path):
    def choosy(w):
        return jnp.where(jnp.all(w > -100), jnp.sum(w), jnp.log(-1.0))

    module = edited(tmp_path, ("def loss(w, weight=0.5):", "def loss(w, weight=0.5):\n    w = jnp.sqrt(w * w)"))
    ds = module.run(tmp_path / "a.zarr", observe={"choosy": choosy})
    xr.testing.assert_identical(module.run(tmp_path / "a.zarr", observe={"choosy": choosy}), ds)


def test_a_store_costs_one_small_program_for_each_shape(tmp_path):
    """What is observed is traced once more than without a store, however many members there are."""
    calls = []

    def counted(w):
        calls.append(w.shape)
        return jnp.sum(w)

    def build(seed, size):
        return gf.GradientFlow(half_square), jnp.full(size, 1.0 + seed)

    def traces(store, size):
        calls.clear()
        axes = {"seed": list(range(20)), "size": [size]}
        options = {"store": store, "solver": gf.solvers.Tsit5(), "progress": False}
        gf.sweep(build, axes, [0.0, 0.5], observe={"sum": counted}, **options)
        return len(calls)

    assert traces(tmp_path / "a.zarr", 3) == traces(None, 2) + 1


def half_square(w):
    return 0.5 * jnp.sum(w**2)


# Studies


def test_a_part_of_a_study_is_taken_only_from_the_same_numbers(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return xr.Dataset({"a": ("x", [1.0])})

    def take(slope, config=1):
        starts = lambda: {"vector field": jnp.asarray([1.0, slope]), "loss": jnp.asarray(1.0)}  # noqa: E731
        return load_or_compute(tmp_path / "a.zarr", {"n": config}, compute, starts, resume=True)

    first = take(2.0)
    xr.testing.assert_equal(take(2.0 * (1 + 1e-15)), first)
    with pytest.raises(ValueError, match=r"with changes \(vector field: size 2.23607 -> "):
        take(2.1)
    with pytest.raises(ValueError, match="n: 1 -> 2"):
        take(2.0, 2)
    assert len(calls) == 1
    gf.sweeps.write_dataset(first.drop_attrs().assign_attrs(part='{"n": 1}'), tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="another version of gradflow wrote"):
        take(2.0)


@pytest.mark.slow
def test_a_study_on_other_data_is_refused(tmp_path):
    """Of the same shape, number and labels; one entry differs."""
    data = gf.data.digits(classes=(0, 1), n=12, centre=True, unit_norm=True, labels="pm1")
    few = {"loss_names": ["square"], "widths": [2], "seeds": [0], "scales": [0.1], "rtol": 1e-2, "saves": 3}
    few |= {"store": tmp_path / "a.zarr", "progress": False}
    gf.studies.small_init((np.asarray(data.x), np.asarray(data.y)), **few)
    other = np.array(data.x)
    other[3, 20] += 1e-6
    with pytest.raises(ValueError, match="data, models or observables: numbers of the flow or rule"):
        gf.studies.small_init((other, np.asarray(data.y)), **few)


# Code


def test_code_knows_recursion_cycles_and_itself():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    cycle = [even]
    cycle.append(cycle)
    assert code_of(cycle).digest == code_of(cycle).digest
    assert code_of(even).digest != code_of(odd).digest
