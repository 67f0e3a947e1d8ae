"""Methods inside the decoder by hand: one unpadded row, layer by layer, tokens taken away in between, no cache.

Nothing here imports the library under test. A rule is told what has come so far, and says which tokens go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from attending import attending_by
from masked_reference import ranked
from tiny import text_layers, vision_columns
from torch import Tensor
from transformers import PreTrainedModel

Probabilities = dict[int, Tensor]  # layer -> (H, Q, S)


@dataclass
class Seen:
    """In front of a layer: tokens by their places in ``hidden``."""

    stage: int
    vision: list[int]  # places of prunable tokens
    hidden: Tensor  # (S', D)
    attention: Tensor  # (H, S', S') of the layer that scores
    place: Callable[[int], int]  # of a column of the prompt, which must be left


@dataclass
class ByHand:
    """Args: rule: gets a `Seen`, returns the places of vision tokens that stay, and {place: joined hidden state}."""

    model: PreTrainedModel
    inputs: dict[str, Tensor]  # one row
    layers: tuple[int, ...]
    rule: Callable[[Seen], tuple[list[int], dict[int, Tensor]]]
    ahead: bool = False
    compact: bool = False
    kept: list[list[int]] = field(default_factory=list)  # columns of the prompt after each stage
    embeds: Tensor | None = None  # (S + t, D) in front of layer 0

    def __post_init__(self) -> None:
        self.inputs, self.prompt_length = dict(self.inputs), self.inputs["input_ids"].shape[1]

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Logits (S', vocabulary) of what is left."""
        hidden, rotary = self._entrance()
        self.embeds, self.kept = hidden[0], []
        prompt = self.prompt_length
        vision = {c for image in vision_columns(self.model, self.inputs["input_ids"][:, :prompt])[0] for c in image}
        columns = list(range(hidden.shape[1]))
        probabilities: Probabilities = {}
        layers = text_layers(self.model)
        with attending_by(self.model, self._attend(probabilities)):
            for number, layer in enumerate(layers):
                if number in self.layers:
                    if self.ahead:
                        layer(hidden, attention_mask=None, position_embeddings=self._rotary(rotary, columns))
                    seen = Seen(
                        self.layers.index(number),
                        [place for place, column in enumerate(columns) if column in vision],
                        hidden[0],
                        probabilities[number if self.ahead else number - 1],
                        columns.index,
                    )
                    stay, joined = self.rule(seen)
                    for place, state in joined.items():
                        hidden[0, place] = state
                    on = [p for p in range(len(columns)) if p not in seen.vision or p in stay or p in joined]
                    hidden, columns = hidden[:, on], [columns[p] for p in on]
                    self.kept.append([column for column in columns if column < prompt])
                found = layer(hidden, attention_mask=None, position_embeddings=self._rotary(rotary, columns))
                hidden = found if isinstance(found, Tensor) else found[0]
        norm = next(module.norm for module in self.model.modules() if getattr(module, "layers", None) is layers)
        return self.model.get_output_embeddings()(norm(hidden))[0]

    def greedy(self, steps: int) -> tuple[list[int], Tensor]:
        """Ids and the logits behind each, (steps, vocabulary); every step runs the whole sequence."""
        logits = []
        for _ in range(steps):
            logits.append(self.forward()[-1])
            token = logits[-1].argmax().view(1, 1)
            self.inputs["input_ids"] = torch.cat([self.inputs["input_ids"], token], 1)
            for name, value in {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}.items():
                if name in self.inputs:
                    self.inputs[name] = torch.nn.functional.pad(self.inputs[name], (0, 1), value=value)
        return self.inputs["input_ids"][0, self.prompt_length :].tolist(), torch.stack(logits)

    def _entrance(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the plain model calls layer 0 with."""
        found: list = []

        def record(module, args, kwargs):
            found.append((args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"]))

        hook = text_layers(self.model)[0].register_forward_pre_hook(record, with_kwargs=True)
        try:
            self.model(**self.inputs, use_cache=False)
        finally:
            hook.remove()
        return found[0][0].clone(), found[0][1]

    def _rotary(self, rotary: tuple[Tensor, ...], columns: list[int]) -> tuple[Tensor, ...]:
        taken = list(range(len(columns))) if self.compact else columns
        return tuple(part[..., taken, :] for part in rotary)

    @staticmethod
    def _attend(probabilities: Probabilities) -> Callable:
        def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
            logits = query @ key.mT * scaling
            future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            weights = logits.masked_fill(future, -torch.inf).softmax(-1)
            probabilities[module.layer_idx] = weights[0]
            return (weights @ value).transpose(1, 2).contiguous(), None

        return attend


def best(seen: Seen, scores: Tensor, count: int) -> list[int]:
    """Places of the vision tokens with the highest scores; ``scores`` (S',)."""
    return ranked(scores, seen.vision)[:count]


def raters(embeds: Tensor, vision: list[int], text: list[int]) -> list[int]:
    """SparseVLM: text that gets more than the mean of the softmax that vision tokens spread over it."""
    share = torch.zeros(len(text))
    for token in vision:
        share += torch.stack([embeds[token] @ embeds[word] for word in text]).softmax(0) / len(vision)
    return [word for word, part in zip(text, share, strict=True) if part > share.mean()]


def clusters(rows: Tensor, count: int) -> tuple[list[int], list[list[int]]]:
    """Density peaks in plain loops: centres, ascending, and the members of each."""
    rows, n = rows.double(), len(rows)
    distance = [[float((a - b).norm()) / rows.shape[1] ** 0.5 for b in rows] for a in rows]
    near = [sorted(line)[:count] for line in distance]
    density = [torch.tensor(-sum(d * d for d in line) / count).exp().item() for line in near]
    farthest = max(max(line) for line in distance)
    ahead = [sorted(range(n), key=lambda i: (-density[i], i)).index(i) for i in range(n)]  # mutual neighbours tie
    apart = [min([distance[i][j] for j in range(n) if ahead[j] < ahead[i]] or [farthest]) for i in range(n)]
    centres = sorted(sorted(range(n), key=lambda i: -apart[i] * density[i])[:count])
    members: list[list[int]] = [[] for _ in centres]
    for i in range(n):
        own = centres.index(i) if i in centres else min(range(count), key=lambda c: distance[i][centres[c]])
        members[own].append(i)
    return centres, members


__all__ = ["ByHand", "Seen", "best", "clusters", "raters"]
