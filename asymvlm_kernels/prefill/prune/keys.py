"""Rank keys of one sample in scratch, and order statistics of them: in registers, or for long rows by a histogram.

A long row fills a histogram of its keys as tiles finish. One bin then holds the wanted key, and only its keys are
sorted out: the same answer as counting the whole row 32 times, which is what happens where a bin holds too many keys
(equal scores, or scores outside the range of the bins).
"""

from __future__ import annotations

from asymvlm_kernels._triton import constant, tl, triton
from asymvlm_kernels.prefill.order import kth_key, kth_keys, top_bit

# Tokens that must stay, above the key of +inf; 2**32 - 1 stays free for "the 0-th largest". Text is cut last.
TEXT = constant(0xFFFFFFFE)
PROTECTED = constant(0xFFFFFFFD)
BINS = constant(2048)
# Bins are 64 to an octave of a score between 2**-12 and 16, positive or negative; one holds all smaller ones, the
# outermost all larger ones, and the last one is for tokens that must stay.
BIN_BITS = constant(17)
UPPER = constant(0xB9800000)  # key of 2**-12
LOWER = constant(0x467FFFFF)  # key of -2**-12


@triton.jit
def bin_of(keys):
    """Bin of each key: monotone, so the bins of a sorted row ascend."""
    upper = tl.full((), UPPER, tl.uint32)
    lower = tl.full((), LOWER, tl.uint32)
    positive = 1024 + tl.minimum(((keys - upper) >> BIN_BITS).to(tl.int32), 1022)
    negative = 1022 - tl.minimum(((lower - keys) >> BIN_BITS).to(tl.int32), 1022)
    bins = tl.where(keys >= upper, positive, tl.where(keys <= lower, negative, 1023))
    return tl.where(keys >= PROTECTED, BINS - 1, bins)


@triton.jit
def load_stored_keys(keys_ptr, offs_s, S):
    # from L2: other programs wrote them
    keys = tl.load(keys_ptr + offs_s, mask=offs_s < S, other=0, cache_modifier=".cg")
    return keys.to(tl.uint32, bitcast=True)


@triton.jit
def count_stored_keys(keys_ptr, first, second, S, BLOCK_S: tl.constexpr):
    """How many keys are at least ``first``, and how many at least ``second``, of those that may be dropped; and how
    many of all are at least ``first``.
    """
    at_first = tl.zeros((BLOCK_S,), tl.int32)
    at_second = tl.zeros((BLOCK_S,), tl.int32)
    of_all = tl.zeros((BLOCK_S,), tl.int32)
    for start in range(0, S, BLOCK_S):
        keys = load_stored_keys(keys_ptr, start + tl.arange(0, BLOCK_S), S)
        prunable = keys < PROTECTED
        at_first += ((keys >= first) & prunable).to(tl.int32)
        at_second += ((keys >= second) & prunable).to(tl.int32)
        of_all += (keys >= first).to(tl.int32)
    return tl.sum(at_first, 0), tl.sum(at_second, 0), tl.sum(of_all, 0)


@triton.jit
def take_histogram(histogram_ptr):
    """The counts of all bins, which are left zero."""
    offs = tl.arange(0, BINS)
    counts = tl.load(histogram_ptr + offs, cache_modifier=".cg")
    tl.debug_barrier()
    tl.store(histogram_ptr + offs, tl.zeros((BINS,), tl.int32))
    return counts


@triton.jit
def bin_with(counts, k):
    """Bin of the ``k``-th largest key, -1 where there is none, and the number of keys in the bins above."""
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    here = (above < k) & (above + counts >= k)
    return tl.max(tl.where(here, tl.arange(0, BINS), -1), 0), tl.sum(tl.where(here, above, 0), 0)


@triton.jit
def collect(keys_ptr, list_ptr, one, other, S, BLOCK_S: tl.constexpr):
    """The keys of two bins, up to ``BLOCK_S`` of them, and their number."""
    found = tl.zeros((), tl.int32)
    for start in range(0, S, BLOCK_S):
        keys = load_stored_keys(keys_ptr, start + tl.arange(0, BLOCK_S), S)
        bins = bin_of(keys)
        taken = ((bins == one) | (bins == other)) & (keys != 0)
        flags = taken.to(tl.int32)
        slot = found + tl.cumsum(flags, 0) - flags
        tl.store(list_ptr + slot, keys.to(tl.int32, bitcast=True), mask=taken & (slot < BLOCK_S))
        found += tl.sum(flags, 0)
    tl.debug_barrier()
    offs = tl.arange(0, BLOCK_S)
    keys = tl.load(list_ptr + offs, mask=offs < found, other=0, cache_modifier=".cg")
    tl.debug_barrier()  # read by all before the next list is written
    return keys.to(tl.uint32, bitcast=True), found


@triton.jit
def quartile_keys_long(keys_ptr, list_ptr, counts, k, m, S, BLOCK_S: tl.constexpr):
    """`kth_keys` of the prunable keys of a row too long for registers. ``counts``: its histogram."""
    prunable = tl.where(tl.arange(0, BINS) == BINS - 1, 0, counts)
    bin_k, above_k = bin_with(prunable, k)
    bin_m, above_m = bin_with(prunable, m)
    keys, found = collect(keys_ptr, list_ptr, bin_k, bin_m, S, BLOCK_S)
    in_k = tl.sum(tl.where(tl.arange(0, BINS) == bin_k, prunable, 0), 0)
    high, low = kth_keys(keys, k - above_k, m - above_m + tl.where(bin_m == bin_k, 0, in_k))
    if found > BLOCK_S:
        high = tl.zeros((), tl.uint32)
        low = tl.zeros((), tl.uint32)
        for step in range(32):
            trial_k = high | top_bit(step)
            trial_m = low | top_bit(step)
            count_k, count_m, _ = count_stored_keys(keys_ptr, trial_k, trial_m, S, BLOCK_S)
            high = tl.where(count_k >= k, trial_k, high)
            low = tl.where(count_m >= m, trial_m, low)
    return high, low


@triton.jit
def cut_key_long(keys_ptr, list_ptr, counts, k, S, BLOCK_S: tl.constexpr):
    """`kth_key` of all keys of a row too long for registers. ``counts``: its histogram."""
    bin_k, above_k = bin_with(counts, k)
    keys, found = collect(keys_ptr, list_ptr, bin_k, bin_k, S, BLOCK_S)
    kth, above = kth_key(keys, k - above_k)
    above += above_k
    if found > BLOCK_S:
        kth = tl.zeros((), tl.uint32)
        above = tl.zeros((), tl.int32)
        for step in range(32):
            trial = kth | top_bit(step)
            _, _, at_trial = count_stored_keys(keys_ptr, trial, trial, S, BLOCK_S)
            above = tl.where(at_trial >= k, above, at_trial)
            kth = tl.where(at_trial >= k, trial, kth)
    return kth, above
