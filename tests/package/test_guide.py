"""README and guide: their Python runs, what they show is what is printed, and the command line finds every page."""

import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys
import unittest.mock

import pytest

import gradflow as gf
from gradflow.cli import main
from gradflow.reports._guide import PAGES, list_pages, read_page

ROOT = pathlib.Path(gf.__file__).parent
README = (ROOT.parent / "README.md").read_text()
OPTIONAL = ("flax", "haiku", "tensorboardX", "wandb")
"""Packages that a block may need; where one is missing, its blocks are skipped."""
QUICK = {"benchmarks", "limits", "momentum"}
"""Pages whose Python takes no more than a few seconds."""


def blocks_of(text):
    """The Python of a page, block by block; other fences are not run."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def package_of(block):
    """The optional package that a block imports, or nothing."""
    return next((name for name in OPTIONAL if re.search(rf"^(from|import) {name}\b", block, re.MULTILINE)), None)


def run(blocks, where):
    """The names that blocks leave behind, run in order in one namespace, and what they print."""
    names, message = {}, io.StringIO()
    with contextlib.redirect_stdout(message):
        for block in blocks:
            exec(compile(block, where, "exec"), names)
    return names, message.getvalue()


def without_numbers(text):
    return [" ".join(re.sub(r"\d[\d.e+-]*", "#", line).split()) for line in text.strip().splitlines()]


# README


def test_the_readme_is_short_and_names_what_it_promises():
    assert len(README.splitlines()) <= 180
    for command in ("pip install -e . && gradflow small-init\n", 'pip install -e ".[test]" && pytest\n'):
        assert command in README


def test_references_to_pages_and_scripts_lead_somewhere():
    for where, text in {"README": README, **{name: read_page(name) for name in PAGES}}.items():
        for name in re.findall(r"`gradflow guide ([a-z-]+)`", text):
            assert name in PAGES, f"{where}: no page {name}"
        for script in re.findall(r"python (benchmarks/\w+\.py)", text):
            assert (ROOT.parent / script).is_file(), f"{where}: no {script}"


@pytest.mark.slow
def test_python_of_the_readme_runs_and_prints_what_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(README)
    assert len(blocks) == 2
    names, message = run(blocks, "README.md")
    (shown,) = re.findall(r"^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert without_numbers(message) == without_numbers(shown)
    evaluations = int(re.search(r"(\d+) gradient evaluations", shown)[1])
    assert int(names["sol"].stats["gradient_evaluations"]) == pytest.approx(evaluations, rel=0.1)  # rounding differs
    assert names["sol"].status == "ok"
    assert abs(float(names["gap"].order[0]) - 1) < 0.1
    assert (tmp_path / "escape.zarr").is_dir()


# Guide


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PAGES]
)
def test_python_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run([block for block in blocks_of(read_page(name)) if not package_of(block)], f"{name}.md")


@pytest.mark.slow
@pytest.mark.parametrize("package", OPTIONAL)
def test_python_that_needs_another_package_runs(package, tmp_path, monkeypatch):
    """These blocks need nothing of their page but its first one."""
    monkeypatch.chdir(tmp_path)
    pytest.importorskip(package)
    pages = [blocks_of(read_page(name)) for name in PAGES]
    wanted = [[blocks[0], *chosen] for blocks in pages if (chosen := [b for b in blocks if package_of(b) == package])]
    assert wanted
    for blocks in wanted:
        run(blocks, package)


@pytest.mark.slow
@pytest.mark.parametrize(("package", "call"), [("tensorboardX", "add_scalar"), ("wandb", ".log")])
def test_recipes_for_other_loggers_log_what_runs_tell(package, call, tmp_path, monkeypatch):
    """Where the package is missing: with a stand-in that takes every call."""
    monkeypatch.chdir(tmp_path)
    recorder = unittest.mock.MagicMock()
    monkeypatch.setitem(sys.modules, package, recorder)
    blocks = blocks_of(read_page("saving-and-continuing"))
    run([blocks[0], *(block for block in blocks if package_of(block) == package)], package)
    logged = [entry for entry in recorder.mock_calls if entry[0].endswith(call)]
    assert logged  # one for each segment; how many there are is a matter of the machine's speed
    for _, values, _ in logged:
        numbers = values[0].values() if package == "wandb" else values[1:]
        assert all(float(number) == float(number) for number in numbers)


def test_pages_are_those_that_are_listed():
    assert {path.stem for path in (ROOT / "guide").iterdir()} == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_the_command_prints_a_page(name, monkeypatch, capsys):
    text = read_page(name)
    assert text.isascii()  # plain text, for terminals and pipes of any encoding
    title, summary = text.split("\n\n", 2)[:2]
    assert re.fullmatch(r"# \S.*", title)
    assert len(summary) > 40
    assert not summary.startswith(("#", "|", "`", "-"))
    monkeypatch.setattr(sys, "argv", ["gradflow", "guide", name])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    assert capsys.readouterr().out.rstrip() == text.rstrip()
    assert f"  {name} " in list_pages()
    assert title.removeprefix("# ") in list_pages()


def test_a_page_that_does_not_exist(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gradflow", "guide", "solver"])
    with pytest.raises(SystemExit, match=r"^2$"):
        main()
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert "Did you mean 'solvers'?" in message
    assert all(f"'{name}'" in message for name in PAGES)


def test_a_reader_of_the_pipe_may_stop_early():
    program = "import sys; from gradflow.cli import main; sys.argv = ['gradflow', 'guide', 'momentum']; main()"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
