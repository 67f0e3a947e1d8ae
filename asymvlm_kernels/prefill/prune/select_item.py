"""Gap, budget and selection of one sample as one program: the end of the first launch of `prune_sequence`.

Keys are those of `order`, and ``PROTECTED`` or ``TEXT`` for a token that must stay: it ranks above every score, so one
selection of ``kept + K`` serves the whole sequence, and a capacity below the kept tokens cuts text last.
"""

from __future__ import annotations

from asymvlm_kernels._triton import constant, tl, triton
from asymvlm_kernels.device import multiply_f64, sum_both
from asymvlm_kernels.prefill.order import keep_best, key_score, kth_key, places_of, three_keys
from asymvlm_kernels.prefill.prune import budget_numbers
from asymvlm_kernels.prefill.prune.keys import (
    BINS,
    PROTECTED,
    cut_key_long,
    load_stored_keys,
    quartile_keys_long,
    take_histogram,
)

RATIOS = constant(budget_numbers.RATIOS)
LINEAR = constant(budget_numbers.LINEAR)


@triton.jit
def keep_millionths(gap, budget):
    """Keep ratio in millionths, int64: bit for bit what ``budget.millionths(gap)`` answers.

    ``budget``: its kind (see `budget_numbers`), three ratios, five float64 numbers as bits. Those of a linear one are
    target, slope, mean gap, minimum and maximum; else the first two are the gaps between the ratios.
    """
    kind, ratio_0, ratio_1, ratio_2, number_0, number_1, number_2, number_3, number_4 = budget
    gap = gap.to(tl.float64)
    first = number_0.to(tl.int64).to(tl.float64, bitcast=True)
    second = number_1.to(tl.int64).to(tl.float64, bitcast=True)
    result = tl.where(gap >= second, ratio_2, tl.where(gap >= first, ratio_1, ratio_0)).to(tl.int64)
    if kind == LINEAR:
        mean = number_2.to(tl.int64).to(tl.float64, bitcast=True)
        minimum = number_3.to(tl.int64).to(tl.float64, bitcast=True)
        maximum = number_4.to(tl.int64).to(tl.float64, bitcast=True)
        ratio = first + multiply_f64(second, gap - mean)
        ratio = tl.where(ratio != ratio, maximum, ratio)
        ratio = tl.where(ratio < minimum, minimum, tl.where(ratio > maximum, maximum, ratio))
        million = tl.full((), 1000000.0, tl.float64)
        shift = tl.full((), 6755399441055744.0, tl.float64)  # 1.5 * 2**52: rounds to the nearest even integer
        result = ((multiply_f64(ratio, million) + shift) - shift).to(tl.int64)
    return result


@triton.jit
def ratio_count(N, millionths):
    """The part of ``N`` tokens that a ratio keeps: at least one."""
    return tl.maximum(N.to(tl.int64) * millionths // 1000000, 1).to(tl.int32)


@triton.jit
def limit_count(count, N, has_text, most):
    """How many of ``N`` tokens are kept: at most ``most``, and all where there is no text."""
    return tl.minimum(tl.where(has_text, tl.minimum(count, N), N), most)


@triton.jit
def cut_key(keys, prunable, always, count, capacity):
    """`kth_key` of all ``keys`` for those that must stay and ``count`` of the ``prunable`` ones."""
    if always > capacity:  # none of the others
        kth, above = kth_key(tl.where(keys >= PROTECTED, keys, 0).to(tl.uint32), capacity)
    else:
        kth, above = kth_key(prunable, count)
        kth = tl.where(count > 0, kth, PROTECTED - 1).to(tl.uint32)
        above += always
    return kth, above


@triton.jit
def write_order(keys_ptr, order_ptr, kth, wanted, length, S, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """The places of the keys above ``kth`` and of ``wanted`` of those equal to it, ascending and padded with -1."""
    better = tl.zeros((), tl.int32)
    equal = tl.zeros((), tl.int32)
    for start in range(0, S, THREADS * WIDTH):
        offs_s = places_of(start, THREADS, WIDTH)
        block = load_stored_keys(keys_ptr, offs_s, S)
        keep, slot, better, equal = keep_best(block, kth, better, equal, wanted)
        tl.store(order_ptr + slot, offs_s, mask=keep)
        tl.store(order_ptr + offs_s, -1, mask=(offs_s >= length) & (offs_s < S))


@triton.jit
def select_sample(
    keys_ptr,
    list_ptr,
    histogram_ptr,
    order_ptr,
    gap_ptr,
    count_ptr,
    length_ptr,
    has_text,
    budget,
    S,
    capacity,
    BLOCK_S: tl.constexpr,
    THREADS: tl.constexpr,
    LONG: tl.constexpr,
):
    """Write the kept places of one sample, ascending and padded with -1, its gap, K and length.

    ``THREADS``: one for each thread, which then holds neighbours in the order.
    """
    WIDTH: tl.constexpr = max(min(BLOCK_S // THREADS, 16), 1)
    kind, ratio_0, ratio_1, ratio_2, _, _, _, _, _ = budget
    if LONG:
        counts = take_histogram(histogram_ptr)
        always = tl.sum(tl.where(tl.arange(0, BINS) == BINS - 1, counts, 0), 0)
        N = tl.sum(counts, 0) - always
        k = tl.maximum(N // 4, 1)
        high, low = quartile_keys_long(keys_ptr, list_ptr, counts, k, N - k + 1, S, BLOCK_S)
        gap = key_score(high) - key_score(low)  # no token: high is key 0, so NaN
        wanted = ratio_count(N, keep_millionths(gap, budget))
        count = limit_count(wanted, N, has_text, tl.maximum(capacity - always, 0))
        length = tl.minimum(always + count, capacity)
        kth, above = cut_key_long(keys_ptr, list_ptr, counts, length, S, BLOCK_S)
    else:
        keys = load_stored_keys(keys_ptr, tl.arange(0, BLOCK_S), S)
        prunable = tl.where(keys >= PROTECTED, 0, keys).to(tl.uint32)
        N, always = sum_both((prunable != 0).to(tl.int32), (keys >= PROTECTED).to(tl.int32))
        k = tl.maximum(N // 4, 1)
        most = tl.maximum(capacity - always, 0)
        # a budget that needs no gap is known beforehand: one search finds the cut along with the quartiles
        is_known = (kind == RATIOS) & (ratio_0 == ratio_1) & (ratio_1 == ratio_2) & (always <= capacity)
        count = limit_count(ratio_count(N, ratio_0.to(tl.int64)), N, has_text, most)
        high, low, kth, above = three_keys(prunable, k, N - k + 1, count, is_known)
        above += always
        gap = key_score(high) - key_score(low)
        if is_known == 0:
            count = limit_count(ratio_count(N, keep_millionths(gap, budget)), N, has_text, most)
            kth, above = cut_key(keys, prunable, always, count, capacity)
        length = tl.minimum(always + count, capacity)
    tl.store(gap_ptr, gap)
    tl.store(count_ptr, count)
    tl.store(length_ptr, length)
    write_order(keys_ptr, order_ptr, kth, length - above, length, S, THREADS, WIDTH)
