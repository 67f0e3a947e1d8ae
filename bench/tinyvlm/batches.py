"""Training batches: a page, about nine questions and answers in one sequence, and part of its vision tokens.

Many turns a page give ten times the supervision. Tokens are removed in training because a model that never saw a
removed background fails under every pruning method: empty cells become attention sinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bench.tinyvlm.glyphs import EOS, PAD, TOKEN_ID, encode
from bench.tinyvlm.model import NUM_VISION, to_model_pixels
from bench.tinyvlm.pages import ENTRY, Layout, Pages, make_pages
from bench.tinyvlm.questions import Turn, ask

TEXT = 80  # text tokens in a sequence
IGNORED = -100
MIX = {"value": 0.52, "exists": 0.10, "count": 0.13, "list": 0.12, "read": 0.13}
FIRST_MIX = {"value": 0.8, "exists": 0.05, "count": 0.05, "list": 0.05, "read": 0.05}


@dataclass(frozen=True)
class Batch:
    """Attributes, with B pages, K kept vision tokens, T text tokens:

    pixels: ``(B, 3, 96, 96)`` float32. text: ``(B, T)`` ids. labels: ``(B, T)``, the id where an answer token stands,
    else -100. cells: ``(B, T)``, the cell the answer token is read from, else -1. kept: ``(B, K)`` ascending vision
    tokens. meaning: ``(B, 144, 3)``, for each cell its glyph, the key of its entry (its glyph outside of entries) and
    its column in the entry (5 outside).
    """

    pixels: torch.Tensor
    text: torch.Tensor
    labels: torch.Tensor
    cells: torch.Tensor
    kept: torch.Tensor
    meaning: torch.Tensor

    @property
    def positions(self) -> torch.Tensor:
        """``(B, 1 + K + T)``: begin-of-text, kept vision tokens and text where they would stand without removal."""
        batch, length = self.text.shape
        start = 1 + NUM_VISION
        text = torch.arange(start, start + length).expand(batch, -1)
        return torch.cat([torch.zeros(batch, 1, dtype=torch.int64), 1 + self.kept, text], 1)


def make_batch(
    seed: list[int], count: int, entries: tuple[int, int], kept: int, mix: dict[str, float] = MIX, text: int = TEXT
) -> Batch:
    """A batch of training pages. The same seed gives the same batch."""
    pages = make_pages([*seed, 0], count, "train", entries)
    rng = np.random.default_rng([*seed, 1])
    rows = [_row(rng, layout, mix, text) for layout in pages.layouts]
    ids, labels, cells = (torch.tensor(part) for part in zip(*rows, strict=True))
    return Batch(to_model_pixels(pages.pixels), ids, labels, cells, _kept(rng, pages, kept), _meaning(pages))


def _row(
    rng: np.random.Generator, layout: Layout, mix: dict[str, float], length: int
) -> tuple[list[int], list[int], list[int]]:
    """Text ids, labels and cells of as many turns as ``length`` tokens hold, the last one cut."""
    ids: list[int] = []
    labels: list[int] = []
    cells: list[int] = []
    used: set[str] = set()
    asked: set[str] = set()
    kinds, shares = list(mix), np.cumsum(list(mix.values()))
    while len(ids) < length - 4:
        kind = kinds[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]
        if kind in asked:
            kind = "value"
        if kind == "value" and len(used) == len(layout.keys):
            kind = "exists"
        turn = ask(rng, layout, kind, used)
        if kind == "value":
            used.add(turn.question[-1])
        elif kind != "exists":
            asked.add(kind)
        question, answer = turn_ids(turn)
        ids += question + answer
        labels += [IGNORED] * len(question) + answer
        cells += [-1] * len(question) + [*turn.cells, -1]
    fill = max(0, length - len(ids))
    return (
        (ids + [PAD] * fill)[:length],
        (labels + [IGNORED] * fill)[:length],
        (cells + [-1] * fill)[:length],
    )


def turn_ids(turn: Turn) -> tuple[list[int], list[int]]:
    """Tokens of the question, and of the answer with its end of text."""
    return encode(turn.question), [*encode(turn.answer), EOS]


def _kept(rng: np.random.Generator, pages: Pages, count: int) -> torch.Tensor:
    """``(B, count)`` vision tokens: entries first, the rest at random."""
    order = np.argsort(-(2.0 * (pages.owner >= 0) + rng.random(pages.owner.shape)), axis=1, kind="stable")
    return torch.from_numpy(np.sort(order[:, :count], axis=1))


def _meaning(pages: Pages) -> torch.Tensor:
    key, column = pages.glyph.copy(), np.full_like(pages.glyph, ENTRY)
    for page, layout in enumerate(pages.layouts):
        for entry in layout.entries:
            cells = slice(entry.cell, entry.cell + ENTRY)
            key[page, cells], column[page, cells] = TOKEN_ID[entry.key], np.arange(ENTRY)
    return torch.from_numpy(np.stack([pages.glyph, key, column], -1))


__all__ = ["FIRST_MIX", "MIX", "TEXT", "Batch", "make_batch", "turn_ids"]
