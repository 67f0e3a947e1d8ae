"""What a method inside the decoder sees between two layers, and what it answers: scores, of which the highest stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.tokens.roles import Tokens


@dataclass(frozen=True, eq=False)
class LayerTokens:
    """A batch of prompts between two layers of the decoder, B rows of S columns: those that are still there.

    Attributes:
        tokens: roles, each ``(B, S)``; ``.prunable`` marks the tokens to choose among.
        hidden: ``(B, S, D)``: what the next layer would read.
        attention: ``(B, S)`` fp32: attention of the layer before, the mean over its heads and the scoring rows.
        layer: number of the next layer.
    """

    tokens: Tokens
    hidden: torch.Tensor
    attention: torch.Tensor
    layer: int


class InsideMethod(ABC):
    """Scores vision tokens between layers; later layers prefill, cache and attend to the kept ones alone.

    Kept tokens stay at their original positions. Before each of its layers the budget of `VisionPruning` applies to
    what is left.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""  # where it was published
    needs_text: ClassVar[bool] = False

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers, from 1, in front of which tokens go."""

    def rows(self, tokens: Tokens) -> torch.Tensor:
        """``(B, S)`` bool: the tokens whose attention is wanted; here the last of each row."""
        return tokens.last

    @abstractmethod
    def scores(self, seen: LayerTokens) -> torch.Tensor:
        """``(B, S)`` fp32: the higher, the longer a token stays; of equal ones the first. NaN ranks last."""
