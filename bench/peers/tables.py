"""Markdown of the comparisons with peers, for the markers of docs/measurements.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.harness import results
from bench.harness.tables import markdown

BLOCKS = {"peers-kvpress": "kvpress", "peers-openvino": "openvino"}


def block(name: str, folder: Path) -> str:
    """The text of a marker."""
    file = folder / f"{BLOCKS[name]}.json"
    if not file.exists():
        return "Nothing measured yet."
    content = results.load(file)
    versions = ", ".join(f"{package} {version}" for package, version in content["peer"].items())
    ours = content["ours"]
    caption = (
        f"Peer: {versions}. Ours: transformers {ours['transformers']}, torch {ours['torch']}, commit {ours['commit']}, "
        f"{ours['time'][:10]}.\n`{content['command']}`"
    )
    rows = [row(name, record) for name, record in content["cases"].items()]
    head = ["case", "ours as published", "choices alike", "tokens held by both", "logits differ by", "the peer"]
    if name == "peers-openvino":  # only the choice is compared
        for line in (head, *rows):
            del line[4]
    return f"{caption}\n\n{markdown(tuple(head), rows)}"


def row(name: str, record: dict[str, Any]) -> list[str]:
    same = record["peer"]
    says = record["expected"]
    if "described" in record and not same["equal"]:
        says += " (computed so, the choice is the same)" if record["described"]["equal"] else " (NOT ALL OF IT)"
    return [
        name,
        "yes" if record["published"]["equal"] else "NO",
        f"{same['lines_equal']} of {same['lines']}",
        f"{same['held_by_both']} of {same['held']}",
        f"{same['logits_difference']:.1e}" if "logits_difference" in same else "-",
        says if record["as_expected"] else f"NOT AS EXPECTED: {says}",
    ]
