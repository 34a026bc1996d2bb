"""The shape of the package: imports obey the order of the rooms, importing is light, docstrings hold and run."""

import ast
import doctest
import importlib
import inspect
import json
import pathlib
import pkgutil
import re
import subprocess
import sys

import equinox as eqx
import jax
import numpy as np
import pytest
import xarray as xr

import gradflow as gf
from gradflow.studies._by_name import function_for, studies_in

ROOT = pathlib.Path(gf.__file__).parent
HERE = pathlib.Path(__file__).resolve()

# A file may import from its own rank and from ranks above it. Rooms of one rank leave each other alone,
# except that a rule names its flows.
RANKS = [
    ["_checks"],
    ["stores", "programs"],
    ["_tree", "_linalg", "_solution", "_conserved", "_homogeneity"],
    ["protocols"],
    ["problems"],
    ["models"],
    ["data"],
    ["flows", "rules", "solvers", "observables", "theory"],
    ["runs"],
    ["limits", "sweeps"],
    ["studies"],
    ["plot", "tables"],
    ["reports"],
    ["cli"],
    ["__main__"],
]
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
MODULES = sorted(info.name for info in pkgutil.walk_packages([str(ROOT)], prefix="gradflow."))


def room_of(module):
    return module.split(".")[1]


RUN_UP = {
    ("gradflow.studies", "__getattr__", "tables"),
    ("gradflow._solution", "Solution.plot", "plot"),
    ("gradflow._solution", "Solution._repr_html_", "reports"),
}
"""The only imports that run up, each within one function: for users of names that have moved to a later room, and for a
result that shows itself."""


def path_of(module):
    path = ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported_rooms(tree):
    """Rooms that code imports anywhere, functions included."""
    computed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gradflow":
            if node.module == "gradflow":
                computed |= {alias.name for alias in node.names}
            else:
                computed.add(room_of(node.module))
        elif isinstance(node, ast.Import):
            computed |= {room_of(alias.name) for alias in node.names if alias.name.startswith("gradflow.")}
    return computed


def parts_of(tree):
    """Statements of a module, and of the classes in it, each with the name of the function that it is."""
    for part in tree.body:
        if isinstance(part, ast.ClassDef):
            yield from ((f"{part.name}.{getattr(inner, 'name', '')}", inner) for inner in part.body)
        else:
            yield getattr(part, "name", ""), part


@pytest.mark.parametrize("module", MODULES)
def test_imports_obey_the_order_of_the_rooms(module):
    room, tree = room_of(module), ast.parse(path_of(module).read_text())
    assert room in RANK, f"{room} has no rank: give it one"
    for name, part in parts_of(tree):
        for other in imported_rooms(part) - {room}:
            allowed = RANK[other] < RANK[room] or (room, other) == ("rules", "flows")
            allowed |= room.startswith("_") and RANK[other] == RANK[room]
            allowed |= (module, name, other) in RUN_UP
            assert allowed, f"{module} imports {other}"


def test_modules_without_a_room_are_the_few_that_all_rooms_build_on():
    outside = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert outside == {"_checks", "_tree", "_linalg", "_solution", "_conserved", "_homogeneity"}


def test_a_flow_is_asked_for_little():
    members = [name for name in vars(gf.AbstractFlow) if not name.startswith("_")]
    assert len(members) <= 9, members


def test_former_declarations_of_flows_are_refused():
    with pytest.raises(ValueError, match="`stride` must be called step_length_ratio"):

        class Short(gf.AbstractFlow):
            def stride(self, before, after):
                return None


def test_rooms_ask_for_methods_by_their_protocols():
    for path in ROOT.rglob("*.py"):
        assert "method_of(" not in path.read_text(), path


