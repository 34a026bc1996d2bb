"""Reports: one file that asks for nothing else, with every number, failure and version that the data set has."""

import html.parser
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import gradflow as gf
from gradflow.cli import main
from gradflow.reports._html import drawing, inline_svg
from gradflow.studies._by_name import question_of, studies_in

SECTIONS = ["Command", "Figure", "Results", "Runs that failed", "Runs", "Cost", "Settings", "Versions"]
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(html.parser.HTMLParser):
    """The text of a page by section, its tables as rows of cells, and all that it asks for from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.asked, self.sections, self.tables, self.classes = [], [], {}, {}, []
        self.here = "top"
        self.feed(text)
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.asked += [v for k, v in attrs.items() if k in ("src", "href", "xlink:href", "data") and v[0] != "#"]
        self.asked += [tag] if tag in ("link", "script", "iframe", "object") else []
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.here = ""
        if tag == "tr":
            self.tables.setdefault(self.here, []).append([])
        if tag in ("td", "th"):
            self.tables[self.here][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.here += data
        self.sections[self.here] = self.sections.get(self.here, "") + data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[self.here][-1][-1] += data


def quadratic(w):
    return 0.5 * jnp.sum(w**2)


SEEDS = [0, 1, 2]


@pytest.fixture(scope="module")
def swept():
    """Descent at a rate that converges and at one that diverges."""

    def build(rate, seed):
        return gf.GradientDescent(quadratic, rate), jax.random.normal(jax.random.key(seed), (2,))

    observe = {"norm": gf.observables.ParameterNorm()}
    axes = {"rate": [0.5, 40.0], "seed": SEEDS}
    return gf.sweep(build, axes, [0.0, 10.0, 400.0], observe=observe, progress=False)


@pytest.fixture(scope="module")
def page(swept, tmp_path_factory):
    return Page(gf.report(swept, tmp_path_factory.mktemp("reports") / "sweep.html").read_text())


def test_a_page_is_one_file(page):
    assert page.asked == []
    assert list(page.sections)[1:] == SECTIONS


def test_every_run_that_failed_is_listed_with_what_helps(page, swept):
    bad = np.argwhere(swept.status.values > 1)
    assert len(bad) == 3
    assert f"{len(bad)} of 6 runs" in page.sections["Runs that failed"]
    head, *rows = page.tables["Runs that failed"]
    assert head[:3] == ["rate", "seed", "status"]
    assert [row[:3] for row in rows] == [["40", str(seed), "diverged"] for seed in SEEDS]
    assert all("lower the learning rate" in row[-1] for row in rows)
    assert rows[0][3] == f"{swept.t_final.values[1, 0]:.4g}"


def test_means_have_their_standard_errors_beside_them(page, swept):
    head, good, bad = page.tables["Results"]
    assert head == ["rate", "runs", "loss_last", "norm"]
    norms = swept.norm.values[0, :, -1]
    mean, error = norms.mean(), norms.std(ddof=1) / np.sqrt(3)
    assert good == ["0.5", "3", good[2], f"{mean:.4g} ± {error:.1e}"]
    assert bad[:2] == ["40", "0"]
    assert bad[3] == "-"


def test_every_run_is_listed(page, swept):
    head, *rows = page.tables["Runs"]
    assert len(rows) == 6
    row = dict(zip(head, rows[1], strict=True))
    assert (row["rate"], row["seed"], row["status"]) == ("0.5", "1", "ok")
    assert row["loss_last"] == f"{swept.loss_last.values[0, 1]:.4g}"
    assert row["norm at the end"] == f"{swept.norm.values[0, 1, -1]:.4g}"
    assert row["gradient_evaluations"] == f"{int(swept.gradient_evaluations.values[0, 1]):,}"


def test_cost_settings_and_versions(page, swept):
    cost = dict(page.tables["Cost"])
    assert cost["gradient_evaluations"] == f"{int(swept.gradient_evaluations.sum()):,} in all"
    versions = dict(page.tables["Versions"])
    assert versions["jax"] == jax.__version__
    assert versions.keys() >= {"gradflow-jax", "numpy", "python", "device", "created"}
    assert json.loads(dict(page.tables["Settings"])["axes"])["seed"] == SEEDS
    assert "Computed from Python" in page.sections["Command"]


def test_errors_that_runs_estimate_stand_beside_what_they_are_of(tmp_path):
    ds = xr.Dataset(
        {
            "status": ("width", np.array([0, -1, 7])),
            "g": (("width", "time"), np.array([[1.0, 2.0], [np.nan, np.nan], [3.0, 4.0]])),
            "error_g": ("width", np.array([0.25, np.nan, 0.5])),
        },
        {"width": [4, 8, 16], "time": [0.0, 1.0]},
    )
    page = Page(gf.report(ds, tmp_path / "a.html").read_text())
    assert [row[-1] for row in page.tables["Runs"]] == ["g at the end", "2 ± 2.5e-01", "-", "4 ± 5.0e-01"]
    failed = page.tables["Runs that failed"][1:]
    assert [row[:2] for row in failed] == [["8", "missing"], ["16", "inaccurate"]]
    assert "goes on with it" in failed[0][-1]
    assert "does not tell with which versions" in page.sections["Versions"]


def test_text_is_escaped(swept, tmp_path):
    page = Page(gf.report(swept.assign_attrs(command="a <script> & b", data="<b>"), tmp_path / "a.html").read_text())
    assert page.sections["Command"].splitlines()[1] == "a <script> & b"
    assert dict(page.tables["Settings"])["data"] == "<b>"


def test_the_command_writes_the_page_of_a_store(swept, tmp_path, monkeypatch, capsys):
    store = gf.sweeps.write_dataset(swept, tmp_path / "runs.zarr")
    for words, written in [
        ([store], tmp_path / "runs.html"),
        ([store, "--out", tmp_path / "x.html"], tmp_path / "x.html"),
    ]:
        monkeypatch.setattr(sys, "argv", ["gradflow", "report", *map(str, words)])
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        with pytest.raises(SystemExit, match=r"^0$"):
            main()
        assert capsys.readouterr().out == f"report: {written}\n"
        assert len(Page(written.read_text()).tables["Runs"]) == 7


def test_a_run_has_a_page_too(tmp_path):
    rule = gf.GradientDescent(quadratic, 0.1)
    sol = gf.iterate(rule, jnp.ones(2), 4, observe={"w": lambda w: w}, save_every=1)
    sol.save(tmp_path / "run.gf")
    from_file = Page(gf.report(tmp_path / "run.gf", tmp_path / "b.html").read_text())
    page = Page(gf.report(sol, tmp_path / "a.html").read_text())
    assert page.asked == []
    assert page.tables["Results"] == from_file.tables["Results"]
    assert ["w[1]", "1", f"{0.9**4:.4g}"] in page.tables["Results"]
    assert dict(page.tables["Cost"])["gradient_evaluations"] == "4"
    assert "None of 1." in page.sections["Runs that failed"]


def test_of_a_batch_the_members_that_failed_are_listed(tmp_path):
    run = lambda s: gf.iterate(gf.GradientDescent(quadratic, s), jnp.ones(2), 500, throw=False)  # noqa: E731
    page = Page(gf.report(jax.vmap(run)(jnp.array([0.5, 40.0])), tmp_path / "a.html").read_text())
    assert [row[:2] for row in page.tables["Runs that failed"][1:]] == [["1", "diverged"]]


def members(count, times):
    rng = np.random.default_rng(0)
    over_time = {name: (("scale", "seed", "time"), rng.random((4, count // 4, times)) + 0.1) for name in "abcdef"}
    per_run = {"status": (("scale", "seed"), np.zeros((4, count // 4), int))}
    return xr.Dataset(over_time | per_run, {"time": np.linspace(0, 1, times)})


def test_64_members_take_less_than_two_megabytes(tmp_path):
    """Six noisy variables of 64 members at 241 times: the worst that a figure of the kind can hold."""
    written = gf.report(members(64, 241), tmp_path / "a.html")
    assert written.stat().st_size < 2e6
    assert Page(written.read_text()).asked[0].startswith("data:image/png;base64,")


def test_figures_stay_as_they_are_within_a_page():
    drawn = gf.plot.members(members(4, 21))
    text = inline_svg(drawn)
    assert text.startswith("<svg")
    assert "http" not in text
    assert "<metadata" not in text
    page = Page(drawing(drawn, "a figure"))
    assert page.asked == []


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        (1.0, "a.html", "`source` must be a data set"),
        (xr.Dataset(), "a.pdf", "`path` must end with .html"),
        (xr.Dataset(), "/dev/null/a.html", "`path` must be a path that can be written"),
        ("no-such.zarr", "a.html", "`store` must be a zarr store"),
    ],
)
def test_what_has_no_page_is_refused(source, path, message, tmp_path):
    with pytest.raises(ValueError, match=f"^Argument {message}"):
        gf.report(source, tmp_path / path if path[0] != "/" else path)


def test_every_study_asks_a_question():
    asked = {study: question_of(xr.Dataset(attrs={"study": study})) for study in studies_in("gradflow.plot")}
    assert len(set(asked.values())) == len(asked)
    assert all(question.endswith("?") for question in asked.values())
    assert question_of(xr.Dataset()) == ""
