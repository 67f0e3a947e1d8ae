"""Text eviction on the small VLM: generated tokens of a long answer, and whole answers of a conversation.

Both compare what is dropped, never how much: at every step (or turn) each method gives up the same number of tokens as
the library's policy, so all hold equal bytes. ``prompt protected`` says whether images and questions may go.

Eviction is simulated by closing columns, which equals removal at kept positions; that `transcribe` decides as the
library's `TextEviction` does is a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asymvlm import TextEviction
from asymvlm.hf.arguments import Callee
from asymvlm_kernels import score_tokens
from bench.quality.statistics import paired, rate, record
from bench.tinyvlm.batches import turn_ids
from bench.tinyvlm.evaluate import ROWS, Samples, features, make_samples
from bench.tinyvlm.glyphs import BOS, EOS, PAD
from bench.tinyvlm.losses import decode
from bench.tinyvlm.model import NUM_VISION
from bench.tinyvlm.pages import make_pages
from bench.tinyvlm.questions import ask, conversation

SCORES = ("attention", "attention of all layers", "oldest first", "random")
RETENTIONS = (0.9, 0.75, 0.5)
THRESHOLD, RECENT = 24, 6  # of a transcript of up to 72 tokens
EARLIER = 7  # turns before the one that counts: with it about as long as the model was trained on
SINKS = 4  # first tokens that StreamingLLM keeps
TALK = {"value": 0.6, "exists": 0.1, "count": 0.1, "list": 0.2}


@dataclass(frozen=True)
class Chooser:
    """How tokens are picked: by which score, the ``recent`` newest never, the prompt never or as well."""

    score: str = "attention"
    protected: bool = True
    recent: int = 0

    @property
    def name(self) -> str:
        guard = f", {self.recent} recent kept" if self.recent else ""
        return f"{self.score}{guard}, prompt {'protected' if self.protected else 'not protected'}"


CHOOSERS = (
    *(Chooser(score, protected) for protected in (True, False) for score in SCORES),
    Chooser("attention", recent=RECENT),
    Chooser("attention of all layers", recent=RECENT),
)


@torch.no_grad()
def transcribe(
    model: Any, samples: Samples, vision: torch.Tensor, policy: TextEviction | None, chooser: Chooser, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens ``(B, T)`` after the samples' questions, T the longest answer and its end of text; and how many
    tokens each row gave up, ``(B,)``, which the policy alone decides.

    The samples must ask questions of one length. When the prompt and more than ``policy.threshold`` tokens are held, as
    many tokens go as ``policy`` wants, lowest first by ``chooser``; the newest always stays.
    """
    from transformers import DynamicCache

    decoder, embed = model.model.language_model, model.get_input_embeddings()
    question = samples.text[samples.question].view(len(samples), -1)
    begin = torch.full((len(samples), 1), BOS)
    rows = torch.cat([embed(begin), vision, embed(question)], 1)
    prompt, steps = rows.shape[1], samples.text.shape[1] - question.shape[1]
    draw = torch.Generator().manual_seed(seed)
    alive = torch.ones(len(samples), prompt + steps, dtype=torch.bool)
    cache, generated = DynamicCache(config=decoder.config), []
    name = Callee.of(type(decoder).forward).cache
    evicted = torch.zeros(len(samples), dtype=torch.int64)
    implementation = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")  # the one that returns probabilities
    try:
        for step in range(steps):
            end = prompt + step
            positions = torch.arange(end - rows.shape[1], end).expand(len(samples), -1)
            out = decoder(
                inputs_embeds=rows,
                attention_mask=alive[:, :end].long(),
                position_ids=positions,
                **{name: cache},
                use_cache=True,
                output_attentions=True,
            )
            if policy is not None and step > 0:
                # a prompt token that went makes room as a generated one does: all choosers hold equal bytes
                excess = policy.excess(step - evicted, torch.full_like(evicted, step))
                scores = _scores(chooser, out.attentions, alive[:, :end], draw)
                candidates = alive[:, :end].clone()
                candidates[:, end - max(1, chooser.recent) :] = False
                if chooser.protected:
                    candidates[:, :prompt] = False
                elif chooser.score == "oldest first":
                    candidates[:, :SINKS] = False
                gone = _lowest(scores, candidates, excess)
                alive[:, :end] &= ~gone
                evicted += gone.sum(1)
            token = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
            generated.append(token)
            rows = embed(token[:, None])
    finally:
        decoder.set_attn_implementation(implementation)
    return torch.stack(generated, 1), evicted


