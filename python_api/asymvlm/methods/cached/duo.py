"""DuoAttention: some heads look far back and keep everything, the others keep the first and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.methods.cached.base import CachedMethod, CachedTokens, RowLimit


@dataclass(frozen=True)
class DuoAttention(CachedMethod):
    """Retrieval heads keep all tokens; in streaming heads the limit holds, for sinks and the newest tokens.

    A layer with heads of both kinds allocates slots for the longer ones: `CacheStats.token_bytes` counts the tokens
    alone. Which heads retrieve is learned once for a model; the paper's authors publish theirs.

    Args:
        retrieval: of each full-attention layer, which of its K/V heads retrieve.
    """

    name: ClassVar[str] = "duoattention"
    paper: ClassVar[str] = "arXiv:2410.10819"
    needs_attention: ClassVar[bool] = False
    needs_limit: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    retrieval: tuple[tuple[bool, ...], ...] = ()
    scope: str = "head"
    sinks: int | None = 4

    def __post_init__(self) -> None:
        if self.scope != "head":
            raise ValueError(f"duoattention gives heads limits of their own, got scope {self.scope!r}")
        object.__setattr__(self, "retrieval", tuple(tuple(bool(head) for head in layer) for layer in self.retrieval))
        if not self.retrieval:
            raise ValueError("duoattention needs retrieval, which heads of each layer look far back, got none")

    def limits(self, row: RowLimit) -> list[list[int | None]]:
        found = [len(layer) for layer in self.retrieval]
        if found != [row.heads] * row.layers:
            raise ValueError(
                f"retrieval must have {row.layers} layers of {row.heads} K/V heads, got layers of {found} heads"
            )
        return [[None if head else row.tokens for head in layer] for layer in self.retrieval]

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        return tokens.columns.to(torch.float32)
