"""What a method of K/V cache eviction sees of a step, and what it answers: scores, of which the lowest go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

SCOPES = ("decoder", "layer", "head")


@dataclass(frozen=True, eq=False)
class CachedTokens:
    """The tokens that one choice is made among. Tensors are on the cache's device.

    A line is a row of the batch, or a K/V head of a row for methods of that scope: ``line = row * heads + head``.
    """

    columns: torch.Tensor  # (lines, slots) int32: column of the token in each slot, negative for none and for padding
    newest: torch.Tensor  # (lines,) int64: column of the step's token
    attention: (
        torch.Tensor | None
    )  # (lines, slots) fp32: its attention, mean of the line's heads; None where ``needs_attention`` is False
    generated: int | torch.Tensor  # tokens of each row so far, evicted ones included
    samples: torch.Tensor | None  # (lines,) int64: a number made from the row's prompt and images, if ``needs_samples``
    layer: int | None  # number of the layer; None where one choice serves all


class CachedMethod(ABC):
    """Scores the tokens of a cache at a step that has to evict; how many go, and which may, is `TextEviction`'s."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""  # where it was published
    needs_attention: ClassVar[bool] = True
    needs_samples: ClassVar[bool] = False
    # who shares a choice: all layers of the "decoder", the heads of a "layer", or nobody: each K/V "head" its own
    scope: str = "decoder"
    # of the prompt: None protects all of it, a number only its first tokens
    sinks: int | None = None

    @abstractmethod
    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        """``(lines, slots)`` fp32: the lowest go first, of equal ones the oldest; NaN below all.

        Read where a token may go. A row's scores must not depend on the other rows.
        """