def _scores(
    chooser: Chooser, attentions: tuple[torch.Tensor, ...], alive: torch.Tensor, draw: torch.Generator
) -> torch.Tensor:
    """``(B, S)`` of the newest row; the lowest go first."""
    if chooser.score == "random":
        return torch.rand(alive.shape, generator=draw)
    if chooser.score == "oldest first":
        return torch.arange(alive.shape[1], dtype=torch.float32).expand(alive.shape)
    layers = attentions if chooser.score == "attention of all layers" else attentions[-1:]
    return torch.stack([layer[:, :, -1].mean(1) for layer in layers]).mean(0)


def _lowest(scores: torch.Tensor, candidates: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """``(B, S)`` bool: the ``count`` lowest candidates of each row, of equal ones the oldest."""
    order = scores.masked_fill(~candidates, float("inf")).sort(dim=1, stable=True).indices
    chosen = torch.zeros_like(candidates)
    chosen.scatter_(1, order, torch.arange(scores.shape[1]).expand_as(order) < count[:, None])
    return chosen & candidates


def transcript_samples(count: int, *, seed: int = 0) -> Samples:
    """Pages of ten to twelve entries to be read out in full: 60 to 72 tokens."""
    return make_samples("test", count, seed=seed, mix={"read": 1.0}, entries=(10, 12))


def transcripts(model: Any, samples: Samples, retentions: tuple[float, ...] = RETENTIONS) -> dict[str, Any]:
    """Token level: exact match and share of right tokens, by what goes and how much of the threshold stays."""
    vision = features(model, samples)
    length = int(samples.question.sum(1)[0])
    truth = torch.cat([samples.labels, samples.labels.new_full((len(samples), 1), -100)], 1)[:, length:-1]

    def judge(policy: TextEviction | None, chooser: Chooser) -> tuple[np.ndarray, np.ndarray]:
        parts = list(_parts(samples))
        tokens = torch.cat([transcribe(model, part, vision[rows], policy, chooser)[0] for rows, part in parts])
        hit, wanted = tokens == truth, truth >= 0
        return (hit | ~wanted).all(1).numpy(), (hit & wanted).sum(1).div(wanted.sum(1)).numpy()

    exact, tokens = judge(None, Chooser())
    result: dict[str, Any] = {"threshold": THRESHOLD, "full": _both(exact, tokens), "rates": {}, "paired": []}
    for retention in retentions:
        policy = TextEviction(threshold=THRESHOLD, retention=retention)
        judged = {chooser: judge(policy, chooser) for chooser in CHOOSERS}
        for chooser, (exact, tokens) in judged.items():
            result["rates"].setdefault(chooser.name, {})[f"{retention:g}"] = _both(exact, tokens)
        pairs = [(Chooser(), Chooser(score)) for score in SCORES[2:]]
        pairs += [(Chooser(score), Chooser(score, False)) for score in SCORES]
        for first, second in pairs:
            compared = record(paired(judged[first][1], judged[second][1]))
            result["paired"].append({"first": first.name, "second": second.name, "retention": retention, **compared})
    return result


def _both(exact: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    return {"exact": record(rate(exact)), "tokens": record(rate(tokens))}


def _parts(samples: Samples) -> Iterator[tuple[slice, Samples]]:
    for start in range(0, len(samples), ROWS):
        rows = slice(start, start + ROWS)
        yield (
            rows,
            Samples(
                samples.pages, samples.turns[rows], samples.text[rows], samples.labels[rows], samples.question[rows]
            ),
        )


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


def make_talks(model: Any, count: int, *, seed: int = 0) -> Talks:
    """Conversations about test pages. The same seed gives the same ones."""
    pages = make_pages([seed, 20], count, "test", (6, 12))
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
    scores = turn_scores(model, talks)
    dropped = torch.zeros_like(inside)
    for row in range(len(inside)):
        sizes = [int((inside[row] & (talks.turn[row] == number)).sum()) for number in range(EARLIER)]
        left, allowed = sum(sizes), sum(sizes) * round(retention * 1_000_000) // 1_000_000
        for number in scores[row, :-1].argsort(stable=True).tolist():
            if left <= allowed:
                break
            left -= sizes[number]
            dropped[row] |= inside[row] & (talks.turn[row] == number)
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
    columns = torch.arange(candidates.shape[1], dtype=torch.float32).expand(candidates.shape)
    draw = torch.Generator().manual_seed(seed)
    scores = columns if how.startswith("oldest") else torch.rand(columns.shape, generator=draw)
    return _lowest(scores, candidates, counts)


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
    """Turn level: the last answer's exact match, by what of the earlier turns is dropped."""
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


__all__ = ["CHOOSERS", "Chooser", "conversations", "make_talks", "transcribe", "transcript_samples", "transcripts"]
