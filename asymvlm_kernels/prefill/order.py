"""Scores as integers that sort as the method ranks, and exact order statistics of them, shared by gap and select.

A key is a uint32: larger is better, -0 equals +0, NaN (1) ranks below -inf, and 0 stands for no token at all. The k-th
largest key is found bit by bit from the top: 32 counts, no sort, no atomics, the same answer for any block size.
"""

from __future__ import annotations

from asymvlm_kernels._triton import tl, triton


@triton.jit
def order_key(score, real):
    """fp32 -> uint32, monotone. (``~bits`` raises in the interpreter, hence the xor.)"""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    flip = tl.where((bits >> 31) == 1, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    key = tl.where(score != score, 1, bits ^ flip)
    return tl.where(real, key, 0).to(tl.uint32)


@triton.jit
def key_score(key):
    """Inverse of `order_key`. The keys 0, 1 and 2**32 - 1 give NaN."""
    flip = tl.where((key >> 31) == 1, 0x80000000, 0xFFFFFFFF).to(tl.uint32)
    return (key ^ flip).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(scores_ptr, mask_ptr, offs_n, N):
    """Keys of the places ``offs_n`` of one row; places outside the row or the mask get the key 0."""
    real = offs_n < N
    score = tl.load(scores_ptr + offs_n, mask=real, other=0.0)
    if mask_ptr is not None:
        real = tl.load(mask_ptr + offs_n, mask=real, other=0) != 0
    return order_key(score, real)


@triton.jit
def top_bit(step):
    """Bit 31, 30, ... 0 for step 0, 1, ... 31."""
    return (tl.full((), 1, tl.uint32) << (31 - step)).to(tl.uint32)


@triton.jit
def kth_key(keys, k):
    """The ``k``-th largest key and the number of keys above it; 2**32 - 1, which no token has, for ``k = 0``."""
    kth = tl.zeros((), tl.uint32)
    above = tl.zeros((), tl.int32)  # the last trial that was too high is kth + 1
    for step in range(32):
        trial = kth | top_bit(step)
        count = tl.sum((keys >= trial).to(tl.int32), 0)
        above = tl.where(count >= k, above, count)
        kth = tl.where(count >= k, trial, kth)
    return kth, above


@triton.jit
def kth_keys(keys, k, m):
    """The ``k``-th and the ``m``-th largest of fewer than 32768 keys: both counts in one reduction of 16 + 16 bits."""
    kth = tl.zeros((), tl.uint32)
    mth = tl.zeros((), tl.uint32)
    for step in range(32):
        trial_k = kth | top_bit(step)
        trial_m = mth | top_bit(step)
        count = tl.sum((keys >= trial_k).to(tl.int32) + ((keys >= trial_m).to(tl.int32) << 16), 0)
        kth = tl.where((count & 0xFFFF) >= k, trial_k, kth)
        mth = tl.where((count >> 16) >= m, trial_m, mth)
    return kth, mth


@triton.jit
def count_keys(scores_ptr, mask_ptr, first, second, N, BLOCK_N: tl.constexpr):
    """How many keys of a row are at least ``first``, and how many at least ``second``. Reads the row in chunks."""
    at_first = tl.zeros((BLOCK_N,), tl.int32)
    at_second = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, N, BLOCK_N):
        keys = load_keys(scores_ptr, mask_ptr, start + tl.arange(0, BLOCK_N), N)
        at_first += (keys >= first).to(tl.int32)
        at_second += (keys >= second).to(tl.int32)
    return tl.sum(at_first, 0), tl.sum(at_second, 0)


@triton.jit
def kth_key_chunked(scores_ptr, mask_ptr, k, N, BLOCK_N: tl.constexpr):
    """`kth_key` for a row too long for registers."""
    kth = tl.zeros((), tl.uint32)
    above = tl.zeros((), tl.int32)
    for step in range(32):
        trial = kth | top_bit(step)
        count, _ = count_keys(scores_ptr, mask_ptr, trial, trial, N, BLOCK_N)
        above = tl.where(count >= k, above, count)
        kth = tl.where(count >= k, trial, kth)
    return kth, above


@triton.jit
def kth_keys_chunked(scores_ptr, mask_ptr, k, m, N, BLOCK_N: tl.constexpr):
    """`kth_keys` for a row too long for registers."""
    kth = tl.zeros((), tl.uint32)
    mth = tl.zeros((), tl.uint32)
    for step in range(32):
        trial_k = kth | top_bit(step)
        trial_m = mth | top_bit(step)
        count_k, count_m = count_keys(scores_ptr, mask_ptr, trial_k, trial_m, N, BLOCK_N)
        kth = tl.where(count_k >= k, trial_k, kth)
        mth = tl.where(count_m >= m, trial_m, mth)
    return kth, mth


@triton.jit
def keep_best(keys, kth, better, equal, wanted):
    """Which keys of a block are kept, and the slot of each: those above ``kth``, and ``wanted`` of those equal to it.

    ``better`` and ``equal`` count such keys in the blocks before. Both prefix sums are one scan of 16 + 16 bits.
    Returns the flags, the slots and the two counts after this block.
    """
    is_better = keys > kth
    is_equal = keys == kth
    flags = is_better.to(tl.int32) + (is_equal.to(tl.int32) << 16)
    before = tl.cumsum(flags, 0) - flags
    better_before = better + (before & 0xFFFF)
    equal_before = equal + (before >> 16)
    keep = is_better | (is_equal & (equal_before < wanted))  # the lowest index wins a tie
    total = tl.sum(flags, 0)
    return keep, better_before + tl.minimum(equal_before, wanted), better + (total & 0xFFFF), equal + (total >> 16)
