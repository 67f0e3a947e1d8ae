"""The app: its commands, ``--version``, and mistakes in the arguments, none of which waits for torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from asymvlm_cli import commands, work

EXIT_FAILED, EXIT_USAGE = 1, 2
NAME = "asymvlm"
# typer carries its own copy of click in some versions and imports click in others; this names the class in both
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name=NAME,
    help="Prune the vision tokens of Hugging Face vision-language models before prefill.",
    pretty_exceptions_enable=False,
    invoke_without_command=True,
)
for command in commands.COMMANDS:
    app.command()(command)


def version() -> str:
    """This package and those that it runs on, by their records on disk."""

    def installed(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    own = installed("asymvlm-kernels")
    spec = importlib.util.find_spec("asymvlm_kernels")  # found, not imported
    if spec is not None and spec.origin is not None:  # right in a bare checkout too
        written = re.search(r'^__version__ = "(.+)"', Path(spec.origin).read_text(encoding="utf-8"), re.MULTILINE)
        own = own if written is None else written.group(1)
    others = ", ".join(f"{name} {installed(name)}" for name in ("torch", "triton", "transformers"))
    return f"asymvlm-kernels {own} ({others}, Python {platform.python_version()})"


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version())
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log everything, tracebacks included.")] = False,
    shown: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    work.settings.verbose = verbose
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``argv`` without the program's name, by default the process's own.

    Returns:
        0; 1 if a self-test or a verification failed or memory ran out; 2 on a mistake in the arguments, told in one
        line on stderr; 130 where Ctrl-C ended it.
    """
    try:
        code = app(args=argv, prog_name=NAME, standalone_mode=False)
    except UsageError as error:
        message = f"{error.format_message()} (see {NAME} --help)"  # type: ignore[attr-defined]
        sys.stderr.write(f"{NAME}: error: {' '.join(message.splitlines())}\n")
        return EXIT_USAGE
    except typer.Abort:
        sys.stderr.write(f"{NAME}: error: aborted\n")
        return EXIT_FAILED
    return code if isinstance(code, int) else 0
