"""Markdown of ``bench/results/quality/evaluated.json``, for the marker of docs/evaluation.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.harness import results
from bench.harness.tables import markdown

BLOCKS = ("evaluated",)


def block(name: str, folder: Path) -> str:
    """The text of a marker of `BLOCKS`."""
    found: dict[str, Any] = results.load(folder / f"{name}.json")
    if "rows" not in found:
        return "Nothing measured yet."
    rows = [
        [row["method"], f"{row['keep']:g}", f"{row['evaluate']:.3f}", f"{row['bench']:.3f}", str(row["differ"])]
        for row in found["rows"]
    ]
    where = f"transformers {found['transformers']}, torch {found['torch']}, {found['device']}"
    caption = f"Exact match on {found['samples']} test pages; {where}, commit {found['commit']}, {found['time'][:10]}."
    head = ("method", "keep", "`asymvlm evaluate`", "bench", "pages judged otherwise")
    return f"{caption}\n`{found['command']}`\n\n{markdown(head, rows)}"


__all__ = ["BLOCKS", "block"]
