"""VL-Cache: the question's attention scores a prompt, and layers that attend more widely keep more of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.methods.cached.base import BEHIND_VISION, CachedMethod, CachedTokens, RowLimit


@dataclass(frozen=True)
class VLCache(CachedMethod):
    """Attention of the prompt's tokens behind the last vision token, summed, in each head; generated tokens all stay.

    A layer's limit is in proportion to the share of its weights that are at least a hundredth of their row's largest,
    over the same queries. No layer is given less than a hundredth of the prompt or more than all of it; what is over
    goes to the others, so the layers' mean is the given limit. A row without an image is scored by all its tokens.

    Args:
        recent_share: of a layer's limit, for the newest tokens, in [0, 1].
    """

    name: ClassVar[str] = "vl-cache"
    paper: ClassVar[str] = "arXiv:2410.23317"
    needs_limit: ClassVar[bool] = True
    needs_density: ClassVar[bool] = True
    moments: ClassVar[tuple[str, ...]] = ("prompt",)

    recent_share: float = 0.1
    scope: str = "head"
    sinks: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.recent_share <= 1:
            raise ValueError(f"recent_share must be in [0, 1], got {self.recent_share!r}")
        if self.scope == "decoder":
            raise ValueError("vl-cache gives layers limits of their own, got scope 'decoder'")

    @property
    def queries(self) -> int | str:
        return BEHIND_VISION

    def recent(self, limit: int) -> int:
        return max(1, int(limit * self.recent_share + 1e-9))

    def limits(self, row: RowLimit) -> list[list[int | None]]:
        assert row.density is not None
        most = max(row.prompt, row.tokens)
        least = min(max(-(-row.prompt // 100), 1), row.tokens)
        return [[size] * row.heads for size in divided(row.tokens * row.layers, row.density, least, most)]

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        assert tokens.attention is not None
        return tokens.attention


def divided(total: int, weights: tuple[float, ...], least: int, most: int) -> list[int]:
    """``total`` in whole parts by weight, each within ``least`` and ``most``; of equal weights the first get more.

    The bounds must leave room: ``least * n <= total <= most * n``. Weights are more than 0.
    """

    def parts(scale: float) -> list[int]:
        return [min(max(int(scale * weight), least), most) for weight in weights]

    low, high = 0.0, (total + 1) / min(weights)
    for _ in range(100):  # the largest scale that does not exceed the total
        middle = (low + high) / 2
        low, high = (middle, high) if sum(parts(middle)) <= total else (low, middle)
    found = parts(low)
    while sum(found) < total:
        for number in sorted(range(len(found)), key=lambda number: -weights[number]):
            if found[number] < most and sum(found) < total:
                found[number] += 1
    return found
