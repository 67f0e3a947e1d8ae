"""Text eviction between turns: whole earlier answers, and as many other tokens, leave a conversation's cache.

What is dropped differs and never how much: `TurnEviction` chooses whole answers, and the controls give up as many
tokens of each row. The last turn is judged by teacher forcing, with what was dropped closed to it, which equals removal
at kept positions. It does not go through `generate`: the library has no controls for turns, all methods must see the
same dialogue with the true earlier answers, and `generate` would take conversations one by one, since the turns of a
batch differ in length. That a patched `generate`, fed a dialogue turn by turn, drops the same answers and then says the
same is a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asymvlm import TurnEviction
from asymvlm.cache.choose import lowest
from asymvlm.eviction.turns import TurnEvictor
from asymvlm.models import adapter_for
from asymvlm_kernels import score_tokens
from bench.quality.statistics import paired, rate, record
from bench.quality.transcripts import SINKS
from bench.tinyvlm.batches import turn_ids
from bench.tinyvlm.evaluate import ROWS, Samples, features
from bench.tinyvlm.glyphs import BOS, EOS, PAD
from bench.tinyvlm.losses import decode
from bench.tinyvlm.model import NUM_VISION
from bench.tinyvlm.pages import Split, make_pages
from bench.tinyvlm.questions import ask, conversation

EARLIER = 7  # turns before the one that counts: with it about as long as the model was trained on
TALK = {"value": 0.6, "exists": 0.1, "count": 0.1, "list": 0.2}


@dataclass(frozen=True)
class Talks:
    """Conversations about one page each, ``EARLIER`` turns and a last one.

    Attributes:
        vision: ``(B, 144, D)``. text: ``(B, T)`` ids, padded on the right. labels: ``(B, T)``, last answer, else -100.
        turn: ``(B, T)`` number of the turn a token belongs to. answer: ``(B, T)`` bool, answer tokens.
    """

    vision: torch.Tensor
    text: torch.Tensor
    labels: torch.Tensor
    turn: torch.Tensor
    answer: torch.Tensor


def make_talks(model: Any, count: int, *, seed: int = 0, split: Split = "test") -> Talks:
    """Conversations about pages of ``split``. The same seed gives the same ones."""
    pages = make_pages([seed, 20], count, split, (6, 12))
    rng = np.random.default_rng([seed, 21])
    rows = []
    for layout in pages.layouts:
        turns = conversation(rng, layout, TALK, EARLIER)
        turns.append(ask(rng, layout, str(rng.choice(list(TALK))), {turn.question[-1] for turn in turns}))
        parts = [turn_ids(turn) for turn in turns]
        rows.append(
            (
                [token for question, answer in parts for token in question + answer],
                [number for number, part in enumerate(parts) for token in part[0] + part[1]],
                [flag for question, answer in parts for flag in [False] * len(question) + [True] * len(answer)],
            )
        )
    length = max(len(row[0]) for row in rows)
    text, turn = torch.full((count, length), PAD), torch.full((count, length), EARLIER)
    answer = torch.zeros(count, length, dtype=torch.bool)
    for place, (ids, numbers, flags) in enumerate(rows):
        text[place, : len(ids)], turn[place, : len(ids)] = torch.tensor(ids), torch.tensor(numbers)
        answer[place, : len(ids)] = torch.tensor(flags)
    labels = torch.where(answer & (turn == EARLIER), text, -100)
    samples = Samples(pages, [], text, labels, ~answer)
    return Talks(features(model, samples), text, labels, turn, answer)


@torch.no_grad()
def turn_scores(model: Any, talks: Talks) -> torch.Tensor:
    """``(B, EARLIER)``: mean over an answer's tokens of the best similarity to the image, Eq. 1 with ones."""
    each = score_tokens(model.get_input_embeddings()(talks.text), talks.vision)
    inside = talks.answer & (talks.text != EOS)
    return torch.stack(
        [
            (each * (inside & (talks.turn == number))).sum(1) / (inside & (talks.turn == number)).sum(1)
            for number in range(EARLIER)
        ],
        1,
    )


