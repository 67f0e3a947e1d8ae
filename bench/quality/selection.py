"""Who stays: scores of every method, and the kept tokens they lead to, by the library's own scoring and selection."""

from __future__ import annotations

import math
from typing import Any

import torch

from asymvlm_kernels import Budget, importance_gap, keep_counts, score_tokens, select_tokens
from bench.tinyvlm.evaluate import Samples
from bench.tinyvlm.glyphs import BOS
from bench.tinyvlm.pages import GRID

CONTROLS = ("random", "stride", "spiral")  # they see neither page nor question


@torch.no_grad()
def similarity(model: Any, samples: Samples, vision: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Eq. 1 against all text of the prompt, as `VisionPruning` does by default: ``(B, 144)`` fp32."""
    embed = model.get_input_embeddings()
    begin = torch.full((len(samples), 1), BOS)
    text = embed(torch.cat([begin, samples.text], 1))
    mask = torch.cat([begin == BOS, samples.question], 1)
    return score_tokens(vision, text, weight, text_mask=mask)


def control_scores(name: str, count: int, tokens: int = GRID * GRID, *, seed: int = 0) -> torch.Tensor:
    """``(count, tokens)`` scores that know nothing: the higher, the longer a token stays.

    ``random``: another order a sample. ``stride``: tokens evenly spread over the raster, whatever number stays.
    ``spiral``: from the centre outwards (the paper's position-only baseline): the edge goes first.

    Raises:
        ValueError: on another name.
    """
    if name == "random":
        return torch.rand(count, tokens, generator=torch.Generator().manual_seed(seed))
    if name == "stride":
        # the golden ratio's multiples fill the unit interval evenly at every length
        order = (torch.arange(tokens, dtype=torch.float64) * (math.sqrt(5) - 1) / 2 % 1).argsort()
        return -order.argsort().to(torch.float32).expand(count, -1)
    if name == "spiral":
        side = math.isqrt(tokens)
        place = torch.arange(side)
        ring = torch.minimum(place, side - 1 - place)
        return torch.minimum(ring[:, None], ring[None]).flatten().to(torch.float32).expand(count, -1)
    raise ValueError(f"control must be one of {', '.join(CONTROLS)}, got {name!r}")


def kept_tokens(scores: torch.Tensor, budget: Budget) -> torch.Tensor:
    """``(B, N)`` bool: what stays under ``budget``."""
    return kept_counts(scores, keep_counts(importance_gap(scores), scores.shape[1], budget))


def kept_counts(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``(B, N)`` bool: the ``counts`` best of each row."""
    width = scores.shape[1]
    index = select_tokens(scores, counts)
    kept = torch.zeros(len(scores), width + 1, dtype=torch.bool)
    kept.scatter_(1, torch.where(index < 0, width, index), True)
    return kept[:, :width]


__all__ = ["CONTROLS", "control_scores", "kept_counts", "kept_tokens", "similarity"]
