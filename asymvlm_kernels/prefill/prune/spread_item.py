"""Scores of one sample spread along the lines of its images: `Spread.apply`, bit for bit, from rank keys to rank keys.

By the program that ranks the sample, once all its scores are there. Keys are those of `keys`: their order is that of
the scores, so the best neighbour has the largest key. NaN ranks below all and is handed on by nobody.
"""

from __future__ import annotations

from asymvlm_kernels._triton import constant, tl, triton
from asymvlm_kernels.device import multiply_f32
from asymvlm_kernels.prefill.order import key_score, order_key
from asymvlm_kernels.prefill.prune.keys import PROTECTED, bin_of
from asymvlm_kernels.prefill.reference import SECOND_HIGHEST

LOWEST = constant(0x007FFFFF)  # key of -inf
HIGHEST = constant(SECOND_HIGHEST)


@triton.jit
def key_beside(keys_ptr, lines_ptr, stride_ls, offs_s, line, S):
    """Keys of the places ``offs_s`` where these lie on the lines ``line``, else 0."""
    inside = (offs_s >= 0) & (offs_s < S)
    # not .cg: the other steps find these in L1, which the acquire of the last arrival has emptied
    key = tl.load(keys_ptr + offs_s, mask=inside, other=0).to(tl.uint32, bitcast=True)
    beside = tl.load(lines_ptr + offs_s.to(tl.int64) * stride_ls, mask=inside, other=-1)
    return tl.where((beside == line) & (key < PROTECTED), key, 0).to(tl.uint32)


@triton.jit
def spread_keys(
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
    BLOCK: tl.constexpr,
    LONG: tl.constexpr,
):
    """Write the scores after they have spread, their keys, and the histogram of these for a long row."""
    for start in range(0, S, BLOCK):
        offs_s = start + tl.arange(0, BLOCK)  # [BLOCK]
        mask_s = offs_s < S
        key = tl.load(keys_ptr + offs_s, mask=mask_s, other=0).to(tl.uint32, bitcast=True)
        line = tl.load(lines_ptr + offs_s.to(tl.int64) * stride_ls, mask=mask_s, other=-1)
        best = key
        for step in range(1, tl.minimum(reach, S - 1) + 1):
            best = tl.maximum(best, key_beside(keys_ptr, lines_ptr, stride_ls, offs_s - step, line, S))
            best = tl.maximum(best, key_beside(keys_ptr, lines_ptr, stride_ls, offs_s + step, line, S))
        spreads = (line >= 0) & (key > LOWEST) & (key < PROTECTED)
        mixed = multiply_f32(key_score(key), own_share) + multiply_f32(key_score(best), share)
        mixed = tl.where(mixed > HIGHEST, HIGHEST, mixed)  # a comparison keeps NaN, a minimum drops it
        score = tl.where(spreads, mixed, key_score(key))
        score = tl.where((key == 0) | (key >= PROTECTED), float("-inf"), score)
        tl.store(scores_ptr + offs_s, score, mask=mask_s)
        key = tl.where(spreads, order_key(mixed, spreads), key).to(tl.uint32)
        tl.store(spread_ptr + offs_s, key.to(tl.int32, bitcast=True), mask=mask_s)
        if LONG:
            tl.atomic_add(histogram_ptr + bin_of(key), 1, mask=mask_s & (key != 0), sem="relaxed")
    tl.debug_barrier()  # all threads have written the keys
