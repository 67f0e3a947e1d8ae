"""From the arguments of a command to the function of `asymvlm.cli` that does its work, imported when it is called."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import typer


@dataclass
class Settings:
    """Of the whole command line."""

    verbose: bool = False


settings = Settings()


def do(command: str, arguments: dict[str, Any]) -> None:
    """Run ``asymvlm.cli.<command>.<command>`` with what the user gave; raises typer.Exit with another code than 0."""
    from asymvlm.cli import console

    console.configure_logging(verbose=settings.verbose)
    function = getattr(importlib.import_module(f"asymvlm.cli.{command}"), command)
    code = console.guarded(lambda: function(**arguments), name="asymvlm")
    if code:
        raise typer.Exit(code)
