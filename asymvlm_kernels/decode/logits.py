"""What the decode kernels share: which slots a row sees, and its logits there."""

from __future__ import annotations

import torch

from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.device import multiply

NO_BOUND = 2**30  # a window that reaches beyond every slot, and still adds to one within int32
NO_BOUNDS = (NO_BOUND, NO_BOUND)
FARTHEST = 2**31 - 1  # and still within int32 below -1
# sizes of a call: a new one of these compiles nothing new
VARYING = ["stride_qb", "stride_qs", "stride_kb", "stride_kg", "stride_vb", "stride_vg", "stride_pb", "stride_rb"]
VARYING += ["stride_lb", "stride_lh", "Q", "S", "chunk", "parts", "scored", "left", "right"]


@triton.jit
def slot_range(seqlens_ptr, leftpad_ptr, pid_b, S):
    """First slot in use and the end of those in use."""
    first = pid_b * 0
    end = first + S
    if seqlens_ptr is not None:
        end = tl.minimum(tl.load(seqlens_ptr + pid_b).to(tl.int64), end)
    if leftpad_ptr is not None:
        first = tl.maximum(tl.load(leftpad_ptr + pid_b).to(tl.int64), first)
    return first.to(tl.int32), end.to(tl.int32)


@triton.jit
def row_positions(q_pos_ptr, row, end, stride_rb, stride_rs, pid_b, Q):
    """int32 positions of query rows ``row``: given, or the last at the last slot in use."""
    position = end - Q + row
    if q_pos_ptr is not None:
        position = tl.load(q_pos_ptr + pid_b * stride_rb + row * stride_rs)
        if position.dtype == tl.int64:
            position = tl.maximum(tl.minimum(position, 2147483647), -1).to(tl.int32)
    return position


@triton.jit
def slot_positions(slot_pos_ptr, offs_n, mask_n, stride_pb, stride_ps, pid_b):
    """int32 positions of the tokens in slots ``offs_n``, -1 in free ones and outside ``mask_n``."""
    position = tl.where(mask_n, offs_n, -1)
    if slot_pos_ptr is not None:
        offs = pid_b * stride_pb + offs_n.to(tl.int64) * stride_ps
        position = tl.load(slot_pos_ptr + offs, mask=mask_n, other=-1)
    return position


@triton.jit
def tanh(x):
    """By exp2 where it is exact enough, by its series near 0, where ``(1 - e) / (1 + e)`` would lose digits."""
    e = tl.exp2(tl.abs(x) * (-2 * 1.4426950408889634))
    far = (1 - e) / (1 + e)
    far = tl.where(x < 0, -far, far)
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.09, near, far)


@triton.jit
def row_logits(query, key, seen, scale, softcap, CAPPED: tl.constexpr):
    """``[rows, slots]`` logits times log2(e), -inf where ``seen`` is False: exp2 is an instruction, exp one more."""
    logits = multiply(query, tl.trans(key), tl.zeros((query.shape[0], key.shape[0]), tl.float32))
    if CAPPED:
        logits = softcap * tanh(logits * (scale / softcap))
        logits *= 1.4426950408889634
    else:
        logits *= scale * 1.4426950408889634
    return tl.where(seen, logits, float("-inf"))


def window_bounds(left: int, right: int, slot_pos: torch.Tensor | None) -> tuple[int, int]:
    """Window sizes without the -1: with ``slot_pos`` no row sees a later position, and a position may be any int32."""
    if slot_pos is not None:
        return FARTHEST if left < 0 else left, 0
    return (NO_BOUND if left < 0 else min(left, NO_BOUND), NO_BOUND if right < 0 else min(right, NO_BOUND))
