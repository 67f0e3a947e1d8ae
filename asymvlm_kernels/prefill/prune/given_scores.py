"""First launch of `prune_sequence` where the caller brings the scores: no product, only gap, budget and selection.

One program a sample writes its rank keys, then reads them back as the last program of `score_item` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.launch import empty, held, launch
from asymvlm_kernels.prefill.order import order_key
from asymvlm_kernels.prefill.prune.budget_numbers import budget_arguments
from asymvlm_kernels.prefill.prune.keys import bin_of
from asymvlm_kernels.prefill.prune.roles import roles_of
from asymvlm_kernels.prefill.prune.score_rule import ScoreRule
from asymvlm_kernels.prefill.prune.scratch import BINS, zeroed_counters
from asymvlm_kernels.prefill.prune.select_by_scores import rank_sample
from asymvlm_kernels.prefill.prune.tokens import kept_of
from asymvlm_kernels.prefill.reference import SECOND_HIGHEST
from asymvlm_kernels.tuning.prune import GIVEN_WARPS, rank_config

NOT_SPECIALIZED = ["stride_gb", "stride_vb", "stride_tb", "stride_pb", "S", "capacity", "kind"]
NOT_SPECIALIZED += ["stride_lb", "reach", "relevant", "usual"]
NOT_SPECIALIZED += [f"ratio_{number}" for number in range(3)] + [f"number_{number}" for number in range(5)]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)  # a new length or budget compiles nothing new
def _select_given_kernel(
    given_ptr,
    vision_mask_ptr,
    text_mask_ptr,
    protect_ptr,
    kept,
    keys_ptr,
    lists_ptr,
    counters_ptr,
    lines_ptr,
    spread_ptr,
    stride_gb,
    stride_gs,
    stride_vb,
    stride_vs,
    stride_tb,
    stride_ts,
    stride_pb,
    stride_ps,
    stride_lb,
    stride_ls,
    S,
    capacity,
    reach,
    own_share,
    share,
    relevant: tl.int64,
    usual,
    kind,
    ratio_0,
    ratio_1,
    ratio_2,
    number_0: tl.int64,
    number_1: tl.int64,
    number_2: tl.int64,
    number_3: tl.int64,
    number_4: tl.int64,
    HIGHEST: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    THREADS: tl.constexpr,
    LONG: tl.constexpr,
    BY_SCORES: tl.constexpr,
):
    pid_b = tl.program_id(0).to(tl.int64)
    given_ptr += pid_b * stride_gb
    vision_mask_ptr += pid_b * stride_vb
    text_mask_ptr += pid_b * stride_tb
    if protect_ptr is not None:
        protect_ptr += pid_b * stride_pb
    keys_ptr += pid_b * S
    counters_ptr += pid_b * BINS
    scores_ptr = kept.scores + pid_b * S
    own_ptr = scores_ptr
    if lines_ptr is not None:
        lines_ptr += pid_b * stride_lb
        spread_ptr += pid_b * S
        own_ptr = kept.own + pid_b * S
    for start in range(0, S, BLOCK_K):
        offs_s = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        mask_s = offs_s < S
        prunable, must_stay, rank = roles_of(
            vision_mask_ptr, text_mask_ptr, protect_ptr, offs_s, stride_vs, stride_ts, stride_ps, S
        )
        score = tl.load(given_ptr + offs_s.to(tl.int64) * stride_gs, mask=prunable, other=float("-inf"))
        score = tl.where(score > HIGHEST, HIGHEST, score)  # a comparison keeps NaN, a minimum drops it
        tl.store(own_ptr + offs_s, score, mask=mask_s)
        key = tl.where(must_stay, rank, order_key(score, prunable)).to(tl.uint32)
        tl.store(keys_ptr + offs_s, key.to(tl.int32, bitcast=True), mask=mask_s)
        if LONG:
            tl.atomic_add(counters_ptr + bin_of(key), 1, mask=mask_s & (key != 0), sem="relaxed")
    tl.debug_barrier()  # all threads have written the keys
    budget = (kind, ratio_0, ratio_1, ratio_2, number_0, number_1, number_2, number_3, number_4)
    has_text = S > 0  # given scores need no text: the budget holds for every sample
    rank_sample(
        keys_ptr,
        spread_ptr,
        lists_ptr + pid_b * BLOCK_S,
        counters_ptr,
        scores_ptr,
        kept,
        pid_b,
        has_text,
        budget,
        lines_ptr,
        stride_ls,
        (reach, own_share, share, relevant, usual),
        S,
        capacity,
        BLOCK_S,
        THREADS,
        LONG,
        BY_SCORES,
    )


def select_given(
    given: torch.Tensor,
    masks: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    outputs: tuple[Any, ...],
    ratios: Sequence[int],
    numbers: Sequence[float],
    capacity: int,
    rule: ScoreRule,
) -> None:
    """Fill the outputs of `score_select` from ``given`` ``(B, S)`` fp32, B x S > 0. Masks: vision, text, protect."""
    B, S = given.shape
    rank = rank_config(S)
    spreads = rule.lines is not None
    aligned = -(-B * S // 4) * 4  # 16 bytes
    sizes = [aligned, aligned * spreads, B * rank.block_s * rank.chunked]
    keys, spread_keys, lists = empty((sum(sizes),), dtype=torch.int32, device=given.device).split(sizes)
    launch(
        _select_given_kernel,
        (B,),
        given,
        *masks,
        kept_of(outputs),
        keys,
        lists,
        held(zeroed_counters, given.device, B * BINS * rank.chunked),
        rule.lines,
        spread_keys if spreads else None,
        *given.stride(),
        *(stride for mask in masks for stride in ((0, 0) if mask is None else mask.stride())),
        *rule.line_strides,
        S,
        capacity,
        *rule.numbers,
        *budget_arguments(ratios, numbers),
        HIGHEST=SECOND_HIGHEST,
        BINS=BINS if rank.chunked else 0,
        BLOCK_S=rank.block_s,
        BLOCK_K=64 * GIVEN_WARPS,
        THREADS=32 * GIVEN_WARPS,
        LONG=rank.chunked,
        BY_SCORES=rule.ranks_by_scores(ratios),
        num_warps=GIVEN_WARPS,
        maxnreg=65536 // (32 * GIVEN_WARPS) - 1,  # where ptxas chooses, it aims lower and spills
    )
