"""FastV: vision tokens go once, in front of layer K, by the attention that the last token paid them a layer before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.methods.inside.base import InsideMethod, LayerTokens
from asymvlm.methods.inside.budget import StageBudget

LAYER, PUBLISHED_LAYERS = 2, 32


@dataclass(frozen=True)
class FastV(InsideMethod):
    """Vision tokens stay that the last token of the prompt attends to most in layer K - 1, the mean over heads.

    They go in place, while the prompt is prefilled: layers from K on hold the kept ones alone, at their original
    positions, and layers in front of K hold all.

    Args:
        layer: K, 2 in the paper (3 in its demonstration).
        keep: share of the tokens that stays, 1 - R in the paper; None: the budget of `VisionPruning`.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "arXiv:2403.06764"

    layer: int = LAYER
    keep: float | None = None

    def __post_init__(self) -> None:
        if self.keep is not None:
            StageBudget.shares((self.layer,), (self.keep,))

    @classmethod
    def for_average(cls, keep: float, num_layers: int, layer: int | None = None) -> FastV:
        """With ``keep`` of the vision tokens on average over the layers of a decoder.

        Args:
            layer: K; None means 2, or 1 in a decoder of fewer than 24 layers.
        Raises:
            ValueError: where the layers in front of K alone hold more on average.
        """
        first = max(1, min(LAYER, round(num_layers * LAYER / PUBLISHED_LAYERS))) if layer is None else layer
        if not first / num_layers < keep <= 1:
            raise ValueError(
                f"keep must be in ({first / num_layers:.4g}, 1]: the {first} of {num_layers} layers in front hold all "
                f"tokens, got {keep!r}"
            )
        return cls(first, (keep * num_layers - first) / (num_layers - first))

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def budget(self) -> StageBudget | None:
        return None if self.keep is None else StageBudget.shares(self.layers, (self.keep,))

    def scores(self, seen: LayerTokens) -> torch.Tensor:
        return seen.attention


@dataclass(frozen=True)
class FastVMasked(FastV):
    """FastV simulated by masking, as comparisons have measured it: all tokens stay, layers from K on do not see them.

    Answers are those of `FastV`; neither work nor K/V is saved.
    """

    name: ClassVar[str] = "fastv masked"
    hides: ClassVar[bool] = True
