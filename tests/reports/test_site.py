"""The site: every public name in it, no link that leads nowhere, nothing from the network."""

import html
import re

import pytest

import gradflow as gf
from gradflow.reports import site
from gradflow.reports._guide import PAGES
from gradflow.reports._site import _with_formulas


@pytest.mark.slow
def test_a_site_is_complete_and_replaces_the_last_one(tmp_path):
    """Building is strict: a link or a name that leads nowhere is an error."""
    out = tmp_path / "site"
    for _ in range(2):
        assert site(out, notebooks=False) == out
    pages = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*.html")}
    assert {f"guide/{name}.html" for name in PAGES} <= set(pages)
    for room, name in (("flows", "CentralFlow"), ("runs", "solve"), ("gradflow", "Solution"), ("sweeps", "sweep")):
        page = html.unescape(pages[f"reference/{room}.html"])
        assert re.search(rf'<h2[^>]* id="gradflow[\w.]*\.{name}"', page), (room, name)
    for name in dir(gf.flows):
        if isinstance(getattr(gf.flows, name), type) and getattr(gf.flows, name).__module__.startswith("gradflow."):
            assert f'.{name}"' in pages["reference/flows.html"], name
    # Examples are blocks of code, not quotations; links to pages of the guide are links.
    assert "<blockquote>" not in "".join(pages.values())
    assert 'href="guide/solvers.html"' in pages["index.html"]
    for name, page in pages.items():
        for source in re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="([^"]+)"', page):
            assert not source.startswith(("http:", "https:", "//")), (name, source)
            if name != "404.html" and not source.startswith("data:"):
                assert (out / name).parent.joinpath(source.split("?")[0].split("#")[0]).exists(), (name, source)


def test_bad_input(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="a folder with other things"):
        site(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_formulas_are_mathml_and_code_is_left_alone():
    text = "A $x^2$ and `$HOME`.\n\n```\n$y$ $z$\n```\n\n    $ indented $\n\n$$a$$\n"
    out = _with_formulas(text)
    assert out.count("<math") == 2
    assert 'display="block"' in out
    for left in ("`$HOME`", "$y$ $z$", "    $ indented $"):
        assert left in out
