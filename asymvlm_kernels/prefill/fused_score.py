"""First launch of `prune_sequence`: score, gap, budget and selection, with counters instead of a second launch.

A program owns one tile of rows and one part of the width. The last of a tile to arrive adds the parts in a fixed order
and writes the scores; the last tile of a sample to arrive ranks the sample. Nobody waits, and every result is the same
whoever comes last. Text is read where it lies: ``t * w`` is split into ``high + low`` tile by tile, and its norm, from
the same tiles, divides the finished product.
"""

from __future__ import annotations

from asymvlm_kernels._triton import constant, tl, triton
from asymvlm_kernels.prefill.fold import lift_exponent, multiply, power_of_two
from asymvlm_kernels.prefill.fused_select import ALWAYS, select_sample
from asymvlm_kernels.prefill.order import order_key

MASK_CHUNK = constant(4096)  # mask bytes that one program reads at once


@triton.jit
def load_mask(mask_ptr, offs_s, stride, S):
    return tl.load(mask_ptr + offs_s.to(tl.int64) * stride, mask=offs_s < S, other=0) != 0


@triton.jit
def list_text(vision_mask_ptr, text_mask_ptr, places_ptr, stride_vs, stride_ts, S):
    """Write the places of a sample's text, ascending, and return their number.

    Every program of a sample writes the same numbers to the same place and reads its own: nobody waits.
    """
    length = tl.zeros((), tl.int32)
    for start in range(0, S, MASK_CHUNK):
        offs_s = start + tl.arange(0, MASK_CHUNK)
        is_text = load_mask(text_mask_ptr, offs_s, stride_ts, S)
        is_text = is_text & (load_mask(vision_mask_ptr, offs_s, stride_vs, S) == 0)
        flags = is_text.to(tl.int32)
        found = tl.sum(flags, 0)
        if found > 0:  # most chunks of a large image have none
            tl.store(places_ptr + length + tl.cumsum(flags, 0) - flags, offs_s, mask=is_text)
        length += found
    tl.debug_barrier()
    return length


