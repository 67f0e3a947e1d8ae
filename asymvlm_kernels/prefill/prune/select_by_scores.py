"""`select_sample` where scores decide themselves: they spread, a threshold counts them, or a floor does.

A build of its own, so that a budget by the gap pays nothing for it. Quartiles and the quantiles of a threshold come
from one search.
"""

from __future__ import annotations

from asymvlm_kernels._triton import constant, tl, triton
from asymvlm_kernels.device import sum_both
from asymvlm_kernels.prefill.order import four_keys, key_score, kth_keys, three_keys
from asymvlm_kernels.prefill.prune.budget_numbers import RELATIVE as BY_RELATIVE
from asymvlm_kernels.prefill.prune.keys import (
    BINS,
    PROTECTED,
    cut_key_long,
    load_stored_keys,
    quartile_keys_long,
    take_histogram,
)
from asymvlm_kernels.prefill.prune.select_item import (
    RATIOS,
    cut_key,
    keep_millionths,
    limit_count,
    ratio_count,
    select_sample,
    write_order,
)
from asymvlm_kernels.prefill.prune.spread_item import spread_keys
from asymvlm_kernels.prefill.relative import HIGH, LOW, count_above, limit_relative, quantile_ranks, threshold_of

LOWER, UPPER = constant(LOW), constant(HIGH)
RELATIVE = constant(BY_RELATIVE)
PER_THREAD = constant(8)  # places that spread at once; 4 of a long row, where 8 spill (Triton 3.6, sm_120)


@triton.jit
def count_above_long(keys_ptr, first, second, S, BLOCK_S: tl.constexpr):
    """How many stored keys belong to scores above two thresholds."""
    above_first = tl.zeros((BLOCK_S,), tl.int32)
    above_second = tl.zeros((BLOCK_S,), tl.int32)
    for start in range(0, S, BLOCK_S):
        keys = load_stored_keys(keys_ptr, start + tl.arange(0, BLOCK_S), S)  # one that must stay is no score: NaN
        above_first += count_above(keys, first)
        above_second += count_above(keys, second)
    return sum_both(above_first, above_second)


@triton.jit
def floor_count(above, N, threshold, usual):
    """Least number of tokens of a sample with ``above`` relevant ones; ``usual`` in millionths."""
    found = limit_relative(above, N, threshold, 1, 1000000)
    return tl.where(found.to(tl.int64) * 1000000 > N.to(tl.int64) * usual, found, 0)


@triton.jit
def floor_of_own(keys_ptr, list_ptr, counts, relevant, usual, S, BLOCK_S: tl.constexpr, LONG: tl.constexpr):
    """The floor by scores that are yet to spread. ``counts``: the histogram of a long row."""
    if LONG:
        N = tl.sum(tl.where(tl.arange(0, BINS) == BINS - 1, 0, counts), 0)
        p, q = quantile_ranks(N, LOWER, UPPER)
        upper, lower = quartile_keys_long(keys_ptr, list_ptr, counts, p, q, S, BLOCK_S)
        threshold = threshold_of(upper, lower, relevant)
        above, _ = count_above_long(keys_ptr, threshold, threshold, S, BLOCK_S)
    else:
        keys = load_stored_keys(keys_ptr, tl.arange(0, BLOCK_S), S)
        prunable = tl.where(keys >= PROTECTED, 0, keys).to(tl.uint32)
        N = tl.sum((prunable != 0).to(tl.int32), 0)
        p, q = quantile_ranks(N, LOWER, UPPER)
        upper, lower = kth_keys(prunable, p, q)
        threshold = threshold_of(upper, lower, relevant)
        above = tl.sum(count_above(prunable, threshold), 0)
    return floor_count(above, N, threshold, usual)


@triton.jit
def wanted_count(gap, N, threshold, above, budget):
    """How many of ``N`` tokens any budget keeps, ``above`` of which are above its threshold."""
    kind, minimum, maximum, _, _, _, _, _, _ = budget
    wanted = ratio_count(N, keep_millionths(gap, budget))
    if kind == RELATIVE:
        wanted = limit_relative(above, N, threshold, minimum, maximum)
    return wanted


