"""The oracle of limits of the whole cache: nothing is removed, and each layer and K/V head has columns that are closed.

A rule is ``rule(seen) -> columns that go``: it sees one head's (or layer's) attention and what it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from attending import attending_by
from evicted_reference import NEVER, Masked
from tiny import text_layers
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What a rule chooses by. ``held`` columns ascend; ``attention`` (heads, queries, columns), real queries alone."""

    held: list[int]
    prompt: list[int]  # columns of the row's prompt, no padding
    attention: Tensor
    queries: list[int]  # columns of the queries
    layer: int  # among the full-attention layers
    head: int
    moment: str  # "prompt" or "step"
    row: int
    layers: list[Tensor]  # as ``attention``, of all heads of each full-attention layer


Rule = Callable[[Seen], list[int]]


def lowest(seen: Seen, scores: Tensor, count: int, first: int = 0, recent: int = 0) -> list[int]:
    """The lowest scored of what is held, but for ``first`` and ``recent`` tokens; of equal ones the oldest."""
    among = seen.held[first : len(seen.held) - recent]
    return sorted(among, key=lambda column: (scores[column].item(), column))[: max(count, 0)]


class MaskedByLimit(Masked):
    """As `Masked`, with ``deaths`` (B, K/V heads, columns) of each full-attention layer, and a rule."""

    def __init__(self, model, inputs, rule: Rule, keep=None, shared: bool = False, sliding: str = "keep") -> None:
        super().__init__(model, inputs, keep, sliding=sliding)
        self.groups = model.config.get_text_config().num_key_value_heads
        self.rule, self.shared = rule, shared
        kinds = [self.kinds[layer] for layer in range(len(text_layers(model)))]
        self.full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
        self.deaths = {layer: torch.full((len(self.keep), self.groups, self.columns), NEVER) for layer in self.full}
        self.begins, self.moment = 0, "prompt"

    def append(self, tokens: Tensor, mask: Tensor | None = None) -> None:
        super().append(tokens, mask)
        grow = (0, tokens.shape[1])
        self.deaths = {layer: torch.nn.functional.pad(death, grow, value=NEVER) for layer, death in self.deaths.items()}

    def real(self, row: int) -> list[int]:
        return (self.inputs["attention_mask"][row].bool() & self.keep[row]).nonzero()[:, 0].tolist()

    def generate(self, steps: int) -> tuple[Tensor, Tensor]:
        """Greedy ids (B, steps) and the logits behind each, the rule applied behind the prompt and each step."""
        ids, logits = [], []
        self.prompt = self.columns
        for step in range(steps):
            self.moment = "step" if step else "prompt"
            logits.append(self.forward())
            self.evict()
            ids.append(logits[-1].argmax(-1, keepdim=True))
            self.append(ids[-1])
        return torch.cat(ids, 1), torch.stack(logits, 1)

    def evict(self) -> None:
        for row in range(len(self.keep)):
            columns = self.real(row)
            layers = [self.probabilities[layer][row][:, columns] for layer in self.full]
            for number, layer in enumerate(self.full):
                attention = layers[number].unflatten(0, (self.groups, -1))
                for head in range(self.groups):
                    death = self.deaths[layer][row, head]
                    own = attention.flatten(0, 1) if self.shared else attention[head]
                    held = [column for column in columns if death[column] == NEVER]
                    prompt = [column for column in columns if column < self.prompt]
                    seen = Seen(held, prompt, own, columns, number, head, self.moment, row, layers)
                    death[self.rule(seen)] = self.columns - 1

    def held(self, layer: int, row: int, head: int) -> list[int]:
        return [column for column in self.real(row) if self.deaths[self.full[layer]][row, head, column] == NEVER]

    def closed(self, layer: int, shared: int) -> Tensor:
        """(B, heads, queries, columns) bool: what a layer's queries see no more."""
        death = self.deaths.get(layer)
        if death is None and self.policy["sliding"] == "mask":
            death = self.deaths[self.full[0]]
        if death is None:
            return torch.tensor(False)
        return torch.arange(self.columns)[:, None] > death.repeat_interleave(shared, 1)[:, :, None]

    @contextmanager
    def _attention(self):
        def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
            shared = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
            logits = query @ key.mT * scaling + attention_mask
            closed = ~self.keep[:, None, None]
            closed = closed | self.closed(module.layer_idx, shared)
            logits = logits.masked_fill(closed, torch.finfo(logits.dtype).min)
            self.probabilities[module.layer_idx] = logits.softmax(-1)
            return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

        with attending_by(self.model, attend):
            yield


class Reindexed(MaskedByLimit):
    """As `MaskedByLimit`, where the first ``sinks`` tokens of a row stand right in front of the rest that it holds.

    Queries keep their positions; of each query the sinks' keys are turned on by as much as was missing at its time.
    """

    def __init__(self, model, inputs, rule: Rule, sinks: int | None, keep=None, neighbours=False) -> None:
        self.neighbours = neighbours  # columns 2 i and 2 i + 1 make a pair, not i and D / 2 + i
        super().__init__(model, inputs, rule, keep, shared=True)
        self.sinks, self.positions, self.turned = [self.real(row)[:sinks] for row in range(len(self.keep))], None, {}

    def forward(self) -> Tensor:
        rotary = self.model.get_decoder().rotary_emb

        def note(module, args, kwargs):
            self.positions = (kwargs["position_ids"] if "position_ids" in kwargs else args[1]).clone()

        hook = rotary.register_forward_pre_hook(note, with_kwargs=True)
        try:
            return super().forward()
        finally:
            hook.remove()

    def evict(self) -> None:
        super().evict()
        low, high = (self.positions, self.positions)
        if self.positions.ndim == 3:
            low, high = self.positions.amin(0), self.positions.amax(0)
        for row, sinks in enumerate(self.sinks):
            held, row_low = self.held(0, row, 0), low.expand(len(self.keep), -1)[row]
            gap = 0
            if held != self.real(row):
                begin = min(row_low[column].item() for column in held if column not in sinks)
                gap = begin - 1 - high.expand(len(self.keep), -1)[row, sinks].max().item()
            self.turned[row, self.columns] = gap  # of the query that comes next

    @contextmanager
    def _attention(self):
        config = self.model.config.get_text_config()
        theta = (config.rope_parameters.get("full_attention") or config.rope_parameters)["rope_theta"]

        def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
            shared = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
            logits = query @ key.mT * scaling
            frequency = theta ** (-torch.arange(0, key.shape[-1], 2).double() / key.shape[-1])
            for (row, column), gap in self.turned.items():
                if column < query.shape[2] and module.layer_idx in self.deaths:
                    sinks = key[row][:, self.sinks[row]].double()
                    parts = (sinks[..., ::2], sinks[..., 1::2]) if self.neighbours else sinks.chunk(2, -1)
                    pairs = torch.complex(*parts) * torch.exp(1j * gap * frequency)
                    turned = [pairs.real, pairs.imag]
                    turned = torch.stack(turned, -1).flatten(-2) if self.neighbours else torch.cat(turned, -1)
                    turned = turned.float()
                    logits[row, :, column, self.sinks[row]] = (query[row, :, column, None] * turned).sum(-1) * scaling
            logits = logits + attention_mask
            closed = ~self.keep[:, None, None]
            closed = closed | self.closed(module.layer_idx, shared)
            logits = logits.masked_fill(closed, torch.finfo(logits.dtype).min)
            self.probabilities[module.layer_idx] = logits.softmax(-1)
            return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

        with attending_by(self.model, attend):
            yield
