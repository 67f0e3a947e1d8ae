"""All of `prune_sequence` in one launch, from the device functions of the two: for results of a known length.

Every program takes a ticket, and tickets stand for work in this order: the parts of the first samples, then the parts
of one more sample and the copy of one that is ranked by then, and at last the copies of the last samples. A copy waits
for the ranking of its sample, which hangs only on programs with lower tickets, that is, on programs that run already:
no grid can deadlock, whatever fits on the device at once, so no cooperative launch is needed. At B > 1 a sample is
copied while it is still in L2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.launch import held, launch, remember
from asymvlm_kernels.prefill.prune.gather_item import gather_item
from asymvlm_kernels.prefill.prune.score_item import NOT_SPECIALIZED, score_item
from asymvlm_kernels.prefill.prune.score_rule import ScoreRule
from asymvlm_kernels.prefill.prune.scratch import zeroed_counters
from asymvlm_kernels.prefill.prune.two_launches import (
    GatherSequence,
    ScoreSelect,
    _gather_sequence_fake,
    _score_select_fake,
    gather_launch,
    nothing_selected,
    score_launch,
)
from asymvlm_kernels.tuning.prefill import H100_PROCESSORS, row_vector
from asymvlm_kernels.tuning.prune import one_launch_config

PROGRAMS_AHEAD = 2 * H100_PROCESSORS  # so many score before a copy waits for them


@triton.jit
def take_ticket(tickets_ptr, B, tiles_and_parts, items, ahead):
    """Whether this program scores, its sample, and the number of its piece of work in the sample."""
    ticket = tl.atomic_add(tickets_ptr, 1, sem="relaxed", scope="gpu")
    lead = ahead * tiles_and_parts  # samples that are scored before the first copy
    round_size = tiles_and_parts + items
    turn = tl.maximum(ticket - lead, 0) // round_size
    place = tl.maximum(ticket - lead, 0) % round_size
    last = ticket - lead - (B - ahead) * round_size  # among the copies of the last samples
    scores = (ticket < lead) | ((last < 0) & (place < tiles_and_parts))
    sample = tl.where(scores, turn + ahead, turn)
    piece = tl.where(scores, place, place - tiles_and_parts)
    sample = tl.where(ticket < lead, ticket // tiles_and_parts, tl.where(last >= 0, B - ahead + last // items, sample))
    piece = tl.where(ticket < lead, ticket % tiles_and_parts, tl.where(last >= 0, last % items, piece))
    return scores, sample.to(tl.int64), piece


@triton.jit
def leave(tickets_ptr, ranked_ptr, B):
    """Count the programs that are done; the last one leaves tickets, count and flags zero."""
    tl.debug_barrier()  # all threads have read the flag of their sample
    if tl.atomic_add(tickets_ptr + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(tickets_ptr, 0)
        tl.store(tickets_ptr + 1, 0)
        for start in range(0, B, 1024):
            offs_b = start + tl.arange(0, 1024)
            tl.store(ranked_ptr + offs_b, tl.zeros((1024,), tl.int32), mask=offs_b < B)


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "K", "B", "items", "ahead"])  # a new length compiles nothing new
def _prune_static_kernel(
    tokens,
    kept,
    scratch,
    stride_eb,
    stride_es,
    stride_ed,
    stride_w,
    stride_vb,
    stride_vs,
    stride_tb,
    stride_ts,
    stride_pb,
    stride_ps,
    stride_lb,
    stride_ls,
    S,
    parts,
    rounds,
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
    words_ptr,
    out_ptr,
    index_ptr,
    carry_ptrs,
    carry_out_ptrs,
    carry_strides_b,
    carry_strides_s,
    carry_strides_x,
    pads,
    tickets_ptr,
    B,
    K,
    items,
    ahead,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
    HIGH_LOW: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    THREADS: tl.constexpr,
    LONG: tl.constexpr,
    BY_SCORES: tl.constexpr,
    WIDTHS: tl.constexpr,
    STACKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LEFT: tl.constexpr,
):
    ranked_ptr = tickets_ptr + 2  # a flag for each sample
    tiles = tl.cdiv(S, BLOCK_N)
    scores, pid_b, piece = take_ticket(tickets_ptr, B, tiles * parts, items, ahead)
    if scores:
        ranks = score_item(
            pid_b,
            piece // parts,
            piece % parts,
            tiles,
            parts,
            rounds,
            tokens,
            kept,
            scratch,
            (
                stride_eb,
                stride_es,
                stride_ed,
                stride_w,
                stride_vb,
                stride_vs,
                stride_tb,
                stride_ts,
                stride_pb,
                stride_ps,
                stride_lb,
                stride_ls,
            ),
            S,
            capacity,
            (kind, ratio_0, ratio_1, ratio_2, number_0, number_1, number_2, number_3, number_4),
            (reach, own_share, share, relevant, usual),
            EPSILON,
            D,
            BLOCK_N,
            BLOCK_L,
            BLOCK_D,
            VECTOR,
            HIGH_LOW,
            LIFT,
            BLOCK_S,
            THREADS,
            LONG,
            BY_SCORES,
        )
        if ranks:
            tl.debug_barrier()  # all threads have written the kept places
            tl.atomic_xchg(ranked_ptr + pid_b, 1, sem="release", scope="gpu")
    else:
        while tl.atomic_add(ranked_ptr + pid_b, 0, sem="acquire", scope="gpu") == 0:
            pass
        tl.debug_barrier()  # no thread reads the kept places before
        gather_item(
            pid_b,
            piece,
            words_ptr,
            kept.order,
            kept.lengths,
            out_ptr,
            index_ptr,
            carry_ptrs,
            carry_out_ptrs,
            (stride_eb, stride_es, stride_ed),
            carry_strides_b,
            carry_strides_s,
            carry_strides_x,
            pads,
            B,
            S,
            K,
            D,
            WIDTHS,
            STACKED,
            ROWS,
            COLUMNS,
            BLOCK_C,
            VECTOR,
            LEFT,
        )
    leave(tickets_ptr, ranked_ptr, B)


@remember
def prune_in_one_launch(
    tokens: tuple[Any, ...],
    ratios: Sequence[int],
    numbers: Sequence[float],
    carry: Sequence[torch.Tensor],
    pads: Sequence[float],
    stacked: Sequence[bool],
    capacity: int,
    left: bool,
    *told: Any,
) -> tuple[ScoreSelect, GatherSequence]:
    """What `score_select` and `gather_sequence` answer, bit for bit, for B x S x capacity > 0.

    ``told``: a `ScoreRule`.
    """
    rule = ScoreRule(*told)
    embeds, vision_mask, text_mask, protect, weight = tokens
    B, S, D = embeds.shape
    selected = _score_select_fake(
        embeds, vision_mask, text_mask, protect, weight, ratios, numbers, capacity, None, *told
    )
    lengths, order = selected[3:5]
    moved = _gather_sequence_fake(embeds, order, lengths, carry, pads, stacked, capacity, left)
    if B == 0 or S == 0:
        return nothing_selected(selected), moved
    score_arguments, constants, pieces = score_launch(tokens, selected, ratios, numbers, capacity, rule)
    config = one_launch_config(D, embeds.itemsize, row_vector(embeds), constants["num_warps"])
    gather_arguments, gather_constants, items = gather_launch(
        embeds, order, lengths, carry, pads, stacked, capacity, left, moved, config
    )
    words, _, _, out, index, carries, carries_out, _, _, _, *carry_numbers, _, _, K = gather_arguments
    ahead = min(triton.cdiv(PROGRAMS_AHEAD, pieces), B)
    launch(
        _prune_static_kernel,
        (B * (pieces + items),),
        *score_arguments,
        words,
        out,
        index,
        carries,
        carries_out,
        *carry_numbers,
        held(zeroed_counters, embeds.device, B + 2, "tickets"),
        B,
        K,
        items,
        ahead,
        **gather_constants | constants,
    )
    return selected, moved
