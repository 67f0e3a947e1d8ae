"""StreamingLLM: the first tokens, attention sinks, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.methods.cached.base import CachedMethod, CachedTokens


@dataclass(frozen=True)
class StreamingLLM(CachedMethod):
    """Sinks and the newest tokens stay.

    Args:
        positions: ``"reindexed"``, as published: tokens stand as close as they lie in the cache, so sinks move up to
            the window; their keys are rotated, which leaves all distances as the paper's numbering has them.
            ``"original"``: every token stays where it was, as `OldestFirst` has it.
        sinks: first tokens that stay. With the prompt protected all of it moves up.
    """

    name: ClassVar[str] = "streamingllm"
    paper: ClassVar[str] = "arXiv:2309.17453"
    needs_attention: ClassVar[bool] = False
    needs_limit: ClassVar[bool] = True

    positions: str = "reindexed"
    sinks: int | None = 4
    scope: str = "decoder"

    def __post_init__(self) -> None:
        if self.positions not in ("reindexed", "original"):
            raise ValueError(f"positions must be 'reindexed' or 'original', got {self.positions!r}")
        if self.scope != "decoder":
            raise ValueError(f"streamingllm keeps the same tokens everywhere, got scope {self.scope!r}")

    @property
    def reindexes(self) -> bool:
        return self.positions == "reindexed"

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        return tokens.columns.to(torch.float32)
