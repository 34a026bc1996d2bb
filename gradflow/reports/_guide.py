"""What `gradflow guide` prints: the pages of the guide, plain text shipped within the package."""

from importlib.resources import files

from gradflow._checks import check_choice

PAGES = (
    "first-steps",
    "choosing-times-and-tolerances",
    "own-models",
    "large-data",
    "saving-and-continuing",
    "pictures",
    "solvers",
    "momentum",
    "edge-of-stability",
    "small-initialisation",
    "high-dimension",
    "mean-field",
    "early-stage",
    "nonsmooth",
    "stochastic",
    "sweeps",
    "benchmarks",
    "extending",
    "limits",
)
"""In the order in which they are best read."""


def read_page(name: str) -> str:
    """The text of a page.

    **Raises** `ValueError` for a name that no page has.

    >>> from gradflow.reports._guide import read_page
    >>> read_page("solvers").split("\\n")[0]
    '# Solvers: which one when, and what they cost'
    """
    check_choice("page", name, PAGES)
    return (files("gradflow") / "guide" / f"{name}.md").read_text(encoding="utf-8")


def list_pages() -> str:
    """The names of the pages, each with its title."""
    width = max(map(len, PAGES))
    titles = {name: read_page(name).split("\n", 1)[0].removeprefix("# ") for name in PAGES}
    lines = [f"  {name:<{width}}  {title}" for name, title in titles.items()]
    return "\n".join(["gradflow guide PAGE prints one of", "", *lines])
