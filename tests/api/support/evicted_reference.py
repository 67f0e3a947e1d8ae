"""The independent oracle of text eviction: nothing is removed, every step runs over the whole sequence, and a query
does not see the columns that were evicted before it. Scores are read off eager attention, sorted with Python's sort.
Nothing here imports the library under test.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from attending import attending_by
from tiny import EOS, family_of, text_layers
from torch import Tensor, nn
from transformers import PreTrainedModel

NEVER = 10**9


class Masked:
    """A conversation on an unpatched model.

    ``death`` (B, columns) is the last query column that sees a token. ``sliding`` layers see evicted tokens on
    ("keep") or not ("mask").
    """

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Tensor], keep: Tensor | None = None, **policy) -> None:
        self.model, self.inputs, self.family = model, dict(inputs), family_of(model)
        ids = inputs["input_ids"]
        self.keep = torch.ones_like(ids).bool() if keep is None else keep
        self.policy = dict(threshold=NEVER, retention=1.0, mode="hysteresis", recent=0, layers="last", sliding="keep")
        self.policy |= policy
        self.death = torch.full(ids.shape, NEVER)
        self.generated: list[int] = []  # columns, the same in every row
        self.evicted: list[list[int]] = [[] for _ in ids]
        self.probabilities: dict[int, Tensor] = {}
        config = model.config.get_text_config()
        self.kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(text_layers(model))
        full = [i for i, kind in enumerate(self.kinds) if kind == "full_attention"]
        self.scored = full if self.policy["layers"] == "all" else full[-1:]
        self.position_ids = None
        if not self.family.mrope:
            self.position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0) + self.family.first_position

    @property
    def columns(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Logits (B, vocabulary) behind the last token."""
        extra = {} if self.position_ids is None else {"position_ids": self.position_ids}
        with self._attention():
            return self.model(**self.inputs, **extra, use_cache=False).logits[:, -1]

    def append(self, tokens: Tensor, mask: Tensor | None = None) -> None:
        """Tokens (B, n) that somebody says or the model has chosen."""
        new = tokens.shape[1]
        self.inputs["input_ids"] = torch.cat([self.inputs["input_ids"], tokens], 1)
        fill = {"token_type_ids": 0, "mm_token_type_ids": 0, **self.family.generated}
        for name, value in fill.items():
            if name in self.inputs:
                self.inputs[name] = nn.functional.pad(self.inputs[name], (0, new), value=value)
        mask = torch.ones_like(tokens) if mask is None else mask
        self.inputs["attention_mask"] = torch.cat([self.inputs["attention_mask"], mask], 1)
        if self.position_ids is not None:
            following = self.position_ids[:, -1:] + mask.cumsum(-1)
            self.position_ids = torch.cat([self.position_ids, following], -1)
        self.death = nn.functional.pad(self.death, (0, new), value=NEVER)
        self.keep = nn.functional.pad(self.keep, (0, new), value=True)

    def generate(self, steps: int, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Greedy ids (B, steps), or ``forced`` ones, and the logits behind each (B, steps, vocabulary)."""
        ids, logits = [], []
        for step in range(steps):
            logits.append(self.forward())
            if step:
                self.evict()
            token = logits[-1].argmax(-1, keepdim=True) if forced is None else forced[:, step : step + 1]
            assert not (token == EOS).any(), "generate would stop here: draw other weights"
            ids.append(token)
            if step < steps - 1:
                self.generated.append(self.columns)
            self.append(token)
        return torch.cat(ids, 1), torch.stack(logits, 1)

    def evict(self) -> None:
        """What the step of the last token evicts: the lowest scores, among equal ones the oldest."""
        policy, last = self.policy, self.columns - 1
        scores = torch.stack([self.probabilities[layer][:, :, -1].mean(1) for layer in self.scored]).mean(0)
        for b in range(len(scores)):
            held = [column for column in self.generated if self.death[b, column] == NEVER]
            if policy["mode"] == "hysteresis":
                target = math.floor(policy["retention"] * policy["threshold"] + 1e-9)
                go = len(held) - target if len(held) > policy["threshold"] else 0
            else:
                target = math.floor(policy["retention"] * len(self.generated) + 1e-9)
                go = max(len(held) - target, 0) if len(self.generated) > policy["threshold"] else 0
            candidates = [column for column in held if column <= last - max(1, policy["recent"])]
            candidates.sort(key=lambda column: (scores[b, column].item(), column))
            for column in candidates[:go]:
                self.death[b, column] = last
            self.evicted[b] += candidates[:go]

    def close(self, row: int, columns: list[int]) -> None:
        """Columns that no later token sees."""
        self.death[row, columns] = self.columns - 1

    @contextmanager
    def _attention(self) -> Iterator[None]:
        def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
            queries = torch.arange(key.shape[2])[:, None]
            is_open = self.keep[:, None].expand(-1, len(queries), -1)
            if self.kinds[module.layer_idx] == "full_attention" or self.policy["sliding"] == "mask":
                is_open = is_open & (queries <= self.death[:, None])
            logits = query @ key.mT * scaling + attention_mask
            logits = logits.masked_fill(~is_open[:, None], torch.finfo(logits.dtype).min)
            self.probabilities[module.layer_idx] = logits.softmax(-1)
            return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

        with attending_by(self.model, attend):
            yield
