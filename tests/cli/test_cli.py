"""The command line: what it writes and prints, how it resumes, and how it complains."""

import contextlib
import html
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import warnings

import matplotlib.pyplot as plt
import pytest
import typer
import xarray as xr
import zarr

import gradflow as gf
from gradflow.cli import _studies, main
from gradflow.studies import _phase_diagram
from gradflow.sweeps import _scheduler


@pytest.fixture
def gradflow(monkeypatch, capsys):
    """Runs a command line in this process: exit code, standard output, standard error without bars."""
    # What a process may set for itself, this one gives back.
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["gradflow", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out") / "deep"


COMMANDS = [
    "small-init",
    "compare",
    "edge",
    "mean-field",
    "momentum",
    "phase-diagram",
    "vanishing-init",
    "early-stage",
    "plot",
    "report",
    "site",
    "export",
    "info",
    "guide",
]


def test_help_lists_every_command(gradflow):
    code, output, _ = gradflow("--help")
    assert code == 0
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", output, re.MULTILINE)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "small-init",
            [
                "--quick",
                "--data",
                "--path",
                "--samples",
                "--classes",
                "--out",
                "--fresh",
                "--rtol",
                "--seeds",
                "--chunk",
            ],
        ),
        ("compare", ["--quick", "--data", "--path", "--samples", "--rule", "--width", "--depth", "--horizon", "--out"]),
        (
            "edge",
            [
                "--quick",
                "--data",
                "--path",
                "--samples",
                "--activation",
                "--momentum",
                "--steps",
                "--out",
                "--fresh",
                "--seeds",
            ],
        ),
        ("momentum", ["--quick", "--data", "--path", "--samples", "--classes", "--steps", "--out"]),
        ("phase-diagram", ["--quick", "--units", "--width", "--noise", "--seeds", "--out", "--fresh"]),
        (
            "vanishing-init",
            ["--quick", "--data", "--path", "--samples", "--classes", "--all-classes", "--out", "--fresh", "--seeds"],
        ),
        (
            "early-stage",
            ["--quick", "--data", "--path", "--samples", "--classes", "--all-classes", "--out", "--seed"],
        ),
        ("plot", ["--out", "STORE"]),
        ("report", ["--out", "STORE"]),
        ("site", ["--out", "--notebooks"]),
        ("export", ["STORE", "FILE"]),
        ("info", ["STORE"]),
        ("guide", ["PAGE"]),
    ],
)
def test_every_command_explains_itself(gradflow, command, options):
    code, output, _ = gradflow(command, "--help")
    assert code == 0
    for option in options:
        # Every option has a sentence after its name and type.
        assert re.search(rf"^  \[?{re.escape(option.lower())}\b.*  \S", output.lower(), re.MULTILINE), option


STUDIES = {
    "_small_init": "small_init",
    "_discrete_gap": "discrete_gap",
    "_edge": "edge",
    "_mean_field": "mean_field",
    "_momentum": "momentum",
    "_phase_diagram": "phase_diagram",
    "_vanishing_init": "vanishing_init",
    "_circle": "circle_illustration",
    "_early_stage": "early_stage",
    "_two_directions": "two_directions",
}


@pytest.mark.parametrize(("file", "study"), STUDIES.items())
def test_quick_versions_are_smaller_and_their_data_fit(file, study):
    """Presets name arguments of their study, of fewer values each, and the data are those that it takes."""
    preset = importlib.import_module(f"gradflow.studies.{file}")
    few = preset.QUICK if hasattr(preset, "QUICK") else preset.quick()
    arguments = inspect.signature(getattr(gf.studies, study)).parameters
    for name, value in few.items():
        whole = arguments[name].default
        if isinstance(whole, tuple):
            assert len(value) <= len(whole), name
        elif isinstance(whole, int):
            assert value <= whole, name
    if hasattr(preset, "load_data"):
        x, y = preset.load_data()
        assert len(x) == len(y) <= 500
        if "quick" in inspect.signature(preset.load_data).parameters:
            assert len(preset.load_data(quick=True).y) <= len(y)


# The main job


START = "import sys; from gradflow.cli import main; sys.argv[0] = 'gradflow'; main()"


