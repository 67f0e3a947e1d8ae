"""Questions about a page. Local ones need a few cells, global ones need all entries: the right budget varies.

| kind | question | answer |
|---|---|---|
| value | what is the value of K | 482 |
| exists | is there key K | yes |
| count | how many entries are there | 07 |
| list | list all keys | AKM, in reading order |
| read | read the page | K:482;M:113;, the long answer |

The question ends with what it asks for, so that its last token can look it up; a question mark is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.tinyvlm.glyphs import LETTERS
from bench.tinyvlm.pages import DIGITS_IN_VALUE, ENTRY, Layout

LOCAL, GLOBAL, LONG = ("value", "exists"), ("count", "list"), ("read",)
KINDS = (*LOCAL, *GLOBAL, *LONG)


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and the cell each answer token is read from (-1 where no single cell holds it)."""

    kind: str
    question: str
    answer: str
    cells: tuple[int, ...]


def ask(rng: np.random.Generator, layout: Layout, kind: str, used: frozenset[str] | set[str] = frozenset()) -> Turn:
    """A question of ``kind`` about ``layout``; one for a value spares the keys in ``used`` while it can.

    Raises:
        ValueError: on an unknown kind.
    """
    entries = layout.entries
    if kind == "value":
        fresh = [entry for entry in entries if entry.key not in used] or list(entries)
        entry = fresh[rng.integers(len(fresh))]
        cells = tuple(entry.cell + 2 + digit for digit in range(DIGITS_IN_VALUE))
        return Turn(kind, f"what is the value of {entry.key}", entry.value, cells)
    if kind == "exists":
        there = bool(rng.random() < 0.5)
        keys = [key for key in LETTERS if (key in layout.keys) == there]
        return Turn(kind, f"is there key {keys[rng.integers(len(keys))]}", "yes" if there else "no", (-1,))
    if kind == "count":
        return Turn(kind, "how many entries are there", f"{len(entries):02d}", (-1, -1))
    if kind == "list":
        return Turn(kind, "list all keys", layout.keys, tuple(entry.cell for entry in entries))
    if kind == "read":
        cells = tuple(cell for entry in entries for cell in (*range(entry.cell, entry.cell + ENTRY), -1))
        return Turn(kind, "read the page", "".join(f"{entry.key}:{entry.value};" for entry in entries), cells)
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def conversation(rng: np.random.Generator, layout: Layout, shares: dict[str, float], turns: int) -> list[Turn]:
    """``turns`` questions about one page, kinds drawn by ``shares``; a global question is asked once."""
    asked: list[Turn] = []
    used: set[str] = set()
    kinds, weights = list(shares), np.array(list(shares.values()))
    for kind in rng.choice(kinds, turns, p=weights / weights.sum()):
        if kind not in LOCAL and any(turn.kind == kind for turn in asked):
            kind = "value"
        if kind == "value" and len(used) == len(layout.keys):
            kind = "exists"
        turn = ask(rng, layout, str(kind), used)
        if kind == "value":
            used.add(turn.question[-1])
        asked.append(turn)
    return asked


__all__ = ["GLOBAL", "KINDS", "LOCAL", "LONG", "Turn", "ask", "conversation"]
