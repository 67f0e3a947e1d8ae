"""``--config run.yaml``: a file of options by their names on the command line, where they win."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer


def from_file(context: typer.Context, file: Path | None) -> Path | None:
    """The callback of ``--config``: what the file says becomes the default of each option.

    Raises:
        typer.BadParameter: naming the file, and the line where there is one, if it cannot be read or holds an unknown
            key, one key twice, or a value that is no text, number, truth value or list of these.
    """
    if file is None:
        return None
    names = {flag.lstrip("-"): option for option in context.command.params for flag in option.opts if flag[:2] == "--"}
    for name in ("config", "help"):
        names.pop(name, None)
    context.default_map = {**(context.default_map or {})}
    seen: set[str] = set()
    for key, value, where in _entries(file):
        name = str(key).replace("_", "-")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            raise typer.BadParameter(f"{where}: {key!r} is no option{f', did you mean {near[0]}?' if near else ''}")
        option = names[name]
        if option.name in seen:
            raise typer.BadParameter(f"{where}: {key!r} stands there twice, wanted it once")
        seen.add(option.name)
        context.default_map[option.name] = _value(option, value, f"{where}: {key}")
    return file


def _entries(file: Path) -> Iterator[tuple[Any, Any, str]]:
    """Key, value and place of each entry of a YAML file."""
    import yaml

    try:
        root = yaml.compose(file.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            raise typer.BadParameter(f"{file}:{root.start_mark.line + 1}: no key: value found, wanted one a line")
        for key, value in root.value:
            made = [yaml.safe_load(yaml.serialize(node, Dumper=yaml.SafeDumper)) for node in (key, value)]
            yield made[0], made[1], f"{file}:{key.start_mark.line + 1}"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f":{mark.line + 1}"
        raise typer.BadParameter(f"{file}{place}: not YAML ({getattr(error, 'problem', None) or error})") from error
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file}: not UTF-8 text (byte {error.start}), wanted UTF-8") from error
    except OSError as error:
        raise typer.BadParameter(f"{file}: cannot be read ({error.strerror})") from error


def _value(option: Any, value: Any, where: str) -> Any:
    """As the option takes it: a list for one that is repeatable, else its entries between commas."""
    if getattr(option, "is_flag", False):
        if not isinstance(value, bool):
            raise typer.BadParameter(f"{where}: {value!r} found, wanted true or false")
        return value
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, (str, int, float)) and not isinstance(entry, bool) for entry in entries):
        raise typer.BadParameter(f"{where}: {value!r} found, wanted text, a number, or a list of these")
    texts = [str(entry) for entry in entries]
    return texts if option.multiple else ",".join(texts)
