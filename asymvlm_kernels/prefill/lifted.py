"""Scores of rows that fp32 cannot square: such a row is read again by itself, times a power of two.

The kernels square and multiply rows as they lie in memory. Squares leave fp32 at lengths of 1.8e19 and below 1e-23, and
digits and products are lost before that. Such rows are rare, so what scores them may be slow; it must not take
registers from the loop that scores all others, hence one row at a time.
"""

from __future__ import annotations

from asymvlm_kernels._triton import constant, tl, triton

COLUMNS = constant(256)  # of a step
NOWHERE = constant(2**31 - 1)


@triton.jit
def needs_lift(square):
    """Whether a squared norm is that of a row to read again: of a length below 1.3e-12 or above 1.1e12.

    A row of fp16 never needs it, unless it is zero: its lengths are 6e-8 to 6e6.
    """
    return (square < 2.0**-79) | (square > 2.0**80)


@triton.jit
def lift_of(square):
    """Power of two that brings a row of this squared norm, which may be infinite or have vanished, to where fp32 holds
    its squares and products, and its norm is above EPSILON: to lengths between 2**-40 and 2**61."""
    small = tl.where(square < 2.0**-100, 2.0**110, 2.0**60)
    return tl.where(square > 2.0**80, 2.0**-80, tl.where(square < 2.0**-79, small, 1.0))


@triton.jit
def load_columns(row_ptr, start_d, stride_d, D: tl.constexpr):
    offs_d = start_d + tl.arange(0, COLUMNS)
    return tl.load(row_ptr + offs_d.to(tl.int64) * stride_d, mask=offs_d < D, other=0.0).to(tl.float32)


@triton.jit
def lifted_square(row_ptr, lift, stride_d, D: tl.constexpr):
    """Squared norm of a row times ``lift``."""
    squares = tl.zeros((COLUMNS,), tl.float32)
    for start_d in tl.range(0, D, COLUMNS, num_stages=1):
        row = load_columns(row_ptr, start_d, stride_d, D) * lift
        squares += row * row
        tl.debug_barrier()  # keeps the loop from being unrolled
    return tl.sum(squares, 0)


@triton.jit
def best_folded(
    row_ptr,
    lift,
    folded_ptr,
    unlift_ptr,
    text_mask_ptr,
    stride_vd,
    stride_tm,
    L,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HIGH_LOW: tl.constexpr,
):
    """Best product of one row times ``lift`` with t' (see `fold`), and the text it belongs to; of several the first."""
    best = tl.full((), float("-inf"), tl.float32)
    place = tl.full((), -1, tl.int32)
    for text in tl.range(0, L, num_stages=1):
        real = text < L
        if text_mask_ptr is not None:
            real = tl.load(text_mask_ptr + tl.cast(text, tl.int64) * stride_tm) != 0
        if real:
            text_ptr = folded_ptr + tl.cast(text, tl.int64) * WIDTH
            products = tl.zeros((COLUMNS,), tl.float32)
            for start_d in tl.range(0, D, COLUMNS, num_stages=1):
                folded = load_columns(text_ptr, start_d, 1, D)
                if HIGH_LOW:
                    folded += load_columns(text_ptr + L * WIDTH, start_d, 1, D)
                products += load_columns(row_ptr, start_d, stride_vd, D) * lift * folded
                tl.debug_barrier()
            similarity = tl.sum(products, 0)
            if HIGH_LOW:
                similarity *= tl.load(unlift_ptr + text)
            better = (best == best) & ((similarity != similarity) | (similarity > best))
            place = tl.where(better, text, place)
            best = tl.where(better, similarity, best)
    return best, place


@triton.jit
def best_text(
    row_ptr,
    lift,
    embeds_ptr,
    weight_ptr,
    places_ptr,
    length,
    stride_es,
    stride_ed,
    stride_w,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Best cosine, but for the norm of the row, of one row times ``lift`` with the texts at ``places_ptr``."""
    best = tl.full((), float("-inf"), tl.float32)
    for text in tl.range(0, length, num_stages=1):
        text_ptr = embeds_ptr + tl.multiple_of(tl.load(places_ptr + text).to(tl.int64) * stride_es, VECTOR)
        text_lift = lift_of(lifted_square(text_ptr, 1.0, stride_ed, D))
        products = tl.zeros((COLUMNS,), tl.float32)
        squares = tl.zeros((COLUMNS,), tl.float32)
        for start_d in tl.range(0, D, COLUMNS, num_stages=1):
            columns = load_columns(text_ptr, start_d, stride_ed, D) * text_lift
            squares += columns * columns
            if weight_ptr is not None:
                columns *= load_columns(weight_ptr, start_d, stride_w, D)
            products += load_columns(row_ptr, start_d, stride_ed, D) * lift * columns
            tl.debug_barrier()
        norm = tl.maximum(tl.sqrt_rn(tl.sum(squares, 0)), EPSILON)
        similarity = tl.div_rn(tl.sum(products, 0), norm)
        better = (best == best) & ((similarity != similarity) | (similarity > best))
        best = tl.where(better, similarity, best)
    return best


@triton.jit
def any_odd_text(embeds_ptr, places_ptr, length, stride_es, stride_ed, D: tl.constexpr, VECTOR: tl.constexpr):
    """Whether a text that is not zero needs a lift: then all rows are read again."""
    found = length < 0
    for text in tl.range(0, length, num_stages=1):
        text_ptr = embeds_ptr + tl.multiple_of(tl.load(places_ptr + text).to(tl.int64) * stride_es, VECTOR)
        square = lifted_square(text_ptr, 1.0, stride_ed, D)
        if needs_lift(square):
            found = found | (lifted_square(text_ptr, lift_of(square), stride_ed, D) > 0)
    return found


@triton.jit
def score_again(
    score,
    square_n,
    odd_text,
    real_n,
    offs_n,
    embeds_ptr,
    weight_ptr,
    places_ptr,
    length,
    stride_es,
    stride_ed,
    stride_w,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Scores of a tile, taken anew for the rows that fp32 cannot square, and for all if that holds for a text.

    ``odd_text``: whether the squared norm of a text says so; it may be zero.
    """
    again = real_n & needs_lift(square_n)
    if odd_text:
        again = again | (real_n & any_odd_text(embeds_ptr, places_ptr, length, stride_es, stride_ed, D, VECTOR))
    row = tl.min(tl.where(again, offs_n, NOWHERE), 0)
    while row < NOWHERE:
        this = offs_n == row
        row_ptr = embeds_ptr + tl.multiple_of(row.to(tl.int64) * stride_es, VECTOR)
        lift = lift_of(tl.max(tl.where(this, square_n, 0.0), 0))
        square = lifted_square(row_ptr, lift, stride_ed, D)
        if square > 0:
            best = best_text(
                row_ptr,
                lift,
                embeds_ptr,
                weight_ptr,
                places_ptr,
                length,
                stride_es,
                stride_ed,
                stride_w,
                EPSILON,
                D,
                VECTOR,
            )
            score = tl.where(this, tl.div_rn(best, tl.maximum(tl.sqrt_rn(square), EPSILON)), score)
        again = again & (this == 0)
        row = tl.min(tl.where(again, offs_n, NOWHERE), 0)
    return score
