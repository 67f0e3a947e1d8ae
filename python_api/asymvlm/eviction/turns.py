"""Whole answers of earlier turns leave the cache when a turn begins: those least like the images it is about.

What a dialogue has said lives on its cache: the columns and ids of each answer, and the merged embeddings of each
turn's image tokens. An answer scores the mean over its tokens of the largest cosine to an image token (Eq. 1, w = 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from asymvlm.cache.dialogue import Answer
from asymvlm.cache.eviction_cache import EvictionCache
from asymvlm.hf.arguments import EMBEDS, IDS, MASK
from asymvlm.hf.generation import setting
from asymvlm.hf.merge import merge_embeddings
from asymvlm.models.adapter import Adapter
from asymvlm.settings.eviction import TurnEviction
from asymvlm.tokens.roles import Tokens
from asymvlm_kernels import gather_rows, score_tokens
from asymvlm_kernels.prefill.reference import compact


class TurnEvictor:
    """Applies one policy to the dialogues of one model."""

    def __init__(self, adapter: Adapter, policy: TurnEviction) -> None:
        self.adapter = adapter
        self.policy = policy

    def begin(self, model: nn.Module, call: Mapping[str, Any], cache: EvictionCache, repeats: int) -> None:
        """Note which columns of the coming prompt are image tokens."""
        if call.get(IDS) is None:
            raise ValueError("turn eviction needs input_ids: embeddings do not tell where images are")
        if (setting(model, call, "num_beams") or 1) > 1:
            raise NotImplementedError("turn eviction does not work with beams: an answer is known when a call ends")
        ids, mask = call[IDS], call.get(MASK)
        missing = 0 if mask is None else mask.shape[1] - ids.shape[1]  # only the new part was sent
        tokens = Tokens.read(model, self.adapter, ids, None if mask is None else mask[:, missing:])
        vision = nn.functional.pad(tokens.vision, (missing, 0))
        dialogue = cache.dialogue
        dialogue.vision = vision.repeat_interleave(repeats, 0)
        dialogue.dropped = [[] for _ in range(len(dialogue.vision))]
        merges_inside = self.adapter.merge is not None and any(
            call.get(name) is not None for name in self.adapter.triggers
        )
        if merges_inside:  # the decoder is called with ids and pixels, so its own call does not show the embeddings
            merged = merge_embeddings(model, self.adapter, call)[EMBEDS]
            dialogue.merged = nn.functional.pad(merged, (0, 0, missing, 0)).repeat_interleave(repeats, 0)

    def before_prompt(self, model: nn.Module, cache: EvictionCache, embeds: torch.Tensor, queries: int) -> None:
        """Before the first layer sees (a chunk of) a prompt: keep its image tokens, evict what the policy says."""
        dialogue, past = cache.dialogue, int(cache.table.past)
        if dialogue.vision is None:
            return
        vision = dialogue.vision[:, past : past + queries]
        rows = dialogue.merged[:, past : past + queries] if dialogue.merged is not None else embeds
        new = [_gather(rows, vision)] if bool(vision.any()) and rows.shape[-1] else []
        if cache.evicts and dialogue.answers and not any(dialogue.dropped):
            self._evict(model, cache, new or dialogue.images)
        dialogue.images += new
        if past + queries >= dialogue.vision.shape[1]:
            dialogue.vision = dialogue.merged = None

    def end(self, model: nn.Module, call: Mapping[str, Any], cache: EvictionCache, sequences: torch.Tensor) -> None:
        """Note the answer of a call that has returned ``sequences`` ``(B, prompt and answer)``."""
        assert cache.table.prompt_end is not None
        answer = sequences[:, call[IDS].shape[1] :]
        ends = setting(model, call, "eos_token_id")
        special = [*(ends if isinstance(ends, (list, tuple)) else [ends]), setting(model, call, "pad_token_id")]
        known = torch.tensor([token for token in special if token is not None], device=answer.device)
        cache.dialogue.answers.append(Answer(cache.table.prompt_end, answer, ~torch.isin(answer, known)))
        cache.dialogue.vision = cache.dialogue.merged = None

    def _evict(
        self, model: nn.Module, cache: EvictionCache, images: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        dialogue, table = cache.dialogue, cache.table
        answers = dialogue.answers
        alive = table.alive(0, answers[-1].stop)
        words = [alive[:, answer.start : answer.stop] & answer.words for answer in answers]
        held = torch.stack([word.sum(1) for word in words], 1)  # (B, answers)
        scores = torch.stack([_similarity(model, answer, images) for answer in answers], 1)
        counts, values = held.tolist(), scores.tolist()
        dialogue.dropped = [self.choose(count, value) for count, value in zip(counts, values)]
        if not any(dialogue.dropped):
            return
        drop = torch.zeros_like(alive)
        for row, numbers in enumerate(dialogue.dropped):
            for number in numbers:
                answer = answers[number]
                drop[row, answer.start : answer.stop] = words[number][row]
        cache.evict_columns(drop)

    def choose(self, held: Sequence[int], scores: Sequence[float]) -> list[int]:
        """Numbers of the answers that go, of one row: lowest score first (NaN below all), among equal ones the oldest.

        Args:
            held: words of each answer that are in the cache. The last answer never goes.
        """
        total = sum(held)
        if total <= self.policy.threshold:
            return []
        order = sorted(
            range(len(held) - 1), key=lambda number: (not math.isnan(scores[number]), scores[number], number)
        )
        gone = []
        for number in order:
            if total <= self.policy.kept(sum(held)):
                break
            if held[number]:
                gone.append(number)
                total -= held[number]
        return gone


def _similarity(model: nn.Module, answer: Answer, images: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """``(B,)`` fp32: mean over an answer's words of their largest cosine to an image token; 0 without images."""
    if not images:
        return torch.zeros(len(answer.ids), device=answer.ids.device)
    embeds = cast("Any", model).get_input_embeddings()(answer.ids).detach()
    tokens = torch.cat([image for image, _ in images], 1).to(embeds.dtype)
    real = torch.cat([mask for _, mask in images], 1)
    scores = score_tokens(embeds, tokens, vision_mask=answer.words, text_mask=real)
    scores = scores.masked_fill(~answer.words | torch.isneginf(scores), 0.0)  # a row without images scores 0
    return scores.sum(1) / answer.words.sum(1).clamp_min(1)


def _gather(rows: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The marked rows of ``(B, S, D)``, packed to the front: ``(B, most, D)`` and which of them are real."""
    index = compact(mask, int(mask.sum(1).max()))
    return gather_rows(rows.detach(), index), index >= 0
