"""`prune_sequence` through the public ops, for what the two launches do not take on.

Several images with floors of their own, scores that spread, budgets that are not this package's, and sequences or
batches too long for them.
"""

from __future__ import annotations

import torch

from asymvlm_kernels.budget import MILLION, Budget, ScoreBudget, budget_counts, counts_scores
from asymvlm_kernels.prefill.gather import gather_rows
from asymvlm_kernels.prefill.groups import guaranteed_tokens, rank_sure
from asymvlm_kernels.prefill.reference import compact, given_scores, rank_scores, token_roles
from asymvlm_kernels.prefill.score import score_tokens
from asymvlm_kernels.prefill.select import importance_gap, select_tokens
from asymvlm_kernels.prefill.spread import Spread


def step_by_step(
    embeds: torch.Tensor,
    vision_mask: torch.Tensor,
    text_mask: torch.Tensor,
    protect: torch.Tensor | None,
    weight: torch.Tensor | None,
    given: torch.Tensor | None,
    budget: Budget | ScoreBudget,
    groups: torch.Tensor | None,
    per_image: bool,
    spreading: tuple[Spread, torch.Tensor] | None,
    static: bool,
    most: int,
    padding_side: str,
) -> tuple[torch.Tensor, ...]:
    """Scores, gap, counts, lengths, index and rows. ``most``: the capacity."""
    prunable, kept_anyway, text = token_roles(vision_mask, text_mask, protect)
    scored = text.any(-1)
    if given is None:
        text_index = compact(text, embeds.shape[1] if static else longest(text.sum(-1)))
        scores = score_tokens(
            embeds, gather_rows(embeds, text_index), weight, vision_mask=prunable, text_mask=text_index >= 0
        )
    else:
        scores, scored = given_scores(given, prunable), torch.ones_like(scored)
    if spreading is not None:
        scores = spreading[0].apply(scores, spreading[1])
    gap = importance_gap(scores, prunable)
    num_tokens = prunable.sum(-1)
    wanted = budget_counts(budget, scores, gap, prunable)
    counts = torch.where(scored, wanted, num_tokens.to(torch.int32))
    rank = rank_scores(scores, kept_anyway, text)
    if groups is not None:
        image_ratio = None
        if per_image:  # a count of the row as a share of it, rounded up: no image loses a token to the rounding
            shares = -(-wanted.long() * MILLION // num_tokens.clamp_min(1))
            image_ratio = shares if counts_scores(budget) else budget.millionths(gap)
        sure = guaranteed_tokens(scores, prunable, groups, image_ratio)
        rank = rank_sure(scores, prunable, kept_anyway, text, sure)
        sure_counts = sure.sum(-1).to(torch.int32)
        counts = torch.where(scored, sure_counts if per_image else counts.maximum(sure_counts), counts)
    stay = kept_anyway.sum(-1).to(torch.int32)
    counts = counts.minimum((most - stay).clamp_min(0))
    lengths = (stay + counts).clamp_max(most)
    index = select_tokens(rank, lengths, mask=prunable | kept_anyway, capacity=most if static else longest(lengths))
    if padding_side == "left":
        index = _align_right(index, lengths)
    return scores, gap, counts, lengths, index, gather_rows(embeds, index)


def longest(lengths: torch.Tensor) -> int:
    """The largest length, on the host: in one copy, or traced where torch.compile captures scalars."""
    if not torch.compiler.is_compiling():
        return max(lengths.tolist(), default=0)
    most = int(lengths.max()) if lengths.numel() else 0
    torch._check(most >= 0)
    return most


def _align_right(index: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Move the padding of ``(B, S')`` from the right to the left."""
    slot = torch.arange(index.shape[1], device=index.device) - (index.shape[1] - lengths[:, None].long())
    return index.gather(-1, slot.clamp_min(0)).masked_fill(slot < 0, -1)
