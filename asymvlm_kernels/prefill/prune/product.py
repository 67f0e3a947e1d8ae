"""Products of one tile of rows with weighted text, and the best of them.

Text is read where it lies: ``t * w`` is split into ``high + low`` tile by tile, and its norm, from the same tiles,
divides the finished product.
"""

from __future__ import annotations

from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.device import multiply
from asymvlm_kernels.prefill.fold import lift_exponent, power_of_two


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
    HIGH_LOW: tl.constexpr,
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
        if HIGH_LOW:
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
