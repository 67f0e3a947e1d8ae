"""Background that stays: the few vision tokens of a sample that resemble the question least.

A decoder rests the attention that it has no use for on tokens that say nothing (attention sinks). A budget that keeps
nothing but what resembles the question takes all of these away, and answers go wrong with everything needed in sight.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from asymvlm_kernels import PrunedSequence, Spread


@dataclass(frozen=True, eq=False)
class Background:
    """Background tokens of a batch, and its scores. All ``(B, S)``."""

    mask: torch.Tensor  # bool
    own: torch.Tensor  # fp32, before scores spread
    scores: torch.Tensor  # fp32, after it

    @classmethod
    def of(
        cls, own: torch.Tensor, spread: Spread | None, lines: torch.Tensor | None, prunable: torch.Tensor, number: int
    ) -> Background:
        """Arguments as of `background_tokens`, which takes the scores after they have spread along ``lines``."""
        scores = own if spread is None or lines is None else spread.apply(own, lines)
        return cls(background_tokens(scores, prunable, number), own, scores)

    def told(self, pruned: PrunedSequence) -> PrunedSequence:
        """A result in which these tokens were protected, with them counted and scored as any other vision token."""
        return dataclasses.replace(
            pruned,
            counts=pruned.counts + self.mask.sum(-1).to(pruned.counts),
            scores=torch.where(self.mask, self.scores, pruned.scores),
            own=torch.where(self.mask, self.own, pruned.own),
        )


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


__all__ = ["Background", "background_tokens"]
