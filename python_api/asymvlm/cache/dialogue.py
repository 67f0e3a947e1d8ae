"""What a dialogue has said so far, kept on its cache: answers, and the image tokens of each turn."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, eq=False)
class Answer:
    """One turn's answer: columns ``start`` on, ids ``(B, n)``, and which of them are words (no end, no padding)."""

    start: int
    ids: torch.Tensor
    words: torch.Tensor  # (B, n) bool

    @property
    def stop(self) -> int:
        return self.start + self.ids.shape[1]


@dataclass(eq=False)
class Dialogue:
    """What was said so far, on an `EvictionCache`."""

    answers: list[Answer] = field(default_factory=list)
    images: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # (B, n, D), (B, n) bool, by turn
    dropped: list[list[int]] = field(default_factory=list)  # numbers of the answers evicted in this call, by row
    vision: torch.Tensor | None = None  # (B, columns) bool, while a turn's prompt is to come
    merged: torch.Tensor | None = None  # (B, columns, D), where the decoder itself merges images

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for answer in self.answers for tensor in (answer.ids, answer.words)] + [
            tensor for image in self.images for tensor in image
        ]
