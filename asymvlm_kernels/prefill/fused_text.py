"""Where the text of a sample lies: found by every program for itself, so that nobody waits."""

from __future__ import annotations

from asymvlm_kernels._triton import constant, tl, triton

MASK_CHUNK = constant(4096)  # mask bytes that one program reads at once


@triton.jit
def load_mask(mask_ptr, offs_s, stride, S):
    return tl.load(mask_ptr + offs_s.to(tl.int64) * stride, mask=offs_s < S, other=0) != 0


@triton.jit
def list_text(vision_mask_ptr, text_mask_ptr, places_ptr, stride_vs, stride_ts, S):
    """Write the places of a sample's text, ascending, and return their number.

    Every program of a sample writes the same numbers to the same place and reads its own: nobody waits.
    """
    length = tl.zeros((), tl.int32)
    for start in range(0, S, MASK_CHUNK):
        offs_s = start + tl.arange(0, MASK_CHUNK)
        is_text = load_mask(text_mask_ptr, offs_s, stride_ts, S)
        is_text = is_text & (load_mask(vision_mask_ptr, offs_s, stride_vs, S) == 0)
        flags = is_text.to(tl.int32)
        found = tl.sum(flags, 0)
        if found > 0:  # most chunks of a large image have none
            tl.store(places_ptr + length + tl.cumsum(flags, 0) - flags, offs_s, mask=is_text)
        length += found
    tl.debug_barrier()
    return length
