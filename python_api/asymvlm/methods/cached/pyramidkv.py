"""PyramidKV: SnapKV with more tokens in the first layers and fewer in the last ones."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

from asymvlm.methods.cached.base import RowLimit
from asymvlm.methods.cached.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """As `SnapKV`, with limits that fall linearly over the layers and have the given one as their mean.

    Args:
        beta: the last layer keeps ``(limit - window) // beta`` tokens beside the window, the first as many more than
            the mean as the last keeps fewer. No layer is given more than the prompt has.
    """

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "arXiv:2406.02069"

    window: int = 8
    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"beta must be 1 or more, got {self.beta!r}")
        if self.scope == "decoder":
            raise ValueError("pyramidkv gives layers limits of their own, got scope 'decoder'")

    def limits(self, row: RowLimit) -> list[list[int | None]]:
        mean = row.tokens - self.window
        low = mean // self.beta
        high = max(min(2 * mean - low, row.prompt - self.window), mean)
        low = 2 * mean - high
        last = max(row.layers - 1, 1)
        # sums of the line up to each layer, rounded: all layers together hold exactly ``layers * mean``
        sums = [(2 * high * n * last - (high - low) * n * (n - 1)) // (2 * last) for n in range(row.layers + 1)]
        sums[-1] = row.layers * mean
        return [[self.window + after - before] * row.heads for before, after in itertools.pairwise(sums)]