@pytest.mark.slow
def test_small_init(gradflow, out, monkeypatch):
    """Written, printed, resumed without running anything, refused when changed, started over, described, drawn."""
    # In a process of its own, which has none of the settings of these tests: float64 is enabled there, and what was
    # stored there is recognised here.
    words = ["small-init", "--quick", "--out", str(out), "--samples", "24"]
    done = subprocess.run([sys.executable, "-c", START, *words], capture_output=True, text=True, check=True)
    output = done.stdout
    store, figure = out / "small-init-quick.zarr", out / "small-init-quick.png"
    assert figure.read_bytes()[:4] == b"\x89PNG"
    ds = xr.open_zarr(store).load()
    neurons = {"angle_0": 16, "angle_negative_0": 16}
    assert dict(ds.sizes) == {"loss": 2, "width": 1, "scale": 3, "seed": 1, "time": 121, **neurons, "saddle": 3}
    assert ds.attrs["dtype"] == "float64"
    assert gf.studies.small_init_table(ds) in output
    assert f"store:  {store}" in output
    assert f"figure: {figure}" in output
    assert "resuming" not in output

    def refuse(*arguments):
        raise AssertionError("something ran")

    with monkeypatch.context() as patched:
        patched.setattr(_scheduler, "run_segment", refuse)
        code, again, _ = gradflow("small-init", "--quick", "--out", out, "--samples", "24")
    assert code == 0
    assert again == f"resuming {store}: 6 of 6 flows are there (--fresh starts over)\n" + output

    code, output, err = gradflow("small-init", "--quick", "--out", out, "--samples", "24", "--rtol", "1e-2")
    assert code == 2
    assert "rtol: 0.001 -> 0.01" in err
    assert "--fresh" in err
    code, output, err = gradflow("small-init", "--quick", "--out", out, "--samples", "26")
    assert code == 2
    assert "data, models or observables" in err
    xr.testing.assert_identical(xr.open_zarr(store).load(), ds)

    zarr.open_group(store, mode="r+")["status"][0, 0, 0, 0] = -1
    code, output, _ = gradflow("info", store)
    assert code == 0
    assert "runs: 1 missing, 5 ok" in output
    with monkeypatch.context() as patched:
        patched.setattr(_scheduler, "run_segment", interrupt)
        code, output, err = gradflow("small-init", "--quick", "--fresh", "--out", out, "--samples", "24")
    assert code == 130
    # Started over on purpose, it is not to be started over once more.
    assert f"`gradflow small-init --quick --out {out} --samples 24` goes on with it" in err


def interrupt(*arguments):
    raise KeyboardInterrupt


# Rules against flows


@pytest.mark.slow
def test_compare_plot_and_info(gradflow, out):
    code, output, _ = gradflow("compare", "--quick", "--out", out, "--samples", "20", "--horizon", "4", "--width", "3")
    assert code == 0
    store, figure = out / "compare-quick.zarr", out / "compare-quick.png"
    assert figure.read_bytes()[:4] == b"\x89PNG"
    ds = gf.sweeps.open_store(store)
    assert (ds.attrs["study"], ds.attrs["horizon"], ds.attrs["width"]) == ("compare", 4.0, 3)
    assert ds.sizes["learning_rate"] == 4
    assert output.startswith(gf.studies.compare_table(ds))
    assert f"figure: {figure}" in output

    code, output, _ = gradflow("plot", store)
    assert (code, output) == (0, f"figure: {store.with_suffix('.png')}\n")
    code, output, _ = gradflow("plot", store, "--out", out / "again" / "a.pdf")
    assert (code, output) == (0, f"figure: {out / 'again' / 'a.pdf'}\n")
    assert (out / "again" / "a.pdf").read_bytes()[:4] == b"%PDF"
    assert plt.get_fignums() == []

    code, output, _ = gradflow("info", store)
    assert code == 0
    assert "runs: 4 ok" in output
    assert "study: compare" in output
    assert "4 learning_rate" in output
    command = f"gradflow compare --quick --out {out} --samples 20 --horizon 4 --width 3"
    assert ds.attrs["command"] == command
    code, output, _ = gradflow("report", store)
    assert (code, output) == (0, f"report: {store.with_suffix('.html')}\n")
    page = store.with_suffix(".html").read_text()
    assert command in page
    assert html.escape(gf.tables.compare(ds)) in page
    code, output, err = gradflow("plot", store, "--out", out / "a.xyz")
    assert code == 2
    assert one_line(err).startswith("gradflow: Format 'xyz' is not supported")

    # The store of another study in the place of the one to be resumed.
    (out / "taken").mkdir()
    store.rename(out / "taken" / "small-init-quick.zarr")
    code, output, err = gradflow("small-init", "--quick", "--out", out / "taken", "--samples", "20")
    assert code == 2
    assert "which holds another study" in one_line(err)
    assert gf.sweeps.open_store(out / "taken" / "small-init-quick.zarr").attrs["study"] == "compare"


