"""Gap, budget and selection of one sample as one program: the end of the first launch of `prune_sequence`.

Keys are those of `order`, and `ALWAYS` for a token that must stay: it ranks above every score, so one selection of
``kept + K`` serves the whole sequence.
"""

from __future__ import annotations

from asymvlm_kernels._triton import INTERPRETED, constant, tl, triton
from asymvlm_kernels.prefill.order import keep_best, key_score, kth_key, kth_keys, top_bit

ALWAYS = constant(0xFFFFFFFE)  # above the key of +inf; 2**32 - 1 stays free for "the 0-th largest"

if INTERPRETED:

    @triton.jit
    def multiply_f64(a, b):
        return a * b

else:

    @triton.jit
    def multiply_f64(a, b):
        """A product that no compiler fuses with the sum behind it: PyTorch rounds twice."""
        return tl.inline_asm_elementwise("mul.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], tl.float64, is_pure=True, pack=1)


@triton.jit
def keep_millionths(gap, linear, ratio_0, ratio_1, ratio_2, number_0, number_1, number_2, number_3, number_4):
    """Keep ratio in millionths, int64: bit for bit what ``budget.millionths(gap)`` answers. Numbers are float64 bits.

    Linear: target, slope, mean gap, minimum, maximum. Else three ratios and the two gaps between them.
    """
    gap = gap.to(tl.float64)
    first = number_0.to(tl.int64).to(tl.float64, bitcast=True)
    second = number_1.to(tl.int64).to(tl.float64, bitcast=True)
    result = tl.where(gap >= second, ratio_2, tl.where(gap >= first, ratio_1, ratio_0)).to(tl.int64)
    if linear != 0:
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
def load_stored_keys(keys_ptr, offs_s, S):
    # from L2: other programs wrote them
    keys = tl.load(keys_ptr + offs_s, mask=offs_s < S, other=0, cache_modifier=".cg")
    return keys.to(tl.uint32, bitcast=True)


@triton.jit
def count_stored_keys(keys_ptr, first, second, S, BLOCK_S: tl.constexpr):
    """How many keys are at least ``first``, and how many at least ``second``, below ``ALWAYS``; and the rest."""
    at_first = tl.zeros((BLOCK_S,), tl.int32)
    at_second = tl.zeros((BLOCK_S,), tl.int32)
    always = tl.zeros((BLOCK_S,), tl.int32)
    for start in range(0, S, BLOCK_S):
        keys = load_stored_keys(keys_ptr, start + tl.arange(0, BLOCK_S), S)
        prunable = keys != ALWAYS
        at_first += ((keys >= first) & prunable).to(tl.int32)
        at_second += ((keys >= second) & prunable).to(tl.int32)
        always += (keys == ALWAYS).to(tl.int32)
    return tl.sum(at_first, 0), tl.sum(at_second, 0), tl.sum(always, 0)


@triton.jit
def select_sample(
    keys_ptr,
    order_ptr,
    gap_ptr,
    count_ptr,
    length_ptr,
    has_text,
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
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKED: tl.constexpr,
):
    """Write the kept places of one sample, ascending and padded with -1, its gap, K and length."""
    if CHUNKED:
        one = tl.full((), 1, tl.uint32)
        N, _, always = count_stored_keys(keys_ptr, one, one, S, BLOCK_S)
        k = tl.maximum(N // 4, 1)
        high = tl.zeros((), tl.uint32)
        low = tl.zeros((), tl.uint32)
        for step in range(32):
            trial_k = high | top_bit(step)
            trial_m = low | top_bit(step)
            count_k, count_m, _ = count_stored_keys(keys_ptr, trial_k, trial_m, S, BLOCK_S)
            high = tl.where(count_k >= k, trial_k, high)
            low = tl.where(count_m >= N - k + 1, trial_m, low)
    else:
        keys = load_stored_keys(keys_ptr, tl.arange(0, BLOCK_S), S)
        prunable = tl.where(keys == ALWAYS, 0, keys).to(tl.uint32)
        N = tl.sum((prunable != 0).to(tl.int32), 0)
        always = tl.sum((keys == ALWAYS).to(tl.int32), 0)
        k = tl.maximum(N // 4, 1)
        high, low = kth_keys(prunable, k, N - k + 1)
    gap = key_score(high) - key_score(low)  # no token: high is key 0, so NaN
    millionths = keep_millionths(
        gap, linear, ratio_0, ratio_1, ratio_2, number_0, number_1, number_2, number_3, number_4
    )
    count = tl.maximum(N.to(tl.int64) * millionths // 1000000, 1).to(tl.int32)
    count = tl.where(has_text, tl.minimum(count, N), N)
    count = tl.minimum(count, tl.maximum(capacity - always, 0))
    length = tl.minimum(always + count, capacity)
    tl.store(gap_ptr, gap)
    tl.store(count_ptr, count)
    tl.store(length_ptr, length)
    if CHUNKED:
        kth = tl.zeros((), tl.uint32)
        above = tl.zeros((), tl.int32)
        for step in range(32):
            trial = kth | top_bit(step)
            found, _, _ = count_stored_keys(keys_ptr, trial, trial, S, BLOCK_S)
            found += tl.where(trial <= ALWAYS, always, 0)
            above = tl.where(found >= length, above, found)
            kth = tl.where(found >= length, trial, kth)
    else:
        kth, above = kth_key(keys, length)
    better = tl.zeros((), tl.int32)
    equal = tl.zeros((), tl.int32)
    for start in range(0, S, BLOCK_K):
        offs_s = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        block = load_stored_keys(keys_ptr, offs_s, S)
        keep, slot, better, equal = keep_best(block, kth, better, equal, length - above)
        tl.store(order_ptr + slot, offs_s, mask=keep)
        tl.store(order_ptr + offs_s, -1, mask=(offs_s >= length) & (offs_s < S))
