"""`site`: guide, notebooks with their figures and reference by room, as one site of HTML."""

import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import gradflow
from gradflow._checks import fail
from gradflow.reports._guide import PAGES, read_page

ROOMS = {
    "": "solutions and errors",
    "runs": "solve and iterate",
    "sweeps": "sweeps",
    "problems": "problems",
    "problems.losses": "losses",
    "models": "models",
    "data": "data",
    "flows": "flows",
    "rules": "rules",
    "solvers": "solvers",
    "observables": "observables",
    "limits": "limits",
    "theory": "theory",
    "studies": "studies",
    "plot": "figures",
    "tables": "tables",
    "reports": "reports",
}
"""Rooms with a page in the reference, and its title, in the order of the page's menu."""
NEEDS = ("mkdocs", "material", "mkdocstrings", "latex2mathml", "jupytext", "nbconvert")

CONFIGURATION = """
site_name: gradflow
docs_dir: docs
site_dir: site
use_directory_urls: false
theme:
  name: material
  font: false
  features: [navigation.tabs, navigation.top, content.code.copy, toc.follow]
  palette:
    - media: "(prefers-color-scheme: light)"
      scheme: default
      primary: blue grey
      toggle: {{icon: material/weather-night, name: dark}}
    - media: "(prefers-color-scheme: dark)"
      scheme: slate
      primary: blue grey
      toggle: {{icon: material/weather-sunny, name: light}}
plugins:
  - search
  - mkdocstrings:
      handlers:
        python:
          paths: ["{source}"]
          options:
            docstring_style: null
            show_root_heading: true
            show_root_full_path: false
            show_source: false
            show_bases: false
            members: false
            merge_init_into_class: true
            show_signature_annotations: true
            extensions: ["gradflow.reports._doctests"]
            separate_signature: true
            heading_level: 2
markdown_extensions: [tables, admonition, attr_list, md_in_html, pymdownx.superfences, pymdownx.highlight]
validation: {{links: {{not_found: warn, anchors: warn, absolute_links: warn}}}}
nav: {menu}
"""


def site(out: str | os.PathLike[str], *, notebooks: bool = True) -> pathlib.Path:
    """Builds the documentation: the README as first page, the guide, executed notebooks, the reference by room.

    It needs a clone of the repository, which holds the README and the notebooks, and the packages of the extra `site`:
    `pip install -e ".[site]"`. Pages load nothing from the network.

    **Arguments**: `out`: the folder to write; what a former build left there is replaced. `notebooks`: whether to
    execute them, which takes minutes, and to show them with their figures.

    **Returns** the folder. **Raises** `ValueError` outside of a clone, for missing packages, a folder that holds other
    things, a notebook that fails, and links that lead nowhere.

    >>> import gradflow as gf
    >>> gf.reports.site("README.md")  # a file
    Traceback (most recent call last):
    ValueError: Argument `out` must be a folder, but is a file: README.md. Give another path.
    """
    target = pathlib.Path(out)
    if target.is_file():
        raise fail("out", "be a folder", f"a file: {target}", "Give another path.")
    if target.is_dir() and any(target.iterdir()) and not (target / "sitemap.xml").exists():
        raise fail("out", "be empty, or a site to be replaced", f"a folder with other things: {target}")
    clone = pathlib.Path(gradflow.__file__).parent.parent
    if not (clone / "README.md").is_file() or not (clone / "notebooks").is_dir():
        raise fail(
            "gradflow", "be installed from a clone with `pip install -e .`", f"in {clone}, without its notebooks"
        )
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise fail(
            "gradflow", "be installed with its extra", f"without {', '.join(missing)}", 'pip install -e ".[site]"'
        )
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        (work / "docs").mkdir()
        menu = [{"Home": _home(clone, work / "docs")}, {"Guide": _guide(work / "docs")}]
        if notebooks:
            menu.append({"Notebooks": _notebooks(clone, work / "docs")})
        menu.append({"Reference": _reference(work / "docs")})
        text = CONFIGURATION.format(source=clone, menu=repr(menu))
        (work / "mkdocs.yml").write_text(text, encoding="utf-8")
        _run("out", [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(work / "mkdocs.yml")])
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(work / "site", target)
    return target


