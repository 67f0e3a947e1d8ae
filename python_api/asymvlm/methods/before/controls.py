"""Controls: methods that see neither the image nor the question. A method that does not beat them does nothing."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.methods.before.base import BeforeMethod, VisionPrompt


def ordinals(prompt: VisionPrompt) -> torch.Tensor:
    """``(B, S)`` int64: number of each prunable token within its row, from 0."""
    return prompt.tokens.prunable.long().cumsum(1) - 1


@dataclass(frozen=True)
class RandomTokens(BeforeMethod):
    """A random order of each row's tokens, which depends on the seed and the row's ids, not on its neighbours."""

    name: ClassVar[str] = "random"

    seed: int = 0

    def scores(self, prompt: VisionPrompt) -> torch.Tensor:
        prunable = prompt.tokens.prunable
        real = torch.where(prompt.tokens.real, prompt.tokens.ids, 0)
        scores = torch.zeros(prunable.shape, dtype=torch.float32)
        for row, (ids, count) in enumerate(zip(real.tolist(), prunable.sum(1).tolist(), strict=True)):
            words = repr((self.seed, [token for token in ids if token]))
            draw = torch.Generator().manual_seed(zlib.crc32(words.encode()))
            scores[row, prunable[row].cpu()] = torch.rand(count, generator=draw)
        return scores.to(prunable.device)


@dataclass(frozen=True)
class Stride(BeforeMethod):
    """Tokens spread evenly over the reading order, whatever number stays."""

    name: ClassVar[str] = "stride"

    def scores(self, prompt: VisionPrompt) -> torch.Tensor:
        # multiples of the golden ratio fill the unit interval evenly, however many there are
        fractions = ordinals(prompt).clamp_min(0).double() * (math.sqrt(5) - 1) / 2 % 1
        return -fractions.to(torch.float32)


@dataclass(frozen=True)
class Spiral(BeforeMethod):
    """From the centre of each image outwards: the edge goes first (the paper's position-only baseline)."""

    name: ClassVar[str] = "spiral"
    paper: ClassVar[str] = "arXiv:2605.29535, Table 4"
    needs_grid: ClassVar[bool] = True

    def scores(self, prompt: VisionPrompt) -> torch.Tensor:
        cells = prompt.cells
        row = torch.minimum(cells.row, cells.height - 1 - cells.row)
        column = torch.minimum(cells.column, cells.width - 1 - cells.column)
        return torch.minimum(row, column).to(torch.float32)
