"""The options of the command line as Markdown tables, from the command itself.

python docs/options.py     # rewrites the part of docs/cli.md between the markers
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python_api")]

import typer.main  # noqa: E402

from asymvlm_cli import commands as functions  # noqa: E402
from asymvlm_cli.app import app  # noqa: E402

PAGE = ROOT / "docs" / "cli.md"
MARKED = re.compile(r"(<!-- options -->\n).*?(<!-- /options -->)", re.DOTALL)
SEVERAL = 3  # commands that make an option a common one
Row = tuple[str, str, str]  # option, default, meaning


def rows(command: object, types: dict[str, Any]) -> Iterator[Row]:
    for option in command.params:  # type: ignore[attr-defined]
        shown = option.show_default
        default = shown if isinstance(shown, str) else option.default
        unset = default is None or default is False or default == () or callable(default)
        name = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
        told = "required" if option.required else "" if unset else f"`{default}`"
        choices = ", ".join(f"`{choice}`" for choice in choices_of(types.get(option.name)))
        meaning = " ".join((option.help or "").split()).replace("|", "\\|")
        yield name, told, f"{meaning} One of {choices}.".strip() if choices else meaning


def choices_of(kind: object) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ("---",) * len(head), *lines])


def markdown() -> str:
    """Common options first, then those of each command."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    users: dict[Row, list[str]] = defaultdict(list)
    types = {function.__name__: get_type_hints(function) for function in functions.COMMANDS}
    for name, command in commands.items():
        for row in rows(command, types[name]):
            users[row].append(name)
    common = {row: names for row, names in users.items() if len(names) >= SEVERAL}
    told = [(row[0], row[1], row[2], "all" if len(n) == len(commands) else ", ".join(n)) for row, n in common.items()]
    parts = ["### Options of several commands", table(("option", "default", "meaning", "commands"), told)]
    for name, command in commands.items():
        parts += [f"### asymvlm {name}", " ".join((command.help or "").split())]
        own = [row for row in rows(command, types[name]) if row not in common]
        parts += [table(("option", "default", "meaning"), own)] if own else []
    return "\n\n".join(parts) + "\n"


def written(page: str) -> str:
    """A page with the part between the markers as it should be."""
    return MARKED.sub(lambda match: match[1] + markdown() + match[2], page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
