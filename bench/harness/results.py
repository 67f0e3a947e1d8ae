"""Results on disk: one JSON file a device and day, merged into, never left half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

EMPTY: dict[str, Any] = {"schema": 1, "runs": [], "parts": {}, "cases": {}}


def load(file: Path) -> dict[str, Any]:
    """The file's content; an empty record where there is no file yet."""
    return json.loads(file.read_text()) if file.exists() else json.loads(json.dumps(EMPTY))


def save(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, file)


def add_run(file: Path, record: dict[str, Any]) -> int:
    """Append a run (command, environment, ceiling); its number is what cases refer to."""
    content = load(file)
    content["runs"].append(record)
    save(file, content)
    return len(content["runs"]) - 1


def add_case(file: Path, key: str, record: dict[str, Any]) -> None:
    content = load(file)
    content["cases"][key] = record
    save(file, content)


def add_part(file: Path, name: str, record: dict[str, Any]) -> None:
    content = load(file)
    content["parts"][name] = record
    save(file, content)


def is_measured(file: Path, key: str, source: str, variants: Iterable[str]) -> bool:
    """Whether ``key`` was measured without error, with these variants, from the kernel sources with this digest."""
    content = load(file)
    case = content["cases"].get(key)
    if case is None or "error" in case or not set(variants) <= set(case["variants"]):
        return False
    return bool(content["runs"][case["run"]]["environment"]["source"] == source)


def newest(folder: Path, device_kind: str, pattern: str = "????-??-??.json") -> Path | None:
    """The latest results file of a kind, ``"cpu"`` or ``"gpu"``, under ``folder``; of single ops by default."""
    files = [
        file for file in folder.glob(f"*/{pattern}") if file.parent.name.startswith("cpu-") == (device_kind == "cpu")
    ]
    return max(files, key=lambda file: (file.stem, file.parent.name), default=None)


def time_us(variant: dict[str, Any]) -> float | None:
    """The figure that stands for a variant: microseconds a call of its primary metric."""
    return variant[variant["primary"]]["median"] if "primary" in variant else None


def spread(variant: dict[str, Any]) -> float:
    """Distance of the two rounds, as a share of the median: the noise of a figure."""
    metric = variant[variant["primary"]]
    return (max(metric["rounds"]) - min(metric["rounds"])) / metric["median"]


def line(key: str, case: dict[str, Any]) -> str:
    """One case in one line: microseconds a call by variant, noise of ours."""
    times = {name: time_us(variant) for name, variant in case["variants"].items()}
    cells = [f"{name} {'failed' if value is None else format(value, '.1f')}" for name, value in times.items()]
    ours = case["variants"]["ours"]
    return f"{key}: us {', '.join(cells)}; {ours['gbs']} GB/s; rounds differ by {spread(ours):.0%}"