def _home(clone: pathlib.Path, docs: pathlib.Path) -> str:
    """The README with the figures that it shows."""
    text = (clone / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        (docs / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clone / path, docs / path)
    (docs / "index.md").write_text(_linked(text, "guide/"), encoding="utf-8")
    return "index.md"


def _guide(docs: pathlib.Path) -> list[dict[str, str]]:
    (docs / "guide").mkdir()
    pages = []
    for name in PAGES:
        text = read_page(name)
        (docs / "guide" / f"{name}.md").write_text(_linked(text, ""), encoding="utf-8")
        pages.append({_title(text): f"guide/{name}.md"})
    return pages


def _notebooks(clone: pathlib.Path, docs: pathlib.Path) -> list[dict[str, str]]:
    """Every notebook, executed, with its figures beside it."""
    (docs / "notebooks").mkdir()
    pages = []
    for source in sorted((clone / "notebooks").glob("*.py")):
        executed = docs / "notebooks" / f"{source.stem}.ipynb"
        convert = ["--quiet", "--to", "ipynb", "--execute", "--output", str(executed), str(source)]
        _run("notebooks", [sys.executable, "-m", "jupytext", *convert])
        _run(
            "notebooks", [sys.executable, "-m", "nbconvert", "--log-level", "ERROR", "--to", "markdown", str(executed)]
        )
        executed.unlink()
        page = executed.with_suffix(".md")
        text = _with_formulas(page.read_text(encoding="utf-8"))
        page.write_text(text, encoding="utf-8")
        pages.append({_title(text): f"notebooks/{page.name}"})
    return pages


def _reference(docs: pathlib.Path) -> list[dict[str, str]]:
    from gradflow.reports._doctests import fenced

    (docs / "reference").mkdir()
    pages = []
    for room, title in ROOMS.items():
        module = importlib.import_module(f"gradflow.{room}".rstrip("."))
        lines = [f"# {title}", "", fenced((inspect.getdoc(module) or "").strip()), ""]
        for name, value in sorted(vars(module).items(), key=lambda item: item[0].lower()):
            if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            # What the package offers at its top has a page of its own room, but for what is of no room.
            if value.__module__.startswith("gradflow.") and (room or value.__module__.count(".") == 1):
                lines += [f"::: {value.__module__}.{value.__qualname__}", ""]
        path = f"reference/{room.replace('.', '-') or 'gradflow'}.md"
        (docs / path).write_text("\n".join(lines), encoding="utf-8")
        pages.append({title: path})
    return pages


def _title(text: str) -> str:
    """The first heading of a page."""
    return next(line[2:] for line in text.splitlines() if line.startswith("# ")).replace('"', "")


def _linked(text: str, folder: str) -> str:
    """Mentions of pages of the guide as links to them."""
    return re.sub(r"`gradflow guide ([a-z-]+)`", rf"[`gradflow guide \1`]({folder}\1.md)", text)


def _with_formulas(text: str) -> str:
    """Formulas between dollars as MathML, which browsers draw by themselves; code is left alone."""
    from latex2mathml.converter import convert

    parts = re.split(r"(```[\s\S]*?```|`[^`\n]*`|^ {4}.*$)", text, flags=re.MULTILINE)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"\$\$(.+?)\$\$", lambda m: convert(m[1], display="block"), parts[i], flags=re.DOTALL)
        parts[i] = re.sub(r"\$([^$]+?)\$", lambda m: convert(m[1]), parts[i])
    return "".join(parts)


def _run(argument: str, command: list[str]) -> None:
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        messages = (done.stdout + done.stderr).strip()[-2000:]
        raise fail(argument, "be built without a complaint", f"not, by `{' '.join(command[2:4])}`:\n{messages}")
