"""Dropped vision tokens that come back: the eighth question about a page whose tokens were dropped by the first.

Judged by teacher forcing as in `bench.quality.conversations`, all pages at once: a token that came back before a turn
is open to that turn and the later ones, which `VisionPruning(recall=True)` is tested to equal. Each question ranks all
tokens of the page; those within the budget are there when it is read, and stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from asymvlm_kernels import Spread, score_tokens
from bench.quality.conversations import EARLIER, Talks, make_talks
from bench.quality.statistics import paired, rate, record
from bench.tinyvlm.evaluate import ROWS
from bench.tinyvlm.glyphs import BOS, PAD
from bench.tinyvlm.losses import decode
from bench.tinyvlm.model import NUM_VISION

KEEPS = (0.35, 0.25)
SCORES = {"learned (default)": None, "learned (default), spread along lines": Spread()}
SIDE = math.isqrt(NUM_VISION)  # tokens of a line
NEVER = EARLIER + 1
ALL, NOTHING, RECALL, AT_ONCE = "all tokens", "nothing comes back", "recall", "as many from the first"


@torch.no_grad()
def ranks(model: Any, talks: Talks, weight: torch.Tensor | None, spread: Spread | None) -> torch.Tensor:
    """``(B, EARLIER + 1, 144)`` int64: the rank of each vision token against the question of each turn."""
    embeds = model.get_input_embeddings()(talks.text)
    lines = (torch.arange(NUM_VISION) // SIDE).expand(len(embeds), -1)
    found = []
    for number in range(EARLIER + 1):
        asked = (talks.turn == number) & ~talks.answer & (talks.text != PAD)
        scores = score_tokens(talks.vision, embeds, weight, text_mask=asked)
        scores = scores if spread is None else spread.apply(scores, lines)
        order = scores.argsort(dim=1, descending=True, stable=True)
        found.append(torch.empty_like(order).scatter_(1, order, torch.arange(NUM_VISION).expand_as(order)))
    return torch.stack(found, 1)


def opened(ranked: torch.Tensor, counts: torch.Tensor, *, recall: bool) -> torch.Tensor:
    """``(B, 144)`` int64: the first turn that sees each vision token, `NEVER` where none does."""
    inside = ranked < counts[:, None, None]
    turns = torch.where(inside, torch.arange(ranked.shape[1])[:, None], NEVER)
    return turns.amin(1) if recall else turns[:, 0]


@torch.no_grad()
def last_answer(model: Any, talks: Talks, first_seen: torch.Tensor) -> np.ndarray:
    """``(B,)`` bool: is the last answer right if turn ``first_seen`` ``(B, 144)`` is the first to see a token?"""
    right, embed = [], model.get_input_embeddings()
    for rows in torch.arange(len(talks.text)).split(ROWS):
        text, begin = talks.text[rows], torch.zeros(len(rows), 1, dtype=torch.int64)
        hidden = torch.cat([embed(torch.full_like(begin, BOS)), talks.vision[rows], embed(text)], 1)
        turn = torch.cat([begin, first_seen[rows], talks.turn[rows]], 1)
        positions = torch.arange(hidden.shape[1]).expand(len(rows), -1)
        hidden, _ = decode(model, hidden, positions, turn[:, None] <= turn[:, :, None])
        predicted = model.lm_head(hidden[:, NUM_VISION:-1]).argmax(-1)
        right.append(((predicted == talks.labels[rows]) | (talks.labels[rows] < 0)).all(1))
    return torch.cat(right).numpy()


def recalled(
    model: Any, count: int, weight: torch.Tensor | None, *, seed: int = 0, keeps: Sequence[float] = KEEPS
) -> dict[str, Any]:
    """The last answer's exact match by scores and keep ratio, and vision tokens that the cache holds at each turn.

    Args:
        weight: of the scorer. seed: of the pages.
    """
    talks = make_talks(model, count, seed=seed)
    full = last_answer(model, talks, torch.zeros(count, NUM_VISION, dtype=torch.int64))
    result: dict[str, Any] = {"full": record(rate(full)), "rates": {}, "held": {}, "paired": []}
    for scores, spread in SCORES.items():
        ranked = ranks(model, talks, weight, spread)
        result["rates"][scores], result["held"][scores] = {}, {}
        for keep in keeps:
            seen = _seen(ranked, int(NUM_VISION * keep))
            right = {name: last_answer(model, talks, one) for name, one in seen.items()}
            result["rates"][scores][f"{keep:g}"] = {name: record(rate(many)) for name, many in right.items()}
            result["held"][scores][f"{keep:g}"] = {
                name: [round(float((one <= turn).sum(-1).float().mean()), 1) for turn in range(EARLIER + 1)]
                for name, one in seen.items()
            }
            for other, answers in (*right.items(), (ALL, full)):
                if other != RECALL:
                    compared = record(paired(right[RECALL], answers))
                    result["paired"].append(
                        {"scores": scores, "keep": keep, "first": RECALL, "second": other, **compared}
                    )
    return result


def _seen(ranked: torch.Tensor, budget: int) -> dict[str, torch.Tensor]:
    counts = torch.full((len(ranked),), budget)
    back = opened(ranked, counts, recall=True)
    held = (back < NEVER).sum(1)  # as many bytes at the end, all by the first question
    return {
        NOTHING: opened(ranked, counts, recall=False),
        RECALL: back,
        AT_ONCE: opened(ranked, held, recall=False),
    }


__all__ = ["KEEPS", "last_answer", "opened", "ranks", "recalled"]
