"""Products of one tile of rows with weighted text, and the best of them.

Text is read where it lies: ``t * w`` is split into ``high + low`` tile by tile, and its norm, from the same tiles,
divides the finished product.
"""

from __future__ import annotations

from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.device import halves_of, max_or_nan, multiply, widened
from asymvlm_kernels.prefill.fold import doubled, in_turns, joined, lift_exponent, power_of_two


@triton.jit
def product_tile(
    embeds_ptr,
    weight_ptr,
    row_n,
    row_l,
    real_n,
    real_l,
    first_d,
    middle_d,
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
    """Products ``(BLOCK_L, BLOCK_N)`` of weighted text and rows over the columns from ``first_d`` to ``last_d``, and
    both squared norms.

    The sums up to ``middle_d`` and behind it are added at the end, so that two programs with half of the columns each
    get the same bits.
    """
    ROWS: tl.constexpr = 2 * BLOCK_L if HIGH_LOW else BLOCK_L
    similarity = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    square_n = tl.zeros((BLOCK_N,), tl.float32)
    square_l = tl.zeros((BLOCK_L,), tl.float32)
    products = tl.zeros((ROWS, BLOCK_N), tl.float32)
    squares_n = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    squares_l = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    for start_d in range(first_d, last_d, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        mask_d = tl.full((BLOCK_D,), 1, tl.int1)
        mask_n = real_n[:, None]
        mask_l = real_l[:, None]
        if D % BLOCK_D != 0:
            mask_d = offs_d < D
            mask_n = mask_n & mask_d[None, :]
            mask_l = mask_l & mask_d[None, :]
        cols = offs_d.to(tl.int64) * stride_d
        vision = tl.load(embeds_ptr + row_n[:, None] + cols[None, :], mask=mask_n, other=0.0)
        half = tl.load(embeds_ptr + row_l[:, None] + cols[None, :], mask=mask_l, other=0.0)
        text = widened(half)
        squares_l += text * text
        if weight_ptr is not None:
            text *= tl.load(weight_ptr + offs_d * stride_w, mask=mask_d, other=0.0)[None, :]
        if LIFT:  # in fp16 `low` would underflow: each step lifts each text row by a power of two
            lift = lift_exponent(tl.max(tl.abs(text), 1))
            text *= power_of_two(lift)[:, None]
        if HIGH_LOW:
            high, low = halves_of(text, vision.dtype)
            text = in_turns(high, low, BLOCK_L, BLOCK_D)
        if LIFT:
            part = multiply(text, tl.trans(vision), tl.zeros((ROWS, BLOCK_N), tl.float32))
            products += part * doubled(power_of_two(254 - lift), BLOCK_L)[:, None]
        else:
            products = multiply(text, tl.trans(vision), products)
        wide = widened(vision)
        squares_n += wide * wide
        if start_d + BLOCK_D == middle_d:
            similarity += joined(products, BLOCK_L, BLOCK_N, HIGH_LOW)
            square_n += tl.sum(squares_n, 1)
            square_l += tl.sum(squares_l, 1)
            products = tl.zeros((ROWS, BLOCK_N), tl.float32)
            squares_n = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            squares_l = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    similarity += joined(products, BLOCK_L, BLOCK_N, HIGH_LOW)
    return similarity, square_n + tl.sum(squares_n, 1), square_l + tl.sum(squares_l, 1)


@triton.jit
def norm_of(square, EPSILON: tl.constexpr):
    return tl.maximum(tl.sqrt_rn(square), tl.zeros_like(square) + EPSILON)


@triton.jit
def best_of(similarity, square_l, real_l, EPSILON: tl.constexpr):
    """Best text of each row, from products ``(BLOCK_L, BLOCK_N)``; NaN where any product is NaN."""
    norm = norm_of(square_l, EPSILON)[:, None]
    similarity = tl.div_rn(similarity, tl.zeros_like(similarity) + norm)
    similarity = tl.where(real_l[:, None], similarity, float("-inf"))
    return max_or_nan(similarity)
