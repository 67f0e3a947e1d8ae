"""Controls: evictions that do not look at attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.methods.cached.base import CachedMethod, CachedTokens


@dataclass(frozen=True)
class OldestFirst(CachedMethod):
    """The newest tokens stay. With ``sinks=4`` it is StreamingLLM's choice, at the original positions."""

    name: ClassVar[str] = "oldest"
    paper: ClassVar[str] = "arXiv:2309.17453"
    needs_attention: ClassVar[bool] = False

    scope: str = "decoder"
    sinks: int | None = None

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        return tokens.columns.to(torch.float32)


@dataclass(frozen=True)
class RandomEviction(CachedMethod):
    """Others at every step, by the seed, the row's prompt and images, the step and how far back a token lies."""

    name: ClassVar[str] = "random eviction"
    needs_attention: ClassVar[bool] = False
    needs_samples: ClassVar[bool] = True

    seed: int = 0
    scope: str = "decoder"
    sinks: int | None = None

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        age = tokens.newest[:, None] - tokens.columns  # padding in front does not count
        mixed = age * 0x9E3779B1 + self.seed * 0x85EBCA77 + tokens.generated * 0xC2B2AE35
        if tokens.samples is not None:
            mixed = mixed + tokens.samples[:, None]
        for shift in (15, 13, 16):  # each round spreads every bit over the others
            mixed = ((mixed ^ (mixed >> shift)) * 0x2C1B3C6D) & 0x7FFFFFFF
        return mixed.to(torch.float32)
