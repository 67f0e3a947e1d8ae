"""Scores of rows that fp32 cannot square: such a row is read again by itself, times a power of two.

The kernels square and multiply rows as they lie in memory. Squares leave fp32 at lengths of 1.8e19 and below 1e-23, and
digits and products are lost before that. Such rows are rare, so what scores them may be slow; it must not take
registers from the loop that scores all others, hence one row at a time.
"""

from __future__ import annotations

from asymvlm_kernels._triton import constant, tl, triton
from asymvlm_kernels.prefill.fold import lift_exponent, power_of_two

COLUMNS = constant(256)  # of a step


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
    return tl.where(square > 1.0, 2.0**-80, tl.where(square < 2.0**-100, 2.0**110, 2.0**60))


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
    SPLIT: tl.constexpr,
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
                if SPLIT:
                    folded += load_columns(text_ptr + L * WIDTH, start_d, 1, D)
                products += load_columns(row_ptr, start_d, stride_vd, D) * lift * folded
                tl.debug_barrier()
            similarity = tl.sum(products, 0)
            if SPLIT:
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
):
    """Best product of one lifted row with the texts at ``places_ptr``, as they lie in memory."""
    best = tl.full((), float("-inf"), tl.float32)
    for text in tl.range(0, length, num_stages=1):
        text_ptr = embeds_ptr + tl.load(places_ptr + text).to(tl.int64) * stride_es
        _, text_lift, norm = lift_row(text_ptr, stride_ed, EPSILON, D)
        products = tl.zeros((COLUMNS,), tl.float32)
        for start_d in tl.range(0, D, COLUMNS, num_stages=1):
            unit = tl.div_rn(load_columns(text_ptr, start_d, stride_ed, D) * text_lift, tl.zeros_like(products) + norm)
            if weight_ptr is not None:
                unit *= load_columns(weight_ptr, start_d, stride_w, D)
            products += load_columns(row_ptr, start_d, stride_ed, D) * lift * unit
        similarity = tl.sum(products, 0)
        better = (best == best) & ((similarity != similarity) | (similarity > best))
        best = tl.where(better, similarity, best)
    return best


@triton.jit
def any_long_text(
    embeds_ptr, places_ptr, length, stride_es, stride_ed, EPSILON: tl.constexpr, D: tl.constexpr
):
    """Whether a text that is not zero needs a lift: then every row that is scored against it is read again."""
    found = length < 0
    for text in tl.range(0, length, num_stages=1):
        text_ptr = embeds_ptr + tl.load(places_ptr + text).to(tl.int64) * stride_es
        peak, lift, norm = lift_row(text_ptr, stride_ed, EPSILON, D)
        norm = tl.div_rn(norm, lift)
        found = found | ((peak > 0) & needs_lift(norm * norm))
    return found