@pytest.mark.slow
def test_phase_diagram(gradflow, out, monkeypatch):
    code, output, _ = gradflow("phase-diagram", "--quick", "--out", out)
    assert code == 0
    store, figure = out / "phase-diagram-quick.zarr", out / "phase-diagram-quick.png"
    assert figure.read_bytes()[:4] == b"\x89PNG"
    ds = gf.sweeps.open_store(store)
    assert ds.attrs["study"] == "phase-diagram"
    assert output.startswith(gf.studies.phase_diagram_table(ds))
    assert list(ds.region.values) == ["green", "blue", "orange"]
    # Two runs of SGD stay near the full system everywhere; what is left at infinite d fails in the orange region.
    mean = ds.risk_sgd.mean("seed").values[..., -1]
    assert (abs(ds.risk_full.values[..., -1] / mean - 1) < 0.25).all()
    assert (ds.risk_truncated.values[2, :, -1] > 10 * mean[2]).all()
    laws = gf.studies.phase_diagram_table(ds)
    assert "0 of 19 runs did not reach the end" in laws
    assert (abs(ds.settled_risk / ds.predicted_settled_risk - 1).values[:3] < 0.06).all()
    assert ds.learning_time_start.values[1] > ds.learning_time_start.values[0]
    # The map over the exponents: its blue point is one of the other map.
    assert list(ds.region_exponents.values) == ["orange", "orange", "blue", "green", "green"]
    assert (list(ds.width_exponents.values), ds.attrs["exponents_dim"]) == ([4], 1000)
    assert (abs(ds.delta_exponents + ds.kappa - ds.kappa_plus_delta) < 1e-15).all()
    assert (abs(ds.gamma_over_p_exponents * 1000**ds.kappa_plus_delta - 1) < 1e-12).all()
    same = ds.sel(rate=1.0, noise=1e-3, kappa=0.1, kappa_plus_delta=0.0)
    assert abs(float(same.final_risk_exponents / same.final_risk) - 1) < 10 * ds.attrs["rtol"]
    assert (ds.final_risk_exponents.diff("kappa_plus_delta") < 0).all()
    assert (ds.learning_samples_exponents.sel(kappa_plus_delta=[0.0, 0.2, 0.4]).diff("kappa_plus_delta") > 0).all()
    # An interrupted run goes on with the parts it has.
    parts = out / "phase-diagram-quick-parts"
    shutil.rmtree(parts / "exponents.zarr")
    monkeypatch.setattr(_phase_diagram, "simulate", interrupt)
    monkeypatch.setattr(_phase_diagram, "_uninformed", interrupt)
    code, again, _ = gradflow("phase-diagram", "--quick", "--out", out)
    assert code == 0
    assert again.startswith(laws)
    code, _, err = gradflow("phase-diagram", "--quick", "--out", out, "--seeds", "3")
    assert code == 2
    assert re.search(r"`store` must hold the same sweep .*seeds: 2 -> 3.*--fresh", err.splitlines()[-1])
    code, _, err = gradflow("phase-diagram", "--quick", "--out", out, "--fresh")
    assert code == 130
    assert "`gradflow phase-diagram --quick" in err


def test_info_lists_what_there_is(gradflow):
    code, output, _ = gradflow("info")
    assert code == 0
    for name in ("GradientFlow", "GradientDescent", "TwoLayer", "ParameterNorm", "digits", "jax ", "device 0: "):
        assert name in output
    assert {"square", "small_init", "plateau", "Erf", "circle"} <= {
        line.split()[0] for line in output.splitlines() if line
    }
    for line in output.splitlines():
        assert len(line) <= 100, line
        if line.startswith("  "):
            assert len(line.split(maxsplit=1)) == 2, line


def test_version(gradflow):
    assert gradflow("--version") == (0, f"gradflow {gf.__version__}\n", "")


