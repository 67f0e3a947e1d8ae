"""Background that stays: the few vision tokens of a sample that resemble the question least.

A decoder rests the attention that it has no use for on tokens that say nothing (attention sinks). A budget that keeps
nothing but what resembles the question takes all of these away, and answers go wrong with everything needed in sight.
"""

from __future__ import annotations

import torch


def background_tokens(scores: torch.Tensor, prunable: torch.Tensor, number: int) -> torch.Tensor:
    """The lowest scored tokens of each row, the first of equal ones; all of a row that has no more.

    Args:
        scores: ``(B, S)`` fp32; NaN ranks behind all others.
        prunable: ``(B, S)`` bool.
    Returns:
        ``(B, S)`` bool. Does not synchronise.
    """
    ranked = torch.where(prunable, scores.nan_to_num(nan=torch.finfo(scores.dtype).max), torch.inf)
    places = ranked.argsort(dim=1, stable=True)[:, :number]
    return torch.zeros_like(prunable).scatter(1, places, True) & prunable


__all__ = ["background_tokens"]
