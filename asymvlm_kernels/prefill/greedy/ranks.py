"""Which token comes next: the one of the largest score, the first of equal ones, in one reduction."""

from __future__ import annotations

from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.prefill.order import key_score, order_key


@triton.jit
def rank(score, real, place):
    """uint64: the larger, the sooner: by score, then by the smaller ``place``; 0 in its upper half where not ``real``.

    No two places have the same.
    """
    return (order_key(score, real).to(tl.uint64) << 32) | (0x7FFFFFFF - place).to(tl.uint64)


@triton.jit
def place_of(best):
    """The place of a rank."""
    return 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def score_of(best):
    """The score of a rank; NaN where there was no token."""
    return key_score((best >> 32).to(tl.uint32))


@triton.jit
def first_rank():
    """More than any token has."""
    return tl.full((), 0xFFFFFFFF, tl.uint32).to(tl.uint64) << 32


@triton.jit
def wanted(counts_ptr, pid_b, most):
    """The count of a sample within ``[0, most]``, int32."""
    return tl.maximum(tl.minimum(tl.load(counts_ptr + pid_b).to(tl.int64), most), 0).to(tl.int32)
