"""Repeated patches: a token whose pixels an earlier token of its image has already says nothing new."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from asymvlm.methods.before.base import BeforeMethod, PositiveScores, VisionPrompt
from asymvlm_kernels import Budget, ScoreBudget


@dataclass(frozen=True)
class Dedup(BeforeMethod):
    """Drops the tokens whose pixels equal those of an earlier token of the same image, all of them to the last bit.

    Its own budget drops just these: a page with much white loses more than a photograph. Under any other budget they go
    first, and the rest is thinned out evenly. Pixels are compared as the processor hands them out; frames of a video
    are one image. (Tower features would not do: equal patches at two places have different ones.)
    """

    name: ClassVar[str] = "dedup"
    needs_pixels: ClassVar[bool] = True
    budget: ClassVar[Budget | ScoreBudget | None] = PositiveScores()

    def scores(self, prompt: VisionPrompt) -> torch.Tensor:
        """In (0, 1] for the first of each kind, at most -1 for the others."""
        prunable, marks = prompt.tokens.prunable, torch.cat([prompt.images[..., None], prompt.pixels], -1)
        new = torch.zeros_like(prunable)
        for row, mine in enumerate(prunable):
            kinds = torch.unique(marks[row, mine], dim=0, return_inverse=True)[1]
            places = torch.arange(len(kinds), device=kinds.device)
            first = torch.full_like(places, len(places)).scatter_reduce(0, kinds, places, "amin")
            new[row, mine] = first[kinds] == places
        even = [_spread_evenly(mask) for mask in (new, prunable & ~new)]
        return torch.where(new, 1 - even[0], -1 - even[1])


def _spread_evenly(mask: torch.Tensor) -> torch.Tensor:
    """``(B, S)`` fp32 in [0, 1): the smallest of the marked tokens lie evenly in their order, however many."""
    numbers = (mask.long().cumsum(1) - 1).clamp_min(0).double()
    return (numbers * (math.sqrt(5) - 1) / 2 % 1).to(torch.float32)
