"""PyramidDrop: vision tokens go in stages, by the attention that the next layer is about to pay them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from asymvlm.methods.inside.base import InsideMethod, LayerTokens
from asymvlm.methods.inside.budget import StageBudget, average, scaled_layers, shares_for

LAYERS, SHARES, PUBLISHED_LAYERS = (8, 16, 24), (0.5, 0.25, 0.125), 32


@dataclass(frozen=True)
class PyramidDrop(InsideMethod):
    """In front of each stage half of the vision tokens stay, those that the next layer's last row attends to most.

    The row is that of the last token of the instruction, and it is computed from the next layer's own queries and keys.

    Args:
        stages: layers, and how many of the prompt's tokens stay; None means 1/2, 1/4, 1/8 from layers 8, 16, 24 on.
    """

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "arXiv:2410.17247"
    ahead: ClassVar[bool] = True

    stages: StageBudget = StageBudget.shares(LAYERS, SHARES)  # noqa: RUF009 frozen

    @classmethod
    def for_average(cls, keep: float, num_layers: int) -> PyramidDrop:
        """With ``keep`` of the vision tokens on average over the layers of a decoder.

        Stages stand at a quarter, half and three quarters of its depth; each keeps the same share of what is left.

        Raises:
            ValueError: for a decoder of fewer than four layers, or a ``keep`` that the first layers alone exceed.
        """
        layers = scaled_layers(LAYERS, PUBLISHED_LAYERS, num_layers)
        held = partial(average, layers, num_layers=num_layers)
        return cls(StageBudget.shares(layers, shares_for(SHARES, keep, held, layers[0] / num_layers)))

    @property
    def layers(self) -> tuple[int, ...]:
        return self.stages.layers

    @property
    def budget(self) -> StageBudget:
        return self.stages

    def scores(self, seen: LayerTokens) -> torch.Tensor:
        return seen.attention