def evict_answers(model: Any, talks: Talks, retention: float) -> torch.Tensor:
    """``(B, T)`` bool: tokens of the answers that `TurnEviction` drops, whole answers, lowest first, never the last."""
    inside = talks.answer & (talks.text != EOS) & (talks.turn < EARLIER)
    scores = turn_scores(model, talks).tolist()
    evictor = TurnEvictor(adapter_for(model), TurnEviction(threshold=0, retention=retention))
    dropped = torch.zeros_like(inside)
    for row, turn in enumerate(talks.turn):
        held = [int((inside[row] & (turn == number)).sum()) for number in range(EARLIER)]
        for number in evictor.choose(held, scores[row]):
            dropped[row] |= inside[row] & (turn == number)
    return dropped


def evict_tokens(talks: Talks, counts: torch.Tensor, how: str, seed: int = 0) -> torch.Tensor:
    """``(B, 1 + 144 + T)`` bool: ``counts`` tokens of each row, before the last turn, that a control drops.

    ``how``: "oldest answer tokens", "random answer tokens", "random of all" (begin-of-text excepted), or "oldest of
    all" behind the first four (StreamingLLM's choice, positions kept).
    """
    earlier = talks.turn < EARLIER
    answers = talks.answer & (talks.text != EOS) & earlier
    head = torch.ones(len(counts), 1 + NUM_VISION, dtype=torch.bool)
    if how.endswith("answer tokens"):
        candidates = torch.cat([~head, answers], 1)
    else:
        candidates = torch.cat([head, earlier], 1)
        candidates[:, : SINKS if how.startswith("oldest") else 1] = False
    columns = torch.arange(candidates.shape[1]).expand(candidates.shape)
    draw = torch.Generator().manual_seed(seed)
    scores = columns.float() if how.startswith("oldest") else torch.rand(columns.shape, generator=draw)
    return lowest(scores, candidates, columns, counts)


@torch.no_grad()
def last_answer(model: Any, talks: Talks, dropped: torch.Tensor) -> np.ndarray:
    """``(B,)`` bool: is the last answer right if its turn sees none of ``dropped`` ``(B, 1 + 144 + T)``?"""
    right = []
    embed = model.get_input_embeddings()
    for rows in torch.arange(len(talks.text)).split(ROWS):
        text = talks.text[rows]
        hidden = torch.cat([embed(torch.full((len(rows), 1), BOS)), talks.vision[rows], embed(text)], 1)
        late = torch.cat([torch.zeros(len(rows), 1 + NUM_VISION, dtype=torch.bool), talks.turn[rows] == EARLIER], 1)
        visible = ~(late[:, :, None] & dropped[rows][:, None])
        positions = torch.arange(hidden.shape[1]).expand(len(rows), -1)
        hidden, _ = decode(model, hidden, positions, visible)
        predicted = model.lm_head(hidden[:, NUM_VISION:-1]).argmax(-1)
        right.append(((predicted == talks.labels[rows]) | (talks.labels[rows] < 0)).all(1))
    return torch.cat(right).numpy()


CONTROLS = ("oldest answer tokens", "random answer tokens", "oldest of all", "random of all")


def conversations(model: Any, count: int, retentions: tuple[float, ...] = (0.75, 0.5, 0.25)) -> dict[str, Any]:
    """The last answer's exact match, by what of the earlier turns is dropped."""
    talks = make_talks(model, count)
    head = torch.zeros(count, 1 + NUM_VISION, dtype=torch.bool)
    nothing = torch.cat([head, torch.zeros_like(talks.answer)], 1)
    full = last_answer(model, talks, nothing)
    result: dict[str, Any] = {"full": record(rate(full)), "rates": {}, "dropped": {}, "paired": []}
    for retention in retentions:
        answers = evict_answers(model, talks, retention)
        counts = answers.sum(1)
        result["dropped"][f"{retention:g}"] = round(float(counts.float().mean()), 1)
        judged = {"whole answers": last_answer(model, talks, torch.cat([head, answers], 1))}
        judged |= {how: last_answer(model, talks, evict_tokens(talks, counts, how)) for how in CONTROLS}
        for name, right in judged.items():
            result["rates"].setdefault(name, {})[f"{retention:g}"] = record(rate(right))
            if name != "whole answers":
                compared = record(paired(judged["whole answers"], right))
                result["paired"].append({"first": "whole answers", "second": name, "retention": retention, **compared})
        compared = record(paired(judged["whole answers"], full))
        result["paired"].append({"first": "whole answers", "second": "full", "retention": retention, **compared})
    return result


__all__ = ["CONTROLS", "Talks", "conversations", "evict_answers", "evict_tokens", "last_answer", "make_talks"]