def test_rooms_do_without_the_imports_that_run_up():
    """What is imported on use alone is not needed: modules are loaded without, and give it on use."""
    script = """
import sys
import gradflow.studies
assert not {"gradflow.tables", "gradflow.plot", "gradflow.reports"} & set(sys.modules)
from gradflow.studies import compare_table
assert compare_table is gradflow.tables.compare
assert all(getattr(gradflow.studies, name) for name in dir(gradflow.studies))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_former_names_of_public_objects_stay():
    for room in (gf, gf.limits):
        assert room.Extrapolated is gf.FilippovSolution
        assert room.Pursuit is gf.NeuronPursuitResult
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = room.no_such_name
    assert gf.models.mild_two_layer is gf.models.mildly_parametrised


def files(room):
    return {path.stem.removeprefix("_") for path in (ROOT / room).glob("_[a-z]*.py")}


STUDY = re.compile(r'"study": "([a-z-]+)"')


def test_a_study_is_found_by_its_name():
    """Every name that a study writes into its data set is a file of this name in three rooms, listed nowhere else."""
    written = [name for path in (ROOT / "studies").glob("_*.py") for name in STUDY.findall(path.read_text())]
    assert len(set(written)) == len(written) > 8
    for study in written:
        name = study.replace("-", "_")
        for room in ("studies", "plot", "tables"):
            assert name in files(room), f"{study} has no file in {room}/"
        for room in (gf.plot, gf.tables):
            computed = function_for(xr.Dataset(attrs={"study": study}), room.__name__, "")
            assert computed is getattr(room, name)
    for room in ("plot", "tables"):
        assert studies_in(f"gradflow.{room}") == sorted(written)


def test_no_module_blinds_the_shape_checks():
    for path in ROOT.rglob("*.py"):
        assert "from __future__ import annotations" not in path.read_text(), path


GLOSSARY = {
    r"foretold|foretell": "predicted, predict",
    r"\bdear(er|est)?\b": "expensive",
    r"\bfor ever\b": "indefinitely",
    r"\bnobody\b": "say plainly what is meant",
    r"\bt(old|ells?) apart\b": "distinguished, separated",
    r"\bpulls?\b|\bfirst labels?\b": "residuals; residuals at the origin",
    r"\bclass Extrapolated\b": "FilippovSolution",
    r"\bclass Pursuit\b": "NeuronPursuitResult",
    r"\bmild_two_layer\(": "mildly_parametrised",
    r"\bdeserted": "uncovered",
    r"\bstray(s|ed)?\b": "deviate",
    r"\basleep\b|\bwakes? up\b": "dormant, becomes active",
    r"\briders\b": "quadratures",
    r"\bkicks?\b": "noise",
    r"(?-i:\b(GAIN|FAR|WARM|SETTLED|TROUBLE|FORGET|YOUNG|PATIENCE|EARLIEST|TAKEN)\b)": "what it bounds",
    r"\bin the air\b": "unfinished",
    r"\bflow_(cost|gradients)\b|\blate_gradients\b": "flow_gradient_evaluations",
    r"\"(heavy-ball|gradient-descent)\"|\"heavy ball\" *[:\]]": "heavy_ball, gradient_descent as values",
    r"(^|[\s(\[`,=~-])\.\d+(?!f)": "0.1, with a zero, in prose and tables",
}
"""Words that may not return, and those to use instead: one term per concept, the field's own."""

GLOSSARY_OF_SWEEPS = {
    r"(?<!in[ -])\b[Ff]lights?\b": "slot state, SlotState",
    r"\b(_?fly|flying|flies)\b": "run_segment",
    r"\blanded\b|\bland\b": "retire, num_finished, finish",
    r"\btakes?_?off\b|\b(on board|aboard)\b": "admit, running",
    r"\b_?[Ii]nbox(es)?\b": "pending, Pending",
    r"\b[Oo]utbox(es)?\b": "finished, Finished",
    r"\bsenders?\b": "finished_ids",
    r"\bwho\b(?=[\[\].,:=)]| =| in )": "member_ids",
    r"\b(VACANT|vacant)\b": "EMPTY, empty",
    r"\bticks?\b": "step_all, steps",
    r"\bsettles?\b": "refill",
    r"\b_?[Ll]anes?\b": "worker, Worker",
    r"\bnews\b": "evaluations_since",
    r"\b_?handed\b|\b_?hand_out\b": "assigned, assign",
    r"\b[Rr]oster\b": "members, Members",
    r"\b(Kind|kind_of)\b": "ShapeGroup, shape_group_of",
    r"\b(Form|_forms)\b": "Template, templates",
    r"\bOwn\b": "PerMember, per_member",
    r"\bplaces\b": "grid_indices",
    r"\btally\b": "counters",
}
"""Likewise in the room `sweeps`; upper and lower case differ."""

