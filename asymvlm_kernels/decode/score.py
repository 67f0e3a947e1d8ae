"""Scores behind any attention kernel that returns its logsumexp: ``score[b, s] = mean_h exp(logit[h, s] - lse[h])``."""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import check_device, check_dtype, check_no_grad, check_shape
from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.decode import arguments, reference
from asymvlm_kernels.decode.logits import (
    VARYING,
    row_logits,
    row_positions,
    slot_positions,
    slot_range,
    window_bounds,
)
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.launch import empty, launch, remember
from asymvlm_kernels.tuning.decode import head_vector, score_lse_config
from asymvlm_kernels.tuning.prefill import architecture


@triton.jit(do_not_specialize=VARYING)
def _score_from_lse_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    seqlens_ptr,
    leftpad_ptr,
    slot_pos_ptr,
    q_pos_ptr,
    scores_ptr,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kg,
    stride_lb,
    stride_lh,
    stride_ls,
    stride_pb,
    stride_ps,
    stride_rb,
    stride_rs,
    Q,
    S,
    G,
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
    # one program scores BLOCK_N slots: one key head after the other, BLOCK_R of its R * scored rows at a time
    pid_b = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_d = offs_d < D
    first, end = slot_range(seqlens_ptr, leftpad_ptr, pid_b, S)
    slot_pos = slot_positions(slot_pos_ptr, offs_n, (offs_n >= first) & (offs_n < end), stride_pb, stride_ps, pid_b)
    mask_n = slot_pos >= 0
    at_k = tl.multiple_of(offs_n.to(tl.int64) * stride_ks, VECTOR)  # [BLOCK_N]
    k_ptr += tl.multiple_of(pid_b * stride_kb, VECTOR)
    tiles = tl.cdiv(R * scored, BLOCK_R)
    score = tl.zeros((BLOCK_N,), tl.float32)
    for step in range(G * tiles):
        pid_g = (step // tiles).to(tl.int64)
        offs_r = step % tiles * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        mask_r = offs_r < R * scored
        row = Q - scored + tl.minimum(offs_r // R, scored - 1)
        head = pid_g * R + offs_r % R
        key_ptrs = k_ptr + tl.multiple_of(pid_g * stride_kg, VECTOR) + at_k[:, None] + offs_d[None, :]
        key = tl.load(key_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        at_q = tl.multiple_of(pid_b * stride_qb + row.to(tl.int64) * stride_qs + head * stride_qh, VECTOR)
        query = tl.load(q_ptr + at_q[:, None] + offs_d[None, :], mask=mask_r[:, None] & mask_d[None, :], other=0.0)
        lse = tl.load(lse_ptr + pid_b * stride_lb + head * stride_lh + row * stride_ls, mask=mask_r, other=0.0)
        row_pos = row_positions(q_pos_ptr, row, end, stride_rb, stride_rs, pid_b, Q)
        seen = (slot_pos[None, :] >= row_pos[:, None] - left) & (slot_pos[None, :] <= row_pos[:, None] + right)
        seen = seen & mask_n[None, :] & mask_r[:, None]
        logits = row_logits(query, key, seen, scale, softcap, CAPPED)
        weights = tl.exp2(logits - lse[:, None] * 1.4426950408889634)
        score += tl.sum(tl.where(logits == float("-inf"), 0.0, weights), 0)  # an empty row: -inf less an infinity
    tl.store(scores_ptr + pid_b * S + offs_n, score / (G * R * scored), mask=offs_n < S)


@remember
def _score_from_lse_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    seqlens: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    slot_pos: torch.Tensor | None,
    q_pos: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    score_rows: int,
) -> torch.Tensor:
    B, Q, H, D = q.shape
    S, G = k.shape[1:3]
    scores = empty((B, S), dtype=torch.float32, device=q.device)
    if scores.numel() == 0:
        return scores
    vector = head_vector(q, k)
    config = score_lse_config(D, q.dtype, vector, architecture(q.device))
    launch(
        _score_from_lse_kernel,
        (triton.cdiv(S, config.block_n), B),
        q,
        k,
        lse,
        None if seqlens is None else seqlens.contiguous(),
        None if leftpad is None else leftpad.contiguous(),
        slot_pos,
        q_pos,
        scores,
        *q.stride()[:3],
        *k.stride()[:3],
        lse.stride(0),
        lse.stride(1),
        lse.stride(2),
        *((0, 0) if slot_pos is None else slot_pos.stride()),
        *((0, 0) if q_pos is None else q_pos.stride()),
        Q,
        S,
        G,
        score_rows,
        *window_bounds(left, right, slot_pos),
        scale,
        softcap,
        D=D,
        R=H // G,
        BLOCK_R=config.block_r,
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_d,
        VECTOR=vector,
        CAPPED=softcap > 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return scores


def _score_from_lse_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    seqlens: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    slot_pos: torch.Tensor | None,
    q_pos: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    score_rows: int,
) -> torch.Tensor:
    return q.new_empty(k.shape[:2], dtype=torch.float32)


score_from_lse_op = define_op(
    "score_from_lse(Tensor q, Tensor k, Tensor lse, Tensor? seqlens, Tensor? leftpad, Tensor? slot_pos, "
    "Tensor? q_pos, float scale, SymInt left, SymInt right, float softcap, SymInt score_rows) -> Tensor",
    reference=reference.score_from_lse,
    triton=_score_from_lse_triton,
    fake=_score_from_lse_fake,
)


def score_from_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    slot_pos: torch.Tensor | None = None,
    q_pos: torch.Tensor | None = None,
    score_rows: int = 1,
) -> torch.Tensor:
    """The scores of `flash_attn_with_kvcache`, from the logsumexp of an attention that was computed elsewhere.

    Args:
        q: ``(B, Q, H, D)`` fp32, fp16 or bf16: the whole query, or its last rows with their part of ``lse``.
        k: ``(B, S, G, D)``, any strides but the last.
        lse: ``(B, H, Q)`` fp32, natural logarithm, of the same scale, cap, window and slots. Empty rows may be +-inf.
        score_rows: how many of the last rows are averaged.
        Other arguments as in `flash_attn_with_kvcache`.
    Returns:
        ``(B, S)`` fp32.
    Raises:
        ValueError: on rank, size, dtype, device or stride mismatch, or an input that requires grad in grad mode.

    Reads K once more and V never. Does not synchronise.
    """
    arguments.check_heads(q, k, None, ("q", "k", "v"))
    B, Q, H, D = q.shape
    check_shape("lse", lse, (B, H, Q))
    check_dtype("lse", lse, (torch.float32,))
    check_device("lse", lse, q)
    check_no_grad("score_from_lse", q=q, k=k, lse=lse)
    slots = arguments.slots(q, k, cache_seqlens, cache_leftpad, slot_pos, q_pos)
    left, right = arguments.window(window_size, causal, slot_pos)
    arguments.check_score_rows(score_rows, Q)
    scale = arguments.scale(softmax_scale, softcap, D)
    scores: torch.Tensor = score_from_lse_op(q, k, lse, *slots, scale, left, right, float(softcap), score_rows)
    return scores
