"""Markdown of the results on real language models, for a marker of docs/measurements.md."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import results
from bench.harness.tables import markdown
from bench.real_lm.entries import FULL

BLOCKS = {"real-lm": "gemma-3-270m"}
Losses = dict[str, dict[str, dict[int, np.ndarray]]]  # by title, share and round: of each block


def block(name: str, folder: Path) -> str:
    """The text of a marker."""
    file = folder / f"{BLOCKS[name]}.json"
    if not file.exists():
        return "Nothing measured yet."
    content = results.load(file)
    run, found = content["runs"][-1], losses(content["cases"])
    whole = np.concatenate([rows for _, rows in sorted(found[FULL][""].items())])
    caption = (
        f"{BLOCKS[name]} in fp32, {len(whole)} blocks of {run['prompt']} tokens of a prompt and {run['forced']} more, "
        f"of which {run['held']} are held at retention 1; texts: {', '.join(run['texts'])}; transformers "
        f"{run['transformers']}, torch {run['torch']}, {run['device']}, commit {run['commit']}, {run['time'][:10]}.\n"
        f"`python -m bench.real_lm`"
    )
    text = (
        f"Loss of the last {run['scored']} tokens, natural logarithm, above that of the whole cache, which is "
        f"{whole.mean():.3f} (perplexity {math.exp(whole.mean()):.1f}); ± is one standard error of the paired "
        "difference over blocks."
    )
    return f"{caption}\n\n{text}\n\n{rows_of(found)}"


def losses(cases: dict[str, Any]) -> Losses:
    """Cases named ``<title> @ <share> # <round>``."""
    found: Losses = defaultdict(lambda: defaultdict(dict))
    for key, case in cases.items():
        title, _, number = key.rpartition(" # ")
        title, _, share = title.rpartition(" @ ") if " @ " in title else (title, "", "")
        found[title][share][int(number)] = np.array(case["loss"])
    return found


def rows_of(found: Losses) -> str:
    """Settings by share, the best at the smallest share first."""
    shares = sorted({share for by in found.values() for share in by if share}, key=float, reverse=True)
    means: dict[str, list[str]] = {}
    order: dict[str, float] = {}
    for title, by in found.items():
        if title == FULL:
            continue
        cells = []
        for share in shares:
            rounds = [number for number in sorted(by.get(share, {})) if number in found[FULL][""]]
            if not rounds:
                cells.append("-")
                continue
            more = np.concatenate([by[share][number] - found[FULL][""][number] for number in rounds])
            cells.append(f"{more.mean():+.3f} ± {more.std(ddof=1) / math.sqrt(len(more)):.3f}")
            order[title] = float(more.mean())
        means[title] = cells
    return markdown(
        ("what goes", *(f"retention {share}" for share in shares)),
        [[title, *means[title]] for title in sorted(means, key=lambda title: order.get(title, math.inf))],
    )


__all__ = ["BLOCKS", "block", "losses", "rows_of"]