GLOSSARY_OF_NAMES = {
    "found": "what it is: sol, ds, result, eigenvalues",
    "own": "what it is: diagonal, labelled, alone",
    "moved": "displaced, stepped, shifted, velocity",
    "kind": "what it is: dtype, solver_class, scaling",
    "rest": "static, remaining",
    "known": "reference, available, method",
    "kept": "cached, chosen, identity",
    "taken": "provenance",
    "spent": "num_evaluations, costs",
    "watched": "controlled",
    "told": "description, reported",
    "said": "message, description",
    "pull": "residuals",
    "pulls": "residuals",
    "least": "min_ and what it is the minimum of",
    "most": "max_ and what it is the maximum of",
    "beside": "sidecar",
    "impulse": "initial_momentum",
}
"""Words that may not be names of variables, and what to call these instead; in prose they are plain English."""

PUBLIC_NAMES = {"kind", "least", "most"}
"""Of those, arguments that functions take by name."""


def test_words_are_those_of_the_field():
    top = ROOT.parent
    texts = [*ROOT.rglob("*.py"), *(top / "notebooks").glob("*.py"), *(top / "benchmarks").rglob("*.py")]
    texts += [top / "README.md", ROOT / "CHANGES.md", *(ROOT / "guide").glob("*.md")]
    texts += [path for path in (top / "tests").rglob("*.*") if path.suffix in (".py", ".md") and path != HERE]
    used = [
        f"{path.relative_to(top)}: {match.group().strip()!r}: {instead}"
        for path in texts
        for word, instead in GLOSSARY.items()
        for match in re.finditer(word, path.read_text(), re.MULTILINE | re.IGNORECASE)
    ]
    assert not used, "\n".join(used)


def test_words_of_sweeps_are_those_of_the_field():
    used = [
        f"{path.name}: {match.group()!r}: {instead}"
        for path in (ROOT / "sweeps").glob("*.py")
        for word, instead in GLOSSARY_OF_SWEEPS.items()
        for match in re.finditer(word, path.read_text(), re.MULTILINE)
    ]
    assert not used, "\n".join(used)