@triton.jit
def product_tile(
    embeds_ptr,
    weight_ptr,
    row_n,
    row_l,
    real_n,
    real_l,
    first_d,
    last_d,
    stride_d,
    stride_w,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    LIFT: tl.constexpr,
):
    """Products of rows and weighted text over the columns from ``first_d`` to ``last_d``, and both squared norms."""
    similarity = tl.zeros((BLOCK_N, BLOCK_L), tl.float32)
    squares_n = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    squares_l = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    for start_d in range(first_d, last_d, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        mask_d = offs_d < D
        cols = offs_d.to(tl.int64) * stride_d
        vision = tl.load(embeds_ptr + row_n[:, None] + cols[None, :], mask=real_n[:, None] & mask_d[None, :], other=0.0)
        text = tl.load(embeds_ptr + row_l[:, None] + cols[None, :], mask=real_l[:, None] & mask_d[None, :], other=0.0)
        text = text.to(tl.float32)
        squares_l += text * text
        if weight_ptr is not None:
            text *= tl.load(weight_ptr + offs_d * stride_w, mask=mask_d, other=0.0)[None, :]
        if LIFT:  # in fp16 `low` would underflow: each step lifts each text row by a power of two
            lift = lift_exponent(tl.max(tl.abs(text), 1))
            text *= power_of_two(lift)[:, None]
        if SPLIT:
            high = text.to(vision.dtype)
            low = tl.where(tl.abs(text) == float("inf"), 0.0, text - high.to(tl.float32)).to(vision.dtype)
            if LIFT:
                part = multiply(vision, tl.trans(high), tl.zeros((BLOCK_N, BLOCK_L), tl.float32))
                part = multiply(vision, tl.trans(low), part)
                similarity += part * power_of_two(254 - lift)[None, :]
            else:
                similarity = multiply(vision, tl.trans(high), similarity)
                similarity = multiply(vision, tl.trans(low), similarity)
        else:
            similarity = multiply(vision, tl.trans(text), similarity)
        wide = vision.to(tl.float32)
        squares_n += wide * wide
    return similarity, tl.sum(squares_n, 1), tl.sum(squares_l, 1)


@triton.jit
def norm_of(square, EPSILON: tl.constexpr):
    return tl.maximum(tl.sqrt_rn(square), tl.zeros_like(square) + EPSILON)


@triton.jit
def best_of(similarity, square_l, real_l, EPSILON: tl.constexpr):
    """Best text of each row; NaN where any product is NaN, which a maximum would drop."""
    norm = norm_of(square_l, EPSILON)[None, :]
    similarity = tl.div_rn(similarity, tl.zeros_like(similarity) + norm)
    similarity = tl.where(real_l[None, :], similarity, float("-inf"))
    unknown = tl.max((similarity != similarity).to(tl.int32), 1) > 0
    return tl.where(unknown, float("nan"), tl.max(similarity, 1))


@triton.jit
def better_of(a, b):
    return tl.where((a != a) | (b != b), float("nan"), tl.maximum(a, b))


@triton.jit(
    do_not_specialize=[
        "stride_eb",
        "stride_vb",
        "stride_tb",
        "stride_pb",
        "S",
        "capacity",
        "linear",
        "ratio_0",
        "ratio_1",
        "ratio_2",
        "number_0",
        "number_1",
        "number_2",
        "number_3",
        "number_4",
    ]
)  # a new length or budget compiles nothing new
def _score_select_kernel(
    embeds_ptr,
    weight_ptr,
    vision_mask_ptr,
    text_mask_ptr,
    protect_ptr,
    scores_ptr,
    gap_ptr,
    counts_ptr,
    lengths_ptr,
    order_ptr,
    keys_ptr,
    parts_ptr,
    squares_ptr,
    counters_ptr,
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
    S,
    capacity,
    linear,
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
    SPLITS: tl.constexpr,
    VECTOR: tl.constexpr,
    SPLIT: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKED: tl.constexpr,
):
    pid_b = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    tiles = tl.num_programs(0) // SPLITS
    embeds_ptr += tl.multiple_of(pid_b * stride_eb, VECTOR)
    vision_mask_ptr += pid_b * stride_vb
    text_mask_ptr += pid_b * stride_tb
    order_ptr += pid_b * S  # holds the places of the text until the sample is ranked
    counters_ptr += pid_b * (tiles + 1)  # one for each tile, the last for the sample

    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < S
    is_vision = load_mask(vision_mask_ptr, offs_n, stride_vs, S)
    must_stay = load_mask(text_mask_ptr, offs_n, stride_ts, S)
    real_n = is_vision
    if protect_ptr is not None:
        protected = load_mask(protect_ptr + pid_b * stride_pb, offs_n, stride_ps, S)
        must_stay = must_stay | protected
        real_n = is_vision & (protected == 0)
    must_stay = must_stay & (real_n == 0)
    has_rows = tl.max(real_n.to(tl.int32), 0) > 0
    length = tl.zeros((), tl.int32)
    if has_rows | (split == 0):  # the others never arrive, so they might still be writing when the sample is ranked
        length = list_text(vision_mask_ptr, text_mask_ptr, order_ptr, stride_vs, stride_ts, S)

    score = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    finishes = split == 0  # where there is nothing to score, the first part closes the tile
    if has_rows & (length > 0):
        SLOT: tl.constexpr = BLOCK_N * BLOCK_L + BLOCK_N
        PART_D: tl.constexpr = ((D + BLOCK_D - 1) // BLOCK_D + SPLITS - 1) // SPLITS * BLOCK_D
        by_width = (length <= BLOCK_L).to(tl.int32)  # else the parts take turns at the blocks of text
        first_d = split * PART_D * by_width
        last_d = tl.where(by_width != 0, tl.minimum(first_d + PART_D, D), D)
        first_l = split * BLOCK_L * (1 - by_width)
        step_l = tl.where(by_width != 0, BLOCK_L, SPLITS * BLOCK_L)
        parts_ptr += (pid_b * tiles + tile) * (SPLITS * SLOT)
        squares_ptr += pid_b * SPLITS * BLOCK_L
        offs_l = tl.arange(0, BLOCK_L)  # [BLOCK_L]
        own = tl.arange(0, BLOCK_N)  # [BLOCK_N]
        pair = own[:, None] * BLOCK_L + offs_l[None, :]
        row_n = tl.multiple_of(offs_n.to(tl.int64) * stride_es, VECTOR)  # int64: S * D may pass 2**31
        best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        part_ptr = parts_ptr + split * SLOT
        for start_l in range(first_l, length, step_l):
            real_l = start_l + offs_l < length
            place = tl.load(order_ptr + start_l + offs_l, mask=real_l, other=0)
            row_l = tl.multiple_of(place.to(tl.int64) * stride_es, VECTOR)
            similarity, square_n, square_l = product_tile(
                embeds_ptr,
                weight_ptr,
                row_n,
                row_l,
                real_n,
                real_l,
                first_d,
                last_d,
                stride_ed,
                stride_w,
                D,
                BLOCK_N,
                BLOCK_L,
                BLOCK_D,
                SPLIT,
                LIFT,
            )
            if by_width != 0:
                tl.store(part_ptr + pair, similarity)
                tl.store(squares_ptr + split * BLOCK_L + offs_l, square_l)  # every tile writes the same
            else:
                best = better_of(best, best_of(similarity, square_l, real_l, EPSILON))
            tl.store(part_ptr + BLOCK_N * BLOCK_L + own, square_n)
        if by_width == 0:
            tl.store(part_ptr + own, best)
        tl.debug_barrier()  # all threads have written before one of them says so
        finishes = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if finishes:
            tl.store(counters_ptr + tile, 0)
            square_n = tl.load(parts_ptr + BLOCK_N * BLOCK_L + own, cache_modifier=".cg")
            if by_width != 0:
                similarity = tl.load(parts_ptr + pair, cache_modifier=".cg")
                square_l = tl.load(squares_ptr + offs_l, cache_modifier=".cg")
                for part in tl.static_range(1, SPLITS):  # a fixed order: the same bits whoever came last
                    similarity += tl.load(parts_ptr + part * SLOT + pair, cache_modifier=".cg")
                    square_n += tl.load(parts_ptr + part * SLOT + BLOCK_N * BLOCK_L + own, cache_modifier=".cg")
                    square_l += tl.load(squares_ptr + part * BLOCK_L + offs_l, cache_modifier=".cg")
                best = best_of(similarity, square_l, offs_l < length, EPSILON)
            else:  # a part without a block of text left -inf; the first has one, hence the norms
                for part in tl.static_range(0, SPLITS):
                    best = better_of(best, tl.load(parts_ptr + part * SLOT + own, cache_modifier=".cg"))
            score = tl.where(real_n, tl.div_rn(best, norm_of(square_n, EPSILON)), float("-inf"))

    if finishes:
        keys_ptr += pid_b * S
        tl.store(scores_ptr + pid_b * S + offs_n, score, mask=mask_n)
        key = tl.where(must_stay, ALWAYS, order_key(score, real_n)).to(tl.uint32)
        tl.store(keys_ptr + offs_n, key.to(tl.int32, bitcast=True), mask=mask_n)
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr + tiles, 1, sem="acq_rel", scope="gpu") == tiles - 1:
            tl.store(counters_ptr + tiles, 0)
            select_sample(
                keys_ptr,
                order_ptr,
                gap_ptr + pid_b,
                counts_ptr + pid_b,
                lengths_ptr + pid_b,
                length > 0,
                linear,
                ratio_0,
                ratio_1,
                ratio_2,
                number_0,
                number_1,
                number_2,
                number_3,
                number_4,
                S,
                capacity,
                BLOCK_S,
                BLOCK_K,
                CHUNKED,
            )
