"""Parts of a tile of rows: what one program computes, and how the last to arrive adds them."""

from __future__ import annotations

from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.prefill.lifted import needs_lift
from asymvlm_kernels.prefill.prune.product import best_of, better_of, norm_of, product_tile


@triton.jit
def parts_by_width(length, BLOCK_L: tl.constexpr):
    """Whether the parts of a tile share its width; else they take turns at the blocks of text.

    They do where the text fits one block with a column to spare, which then holds ``||v||^2``.
    """
    return (length < BLOCK_L).to(tl.int32)


@triton.jit
def score_part(
    embeds_ptr,
    weight_ptr,
    places_ptr,
    part_ptr,
    squares_ptr,
    offs_n,
    real_n,
    length,
    part,
    stride_es,
    stride_ed,
    stride_w,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
    HIGH_LOW: tl.constexpr,
    LIFT: tl.constexpr,
):
    """One part of one tile into scratch: products with ``||v||^2`` in the last column, or the best of its text,
    ``||v||^2``, and whether fp32 can square all of that text."""
    PART_D: tl.constexpr = ((D + BLOCK_D - 1) // BLOCK_D + PARTS - 1) // PARTS * BLOCK_D
    by_width = parts_by_width(length, BLOCK_L)
    first_d = part * PART_D * by_width
    last_d = tl.where(by_width != 0, tl.minimum(first_d + PART_D, D), D)
    first_l = part * BLOCK_L * (1 - by_width)
    step_l = tl.where(by_width != 0, BLOCK_L, PARTS * BLOCK_L)
    offs_l = tl.arange(0, BLOCK_L)  # [BLOCK_L]
    own = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_n = tl.multiple_of(offs_n.to(tl.int64) * stride_es, VECTOR)  # int64: S * D may pass 2**31
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    odd = tl.zeros((BLOCK_L,), tl.int32)
    for start_l in range(first_l, length, step_l):
        real_l = start_l + offs_l < length
        place = tl.load(places_ptr + start_l + offs_l, mask=real_l, other=0)
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
            HIGH_LOW,
            LIFT,
        )
        if by_width != 0:
            similarity = tl.where((offs_l == BLOCK_L - 1)[None, :], square_n[:, None], similarity)
            tl.store(part_ptr + own[:, None] * BLOCK_L + offs_l[None, :], similarity)
            tl.store(squares_ptr + part * BLOCK_L + offs_l, square_l)  # every tile writes the same
        else:
            best = better_of(best, best_of(similarity, square_l, real_l, EPSILON))
            odd |= (real_l & needs_lift(square_l)).to(tl.int32)
            tl.store(part_ptr + BLOCK_N + own, square_n)
    if by_width == 0:
        tl.store(part_ptr + own, best)
        tl.store(part_ptr + 2 * BLOCK_N, tl.max(odd, 0).to(tl.float32))


@triton.jit
def add_parts(
    parts_ptr,
    squares_ptr,
    length,
    EPSILON: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Scores of one tile from its parts, in a fixed order: the same bits whoever came last.

    With them ``||v||^2``, and whether fp32 cannot square a text.
    """
    SLOT: tl.constexpr = BLOCK_N * BLOCK_L
    offs_l = tl.arange(0, BLOCK_L)  # [BLOCK_L]
    own = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    if parts_by_width(length, BLOCK_L) != 0:
        pair = own[:, None] * BLOCK_L + offs_l[None, :]
        total = tl.load(parts_ptr + pair, cache_modifier=".cg")
        square_l = tl.load(squares_ptr + offs_l, cache_modifier=".cg")
        for part in tl.static_range(1, PARTS):
            total += tl.load(parts_ptr + part * SLOT + pair, cache_modifier=".cg")
            square_l += tl.load(squares_ptr + part * BLOCK_L + offs_l, cache_modifier=".cg")
        square_n = tl.sum(tl.where((offs_l == BLOCK_L - 1)[None, :], total, 0.0), 1)
        best = best_of(total, square_l, offs_l < length, EPSILON)
        odd_text = tl.max(((offs_l < length) & needs_lift(square_l)).to(tl.int32), 0) > 0
    else:  # a part without a block of text left -inf; the first has one, hence the norms
        square_n = tl.load(parts_ptr + BLOCK_N + own, cache_modifier=".cg")
        odd_text = length < 0
        for part in tl.static_range(0, PARTS):
            best = better_of(best, tl.load(parts_ptr + part * SLOT + own, cache_modifier=".cg"))
            odd_text = odd_text | (tl.load(parts_ptr + part * SLOT + 2 * BLOCK_N, cache_modifier=".cg") > 0)
    return tl.div_rn(best, norm_of(square_n, EPSILON)), square_n, odd_text