def named(tree):
    """Variables and arguments of the functions and of the script in a file, each with its line."""
    fields = {id(name) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for name in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and id(node) in fields:
            fields.add(id(node.target))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in fields:
            yield node.lineno, node.id
        elif isinstance(node, ast.arg) and node.arg not in PUBLIC_NAMES:
            yield node.lineno, node.arg


def test_variables_are_called_what_they_are():
    top = ROOT.parent
    used = [
        f"{path.relative_to(top)}:{line}: {name!r}: {GLOSSARY_OF_NAMES[name]}"
        for room in (ROOT, top / "notebooks", top / "benchmarks", top / "tests")
        for path in sorted(room.rglob("*.py"))
        for line, name in named(ast.parse(path.read_text()))
        if name in GLOSSARY_OF_NAMES
    ]
    assert not used, "\n".join(used)


def test_the_command_line_holds_no_science():
    """Commands read options, call a study and report; only the list of what the package holds looks into the rooms."""
    allowed = {
        "cli",
        "_checks",
        "_solution",
        "stores",
        "sweeps",
        "studies",
        "plot",
        "tables",
        "reports",
        "gradflow",
        "__version__",
    }
    for path in (ROOT / "cli").glob("*.py"):
        if path.stem != "_info":
            assert imported_rooms(ast.parse(path.read_text())) <= allowed, path.name


def test_sweeps_ask_no_type_of_what_they_run():
    for path in (ROOT / "sweeps").glob("*.py"):
        for call in re.findall(r"isinstance\([^()]*(?:\([^()]*\)[^()]*)*\)", path.read_text()):
            assert not re.search(r"Abstract|Flow|Rule|Setup|Member|Run\b", call), f"{path.name}: {call}"


def test_importing_touches_no_device_and_changes_no_setting():
    script = """
import json, jax
before = dict(jax.config.values)
import gradflow
from jax._src import xla_bridge
after = dict(jax.config.values)
changed = [k for k in after if before.get(k) != after[k]]
heavy = [m for m in ("xarray", "zarr", "matplotlib", "sklearn", "mlxtend", "pandas") if m in __import__("sys").modules]
print(json.dumps({"backends": list(xla_bridge._backends), "changed": changed, "heavy": heavy}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"backends": [], "changed": [], "heavy": []}


def public_classes():
    rooms = [gf.problems, gf.models, gf.flows, gf.rules, gf.observables, gf.solvers, gf]
    computed = {}
    for room in rooms:
        for name, value in vars(room).items():
            is_ours = inspect.isclass(value) and value.__module__.startswith("gradflow")
            if is_ours and issubclass(value, eqx.Module) and not name.startswith(("_", "Abstract")):
                computed[name] = value
    return computed


class Net(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        return self.weight @ x


def cases(key):
    """One instance of every public class: a class without a row here fails the test below."""
    model = gf.models.TwoLayer(64, 4, key=key)
    problem = gf.EmpiricalRisk(*gf.data.digits(classes=(0, 1), n=10, labels="pm1"), gf.losses.square)
    ones = jax.numpy.ones
    polar = gf.Polar(model, -20.0)
    linear = gf.EmpiricalRisk(np.eye(2), np.ones(2), gf.losses.square)
    neurons = gf.models.TwoLayer(2, 2, activation=jax.nn.identity, key=key)
    zero, yes = jax.numpy.zeros(()), jax.numpy.asarray(True)
    teaching = gf.TeacherStudent.orthogonal(20, 2)
    overlaps = teaching.order_parameters(teaching.uninformed(2, key))
    reduced = gf.flows.OverparametrisedFlow(teaching)
    mean = gf.OrderParameterFlow(teaching, gamma_over_p=0.5)
    fluctuating = gf.flows.FluctuationFlow(mean, 2, dim=20, samples=32, key=key)
    field = gf.solvers.Field(gf.GradientFlow(problem), None, zero, zero)
    averaging = gf.models.MeanFieldStart(64, first=gf.models.nodes.Uniform(-1, 1), output=gf.models.nodes.Uniform(0, 1))
    net, node_weights = averaging.draw(4, key)
    attempt = gf.solvers.Attempt(zero, zero, zero, None, None, None, yes, jax.numpy.asarray(1), jax.numpy.asarray(0))
    return model, {
        "EmpiricalRisk": problem,
        "TwoLayer": model,
        "MLP": gf.models.MLP(64, 4, key=key),
        "ConvNet": gf.models.ConvNet((8, 8), (2,), key=key),
        "MeanFieldNet": net,
        "MeanFieldStart": averaging,
        "DeepLinear": gf.models.DeepLinear(64, 4, key=key),
        "TeacherStudent": teaching,
        "OrderParameters": overlaps,
        "DiagonalLinear": gf.models.DiagonalLinear(64),
        "LogDiagonal": gf.models.LogDiagonal(64, log_scale=-9.0),
        "OneLayer": gf.models.OneLayer(64, 4, key=key),
        "Parametrisation": gf.models.ntk,
        "Smoothed": gf.models.Smoothed(0.01),
        "SignedTwoLayer": gf.models.SignedTwoLayer(64, 4, key=key),
        "DescentAscentFlow": gf.DescentAscentFlow(problem, 0.1),
        "EdgeFlow": gf.EdgeFlow(problem, 0.1),
        "GradientFlow": gf.GradientFlow(problem),
        "CentralFlow": gf.CentralFlow(gf.GradientDescent(problem, 0.1)),
        "HeavyBallFlow": gf.HeavyBallFlow(problem, 0.1, 0.1),
        "LinearisedFlow": gf.LinearisedFlow(problem, model),
        "MeanFieldFlow": gf.MeanFieldFlow(problem, node_weights),
        "ModifiedFlow": gf.ModifiedFlow(problem, 0.1),
        "MomentumDescentAscentFlow": gf.MomentumDescentAscentFlow(problem, 0.1, 0.5),
        "MomentumFlow": gf.MomentumFlow(problem, 0.1, 0.9),
        "NesterovConvexFlow": gf.NesterovConvexFlow(problem, 0.1),
        "NesterovFlow": gf.NesterovFlow(problem, 0.1, 0.1),
        "PrincipalFlow": gf.PrincipalFlow(problem, 0.1),
        "RodFlow": gf.RodFlow(problem, 0.1),
        "SecondOrderFlow": gf.SecondOrderFlow(problem, 0.1),
        "OrderParameterFlow": gf.OrderParameterFlow(teaching, gamma_over_p=0.5),
        "OverparametrisedFlow": reduced,
        "ReducedOverlaps": reduced.reduce(overlaps),
        "FluctuationFlow": fluctuating,
        "Fluctuations": fluctuating.start(overlaps),
        "InterpolatedSchedule": gf.flows.InterpolatedSchedule([0.0, 1.0], [1.0, 0.5]),
        "OnePassSGD": gf.OnePassSGD(teaching, 0.5, key=key),
        "SGD": gf.SGD(problem, 0.1, batch_size=2, key=key),
        "SGDFlow": gf.SGDFlow(problem, 0.1, batch_size=2),
        "MeanFieldSGD": gf.MeanFieldSGD(problem, node_weights, key=key),
        "PopulationRisk": gf.PopulationRisk(problem.x, problem.y, np.full(10, 0.1), gf.losses.square),
        "LogDiagonalFlow": gf.LogDiagonalFlow(problem),
        "NeuronPolarFlow": gf.NeuronPolarFlow(problem),
        "PolarFlow": gf.PolarFlow(problem),
        "Polar": polar,
        "NeuralCorrelation": gf.NeuralCorrelation(problem),
        "GradientDescent": gf.GradientDescent(problem, 0.1),
        "HeavyBall": gf.HeavyBall(problem, 0.1, mu=0.1),
        "Nesterov": gf.Nesterov(problem, 0.1),
        "OptaxRule": gf.OptaxRule(problem, __import__("optax").sgd, 0.1),
        "RMSProp": gf.RMSProp(problem, 0.1),
        "ScalarRMSProp": gf.ScalarRMSProp(problem, 0.1),
        "Loss": gf.observables.Loss(problem),
        "GradientBound": gf.observables.GradientBound(problem),
        "Margins": gf.observables.Margins(problem),
        "MaxMarginResidual": gf.observables.MaxMarginResidual(problem),
        "NormalisedMargin": gf.observables.NormalisedMargin(problem),
        "NeuronPartition": gf.observables.NeuronPartition(problem.x, problem.y),
        "PartitionCounts": gf.observables.PartitionCounts(problem.x, problem.y),
        "Accuracy": gf.observables.Accuracy(problem),
        "GradientNorm": gf.observables.GradientNorm(problem),
        "ParameterNorm": gf.observables.ParameterNorm(),
        "Lyapunov": gf.observables.Lyapunov(model),
        "NeuronMovement": gf.observables.NeuronMovement(model),
        "NeuronNorms": gf.observables.NeuronNorms(),
        "NeuronAngles": gf.observables.NeuronAngles(ones(64)),
        "HessianEigenvalues": gf.observables.HessianEigenvalues(problem, 2),
        "Sharpness": gf.observables.Sharpness(problem),
        "HessianEigenpairs": gf.observables.HessianEigenpairs(problem, 2),
        "IterateMean": gf.observables.IterateMean(problem),
        "NTK": gf.observables.NTK(problem),
        "NTKEigenvalues": gf.observables.NTKEigenvalues(problem),
        "Balancedness": gf.observables.Balancedness(),
        "ActivationPattern": gf.observables.ActivationPattern(problem.x),
        "SlidingNeurons": gf.observables.SlidingNeurons(problem, 0.01),
        "Aligned": gf.observables.Aligned(problem),
        "Correlation": gf.observables.Correlation(problem),
        "ParticleHistogram": gf.observables.ParticleHistogram([0.0, 1.0]),
        "KKTResidual": gf.observables.KKTResidual(problem),
        "LogNorm": gf.observables.LogNorm(),
        "State": gf.observables.State(lambda state: state[1]),
        "Time": gf.observables.Time(),
        "Velocity": gf.observables.Velocity(),
        "Amplitude": gf.observables.Amplitude(),
        "MeanLoss": gf.observables.MeanLoss(),
        "Variance": gf.observables.Variance(),
        "LossRate": gf.observables.LossRate(problem),
        "Attempt": attempt,
        "Automatic": gf.solvers.Automatic(),
        "EulerMaruyama": gf.solvers.EulerMaruyama(),
        "Field": field,
        "FixedSteps": gf.solvers.FixedSteps(__import__("diffrax").Euler()),
        "Hybrid": gf.solvers.Hybrid(),
        "NDF": gf.solvers.NDF(),
        "CatchingUp": gf.solvers.CatchingUp(),
        "Nystrom": gf.solvers.Nystrom(),
        "OneStep": gf.solvers.OneStep(gf.solvers.Tsit5()),
        "RKC2": gf.solvers.RKC2(),
        "ROCK2": gf.solvers.ROCK2(),
        "SKROCK": gf.solvers.SKROCK(0.1, stages=3),
        "SmallNoise": gf.solvers.SmallNoise(),
        "StepControl": gf.solvers.StepControl(jax.numpy.array(1e-3), None),
        "Until": gf.Until(problem, below=0.1),
        "Solution": gf.solve(gf.GradientFlow(problem), model, [0.5]),
        "FirstEscape": gf.first_escape(linear, gf.Polar(neurons, -20.0)),
        "NeuronPursuitResult": gf.NeuronPursuitResult(np.zeros(1), np.zeros(1), model, (), (), np.zeros(0), "fitted"),
        "Saddle": gf.Saddle(0.0, 1.0, 0.5, 0.5, 0.0, 1, 1, 1.0, 1.0),
        "FilippovSolution": gf.filippov(lambda smoothing: gf.GradientFlow(problem), model, [0.5]),
    }


@pytest.mark.slow
def test_every_public_class_has_a_case_and_passes_through_jax(key):
    """Each instance survives flattening, jit and vmap; observables, flows and rules do what their room promises."""
    model, instances = cases(key)
    assert set(instances) == set(public_classes())
    for name, value in instances.items():
        assert type(value).__name__ == name
        leaves, structure = jax.tree_util.tree_flatten(value)
        again = jax.tree_util.tree_unflatten(structure, leaves)
        assert eqx.tree_equal(value, again) is not False
        if name in vars(gf.observables) and not hasattr(value, "of_state"):
            computed = eqx.filter_jit(lambda observable, params: observable(params))(value, model)
            assert jax.tree.map(np.shape, computed) == jax.tree.map(np.shape, value(model))


STARTS = {"Fluctuations", "InterpolatedSchedule", "ReducedOverlaps"}
"""What flows start from or are made of, without a clock of its own."""
RECORDS = {"Attempt", "FilippovSolution", "Field", "FirstEscape", "Fluctuations", "Parametrisation"}
RECORDS |= {"NeuronPursuitResult", "ReducedOverlaps", "Saddle", "Solution"}
"""What functions return; their examples show these."""


def test_every_public_class_documents_itself():
    for name, value in public_classes().items():
        text = inspect.getdoc(value) or ""
        assert len(text) > 60, name
        if name not in RECORDS:
            assert ">>>" in text, f"{name} has no example"
    rooms = vars(gf.flows) | vars(gf.rules)
    for name in [name for name in public_classes() if name in rooms and name not in STARTS]:
        assert "**Time unit**" in inspect.getdoc(public_classes()[name])
        base = gf.AbstractFlow if issubclass(public_classes()[name], gf.AbstractFlow) else gf.AbstractRule
        overridden = public_classes()[name].time_unit is not base.time_unit
        assert overridden or name == "SecondOrderFlow", f"{name} does not say how its time counts iterations"


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module):
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    loaded = importlib.import_module(module)
    for test in finder.find(loaded, module, globs={}):  # as a reader has it, who imports what the example does
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
