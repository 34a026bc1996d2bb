"""The command `gradflow`: studies, and tools for what they leave."""

import pathlib
from typing import Annotated

import typer

from gradflow.cli import _studies as _studies  # registers its commands
from gradflow.cli._app import app


def main() -> None:
    """Entry point of the command `gradflow`."""
    app()


@app.command("plot", short_help="Draws the figure of a stored study or run.")
def plot_store(
    store: Annotated[pathlib.Path, typer.Argument(help="A zarr store that a study or a run wrote.")],
    out: Annotated[pathlib.Path | None, typer.Option("--out", help="File to write; .png, .pdf or .svg.")] = None,
) -> None:
    """Draws the figure of a stored study again, or that of a run in a store, which may still go on."""
    from gradflow import plot
    from gradflow.sweeps import open_store

    target = store.with_suffix(".png") if out is None else out
    print(f"figure: {plot.save(plot.draw(open_store(store)), target)}")


@app.command("report", short_help="One page of a stored study, sweep or run, to send on.")
def report_store(
    store: Annotated[pathlib.Path, typer.Argument(help="A zarr store, or a file that Solution.save wrote.")],
    out: Annotated[pathlib.Path | None, typer.Option("--out", help="File to write; .html.")] = None,
) -> None:
    """Writes one self-contained page of HTML: question, command, figure, results with errors, failures, cost."""
    from gradflow.cli._process import configure_jax
    from gradflow.reports import report

    configure_jax()
    print(f"report: {report(store, store.with_suffix('.html') if out is None else out)}")


@app.command("site", short_help="Builds the documentation as a site, in a clone.")
def build_site(
    out: Annotated[pathlib.Path, typer.Option("--out", help="Folder to write.")] = pathlib.Path("gradflow-site"),
    notebooks: Annotated[
        bool, typer.Option("--notebooks/--no-notebooks", help="Execute the notebooks, in minutes, and show them.")
    ] = True,
) -> None:
    """Builds guide, notebooks with their figures and reference as one site, which opens without a network."""
    from gradflow.reports import site

    print(f"site: {site(out, notebooks=notebooks) / 'index.html'}")


@app.command("info", short_help="Versions and everything on offer, or what a store holds.")
def info(
    store: Annotated[pathlib.Path | None, typer.Argument(help="A zarr store, to be described.")] = None,
) -> None:
    """Versions, devices and what the package offers; with a store, what it holds and how it was computed."""
    from gradflow.cli._info import describe_installation, describe_store

    print(describe_installation() if store is None else describe_store(store))


@app.command("export", short_help="Writes a store as one netCDF file.")
def export(
    store: Annotated[pathlib.Path, typer.Argument(help="A zarr store that a study or a sweep wrote.")],
    file: Annotated[pathlib.Path, typer.Argument(help="The netCDF file to write.")],
) -> None:
    """Writes a store as one netCDF file."""
    from gradflow.sweeps import to_netcdf

    print(f"netCDF: {to_netcdf(store, file)}")


@app.command("guide", short_help="The guide: prints a page, or lists the pages.")
def guide(
    page: Annotated[str | None, typer.Argument(help="A page of the guide; without one, all are listed.")] = None,
) -> None:
    """Prints a page of the guide as plain text; without a page, the list of pages."""
    from gradflow.reports._guide import list_pages, read_page

    print(list_pages() if page is None else read_page(page).rstrip())
