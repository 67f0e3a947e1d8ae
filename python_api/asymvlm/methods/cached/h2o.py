"""H2O: heavy hitters, by the attention that a token has had from all queries so far, and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.methods.cached.base import ALL, CachedMethod, CachedTokens


@dataclass(frozen=True)
class H2O(CachedMethod):
    """The newest tokens stay, and of the others those with the largest sum of attention, in each K/V head.

    The sum goes over the queries of the prompt and of every step, row by row (the released code adds up the batch).
    ``CacheLimit(H2O(), share=0.2)`` is the published setting: a tenth of the prompt heavy, a tenth recent.
    ``TextEviction(score="accumulated")`` takes the rule to generated tokens alone, whose attention alone is added up.

    Args:
        recent_share: of the limit, for the newest tokens, in [0, 1]: ``floor(recent_share * limit)``, at least 1.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "arXiv:2306.14048"
    adds_up: ClassVar[bool] = True

    recent_share: float = 0.5
    scope: str = "head"
    sinks: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.recent_share <= 1:
            raise ValueError(f"recent_share must be in [0, 1], got {self.recent_share!r}")

    @property
    def queries(self) -> int | str:
        return ALL

    def recent(self, limit: int) -> int:
        return max(1, int(limit * self.recent_share + 1e-9))

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        assert tokens.attention is not None
        return tokens.attention