@triton.jit
def select_by_scores(
    keys_ptr,
    spread_ptr,
    list_ptr,
    histogram_ptr,
    scores_ptr,
    order_ptr,
    gap_ptr,
    count_ptr,
    length_ptr,
    has_text,
    budget,
    lines_ptr,
    stride_ls,
    rule,
    S,
    capacity,
    BLOCK_S: tl.constexpr,
    THREADS: tl.constexpr,
    LONG: tl.constexpr,
):
    """`select_sample`, and where there are lines the scores after they have spread along them.

    ``rule``: reach, weight of the own and of the best score, beta of the floor as bits, and its usual share in
    millionths, negative for no floor.
    """
    WIDTH: tl.constexpr = max(min(BLOCK_S // THREADS, 16), 1)
    reach, own_share, share, relevant, usual = rule
    kind, ratio_0, ratio_1, ratio_2, beta, _, _, _, _ = budget
    SPREADS: tl.constexpr = lines_ptr is not None
    floor = tl.zeros((), tl.int32)
    counts = tl.zeros((1,), tl.int32)
    if LONG:
        counts = take_histogram(histogram_ptr)
    if SPREADS:
        if usual >= 0:
            floor = floor_of_own(keys_ptr, list_ptr, counts, relevant, usual, S, BLOCK_S, LONG)
        if LONG:
            tl.debug_barrier()  # the histogram is zero before it fills anew
        BLOCK: tl.constexpr = min(BLOCK_S, PER_THREAD // (2 if LONG else 1) * THREADS)
        spread_keys(
            keys_ptr,
            spread_ptr,
            scores_ptr,
            histogram_ptr,
            lines_ptr,
            stride_ls,
            reach,
            own_share,
            share,
            S,
            BLOCK,
            LONG,
        )
        keys_ptr = spread_ptr
        if LONG:
            counts = take_histogram(histogram_ptr)
    if LONG:
        always = tl.sum(tl.where(tl.arange(0, BINS) == BINS - 1, counts, 0), 0)
        N = tl.sum(counts, 0) - always
        k = tl.maximum(N // 4, 1)
        high, low = quartile_keys_long(keys_ptr, list_ptr, counts, k, N - k + 1, S, BLOCK_S)
        gap = key_score(high) - key_score(low)
        of_budget = tl.zeros((), tl.float64)
        of_floor = of_budget
        above = tl.zeros((), tl.int32)
        above_floor = above
        if (kind == RELATIVE) | (usual >= 0):
            p, q = quantile_ranks(N, LOWER, UPPER)
            upper, lower = quartile_keys_long(keys_ptr, list_ptr, counts, p, q, S, BLOCK_S)
            of_budget = threshold_of(upper, lower, beta)
            of_floor = threshold_of(upper, lower, relevant)
            above, above_floor = count_above_long(keys_ptr, of_budget, of_floor, S, BLOCK_S)
        if not SPREADS:
            floor = tl.where(usual >= 0, floor_count(above_floor, N, of_floor, usual), 0)
        wanted = tl.maximum(wanted_count(gap, N, of_budget, above, budget), floor)
        count = limit_count(wanted, N, has_text, tl.maximum(capacity - always, 0))
        length = tl.minimum(always + count, capacity)
        kth, at_kth = cut_key_long(keys_ptr, list_ptr, counts, length, S, BLOCK_S)
    else:
        keys = load_stored_keys(keys_ptr, tl.arange(0, BLOCK_S), S)
        prunable = tl.where(keys >= PROTECTED, 0, keys).to(tl.uint32)
        N, always = sum_both((prunable != 0).to(tl.int32), (keys >= PROTECTED).to(tl.int32))
        k = tl.maximum(N // 4, 1)
        most = tl.maximum(capacity - always, 0)
        is_known = (kind == RATIOS) & (ratio_0 == ratio_1) & (ratio_1 == ratio_2) & (always <= capacity)
        if not SPREADS:
            is_known = is_known & (usual < 0)
        count = limit_count(tl.maximum(ratio_count(N, ratio_0.to(tl.int64)), floor), N, has_text, most)
        if is_known:  # one search finds the cut along with the quartiles
            high, low, kth, at_kth = three_keys(prunable, k, N - k + 1, count, is_known)
            at_kth += always
            gap = key_score(high) - key_score(low)
        else:
            p, q = quantile_ranks(N, LOWER, UPPER)
            high, low, upper, lower = four_keys(prunable, k, N - k + 1, p, q)
            gap = key_score(high) - key_score(low)
            of_budget = threshold_of(upper, lower, beta)
            of_floor = threshold_of(upper, lower, relevant)
            above, above_floor = sum_both(count_above(prunable, of_budget), count_above(prunable, of_floor))
            least = floor
            if not SPREADS:
                least = tl.where(usual >= 0, floor_count(above_floor, N, of_floor, usual), 0)
            wanted = tl.maximum(wanted_count(gap, N, of_budget, above, budget), least)
            count = limit_count(wanted, N, has_text, most)
            kth, at_kth = cut_key(keys, prunable, always, count, capacity)
        length = tl.minimum(always + count, capacity)
    tl.store(gap_ptr, gap)
    tl.store(count_ptr, count)
    tl.store(length_ptr, length)
    write_order(keys_ptr, order_ptr, kth, length - at_kth, length, S, THREADS, WIDTH)


@triton.jit
def rank_sample(
    keys_ptr,
    spread_ptr,
    list_ptr,
    histogram_ptr,
    scores_ptr,
    kept,
    pid_b,
    has_text,
    budget,
    lines_ptr,
    stride_ls,
    rule,
    S,
    capacity,
    BLOCK_S: tl.constexpr,
    THREADS: tl.constexpr,
    LONG: tl.constexpr,
    BY_SCORES: tl.constexpr,
):
    """`select_by_scores` or `select_sample`, into the rows of sample ``pid_b``."""
    order_ptr = kept.order + pid_b * S
    gap_ptr = kept.gap + pid_b
    count_ptr = kept.counts + pid_b
    length_ptr = kept.lengths + pid_b
    if BY_SCORES:
        select_by_scores(
            keys_ptr,
            spread_ptr,
            list_ptr,
            histogram_ptr,
            scores_ptr,
            order_ptr,
            gap_ptr,
            count_ptr,
            length_ptr,
            has_text,
            budget,
            lines_ptr,
            stride_ls,
            rule,
            S,
            capacity,
            BLOCK_S,
            THREADS,
            LONG,
        )
    else:
        select_sample(
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
            BLOCK_S,
            THREADS,
            LONG,
        )
