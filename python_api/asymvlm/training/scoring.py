"""Scores and gaps of merged batches under a weight, and the penalty that training derives from them."""

from __future__ import annotations

import torch

from asymvlm.methods.before.similarity import sequence_scores
from asymvlm.training.passes import FrozenModel, MergedBatch
from asymvlm.training.rows import remembered, text_rows
from asymvlm.training.settings import TrainingSettings
from asymvlm_kernels import UniformBudget, importance_gap, keep_counts
from asymvlm_kernels.training.soft_mask import soft_mask


def weighted_scores(batch: MergedBatch, weight: torch.Tensor) -> torch.Tensor:
    """Eq. 1 for the whole sequence: ``(B, S)`` fp32, -inf outside the prunable tokens; differentiable in ``weight``."""
    return sequence_scores(batch.embeds, batch.prunable, batch.text, weight.float())


def penalty(batch: MergedBatch, weight: torch.Tensor, ratio: float, settings: TrainingSettings) -> torch.Tensor:
    """The soft mask of a batch for one keep ratio, ``(B, S)`` fp32. Differentiable in ``weight``."""
    scores = weighted_scores(batch, weight)
    gap = torch.zeros(len(scores), device=scores.device)  # a uniform budget does not read it
    counts = keep_counts(gap, batch.prunable.sum(-1), UniformBudget(ratio))
    return soft_mask(
        scores,
        counts.masked_fill(~batch.trainable, 0),
        batch.prunable,
        strength=settings.strength,
        temperature=settings.temperature,
        theta_grad=settings.theta_grad,
    )


def row_losses(
    frozen: FrozenModel, batch: MergedBatch, weight: torch.Tensor, ratio: float, settings: TrainingSettings
) -> torch.Tensor:
    """Mean squared L2 distance of last hidden states between the two passes, for each row: ``(B,)`` fp32.

    Rows that have no vision to prune, or no text to score it against, are 0. Differentiable in ``weight``.
    """
    if settings.masked_rows == "text":
        wanted, layers = remembered(frozen, batch)
        masked = text_rows(frozen, batch, layers, penalty(batch, weight, ratio, settings))
    else:
        with torch.no_grad():
            wanted = frozen.hidden(batch)
        masked = frozen.hidden(batch, penalty(batch, weight, ratio, settings))
    distance = (masked - wanted).square().sum(-1)  # (positions,)
    row = batch.compared.nonzero()[:, 0]
    sums = distance.new_zeros(len(batch.embeds)).index_add(0, row, distance)
    return torch.where(batch.trainable, sums / batch.compared.sum(-1), 0.0)


@torch.no_grad()
def batch_gaps(batch: MergedBatch, weight: torch.Tensor) -> torch.Tensor:
    """Importance gap of each row, ``(B,)`` fp32; NaN where there is nothing to score."""
    gaps = importance_gap(weighted_scores(batch, weight), batch.prunable)
    return gaps.masked_fill(~batch.trainable, float("nan"))
