"""Dropped vision tokens that come back: the eighth question about a page whose tokens were dropped by the first.

Judged by teacher forcing as in `bench.quality.conversations`, all pages at once, by the rules that `Recall` is tested
to follow. Each question ranks all tokens of the page. What its budget holds is there when it is read; beside it stays
what the cache held, or nothing else does. K and V of vision tokens are kept as their turn computed them, or recomputed
together; those of text are always kept, but for the control that reads the whole dialogue again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asymvlm_kernels import RelativeThresholdBudget, Spread, score_tokens
from bench.quality.conversations import EARLIER, Talks, make_talks
from bench.quality.statistics import paired, rate, record
from bench.tinyvlm.evaluate import ROWS
from bench.tinyvlm.glyphs import BOS, PAD
from bench.tinyvlm.losses import decode
from bench.tinyvlm.model import NUM_VISION

KEEPS = (0.35, 0.25)
TURNS = EARLIER + 1
SIDE = math.isqrt(NUM_VISION)  # tokens of a line
MINIMUM = 0.1  # of a relative budget
FITTED_ON = 200  # dialogues of calibration pages
ALL, NOTHING, AT_ONCE = "all tokens", "nothing comes back", "as many from the first"
KEPT, RECOMPUTED = "recall, K/V kept", "recall, K/V recomputed"
LEAVING = f"{RECOMPUTED}, unwanted tokens leave"
REREAD = "recall, the dialogue read again"


@dataclass(frozen=True)
class Setting:
    """How the tokens of a page are scored, and how many each question wants."""

    name: str
    spread: Spread | None
    relative: bool  # a threshold on the scores' scale, for the same average, instead of the same number always


SETTINGS = (
    Setting("learned (default)", None, False),
    Setting("learned (default), spread along lines", Spread(), False),
    Setting("learned (default), spread along lines, relative threshold", Spread(), True),
)


@torch.no_grad()
def scores(model: Any, talks: Talks, weight: torch.Tensor | None, spread: Spread | None) -> torch.Tensor:
    """``(B, TURNS, 144)``: each vision token's score against the question of each turn."""
    embeds = model.get_input_embeddings()(talks.text)
    lines = (torch.arange(NUM_VISION) // SIDE).expand(len(embeds), -1)
    found = []
    for number in range(TURNS):
        asked = (talks.turn == number) & ~talks.answer & (talks.text != PAD)
        one = score_tokens(talks.vision, embeds, weight, text_mask=asked)
        found.append(one if spread is None else spread.apply(one, lines))
    return torch.stack(found, 1)


def highest(scored: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Bool mask of the ``counts`` highest of the last axis, of equal scores the first."""
    order = scored.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(NUM_VISION).expand_as(order))
    return rank < counts[..., None]


def fitted(scored: torch.Tensor, average: float) -> RelativeThresholdBudget:
    """The relative threshold whose questions want a share ``average`` of the tokens on average."""
    low, high = -1.0, 2.0
    for _ in range(30):
        budget = RelativeThresholdBudget((low + high) / 2, MINIMUM)
        if float(wanted(scored, budget).float().mean()) > average:
            low = budget.beta
        else:
            high = budget.beta
    return RelativeThresholdBudget(high, MINIMUM)


def wanted(scored: torch.Tensor, budget: RelativeThresholdBudget | int) -> torch.Tensor:
    """``(B, TURNS, 144)`` bool: what each question ranks into its budget."""
    if isinstance(budget, int):
        return highest(scored, torch.full(scored.shape[:2], budget))
    rows = scored.flatten(0, 1)
    return highest(scored, budget.counts(rows, torch.ones_like(rows, dtype=torch.bool)).unflatten(0, scored.shape[:2]))


@torch.no_grad()
def last_answer(model: Any, talks: Talks, held: torch.Tensor, *, recomputed: bool) -> np.ndarray:
    """``(B,)`` bool: is the last answer right if the text of turn t sees the vision tokens ``held[:, t]``?

    Args:
        held: ``(B, TURNS, 144)`` bool. recomputed: they see each other there, whenever they came; otherwise ``held``
            only grows, and a token sees those before it that were there when it came.
    """
    right, embed = [], model.get_input_embeddings()
    for rows in torch.arange(len(talks.text)).split(ROWS if not recomputed else ROWS // 4):
        text, begin = talks.text[rows], torch.zeros(len(rows), 1, dtype=torch.int64)
        sets = held[rows] if recomputed else held[rows, -1:]
        index = sets.sort(dim=2, descending=True, stable=True).indices[..., : int(sets.sum(2).max())].sort(dim=2).values
        there, came = sets.gather(2, index).flatten(1), (~held[rows]).sum(1).gather(1, index.flatten(1))
        copy = torch.arange(sets.shape[1]).repeat_interleave(index.shape[2]).expand(there.shape)
        vision = talks.vision[rows].gather(1, index.flatten(1)[..., None].expand(-1, -1, talks.vision.shape[-1]))
        hidden = torch.cat([embed(begin + BOS), vision, embed(text)], 1)
        after = torch.arange(1 + NUM_VISION, 1 + NUM_VISION + text.shape[1]).expand(text.shape)
        positions = torch.cat([begin, 1 + index.flatten(1), after], 1)
        turn = torch.cat([begin, copy if recomputed else came, talks.turn[rows]], 1)
        is_vision = torch.zeros_like(turn, dtype=torch.bool)
        is_vision[:, 1 : 1 + there.shape[1]] = True
        same, earlier = turn[:, None] == turn[:, :, None], turn[:, None] <= turn[:, :, None]
        visible = torch.where(is_vision[:, None], same, True) if recomputed else earlier
        visible &= torch.cat([begin == 0, there, text >= 0], 1)[:, None]
        hidden, _ = decode(model, hidden, positions, visible | torch.eye(hidden.shape[1], dtype=torch.bool))
        predicted = model.lm_head(hidden[:, there.shape[1] : -1]).argmax(-1)
        right.append(((predicted == talks.labels[rows]) | (talks.labels[rows] < 0)).all(1))
    return torch.cat(right).numpy()


def recalled(
    model: Any, count: int, weight: torch.Tensor | None, *, seed: int = 0, keeps: Sequence[float] = KEEPS
) -> dict[str, Any]:
    """The last answer's exact match by setting and keep ratio, and vision tokens that the cache holds at each turn.

    Args:
        weight: of the scorer. seed: of the pages.
    """
    talks = make_talks(model, count, seed=seed)
    others = make_talks(model, FITTED_ON, seed=seed, split="calibration")
    full = last_answer(model, talks, torch.ones(count, TURNS, NUM_VISION, dtype=torch.bool), recomputed=False)
    result: dict[str, Any] = {"full": record(rate(full)), "rates": {}, "held": {}, "returned": {}, "paired": []}
    for setting in SETTINGS:
        scored = scores(model, talks, weight, setting.spread)
        tables: dict[str, dict[str, Any]] = {name: {} for name in ("rates", "held", "returned")}
        for keep in keeps:
            budget = fitted(scores(model, others, weight, setting.spread), keep) if setting.relative else None
            want = wanted(scored, int(NUM_VISION * keep) if budget is None else budget)
            held = _held(scored, want)
            right = {
                name: last_answer(model, talks, one, recomputed=name in (RECOMPUTED, LEAVING))
                for name, one in held.items()
            }
            tables["rates"][f"{keep:g}"] = {name: record(rate(many)) for name, many in right.items()}
            tables["held"][f"{keep:g}"] = {
                name: [round(float(number), 1) for number in one.sum(-1).float().mean(0)] for name, one in held.items()
            }
            tables["returned"][f"{keep:g}"] = {
                name: _returned(many, right[NOTHING], full) for name, many in right.items() if name != NOTHING
            }
            result["paired"] += _pairs(setting.name, keep, {**right, ALL: full})
        for name, table in tables.items():
            result[name][setting.name] = table
    return result


def _held(scored: torch.Tensor, want: torch.Tensor) -> dict[str, torch.Tensor]:
    """``(B, TURNS, 144)`` bool by what comes back: the vision tokens in the cache when each question is read."""
    union = want.long().cumsum(1) > 0
    first = highest(scored[:, 0], union[:, -1].sum(1))  # as many bytes at the end, all by the first question
    return {
        NOTHING: want[:, :1].expand(want.shape),
        KEPT: union,
        RECOMPUTED: union,
        LEAVING: want,
        REREAD: union[:, -1:].expand(want.shape),
        AT_ONCE: first[:, None].expand(want.shape),
    }


def _returned(right: np.ndarray, nothing: np.ndarray, full: np.ndarray) -> float:
    """Share of what pruning for the first question costs the last one."""
    return round(float((right.mean() - nothing.mean()) / (full.mean() - nothing.mean())), 3)


def _pairs(setting: str, keep: float, right: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    return [
        {"scores": setting, "keep": keep, "first": one, "second": other, **record(paired(right[one], answers))}
        for one in (RECOMPUTED, LEAVING)
        for other, answers in right.items()
        if other != one
    ]


__all__ = ["KEEPS", "fitted", "highest", "last_answer", "recalled", "scores", "wanted"]
