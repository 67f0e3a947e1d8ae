"""Device function of the score kernel: one tile of vision rows against all text of its sample."""

from __future__ import annotations

from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.device import multiply, widened
from asymvlm_kernels.prefill.fold import TURN, joined
from asymvlm_kernels.prefill.lifted import NOWHERE, best_folded, lift_of, lifted_square, needs_lift


@triton.jit
def score_tile(
    vision_ptr,
    folded_ptr,
    unlift_ptr,
    text_mask_ptr,
    real_n,
    offs_n,
    stride_vn,
    stride_vd,
    stride_tm,
    L,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
    HIGH_LOW: tl.constexpr,
    BEST: tl.constexpr,
):
    """Scores, best text and norm of the rows ``offs_n`` of one sample. Rows outside ``real_n`` are neither read nor
    scored (-inf). The best text is the first of equal ones, of a NaN score the first that gives NaN, else -1.
    """
    ROWS: tl.constexpr = 2 * BLOCK_L if HIGH_LOW else BLOCK_L
    offs_r = tl.arange(0, ROWS)  # [ROWS]: both halves of t' in turns
    rows_l = offs_r // (2 * TURN) * TURN + offs_r % TURN if HIGH_LOW else offs_r
    half = offs_r // TURN % 2 if HIGH_LOW else tl.zeros((ROWS,), tl.int32)
    rows = tl.multiple_of(offs_n.to(tl.int64) * stride_vn, VECTOR)  # [BLOCK_N], int64: N * D may pass 2**31
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    unknown = tl.zeros((BLOCK_N,), tl.int32)  # rows with a NaN: tl.max drops it
    place = tl.full((BLOCK_N,), -1, tl.int32)
    length = tl.where(tl.max(real_n.to(tl.int32), 0) > 0, L, 0)
    for start_l in range(0, length, BLOCK_L):
        offs_l = start_l + tl.arange(0, BLOCK_L)  # [BLOCK_L]
        mask_l = offs_l < L
        real_l = mask_l
        if text_mask_ptr is not None:
            real_l = tl.load(text_mask_ptr + offs_l.to(tl.int64) * stride_tm, mask=mask_l, other=0) != 0
        if tl.max(real_l.to(tl.int32), 0) > 0:
            products = tl.zeros((ROWS, BLOCK_N), tl.float32)
            squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            place_l = start_l + rows_l
            real_rows = place_l < L
            if text_mask_ptr is not None:
                text_place = text_mask_ptr + place_l.to(tl.int64) * stride_tm
                real_rows = tl.load(text_place, mask=real_rows, other=0) != 0
            text_ptrs = folded_ptr + (place_l.to(tl.int64) + half * L)[:, None] * WIDTH
            for start_d in range(0, D, BLOCK_D):
                offs_d = start_d + tl.arange(0, BLOCK_D)  # [BLOCK_D]
                mask = real_n[:, None] & (offs_d < D)[None, :]
                cols = offs_d.to(tl.int64) * stride_vd
                vision = tl.load(vision_ptr + rows[:, None] + cols[None, :], mask=mask, other=0.0)
                text = tl.load(text_ptrs + offs_d[None, :], mask=real_rows[:, None], other=0.0)
                products = multiply(text, tl.trans(vision), products)
                wide = widened(vision)
                squares += wide * wide
            similarity = joined(products, BLOCK_L, BLOCK_N, HIGH_LOW)
            if HIGH_LOW:
                similarity *= tl.load(unlift_ptr + offs_l, mask=real_l, other=1.0)[:, None]
            similarity = tl.where(real_l[:, None], similarity, float("-inf"))
            is_unknown = similarity != similarity
            new_unknown = tl.max(is_unknown.to(tl.int32), 0)
            new_best = tl.max(similarity, 0)
            if BEST:
                found = tl.where((new_unknown > 0)[None, :], is_unknown, similarity == new_best[None, :])
                first = tl.min(tl.where(found, offs_l[:, None], NOWHERE), 0)
                place = tl.where((unknown == 0) & ((new_unknown > 0) | (new_best > best)), first, place)
            unknown |= new_unknown
            best = tl.maximum(best, new_best)
            square = tl.sum(squares, 1)
    best = tl.where(unknown > 0, float("nan"), best)
    lift = tl.full((BLOCK_N,), 1.0, tl.float32)
    if vision_ptr.dtype.element_ty != tl.float16:
        # without text the square is 0 and the best -inf; products that overflowed to that come with a large square
        again = real_n & needs_lift(square) & ((best > float("-inf")) | (square > 1.0))
        row = tl.min(tl.where(again, offs_n, NOWHERE), 0)
        while row < NOWHERE:
            this = offs_n == row
            row_ptr = vision_ptr + tl.multiple_of(row.to(tl.int64) * stride_vn, VECTOR)
            own_lift = lift_of(tl.max(tl.where(this, square, 0.0), 0))
            own_square = lifted_square(row_ptr, own_lift, stride_vd, D)
            if own_square > 0:
                product, text = best_folded(
                    row_ptr,
                    own_lift,
                    folded_ptr,
                    unlift_ptr,
                    text_mask_ptr,
                    stride_vd,
                    stride_tm,
                    L,
                    D,
                    WIDTH,
                    HIGH_LOW,
                )
                best = tl.where(this, product, best)
                square = tl.where(this, own_square, square)
                lift = tl.where(this, own_lift, lift)
                place = tl.where(this, text, place)
            again = again & (this == 0)
            row = tl.min(tl.where(again, offs_n, NOWHERE), 0)
    norm = tl.maximum(tl.sqrt_rn(square), tl.full((BLOCK_N,), EPSILON, tl.float32))
    score = tl.div_rn(best, norm)
    if BEST:
        norm = tl.where(score != score, float("nan"), tl.div_rn(norm, lift))  # the maximum dropped it
    return tl.where(real_n, score, float("-inf")), tl.where(real_n, place, -1), norm
