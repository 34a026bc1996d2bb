"""The application to which all commands belong."""

from typing import Annotated

import typer

from gradflow.cli._process import Commands

app = typer.Typer(
    cls=Commands,
    help="Neural-network training as a dynamical system: exact gradient flows beside the optimisers they idealise.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)


def _version(asked: bool) -> None:
    if asked:
        import gradflow

        print(f"gradflow {gradflow.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Neural-network training as a dynamical system: exact gradient flows beside the optimisers they idealise."""
