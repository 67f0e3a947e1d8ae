"""TOVA: every step, each layer drops the token that the newest one attends to least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.methods.cached.base import CachedMethod, CachedTokens


@dataclass(frozen=True)
class TOVA(CachedMethod):
    """Attention of the last token, mean over the heads of a layer, behind the prompt and behind every step.

    Nothing is protected under `CacheLimit`, the newest token included.
    """

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "arXiv:2401.06104"

    scope: str = "layer"
    sinks: int | None = None

    def recent(self, limit: int) -> int:
        return 0

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        assert tokens.attention is not None
        return tokens.attention
