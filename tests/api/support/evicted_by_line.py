"""The oracle of evictions that layers or heads choose for themselves: each has its own closed columns, nothing is
removed. Nothing here imports the library under test.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from attending import attending_by
from evicted_reference import NEVER, Masked
from tiny import text_layers
from torch import Tensor


class MaskedByLine(Masked):
    """As `Masked`, with ``deaths`` of each layer: (B, K/V heads, columns).

    ``scope`` is the decoder, whose last layer scores for all, a layer or a head. With ``adds_up`` a score is the sum of
    the attention of all generated tokens so far.
    """

    def __init__(self, model, inputs, keep=None, scope="head", sinks=None, score=None, adds_up=False, **policy) -> None:
        super().__init__(model, inputs, keep, **policy)
        config = model.config.get_text_config()
        self.groups, self.scope, self.sinks, self.score = config.num_key_value_heads, scope, sinks, score
        self.adds_up, self.sums = adds_up, {}
        shape = (len(inputs["input_ids"]), self.groups, self.columns)
        self.deaths = {layer: torch.full(shape, NEVER) for layer in range(len(text_layers(model)))}
        self.prompt = self.columns

    def append(self, tokens: Tensor, mask: Tensor | None = None) -> None:
        super().append(tokens, mask)
        grow = (0, tokens.shape[1])
        self.deaths = {layer: torch.nn.functional.pad(death, grow, value=NEVER) for layer, death in self.deaths.items()}

    def evict(self) -> None:
        full = [layer for layer in self.deaths if self.kinds[layer] == "full_attention"]
        for layer in full if self.scope != "decoder" else full[-1:]:
            scores = self._scores(layer)
            for row, lines in enumerate(scores):
                for head in range(self.groups):
                    self._evict_line(row, head, layer, lines[head])
        if self.scope == "decoder":
            self.deaths |= {layer: self.deaths[full[-1]].clone() for layer in full}

    def _scores(self, layer: int) -> Tensor:
        """(B, K/V heads, columns)."""
        heads = self.probabilities[layer][:, :, -1].unflatten(1, (self.groups, -1)).mean(2)
        if self.scope != "head":
            heads = heads.mean(1, keepdim=True).expand_as(heads)
        if not self.adds_up:
            return heads
        before = self.sums.get(layer, heads[..., :0])
        self.sums[layer] = heads + torch.nn.functional.pad(before, (0, heads.shape[-1] - before.shape[-1]))
        return self.sums[layer]

    def _evict_line(self, row: int, head: int, layer: int, score: Tensor) -> None:
        death, last, policy = self.deaths[layer][row, head], self.columns - 1, self.policy
        may_go = list(self.generated)
        if self.sinks is not None:
            real = (self.inputs["attention_mask"][row, : self.prompt].bool() & self.keep[row, : self.prompt]).nonzero()
            may_go += real[self.sinks :, 0].tolist()
        held = len(self.generated) - int((death != NEVER).sum())
        excess = 0
        if held > policy["threshold"]:
            excess = held - math.floor(policy["retention"] * policy["threshold"] + 1e-9)
        candidates = [
            column for column in may_go if death[column] == NEVER and column <= last - max(1, policy["recent"])
        ]
        score = score if self.score is None else self.score(score, last)
        candidates.sort(key=lambda column: (score[column].item(), column))
        death[candidates[:excess]] = last

    @contextmanager
    def _attention(self):
        def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
            shared = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
            queries = torch.arange(key.shape[2])[:, None]
            alive = queries <= self.deaths[module.layer_idx].repeat_interleave(shared, 1)[:, :, None]
            logits = query @ key.mT * scaling + attention_mask
            logits = logits.masked_fill(~(alive & self.keep[:, None, None]), torch.finfo(logits.dtype).min)
            self.probabilities[module.layer_idx] = logits.softmax(-1)
            return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

        with attending_by(self.model, attend):
            yield


def held_by_line(cache) -> list[list[list[int]]]:
    """Columns that each group's lines hold."""
    return [[sorted(line[line >= 0].tolist()) for line in table.slot_pos] for table in cache.tables]
