"""The two launches of `prune_sequence` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asymvlm_kernels.budget import keep_counts
from asymvlm_kernels.prefill import reference
from asymvlm_kernels.prefill.fused_budget import EncodedBudget

ScoreSelect = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
GatherSequence = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]


def score_select(
    embeds: torch.Tensor,
    vision_mask: torch.Tensor,
    text_mask: torch.Tensor,
    protect: torch.Tensor | None,
    weight: torch.Tensor | None,
    ratios: Sequence[int],
    numbers: Sequence[float],
    capacity: int,
    given: torch.Tensor | None = None,
) -> ScoreSelect:
    prunable, must_stay, text = reference.token_roles(vision_mask, text_mask, protect)
    scored = text.any(-1)
    if given is None:
        # reads the longest text on the host, which synchronises a CUDA device: the fallback, not the path of a GPU
        text_index = reference.compact(text, int(text.sum(-1).max()) if len(text) else 0)
        rows = reference.gather_rows(embeds, text_index, 0)
        scores = reference.score_tokens(embeds, rows, weight, prunable, text_index >= 0)
    else:
        scores, scored = reference.given_scores(given, prunable), torch.ones_like(scored)
    gap = reference.importance_gap(scores, prunable)
    num_tokens = prunable.sum(-1)
    counts = keep_counts(gap, num_tokens, EncodedBudget(ratios, numbers))
    counts = torch.where(scored, counts, num_tokens.to(torch.int32))
    stay = must_stay.sum(-1).to(torch.int32)
    counts = counts.minimum((capacity - stay).clamp_min(0))
    lengths = (stay + counts).clamp_max(capacity)
    rank = reference.rank_scores(scores, must_stay, text)
    order = reference.select_tokens(rank, lengths, prunable | must_stay, embeds.shape[1])
    return scores, gap, counts, lengths, order.to(torch.int32)


def gather_sequence(
    embeds: torch.Tensor,
    order: torch.Tensor,
    lengths: torch.Tensor,
    carry: Sequence[torch.Tensor],
    pads: Sequence[float],
    stacked: Sequence[bool],
    capacity: int,
    left: bool,
) -> GatherSequence:
    rank = torch.arange(capacity, device=order.device).expand(order.shape[0], capacity)
    rank = rank - (capacity - lengths[:, None].long()) if left else rank
    real = (rank >= 0) & (rank < lengths[:, None])
    index = order.long().gather(-1, rank.clamp(0, max(order.shape[1] - 1, 0))) if order.shape[1] else rank
    index = index.masked_fill(~real, -1)
    outs = []
    for tensor, pad, is_stacked in zip(carry, pads, stacked):
        out = reference.gather_rows(tensor.permute(1, 2, 0) if is_stacked else tensor, index, pad)
        outs.append(out.permute(2, 0, 1).contiguous() if is_stacked else out)
    return reference.gather_rows(embeds, index, 0), index, outs
