"""What a method of K/V cache eviction sees of a step, and what it answers: scores, of which the lowest go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

SCOPES = ("decoder", "layer", "head")
BEHIND_VISION = "behind vision"  # queries of a prompt: its tokens behind the last vision token
ALL = "all"


@dataclass(frozen=True, eq=False)
class CachedTokens:
    """The tokens that one choice is made among. Tensors are on the cache's device.

    A line is a row of the batch, or a K/V head of a row for methods of that scope: ``line = row * heads + head``.
    """

    columns: torch.Tensor  # (lines, slots) int32: column of the token in each slot, negative for none and for padding
    newest: torch.Tensor  # (lines,) int64: column of the step's token
    # (lines, slots) fp32: attention of the step's token; behind a prompt the sum over the method's ``queries``; the sum
    # over all queries so far where it ``adds_up``, of generated tokens alone under `TextEviction`. Mean of the line's
    # heads. None where ``needs_attention`` is False.
    attention: torch.Tensor | None
    generated: int | torch.Tensor  # tokens of each row so far, evicted ones included
    samples: torch.Tensor | None  # (lines,) int64: a number made from the row's prompt and images, if ``needs_samples``
    layer: int | None  # number of the layer; None where one choice serves all


@dataclass(frozen=True)
class RowLimit:
    """The tokens of one row that a method divides among layers and heads, behind a prompt."""

    tokens: int  # that a layer may hold, on average over the layers
    prompt: int  # tokens of the row's prompt, no padding
    layers: int  # that hold tokens of their own; 1 where one choice serves all
    heads: int  # K/V heads of a layer that hold tokens of their own; 1 where one choice serves all
    density: tuple[float, ...] | None  # of each layer, if ``needs_density``: the share of large attention weights


class CachedMethod(ABC):
    """Scores the tokens of a cache at a step that has to evict.

    How many go, and which may, is said by `TextEviction`, for generated tokens, or by `CacheLimit`, for the whole
    cache, to which ``moments``, ``queries``, ``reindexes``, ``limits`` and the density speak alone.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""  # where it was published
    needs_attention: ClassVar[bool] = True
    needs_samples: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False  # which heads do what, an argument without a default
    needs_limit: ClassVar[bool] = False  # refused by `TextEviction`
    moments: ClassVar[tuple[str, ...]] = ("prompt", "step")  # it chooses behind each prompt, behind each step
    adds_up: ClassVar[bool] = False  # attention is the sum over all queries so far
    needs_density: ClassVar[bool] = False
    density_threshold: ClassVar[float] = 0.01  # of a row's largest weight: weights from there on are large
    # who shares a choice: all layers of the "decoder", the heads of a "layer", or nobody: each K/V "head" its own
    scope: str = "decoder"
    # of the prompt: a number protects its first tokens, None all of it (under `CacheLimit` nothing, see there)
    sinks: int | None = None

    @abstractmethod
    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        """``(lines, slots)`` fp32: the lowest go first, of equal ones the oldest; NaN below all.

        Read where a token may go. A row's scores must not depend on the other rows.
        """

    @property
    def queries(self) -> int | str:
        """Whose attention to a prompt scores: of so many of its last tokens, of ``"all"`` or of ``"behind vision"``."""
        return 1 if self.needs_attention else 0

    @property
    def reindexes(self) -> bool:
        """Whether protected tokens move up to the rest: their keys are rotated as if nothing had been between."""
        return False

    def recent(self, limit: int) -> int:
        """Newest tokens that always stay, of the ``limit`` of one layer or head, or of what `TextEviction` leaves."""
        return 1

    def limits(self, row: RowLimit) -> list[list[int | None]]:
        """Tokens to hold, for each head of each layer; None for no limit."""
        return [[row.tokens] * row.heads for _ in range(row.layers)]
