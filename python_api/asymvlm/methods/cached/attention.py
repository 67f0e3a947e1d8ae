"""AsymVLM's text eviction: a token matters as much as the newest token attends to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.methods.cached.base import CachedMethod, CachedTokens


@dataclass(frozen=True)
class LastRow(CachedMethod):
    """Attention of the step's token.

    Args:
        scope: ``"decoder"``: one choice for all layers, by those that `TextEviction` names. ``"layer"``, ``"head"``:
            each layer, or each K/V head of it, keeps the tokens that it attends to itself.
        sinks: None protects the prompt; a number protects its first tokens alone.
    """

    name: ClassVar[str] = "attention"
    paper: ClassVar[str] = "arXiv:2605.29535"

    scope: str = "decoder"
    sinks: int | None = None

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        assert tokens.attention is not None
        return tokens.attention
