"""First launch of `prune_sequence`: score, gap, budget and selection, with counters instead of a second launch.

A program owns one tile of rows and one part of the width. The last of a tile to arrive adds the parts in a fixed order
and writes the scores; the last tile of a sample to arrive ranks the sample. Nobody waits, and every result is the same
whoever comes last.
"""

from __future__ import annotations

from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.prefill.lifted import score_again
from asymvlm_kernels.prefill.order import order_key
from asymvlm_kernels.prefill.prune.keys import BINS, bin_of
from asymvlm_kernels.prefill.prune.parts import add_parts, prefetch_rows, score_part, slot_size
from asymvlm_kernels.prefill.prune.roles import list_text, roles_of
from asymvlm_kernels.prefill.prune.select_by_scores import rank_sample

NOT_SPECIALIZED = ["stride_eb", "stride_vb", "stride_tb", "stride_pb", "S", "parts", "rounds", "capacity"]
NOT_SPECIALIZED += ["stride_lb", "reach", "relevant", "usual", "kind"]
NOT_SPECIALIZED += [f"ratio_{number}" for number in range(3)] + [f"number_{number}" for number in range(5)]


@triton.jit
def score_item(
    pid_b,
    tile,
    part,
    tiles,
    parts,
    rounds,
    tokens,
    kept,
    scratch,
    strides,
    S,
    capacity,
    budget,
    rule,
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
):
    """One part of one tile of one sample; the last part closes the tile, the last tile ranks the sample.

    Returns whether the sample was ranked. ``tokens``, ``kept`` and ``scratch`` are named pointers (see `tokens`);
    ``strides``: of the embeddings, the weight, the three masks and the lines. ``rule``: see `select_by_scores`.
    """
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
    ) = strides
    slot = slot_size(rounds, BLOCK_N, BLOCK_L)
    COUNTERS: tl.constexpr = BINS if LONG else 0
    embeds_ptr = tokens.embeds + tl.multiple_of(pid_b * stride_eb, VECTOR)
    vision_mask_ptr = tokens.vision_mask + pid_b * stride_vb
    text_mask_ptr = tokens.text_mask + pid_b * stride_tb
    protect_ptr = None
    if tokens.protect is not None:
        protect_ptr = tokens.protect + pid_b * stride_pb
    order_ptr = kept.order + pid_b * S  # holds the places of the text until the sample is ranked
    parts_ptr = scratch.parts + (pid_b * tiles + tile) * parts * slot
    keys_ptr = scratch.keys + pid_b * tiles * BLOCK_N
    squares_ptr = scratch.squares + pid_b * (rounds * parts * BLOCK_L)
    counters_ptr = scratch.counters + pid_b * (COUNTERS + tiles + 1)  # bins, one a tile, the last for the sample
    tiles_ptr = counters_ptr + COUNTERS

    prefetch_rows(embeds_ptr, tile * BLOCK_N, part, parts, stride_es, stride_ed, S, D, BLOCK_N, BLOCK_D)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < S
    real_n, _, _ = roles_of(vision_mask_ptr, text_mask_ptr, protect_ptr, offs_n, stride_vs, stride_ts, stride_ps, S)
    has_rows = tl.max(real_n.to(tl.int32), 0) > 0
    length = tl.zeros((), tl.int32)
    if has_rows | (part == 0):  # the others never arrive, so they might still be writing when the sample is ranked
        length = list_text(vision_mask_ptr, text_mask_ptr, order_ptr, stride_vs, stride_ts, S)

    score = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    finishes = part == 0  # where there is nothing to score, the first part closes the tile
    if has_rows & (length > 0):
        score_part(
            embeds_ptr,
            tokens.weight,
            order_ptr,
            parts_ptr + part * slot,
            squares_ptr,
            offs_n,
            real_n,
            length,
            part,
            parts,
            rounds,
            stride_es,
            stride_ed,
            stride_w,
            EPSILON,
            D,
            BLOCK_N,
            BLOCK_L,
            BLOCK_D,
            VECTOR,
            HIGH_LOW,
            LIFT,
        )
        tl.debug_barrier()  # all threads have written before one of them says so
        finishes = tl.atomic_add(tiles_ptr + tile, 1, sem="acq_rel", scope="gpu") == parts - 1
        if finishes:
            tl.store(tiles_ptr + tile, 0)
            score, square, odd = add_parts(parts_ptr, squares_ptr, length, parts, rounds, EPSILON, BLOCK_N, BLOCK_L)
            # read anew: kept in registers since the start, the roles would spill
            real_n, _, _ = roles_of(
                vision_mask_ptr, text_mask_ptr, protect_ptr, offs_n, stride_vs, stride_ts, stride_ps, S
            )
            if not LIFT:
                score = score_again(
                    score,
                    square,
                    odd,
                    real_n,
                    offs_n,
                    embeds_ptr,
                    tokens.weight,
                    order_ptr,
                    length,
                    stride_es,
                    stride_ed,
                    stride_w,
                    EPSILON,
                    D,
                    VECTOR,
                )
            score = tl.where(real_n, score, float("-inf"))

    ranks = tile < 0
    if finishes:
        scores_ptr = kept.scores + pid_b * S
        own_ptr = scores_ptr
        if kept.own is not None:
            own_ptr = kept.own + pid_b * S
        tl.store(own_ptr + offs_n, score, mask=mask_n)
        real_n, must_stay, rank = roles_of(
            vision_mask_ptr, text_mask_ptr, protect_ptr, offs_n, stride_vs, stride_ts, stride_ps, S
        )
        key = tl.where(must_stay, rank, order_key(score, real_n)).to(tl.uint32)
        tl.store(keys_ptr + offs_n, key.to(tl.int32, bitcast=True))
        if LONG:
            tl.atomic_add(counters_ptr + bin_of(key), 1, mask=mask_n & (key != 0), sem="relaxed")
        tl.debug_barrier()
        ranks = tl.atomic_add(tiles_ptr + tiles, 1, sem="acq_rel", scope="gpu") == tiles - 1
        if ranks:
            tl.store(tiles_ptr + tiles, 0)
            lines_ptr = None
            spread_ptr = None
            if tokens.lines is not None:
                lines_ptr = tokens.lines + pid_b * stride_lb
                spread_ptr = scratch.spread_keys + pid_b * tiles * BLOCK_N
            rank_sample(
                keys_ptr,
                spread_ptr,
                scratch.lists + pid_b * BLOCK_S,
                counters_ptr,
                scores_ptr,
                kept,
                pid_b,
                length > 0,
                budget,
                lines_ptr,
                stride_ls,
                rule,
                S,
                capacity,
                BLOCK_S,
                THREADS,
                LONG,
                BY_SCORES,
            )
    return ranks


@triton.jit(do_not_specialize=NOT_SPECIALIZED)  # a new length or budget compiles nothing new
def _score_select_kernel(
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
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # the copy may be launched; it waits for the end of this grid
    score_item(
        tl.program_id(1).to(tl.int64),
        tl.program_id(0) // parts,
        tl.program_id(0) % parts,
        tl.num_programs(0) // parts,
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
