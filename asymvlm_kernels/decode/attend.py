"""Attention over cache slots that also returns each slot's score: the op behind `flash_attn_with_kvcache`.

``out[h] = sum_s p[h, s] v[s]``, ``p[h] = softmax(q[h] k)``, ``score[s] = mean_h p[h, s]``. The cache is split among
programs. One owns the rows of all query heads that share a key head, so K and V are read once, and keeps a running
maximum and sum; it stores its partial output, its logsumexp and, for the scored rows, the logits as they are. The
second launch (`merge.py`) merges the partial outputs and turns the logits into scores, which it can because by then
every logsumexp is known. Nothing is added atomically: the order of every sum is fixed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.decode import reference
from asymvlm_kernels.decode.base import long_attention
from asymvlm_kernels.decode.logits import (
    NO_BOUNDS,
    VARYING,
    row_logits,
    row_positions,
    slot_positions,
    slot_range,
    window_bounds,
)
from asymvlm_kernels.decode.merge import merge_parts
from asymvlm_kernels.decode.score import score_from_lse_op
from asymvlm_kernels.device import multiply
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.launch import empty, launch, remember
from asymvlm_kernels.straight import straight
from asymvlm_kernels.tuning.decode import attend_config, head_vector, split_slots
from asymvlm_kernels.tuning.prefill import architecture

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # output, logsumexp, scores


@triton.jit(do_not_specialize=VARYING)
def _attend_slots_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    seqlens_ptr,
    leftpad_ptr,
    slot_pos_ptr,
    q_pos_ptr,
    parts_ptr,
    sums_ptr,
    logits_ptr,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kg,
    stride_vb,
    stride_vs,
    stride_vg,
    stride_pb,
    stride_ps,
    stride_rb,
    stride_rs,
    Q,
    S,
    chunk,
    scored,
    left,
    right,
    scale,
    softcap,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
    CAPPED: tl.constexpr,
):
    # one program takes BLOCK_R of the Q * R rows of one key head over one part of the slots
    part, parts = tl.program_id(1), tl.num_programs(1)
    tiles = tl.cdiv(Q * R, BLOCK_R)
    pid_g = (tl.program_id(0) // tiles).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    H = tl.num_programs(0) // tiles * R
    offs_r = tl.program_id(0) % tiles * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_r = offs_r < Q * R
    mask_d = offs_d < D
    row = tl.minimum(offs_r // R, Q - 1)
    head = pid_g * R + offs_r % R  # [BLOCK_R] int64: every product with it may pass 2**31

    first, end = slot_range(seqlens_ptr, leftpad_ptr, pid_b, S)
    row_pos = row_positions(q_pos_ptr, row, end, stride_rb, stride_rs, pid_b, Q)  # [BLOCK_R]
    lowest = tl.min(row_pos, 0) - left
    highest = tl.max(row_pos, 0) + right
    if slot_pos_ptr is None:  # whole steps outside the window are left out
        first = tl.maximum(first, lowest)
        end = tl.minimum(end, highest + 1)
    start = part * chunk
    stop = tl.minimum(start + chunk, S)
    begin = tl.minimum(tl.maximum(start, first // BLOCK_N * BLOCK_N), stop)
    until = tl.maximum(tl.minimum(stop, end), begin)

    at = pid_b * stride_qb + row.to(tl.int64) * stride_qs + head * stride_qh
    at = tl.multiple_of(at, VECTOR)
    query = tl.load(q_ptr + at[:, None] + offs_d[None, :], mask=mask_r[:, None] & mask_d[None, :], other=0.0)
    k_ptr += tl.multiple_of(pid_b * stride_kb + pid_g * stride_kg, VECTOR)
    v_ptr += tl.multiple_of(pid_b * stride_vb + pid_g * stride_vg, VECTOR)
    if logits_ptr is not None:  # (B, H * scored, S)
        is_scored = mask_r & (row >= Q - scored)
        logit_ptrs = logits_ptr + ((pid_b * H + head) * scored + row - (Q - scored)) * S  # [BLOCK_R]

    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for slot in range(begin, until, BLOCK_N):
        offs_n = slot + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask_n = (offs_n >= first) & (offs_n < end)
        slot_pos = slot_positions(slot_pos_ptr, offs_n, mask_n, stride_pb, stride_ps, pid_b)  # [BLOCK_N]
        # what nobody of this tile may see is not read: a NaN there would pass through a probability of 0
        mask_n = (slot_pos >= 0) & (slot_pos >= lowest) & (slot_pos <= highest)
        seen = (slot_pos[None, :] >= row_pos[:, None] - left) & (slot_pos[None, :] <= row_pos[:, None] + right)
        mask = mask_n[:, None] & mask_d[None, :]
        at_k = tl.multiple_of(offs_n.to(tl.int64) * stride_ks, VECTOR)
        key = tl.load(k_ptr + at_k[:, None] + offs_d[None, :], mask=mask, other=0.0)
        at_v = tl.multiple_of(offs_n.to(tl.int64) * stride_vs, VECTOR)
        value = tl.load(v_ptr + at_v[:, None] + offs_d[None, :], mask=mask, other=0.0)
        logits = row_logits(query, key, seen & mask_n[None, :], scale, softcap, CAPPED)
        if logits_ptr is not None:
            tl.store(logit_ptrs[:, None] + offs_n[None, :], logits, mask=is_scored[:, None] & (offs_n < stop)[None, :])
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen nothing yet
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        sums = multiply(weights.to(value.dtype), value, sums * shrink[:, None])
        peak = new_peak

    alive = total != 0  # True for NaN
    at = ((pid_b * H + head) * Q + row) * parts + part  # [BLOCK_R] of (B, H, Q, parts)
    tl.store(sums_ptr + at, tl.where(alive, peak + tl.log2(total), float("-inf")), mask=mask_r)
    result = sums / tl.where(alive, total, 1.0)[:, None]
    tl.store(parts_ptr + at[:, None] * D + offs_d[None, :], result, mask=(mask_r & alive)[:, None] & mask_d[None, :])


@remember
def _attend_slots_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlens: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    slot_pos: torch.Tensor | None,
    q_pos: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    num_splits: int,
    with_lse: bool,
    score_rows: int,
    merge: Callable[..., None] = merge_parts,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, Q, H, D = q.shape
    S, G = k.shape[1:3]
    if q.numel() == 0 or S == 0:
        return reference.attend_slots(
            q, k, v, seqlens, leftpad, slot_pos, q_pos, scale, left, right, softcap, num_splits, with_lse, score_rows
        )
    R = H // G
    vector = head_vector(q, k, v)
    config = attend_config(Q * R, D, q.dtype, vector, slot_pos is not None, architecture(q.device))
    tiles = triton.cdiv(Q * R, config.block_r)
    chunk = split_slots(S, G, tiles, 2 * D * k.itemsize, config.block_n, num_splits)
    parts = triton.cdiv(S, chunk)

    def fp32(*size: int) -> torch.Tensor:
        return empty(size, dtype=torch.float32, device=q.device)

    partial, sums = fp32(B, H, Q, parts, D), fp32(B, H, Q, parts)
    logits = fp32(B, H * score_rows, S) if score_rows else None
    out, lse = empty((B, Q, H, D), dtype=q.dtype, device=q.device), fp32(B, H, Q if with_lse else 0)
    scores = fp32(B, S if score_rows else 0)
    lengths, leftpads = _contiguous(seqlens), _contiguous(leftpad)
    bounds = window_bounds(left, right, slot_pos)
    launch(
        _attend_slots_kernel,
        (G * tiles, parts, B),
        q,
        k,
        v,
        lengths,
        leftpads,
        slot_pos,
        q_pos,
        partial,
        sums,
        logits,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *((0, 0) if slot_pos is None else slot_pos.stride()),
        *((0, 0) if q_pos is None else q_pos.stride()),
        Q,
        S,
        chunk,
        score_rows,
        *bounds,
        scale,
        softcap,
        D=D,
        R=R,
        BLOCK_R=config.block_r,
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_d,
        VECTOR=vector,
        CAPPED=softcap > 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    merge(partial, sums, logits, lengths, leftpads, bounds if slot_pos is None else NO_BOUNDS, out, lse, scores)
    return out, lse, scores


def _contiguous(numbers: torch.Tensor | None) -> torch.Tensor | None:
    return None if numbers is None else numbers.contiguous()


def delegate_long(attend: Callable[..., Result]) -> Callable[..., Result]:
    """``attend``, but for long queries over a plain cache the output of a base kernel and the scores of the last rows.

    Inside the op, so that a compiled graph does not depend on the choice.
    """

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        seqlens: torch.Tensor | None, leftpad: torch.Tensor | None,
        slot_pos: torch.Tensor | None, q_pos: torch.Tensor | None,
        scale: float, left: int, right: int, softcap: float, num_splits: int, with_lse: bool, score_rows: int,
    ) -> Result:  # fmt: skip
        plain = seqlens is None and leftpad is None and slot_pos is None and num_splits == 0
        found = long_attention(q, k, v, scale, left, right, softcap, with_lse) if plain else None
        slots, bounds = (seqlens, leftpad, slot_pos, q_pos), (scale, left, right, softcap)
        if found is None:
            return attend(q, k, v, *slots, *bounds, num_splits, with_lse, score_rows)
        out, lse = found
        scores = q.new_empty((q.shape[0], 0), dtype=torch.float32)
        last = slice(q.shape[1] - score_rows, None)
        if score_rows and lse is not None:
            scores = score_from_lse_op(q[:, last], k, lse[:, :, last], *slots, *bounds, score_rows)
        elif score_rows:
            scores = attend(q[:, last], k, v, *slots, *bounds, num_splits, False, score_rows)[2]
        return (
            out,
            lse if with_lse and lse is not None else q.new_empty((q.shape[0], q.shape[2], 0), dtype=torch.float32),
            scores,
        )

    return run


def _attend_slots_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlens: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    slot_pos: torch.Tensor | None,
    q_pos: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    num_splits: int,
    with_lse: bool,
    score_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, Q, H, _ = q.shape
    lse = q.new_empty((B, H, Q if with_lse else 0), dtype=torch.float32)
    return q.new_empty(q.shape), lse, q.new_empty((B, k.shape[1] if score_rows else 0), dtype=torch.float32)


attend_slots = straight(
    define_op(
        "attend_slots(Tensor q, Tensor k, Tensor v, Tensor? seqlens, Tensor? leftpad, Tensor? slot_pos, Tensor? q_pos, "
        "float scale, SymInt left, SymInt right, float softcap, SymInt num_splits, bool with_lse, SymInt score_rows) "
        "-> (Tensor, Tensor, Tensor)",
        reference=delegate_long(reference.attend_slots),
        triton=delegate_long(_attend_slots_triton),
        fake=_attend_slots_fake,
    )
)
