"""SnapKV: behind the prompt, once, the tokens stay that its last tokens attend to, with their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.methods.cached.base import CachedMethod, CachedTokens


@dataclass(frozen=True)
class SnapKV(CachedMethod):
    """Attention of the prompt's last ``window`` tokens, summed, then averaged over ``kernel`` neighbours, in each head.

    The window stays, and ``limit - window`` of the tokens in front of it. Generated tokens all stay.

    Args:
        window: last tokens of the prompt that score and stay; the paper takes 16 to 64.
        kernel: neighbours that an average is taken over, the token included; odd. Beyond an end they count as 0.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "arXiv:2404.14469"
    needs_limit: ClassVar[bool] = True
    moments: ClassVar[tuple[str, ...]] = ("prompt",)

    window: int = 32
    kernel: int = 5
    scope: str = "head"
    sinks: int | None = None

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be 1 or more, got {self.window!r}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and 1 or more, got {self.kernel!r}")

    @property
    def queries(self) -> int | str:
        return self.window

    def recent(self, limit: int) -> int:
        return self.window

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        assert tokens.attention is not None
        return pooled(tokens.attention, tokens.columns, self.window, self.kernel)


def pooled(scores: torch.Tensor, columns: torch.Tensor, window: int, kernel: int) -> torch.Tensor:
    """Averages over neighbours in the order of ``columns``, the last ``window`` tokens left out; ``(lines, slots)``.

    Padding and free slots, whose columns are negative, count as neighbours in front of the first token, of score 0.
    """
    order = columns.argsort(dim=1, stable=True)
    row = scores.masked_fill(columns < 0, 0.0).gather(1, order)
    row[:, max(row.shape[1] - window, 0) :] = 0
    means = torch.nn.functional.avg_pool1d(row[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]
    return torch.empty_like(means).scatter_(1, order, means)
