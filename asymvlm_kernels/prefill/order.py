"""Scores as integers that sort as the method ranks, and exact order statistics of them, shared by gap and select.

A key is a uint32: larger is better, -0 equals +0, NaN (1) ranks below -inf, and 0 stands for no token at all. The k-th
largest key is found bit by bit from the highest bit in which the keys differ, and no further than to the bit below
which the count is k: no sort, no atomics, the same answer for any block size.
"""

from __future__ import annotations

from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.device import max_and_min, min_both, sum_both


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
def shared_bits(keys):
    """The bits that all keys but 0 begin with, and the first bit in which they differ; 0 where they are equal."""
    none = tl.full((), 0xFFFFFFFF, tl.uint32)
    top, low = max_and_min(keys, tl.where(keys == 0, none, keys))
    differ = top ^ low
    differ |= differ >> 1
    differ |= differ >> 2
    differ |= differ >> 4
    differ |= differ >> 8
    differ |= differ >> 16  # ones from the first bit on
    return top & (differ ^ none), differ - (differ >> 1)


@triton.jit
def kth_key(keys, k):
    """A key and the number of keys above it, so that those and the first of the keys equal to it are the ``k`` largest.

    It is the ``k``-th largest key, or the number just below, with ``k`` keys above; 2**32 - 1, which no token has, for
    ``k = 0``.
    """
    none = tl.full((), 0xFFFFFFFF, tl.uint32)
    kth, bit = shared_bits(keys)
    above = tl.zeros((), tl.int32)  # the last trial that was too high is kth + 1
    is_open = k > 0
    while is_open & (bit != 0):
        trial = kth | bit
        count = tl.sum((keys >= trial).to(tl.int32), 0)
        is_open = count != k
        above = tl.where(count >= k, above, count)
        kth = tl.where(count >= k, trial, kth)
        bit = bit >> 1
    if is_open == 0:
        kth = tl.min(tl.where(keys >= kth, keys, none), 0) - 1
        above += k
    kth = tl.where(k > 0, kth, none)
    return kth, tl.minimum(above, k)


@triton.jit
def kth_keys(keys, k, m):
    """The ``k``-th and the ``m``-th largest of fewer than 32768 keys: both counts in one reduction of 16 + 16 bits."""
    kth, mth, _, _ = three_keys(keys, k, m, 0, k < 0)
    return kth, mth


@triton.jit
def three_keys(keys, k, m, cut, with_cut):
    """The ``k``-th and the ``m``-th largest of fewer than 32768 keys, and where ``with_cut`` is set the answer of
    `kth_key` for ``cut``, from one loop. There the key may be any number from the next largest to just below the
    ``cut``-th.
    """
    kth, bit = shared_bits(keys)
    mth = kth
    last = kth
    above = tl.zeros((), tl.int32)
    open_k = k > 0
    open_m = m > 0
    open_cut = with_cut & (k >= 0)
    while (open_k | open_m | open_cut) & (bit != 0):
        trial_k = tl.where(open_k, kth | bit, kth)
        trial_m = tl.where(open_m, mth | bit, mth)
        trial = tl.where(open_cut, last | bit, last)
        both = (keys >= trial_k).to(tl.int32) + ((keys >= trial_m).to(tl.int32) << 16)
        both, count = sum_both(both, (keys >= trial).to(tl.int32))
        count_k = both & 0xFFFF
        count_m = both >> 16
        kth = tl.where(count_k >= k, trial_k, kth)
        mth = tl.where(count_m >= m, trial_m, mth)
        above = tl.where(open_cut & (count <= cut), count, above)
        last = tl.where(open_cut & (count == cut), trial - 1, tl.where(count >= cut, trial, last))
        open_k = open_k & (count_k != k)
        open_m = open_m & (count_m != m)
        open_cut = open_cut & (count != cut)
        bit = bit >> 1
    none = tl.full((), 0xFFFFFFFF, tl.uint32)
    kth, mth = min_both(tl.where(keys >= kth, keys, none), tl.where(keys >= mth, keys, none))
    return kth, mth, last, above


@triton.jit
def four_keys(keys, k, m, p, q):
    """The ``k``-th, ``m``-th, ``p``-th and ``q``-th largest of fewer than 32768 keys, from one loop."""
    kth, bit = shared_bits(keys)
    mth = kth
    pth = kth
    qth = kth
    open_k = k > 0
    open_m = m > 0
    open_p = p > 0
    open_q = q > 0
    while (open_k | open_m | open_p | open_q) & (bit != 0):
        trial_k = tl.where(open_k, kth | bit, kth)
        trial_m = tl.where(open_m, mth | bit, mth)
        trial_p = tl.where(open_p, pth | bit, pth)
        trial_q = tl.where(open_q, qth | bit, qth)
        one, two = sum_both(
            (keys >= trial_k).to(tl.int32) + ((keys >= trial_m).to(tl.int32) << 16),
            (keys >= trial_p).to(tl.int32) + ((keys >= trial_q).to(tl.int32) << 16),
        )
        kth = tl.where((one & 0xFFFF) >= k, trial_k, kth)
        mth = tl.where((one >> 16) >= m, trial_m, mth)
        pth = tl.where((two & 0xFFFF) >= p, trial_p, pth)
        qth = tl.where((two >> 16) >= q, trial_q, qth)
        open_k = open_k & ((one & 0xFFFF) != k)
        open_m = open_m & ((one >> 16) != m)
        open_p = open_p & ((two & 0xFFFF) != p)
        open_q = open_q & ((two >> 16) != q)
        bit = bit >> 1
    none = tl.full((), 0xFFFFFFFF, tl.uint32)
    kth, mth = min_both(tl.where(keys >= kth, keys, none), tl.where(keys >= mth, keys, none))
    pth, qth = min_both(tl.where(keys >= pth, keys, none), tl.where(keys >= qth, keys, none))
    return kth, mth, pth, qth


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
def places_of(start, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Places ``(ROWS, WIDTH)`` from ``start`` on, row after row."""
    return start + tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def keep_best(keys, kth, better, equal, wanted):
    """Which keys of a block ``(ROWS, WIDTH)`` are kept, and the slot of each: those above ``kth``, and ``wanted`` of
    those equal to it.

    ``better`` and ``equal`` count such keys in the blocks before. A block holds fewer than 32768 keys: both prefix sums
    are one scan of 16 + 16 bits, over the rows and then along each. Returns the flags, the slots and the two counts
    after this block.
    """
    is_better = keys > kth
    is_equal = keys == kth
    flags = is_better.to(tl.int32) + (is_equal.to(tl.int32) << 16)
    of_rows = tl.sum(flags, 1)
    before = (tl.cumsum(of_rows, 0) - of_rows)[:, None] + tl.cumsum(flags, 1) - flags
    better_before = better + (before & 0xFFFF)
    equal_before = equal + (before >> 16)
    keep = is_better | (is_equal & (equal_before < wanted))  # the lowest index wins a tie
    total = tl.sum(of_rows, 0)
    return keep, better_before + tl.minimum(equal_before, wanted), better + (total & 0xFFFF), equal + (total >> 16)
