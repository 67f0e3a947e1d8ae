"""JSON that people and other programs write: whatever is wrong with a file is one line that begins with its path."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGEST = 2**63  # of whole numbers, which torch and other readers can still hold


class FileError(ValueError):
    """A file cannot be used. One line: the path, what was found and what was wanted."""


def first_line(error: BaseException) -> str:
    """The first line of a message, for errors that must fit in one."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def read_text(path: str | Path) -> str:
    """A UTF-8 file, with or without a byte order mark.

    Raises:
        FileError: if it cannot be read, or is in another encoding.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 text (byte {error.start}), wanted UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FileError(f"{path!s}: cannot be read ({reason})".replace("\0", "\\0")) from error


def parse(text: str, where: str) -> Any:
    """One JSON value of plain numbers.

    Raises:
        FileError: beginning with ``where``, if it is not JSON, nested too deep, or holds a number that is not finite or
            too large.
    """
    try:
        return json.loads(text, parse_float=_finite, parse_int=_whole, parse_constant=_refuse)
    except RecursionError as error:
        raise FileError(f"{where}: nested too deep, wanted a plain JSON record") from error
    except ValueError as error:
        raise FileError(f"{where}: not JSON ({error})") from error


def read_object(path: str | Path, example: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        example: of what is wanted, for the error.
    Raises:
        FileError: as `read_text` and `parse` do, or if the file holds something else.
    """
    text = read_text(path)
    if not text.strip():
        raise FileError(f"{path}: the file is empty, wanted {example}")
    record = parse(text, str(path))
    if not isinstance(record, dict):
        raise FileError(f"{path}: JSON {type(record).__name__} found, wanted an object such as {example}")
    return record


def check_plain(value: Any, where: str) -> None:
    """Raise a FileError if a value that somebody else parsed holds a number that is not finite or too large."""
    if isinstance(value, dict):
        for entry in value.values():
            check_plain(entry, where)
    elif isinstance(value, list):
        for entry in value:
            check_plain(entry, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise FileError(f"{where}: the number {value} is not finite")
    elif isinstance(value, int) and not -LARGEST <= value < LARGEST:
        raise FileError(f"{where}: a number of {len(str(abs(value)))} digits is too large")


def read_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """``path:number`` and text of each line that is not blank. Lines end where JSONL says so: at a line feed alone.

    Raises:
        FileError: as `read_text` does.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse(text)
    return value


def _whole(text: str) -> int:
    if len(text) > 20 or not -LARGEST <= int(text) < LARGEST:
        _refuse(text)
    return int(text)


def _refuse(text: str) -> None:
    shown = text if len(text) <= 24 else f"{text[:20]}... of {len(text)} digits"
    raise ValueError(f"the number {shown} is not finite or too large")
