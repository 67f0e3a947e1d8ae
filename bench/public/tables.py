"""Markdown of the results on public images, for the markers of docs/measurements.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.harness import results
from bench.harness.tables import markdown
from bench.public.easy_vqa import KINDS
from bench.quality.tables import cell, difference

FILE = "easy-vqa.json"
Cell = dict[str, Any]


def block(name: str, folder: Path) -> str:
    """The text of a marker: ``public-`` and one of `BLOCKS`."""
    content = results.load(folder / FILE)
    part = name.removeprefix("public-")
    if part not in content["parts"]:
        return "Nothing measured yet."
    measured = content["parts"][part]
    run = content["runs"][measured["run"]]
    caption = (
        f"easy-vqa, the small VLM trained on {run['images']['train']} of its training images, exact match on "
        f"{measured['samples']} questions, each about another test image; transformers {run['transformers']}, torch "
        f"{run['torch']}, {run['device']}, commit {run['commit']}, {run['time'][:10]}.\n`{run['command']}`"
    )
    return f"{caption}\n\n{BLOCKS[name](measured)}"


def methods(measured: Cell) -> str:
    """Methods by keep ratio, the difference to ours, and the smallest ratio by kind of question."""
    full, rates = measured["full"], measured["rates"]
    ratios = list(next(iter(rates.values())))
    head = ("method", *(f"keep {ratio}" for ratio in ratios))
    rows = [["all tokens", *[cell(full)] * len(ratios)]]
    rows += [[name, *(cell(found[ratio]) for ratio in ratios)] for name, found in rates.items()]
    paired: dict[str, dict[str, str]] = {}
    for pair in measured["paired"]:
        name, ratio = pair["first"].rsplit("/", 1)
        if pair["second"].rsplit("/", 1)[0] == measured["ours"]:
            paired.setdefault(f"{name} − {measured['ours']}", {})[ratio] = difference(pair)
    others = [[name, *(row.get(ratio, "-") for ratio in ratios)] for name, row in paired.items()]
    least = ratios[-1]
    whole = {"all tokens": full, "a guess by the question's words": measured["guessed"]}
    kinds = [[name, *(cell(found["kinds"][kind]) for kind in KINDS)] for name, found in whole.items()]
    kinds += [[name, *(cell(found[least]["kinds"][kind]) for kind in KINDS)] for name, found in rates.items()]
    return "\n\n".join([
        markdown(head, rows),
        markdown(("paired difference", *head[1:]), others),
        f"By kind of question, keep {least}:",
        markdown(("method", *KINDS), kinds),
    ])  # fmt: skip


def budgets(measured: Cell) -> str:
    """Adaptive budgets beside a uniform one that keeps as many tokens."""
    head = ("average", "budget", "kept", "adaptive", "uniform", "adaptive − uniform", "adaptive − all tokens", *KINDS)
    rows = [
        [
            average,
            name,
            f"{row['kept']:.3f}",
            cell(row),
            cell(row["uniform"]),
            difference(row["paired"]),
            difference(row["full"]),
            *(f"{row['kinds'][kind]['mean']:.3f} ({row['kinds'][kind]['kept']:.2f})" for kind in KINDS),
        ]
        for average, found in measured["averages"].items()
        for name, row in found.items()
    ]
    return markdown(head, rows) + "\n\nBy kind of question with the adaptive budget; kept shares in brackets."


BLOCKS = {"public-methods": methods, "public-budgets": budgets}

__all__ = ["BLOCKS", "block"]
