"""What a method inside the decoder sees between two layers, and what it answers: scores, of which the highest stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from asymvlm.methods.before.base import VisionPrompt
from asymvlm.methods.inside.budget import StageBudget
from asymvlm.tokens.roles import Tokens


@dataclass(frozen=True, eq=False)
class StageTokens:
    """A batch of prompts between two layers of the decoder, B rows of S columns: those that are still there.

    Attributes:
        tokens: roles, each ``(B, S)``; ``.prunable`` marks the tokens to choose among.
        text: ``(B, S)`` bool: the text that counts, by the setting ``text=``; labelled tokens, an answer, do not.
        asking: ``(B, S)`` bool: the token of each row that the answer follows: the last one, or the last in front of
            the first label.
        noted: what `InsideMethod.begin` returned, at these columns.
        layer: number of the next layer.
    """

    tokens: Tokens
    text: torch.Tensor
    asking: torch.Tensor
    noted: Mapping[str, torch.Tensor]
    layer: int


@dataclass(frozen=True, eq=False)
class LayerTokens(StageTokens):
    """The same with what the layers say.

    Attributes:
        hidden: ``(B, S, D)``: what the next layer would read.
        attention: ``(B, S)`` fp32: attention of the layer before, or of the next, the mean over its heads and the
            scoring rows.
        heads: ``(B, H, S)`` fp32: that of each query head, where the method is ``per_head``; None otherwise.
    """

    hidden: torch.Tensor
    attention: torch.Tensor
    heads: torch.Tensor | None


class Joined(NamedTuple):
    """Tokens that a method makes from those that go."""

    mask: torch.Tensor  # (B, S) bool: columns of dropped tokens, which the new ones take
    hidden: torch.Tensor  # (B, S, D): hidden states to go on with; read where ``mask`` is True


class InsideMethod(ABC):
    """Scores vision tokens between layers; later layers prefill, cache and attend to the kept ones alone.

    Kept tokens stay at their original positions unless the method is ``compact``. Before each of its layers its own
    ``budget`` says how many stay, or that of `VisionPruning` applies to what is left.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""  # where it was published
    needs_text: ClassVar[bool] = False
    needs_one_axis: ClassVar[bool] = False  # of positions: M-RoPE is refused
    ahead: ClassVar[bool] = False  # attention is that of the next layer, whose queries and keys are made twice
    per_head: ClassVar[bool] = False  # `LayerTokens.heads` is read
    hides: ClassVar[bool] = False  # tokens stay, and later layers do not see them

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers, from 1, in front of which tokens go."""

    @property
    def budget(self) -> StageBudget | None:
        """How many stay from each of the layers on, where the method decides it; None: `VisionPruning` does."""
        return None

    @property
    def compact(self) -> bool:
        """Whether later layers number the tokens that are left from 0, and go on behind them."""
        return False

    def begin(self, prompt: VisionPrompt) -> Mapping[str, torch.Tensor]:
        """``(B, S)`` tensors made from the prompt in front of layer 0, for `StageTokens.noted`."""
        return {}

    def rows(self, stage: StageTokens) -> torch.Tensor:
        """``(B, S)`` bool: the tokens whose attention is wanted; here the one of each row that asks."""
        return stage.asking

    @abstractmethod
    def scores(self, seen: LayerTokens) -> torch.Tensor:
        """``(B, S)`` fp32: the higher, the longer a token stays; of equal ones the first. NaN ranks last."""

    def join(self, seen: LayerTokens, scores: torch.Tensor, kept: torch.Tensor) -> Joined | None:
        """New tokens from those that go: prunable ones outside ``kept`` ``(B, S)`` bool. None: there are none."""
        return None
