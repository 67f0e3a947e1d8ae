"""The ``asymvlm`` command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from asymvlm.cli import calibrate, chat, console, doctor, heatmap, run, train, verify

app = typer.Typer(
    name="asymvlm",
    help="Prune the vision tokens of Hugging Face vision-language models before prefill.",
    add_completion=False,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
)
app.command()(run.run)
app.command()(chat.chat)
app.command()(heatmap.heatmap)
app.command()(train.train)
app.command()(calibrate.calibrate)
app.command()(doctor.doctor)
app.command()(verify.verify)


@app.callback()
def _common(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log everything, tracebacks included.")] = False,
) -> None:
    console.configure_logging(verbose=verbose)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``argv`` without the program's name, by default the process's own.

    Returns:
        0; 1 if a self-test or a verification failed or memory ran out; 2 on a mistake in the arguments, told in one
        line on stderr.
    """
    return console.run_app(app, argv, name="asymvlm")
