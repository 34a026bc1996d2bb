"""Parts of a page: escaped text, tables, figures as SVG within the page, and the page around them."""

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

LARGEST_SVG = 900_000
"""Characters of a figure as SVG: one that takes more, with many thousands of points, goes into the page as an image."""

PROVENANCE = ("python", "device", "dtype", "commit", "created")
"""What is told of a computation besides versions."""

DPI = 160
"""Pixels per inch of a figure that goes into the page as an image."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --faint: #6b6b6b; --line: #d8d8d8; --box: #f5f5f3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #161616; --faint: #a0a0a0; --line: #3a3a3a; --box: #222222; }
  figure svg, figure img { filter: invert(1) hue-rotate(180deg) brightness(1.7); }
}
body { margin: 0 auto; padding: 1rem; max-width: 72rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--line); }
p { max-width: 46rem; } p.about { color: var(--faint); margin-top: 0; }
pre, .scroll, figure { overflow-x: auto; }
pre { background: var(--box); padding: 0.75rem; font: 0.82rem/1.4 ui-monospace, monospace; }
figure { margin: 1rem 0; } figure svg, figure img { width: 100%; min-width: 40rem; height: auto; display: block; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem 0.2rem 0; text-align: right; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td.text, th.text { text-align: left; } td.long { white-space: normal; min-width: 16rem; }
"""


def escape(text: object) -> str:
    """Text as it stands in a page."""
    return html.escape(str(text))


def section(title: str, *parts: str) -> str:
    """A section with its heading; nothing where there is nothing in it."""
    shown = [part for part in parts if part]
    return "\n".join([f"<h2>{escape(title)}</h2>", *shown]) if shown else ""


def pre(text: str) -> str:
    """Text in which columns stay columns."""
    return f"<pre>{escape(text)}</pre>"


def table(names: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[str] = ()) -> str:
    """A table; columns named in `text` are aligned to the left, all others are numbers."""
    left = [name in text for name in names]

    def line(kind: str, cells: Sequence[str]) -> str:
        inner = (f"<{kind}{_class(one, cell)}>{escape(cell)}</{kind}>" for cell, one in zip(cells, left, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    head, lines = line("th", names), [line("td", row) for row in rows]
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _class(left: bool, cell: str) -> str:
    if not left:
        return ""
    return ' class="text long"' if len(cell) > 40 else ' class="text"'


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and what they are."""
    lines = "\n".join(
        f'<tr><th scope="row" class="text">{escape(name)}</th><td{_class(True, value)}>{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f'<div class="scroll"><table><tbody>\n{lines}\n</tbody></table></div>'


def drawing(drawn: Figure, label: str) -> str:
    """A figure within the page: as SVG, or as an image where that would be large.

    Its background is transparent, so that it looks like the page in the light and in the dark.
    """
    content = inline_svg(drawn)
    if len(content) > LARGEST_SVG:
        image = io.BytesIO()
        drawn.savefig(image, format="png", dpi=DPI, transparent=True)
        encoded = base64.b64encode(image.getvalue()).decode()
        content = f'<img alt="{escape(label)}" src="data:image/png;base64,{encoded}">'
    return f'<figure role="img" aria-label="{escape(label)}">\n{content}\n</figure>'


def inline_svg(drawn: Figure) -> str:
    """A figure as an element `svg`, without links: text as outlines, coordinates to a hundredth of a point."""
    written = io.StringIO()
    # A fixed salt: the same figure is written in the same words.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "gradflow"}):
        drawn.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Within HTML the two namespaces are known, and nothing is looked up.
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href=", "href=")
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text).strip()


def number(value: object) -> str:
    """A number to four digits, counts in full, a dash for what is not known."""
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, float | np.floating):
        return "-" if np.isnan(value) else f"{float(value):.4g}"
    return str(value)


def and_error(value: object, error: float | np.ndarray) -> str:
    """A number with its error beside it, where that is known."""
    return f"{number(value)} ± {float(error):.1e}" if np.isfinite(error) else number(value)


def versions(attributes: Mapping[str, object]) -> str:
    """A table of what `installation` tells, as far as it is known."""
    rows = list(json.loads(str(attributes.get("versions", "{}"))).items())
    return pairs([*rows, *((name, str(attributes[name])) for name in PROVENANCE if name in attributes)])


def page(title: str, *parts: str) -> str:
    """The page: one file, which asks for nothing from elsewhere."""
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