def test_an_interruption_and_a_warning_take_one_line(gradflow, monkeypatch, tmp_path):
    def warn(*arguments, **options):
        warnings.warn("rtol is low", gf.PrecisionWarning, stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setattr(gf.studies, "discrete_gap", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = gradflow("compare", "--quick", "--out", tmp_path / "o")
    assert code == 130
    assert err.splitlines() == ["gradflow: warning: rtol is low", "", "gradflow: interrupted; nothing was written."]


@pytest.mark.slow
def test_programs_are_kept_where_the_environment_says(tmp_path):
    """In the user's cache, one folder for each kind of processor; elsewhere, or nowhere, on request."""
    script = "import jax; from gradflow.cli._process import configure_jax; configure_jax();"
    script += "print(jax.config.jax_compilation_cache_dir)"

    def folder(**variables):
        plain = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        env = plain | variables
        return subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env
        ).stdout.strip()

    assert folder(XDG_CACHE_HOME=str(tmp_path)).startswith(str(tmp_path / "gradflow"))
    assert folder(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == str(
        tmp_path / "mine"
    )
    (tmp_path / "file").write_text("")
    assert folder(XDG_CACHE_HOME=str(tmp_path / "file")) == "None"


# Mistakes


def one_line(err):
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize("command", ["small-init", "compare", "momentum"])
def test_unknown_data_set(gradflow, command, tmp_path):
    code, output, err = gradflow(command, "--quick", "--data", "imagenet", "--out", tmp_path / "o")
    assert (code, output) == (2, "")
    assert re.match(r"gradflow: Argument `--data` must be one of 'digits', .*, but is 'imagenet'", one_line(err))


@pytest.mark.parametrize("command", ["small-init", "compare", "momentum"])
def test_unwritable_folder(gradflow, command, tmp_path, monkeypatch):
    """Refused before anything runs."""
    monkeypatch.setattr(gf.studies, "small_init", interrupt)
    monkeypatch.setattr(gf.studies, "discrete_gap", interrupt)
    monkeypatch.setattr(gf.studies, "momentum", interrupt)
    (tmp_path / "file").write_text("")
    code, output, err = gradflow(command, "--quick", "--out", tmp_path / "file" / "o")
    assert (code, output) == (2, "")
    assert one_line(err).startswith("gradflow: Argument `--out` must be a path that can be written, but is ")


MISTAKES = [
    (["small-init", "--quick", "--rtol", "-1"], "`--rtol` must be positive, but is -1"),
    (["small-init", "--quick", "--rtol", "2"], "`--rtol` must be below 1"),
    (["small-init", "--quick", "--seeds", "0"], "`--seeds` must be a non-empty"),
    (["small-init", "--quick", "--classes", "0", "0"], "`--classes` must be a sequence of distinct labels"),
    (["small-init", "--quick", "--classes", "0", "77"], "`--classes` must be"),
    (["small-init", "--quick", "--samples", "0"], "`--samples` must be"),
    (["compare", "--quick", "--samples", "0"], "`--samples` must be"),
    (["compare", "--quick", "--horizon", "-1"], "`--horizon` must be positive, but is -1"),
    (["compare", "--quick", "--rule", "adam"], "`--rule` must be one of 'gradient_descent', 'heavy_ball', 'nesterov'"),
    (["phase-diagram", "--quick", "--noise", "-1"], "`--noise` must not be negative, but is -1"),
    (["phase-diagram", "--quick", "--seeds", "1"], "`--seeds` must be an integer of at least 2, but is 1"),
    (["compare", "--quick", "--width", "0"], "`--width` must be an integer of at least 1, but is 0"),
    (
        ["plot", "nowhere.zarr"],
        "`store` must be a zarr store written by gradflow, but is 'nowhere.zarr', which does not",
    ),
    (
        ["info", "nowhere.zarr"],
        "`store` must be a zarr store written by gradflow, but is 'nowhere.zarr', which does not",
    ),
    (["info", "file"], "but is 'file', which holds something else"),
    (["plot", "sweep.zarr"], "`ds` must carry the attribute `study`"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes_end_with_one_line(gradflow, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    gf.sweeps.write_dataset(xr.Dataset({"a": ("x", [1.0])}), tmp_path / "sweep.zarr")
    code, printed, err = gradflow(*words)
    assert (code, printed) == (2, "")
    assert message in one_line(err)
    assert one_line(err).startswith("gradflow: Argument ")


@pytest.mark.parametrize("words", [["compare", "--wdith", "3"], ["nonsense"], ["compare", "--width", "three"]])
def test_misspelt_words_have_the_same_code(gradflow, words):
    code, _, err = gradflow(*words)
    assert code == 2
    assert "Usage:" in err


def test_without_a_word_it_prints_its_help(gradflow):
    code, printed, err = gradflow()
    assert (code, err) == (0, "")
    assert printed == gradflow("--help")[1]
    assert "small-init" in printed


def test_a_failed_run_has_a_code_of_its_own(gradflow, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        gf.solve(gf.GradientFlow(lambda w: w**2), 1.0 + gf.data.circle(1).y[0], [1e9], max_steps=3)

    monkeypatch.setattr(gf.studies, "discrete_gap", fail)
    code, _, err = gradflow("compare", "--quick", "--out", tmp_path / "o")
    assert code == 1
    assert "max_steps" in one_line(err)


@pytest.mark.parametrize(("codes", "code"), [([0, 1], 0), ([0, 2, 3, 2], 1)])
def test_flows_that_failed_are_told_and_have_the_code_of_failures(codes, code, capsys):
    status = xr.DataArray(codes)
    with pytest.raises(typer.Exit) if code else contextlib.nullcontext() as end:
        _studies._end_with(status)
    message = capsys.readouterr().err
    if not code:
        assert message == ""
        return
    assert end.value.exit_code == code
    assert message.startswith("gradflow: 3 of 4 flows ended early: max_steps: the step budget ran out")
    assert "step_underflow: " in message


@pytest.mark.slow
def test_a_mistake_in_a_process_of_its_own(tmp_path):
    words = ["small-init", "--quick", "--out", str(tmp_path), "--seeds", "0"]
    done = subprocess.run([sys.executable, "-c", START, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert one_line(done.stderr).startswith("gradflow: Argument `--seeds`")
    assert list(tmp_path.iterdir()) == []
