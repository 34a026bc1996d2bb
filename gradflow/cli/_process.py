"""What a command line sets up, since its process is its own, and how it complains: one line on standard error."""

import hashlib
import os
import pathlib
import platform
import re
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperGroup

from gradflow._solution import SolveError

SAME = {"name": "data", "n": "samples", "axes['seed']": "seeds"}
"""Arguments of Python that go by another name on the command line."""


class Commands(TyperGroup):
    """Ends with one line: code 2 for complaints about input, 1 for failed runs, 130 for interruptions.

    Without a command it prints the help, which is no complaint.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def invoke(self, ctx: Any) -> object:
        warnings.showwarning = _warn
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            # The reader of a pipe, such as `head`, has seen enough; nothing is left to say to it, at exit neither.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            print("\ngradflow: interrupted; nothing was written.", file=sys.stderr)
            raise typer.Exit(130) from None
        except (ValueError, OSError, SolveError) as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            options = {name for option in command.params for name in option.opts} if command else set()
            print(f"gradflow: {as_options(str(error), options)}", file=sys.stderr)
            raise typer.Exit(1 if isinstance(error, SolveError) else 2) from None


def as_options(message: str, options: Iterable[str]) -> str:
    """A message about an argument of Python, about the option of the same meaning if there is one."""

    def option(match: re.Match[str]) -> str:
        name = "--" + SAME.get(match[1], match[1]).replace("_", "-")
        return f"Argument `{name}`" if name in options else match[0]

    return re.sub(r"Argument `([^`]+)`", option, message)


def configure_jax() -> None:
    """Float64, the reference precision of every study, and programs that are compiled once for all processes.

    Importing the package decides neither. `JAX_COMPILATION_CACHE_DIR` names another folder for programs, and
    `JAX_ENABLE_COMPILATION_CACHE=0` keeps none.
    """
    import jax

    jax.config.update("jax_enable_x64", True)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def cache_folder() -> pathlib.Path:
    """A folder in the user's cache, of its own for each kind of processor: programs are made for one of them."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "gradflow" / f"{platform.machine()}-{_processor()}"


def _processor() -> str:
    try:
        description = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        description = "\n".join(
            line for line in description.splitlines() if line.startswith(("flags", "Features", "model name"))
        )
    except OSError:
        description = platform.processor()
    return hashlib.sha256(description.encode()).hexdigest()[:12]


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"gradflow: warning: {message}", file=sys.stderr)
