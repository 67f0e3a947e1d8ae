"""What `prune_sequence` keeps, written once: the specification of its two launches, and the way for all other calls.

`select_places` is made of four ops. In plain PyTorch (`PLAIN`) it is the reference of `score_select`; with the
registered ones it serves what the two launches do not take on. `gather_sequence` closes the gaps after either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from asymvlm_kernels.budget import AtLeastRelevant, Budget, ScoreBudget, budget_counts, counts_scores
from asymvlm_kernels.millionths import MILLION
from asymvlm_kernels.prefill import reference
from asymvlm_kernels.prefill.prune.budget_numbers import decode_budget
from asymvlm_kernels.prefill.prune.groups import guaranteed_tokens, rank_sure
from asymvlm_kernels.prefill.prune.score_rule import ScoreRule
from asymvlm_kernels.prefill.spread import Spread

ScoreSelect = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]
GatherSequence = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]


class Steps(NamedTuple):
    """Four ops of one selection, and how the host learns the longest text. They check nothing: `prune_sequence` has."""

    gather_rows: Callable[..., torch.Tensor]
    score_tokens: Callable[..., torch.Tensor]
    importance_gap: Callable[..., torch.Tensor]
    select_tokens: Callable[..., torch.Tensor]
    longest: Callable[[torch.Tensor], int]


PLAIN = Steps(
    reference.gather_rows,
    reference.score_tokens,
    reference.importance_gap,
    reference.select_tokens,
    longest=lambda lengths: int(lengths.max()) if len(lengths) else 0,  # inside an op, where nothing is traced
)


def select_places(
    steps: Steps,
    tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    given: torch.Tensor | None,
    budget: Budget | ScoreBudget,
    capacity: int,
    *,
    groups: torch.Tensor | None = None,
    per_image: bool = False,
    spreading: tuple[Spread, torch.Tensor] | None = None,
    floor: AtLeastRelevant | None = None,
    static: bool = False,
) -> ScoreSelect:
    """Scores, gap, K, length and kept places of each row: arguments as those of `prune_sequence`.

    Every token that must stay ranks above every score, so one selection of ``kept + K`` serves the whole sequence. The
    places ``(B, S)`` int32 are ascending, padded with -1. ``static``: reads no length on the host. The list at the end
    holds the scores before they spread, where they do.
    """
    embeds, vision_mask, text_mask, protect, weight = tokens
    prunable, must_stay, text = reference.token_roles(vision_mask, text_mask, protect)
    scored = text.any(-1)
    if given is None:
        text_index = reference.compact(text, embeds.shape[1] if static else steps.longest(text.sum(-1)))
        rows = steps.gather_rows(embeds, text_index, 0)
        scores = steps.score_tokens(embeds, rows, weight, prunable, text_index >= 0)
    else:
        scores, scored = reference.given_scores(given, prunable), torch.ones_like(scored)
    own = scores
    if spreading is not None:
        scores = spreading[0].apply(scores, spreading[1]).clamp_max(reference.SECOND_HIGHEST)  # sums are rounded
    gap = steps.importance_gap(scores, prunable)
    num_tokens = prunable.sum(-1)
    wanted = budget_counts(budget, scores, gap, prunable)
    if floor is not None:
        wanted = wanted.maximum(floor.floor(own, prunable))
    counts = torch.where(scored, wanted, num_tokens.to(torch.int32))
    rank = reference.rank_scores(scores, must_stay, text)
    if groups is not None:
        image_ratio = None
        if per_image:  # a count of the row as a share of it, rounded up: no image loses a token to the rounding
            shares = -(-wanted.long() * MILLION // num_tokens.clamp_min(1))
            image_ratio = shares if counts_scores(budget) or floor is not None else budget.millionths(gap)
        sure = guaranteed_tokens(scores, prunable, groups, image_ratio)
        rank = rank_sure(scores, prunable, must_stay, text, sure)
        sure_counts = sure.sum(-1).to(torch.int32)
        counts = torch.where(scored, sure_counts if per_image else counts.maximum(sure_counts), counts)
    stay = must_stay.sum(-1).to(torch.int32)
    counts = counts.minimum((capacity - stay).clamp_min(0))
    lengths = (stay + counts).clamp_max(capacity)
    order = steps.select_tokens(rank, lengths, prunable | must_stay, embeds.shape[1])
    return scores, gap, counts, lengths, order.to(torch.int32), [] if spreading is None else [own]


def longest(lengths: torch.Tensor) -> int:
    """The largest length, on the host: in one copy, or traced where torch.compile captures scalars."""
    if not torch.compiler.is_compiling():
        return max(lengths.tolist(), default=0)
    most = int(lengths.max()) if lengths.numel() else 0
    torch._check(most >= 0)
    return most


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
    *told: Any,
) -> ScoreSelect:
    """``told``: a `ScoreRule`."""
    tokens, rule = (embeds, vision_mask, text_mask, protect, weight), ScoreRule(*told)
    budget = decode_budget(ratios, numbers)
    options: dict[str, Any] = {"spreading": rule.spreading, "floor": rule.plain_floor}
    return select_places(PLAIN, tokens, given, budget, capacity, **options)


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
