"""Which places of a sample may be dropped and which must stay, and where its text lies.

Every program finds that for itself, so that nobody waits.
"""

from __future__ import annotations

from asymvlm_kernels._triton import constant, tl, triton
from asymvlm_kernels.prefill.prune.keys import PROTECTED, TEXT

MASK_CHUNK = constant(1024)  # mask bytes that one program reads at once: 4 a thread of 8 warps


@triton.jit
def load_mask(mask_ptr, offs_s, stride, S):
    return tl.load(mask_ptr + offs_s.to(tl.int64) * stride, mask=offs_s < S, other=0) != 0


@triton.jit
def roles_of(vision_mask_ptr, text_mask_ptr, protect_ptr, offs_s, stride_vs, stride_ts, stride_ps, S):
    """Whether each place may be dropped, whether it must stay, and the rank key of one that must."""
    is_vision = load_mask(vision_mask_ptr, offs_s, stride_vs, S)
    must_stay = load_mask(text_mask_ptr, offs_s, stride_ts, S)
    rank = tl.full(offs_s.shape, TEXT, tl.uint32)
    prunable = is_vision
    if protect_ptr is not None:
        protected = load_mask(protect_ptr, offs_s, stride_ps, S)
        rank = tl.where(must_stay & (is_vision == 0), TEXT, PROTECTED).to(tl.uint32)
        must_stay = must_stay | protected
        prunable = is_vision & (protected == 0)
    return prunable, must_stay & (prunable == 0), rank


@triton.jit
def load_text(vision_mask_ptr, text_mask_ptr, offs_s, stride_vs, stride_ts, S):
    """Whether each place is text: in the text's mask and not in that of the vision."""
    is_text = load_mask(text_mask_ptr, offs_s, stride_ts, S)
    return is_text & (load_mask(vision_mask_ptr, offs_s, stride_vs, S) == 0)


@triton.jit
def list_text(vision_mask_ptr, text_mask_ptr, places_ptr, stride_vs, stride_ts, S):
    """Write the places of a sample's text, ascending, and return their number.

    Every program of a sample writes the same numbers to the same place and reads its own: nobody waits.
    """
    length = tl.zeros((), tl.int32)
    offs = tl.arange(0, MASK_CHUNK)
    is_text = load_text(vision_mask_ptr, text_mask_ptr, offs, stride_vs, stride_ts, S)
    for start in range(0, S, MASK_CHUNK):
        offs_s = start + offs
        behind = load_text(vision_mask_ptr, text_mask_ptr, offs_s + MASK_CHUNK, stride_vs, stride_ts, S)  # on its way
        flags = is_text.to(tl.int32)
        found = tl.sum(flags, 0)
        if found > 0:  # most chunks of a large image have none
            tl.store(places_ptr + length + tl.cumsum(flags, 0) - flags, offs_s, mask=is_text)
        length += found
        is_text = behind
    tl.debug_barrier()
    return length
