"""Attention that each key receives: ``sum[b, g, s] = mean over the heads of g, sum over queries of p[b, h, q, s]``.

H2O adds these sums up, SnapKV takes those of the last queries, VL-Cache those behind the images. Two passes over the
logits, which are never stored: the first gives each query the logarithm of its sum, unless attention has it already;
in the second a program owns some keys of a key head and takes all rows that may see them, in order. Nothing is added
atomically. The rows of the query heads that share a key head are its rows, so K is not expanded.
"""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import check_device, check_dtype, check_no_grad, check_shape
from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.decode import arguments, reference
from asymvlm_kernels.decode.logits import VARYING, row_logits, row_positions, slot_positions, window_bounds
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.launch import empty, launch, remember
from asymvlm_kernels.tuning.decode import column_sums_config, head_vector
from asymvlm_kernels.tuning.prefill import architecture

LOG2_E = 1.4426950408889634


@triton.jit
def _load_heads(q_ptr, pid_b, row, head, stride_qb, stride_qs, stride_qh, mask_r, D: tl.constexpr,
                BLOCK_D: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """``[BLOCK_R, BLOCK_D]``: rows ``row`` of the heads ``head``, zeros outside."""
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    at = tl.multiple_of(pid_b * stride_qb + row.to(tl.int64) * stride_qs + head * stride_qh, VECTOR)
    return tl.load(q_ptr + at[:, None] + offs_d[None, :], mask=mask_r[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def _load_keys(k_ptr, offs_n, mask_n, stride_ks, D: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr):
    """``[BLOCK_N, BLOCK_D]``: the keys in the slots ``offs_n``, zeros outside."""
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    at = tl.multiple_of(offs_n.to(tl.int64) * stride_ks, VECTOR)
    return tl.load(k_ptr + at[:, None] + offs_d[None, :], mask=mask_n[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=VARYING)
def _query_sums_kernel(
    q_ptr,
    k_ptr,
    q_pos_ptr,
    slot_pos_ptr,
    lse_ptr,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kg,
    stride_rb,
    stride_rs,
    stride_pb,
    stride_ps,
    Q,
    S,
    left,
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
    # one program takes BLOCK_R of the Q * R rows of one key head over all slots
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    pid_g, pid_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    mask_r = offs_r < Q * R
    row, head = tl.minimum(offs_r // R, Q - 1), pid_g * R + offs_r % R
    row_pos = tl.where(mask_r, row_positions(q_pos_ptr, row, S, stride_rb, stride_rs, pid_b, Q), -1)  # [BLOCK_R]
    begin, end = 0, S
    if slot_pos_ptr is None:  # whole steps that no row sees are left out
        begin = tl.maximum(tl.min(tl.where(row_pos < 0, S, row_pos), 0) - left, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(tl.max(row_pos, 0) + 1, S)
    query = _load_heads(q_ptr, pid_b, row, head, stride_qb, stride_qs, stride_qh, mask_r, D, BLOCK_D, VECTOR)
    k_ptr += tl.multiple_of(pid_b * stride_kb + pid_g * stride_kg, VECTOR)
    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for slot in range(begin, end, BLOCK_N):
        offs_n = slot + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        slot_pos = slot_positions(slot_pos_ptr, offs_n, offs_n < S, stride_pb, stride_ps, pid_b)
        key = _load_keys(k_ptr, offs_n, offs_n < S, stride_ks, D, BLOCK_D, VECTOR)
        seen = (slot_pos >= 0)[None, :] & (slot_pos[None, :] <= row_pos[:, None])
        seen = seen & (slot_pos[None, :] >= row_pos[:, None] - left)
        logits = row_logits(query, key, seen, scale, softcap, CAPPED)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen nothing yet
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        peak = new_peak
    at = (pid_b * tl.num_programs(1) * R + head) * Q + row  # of (B, H, Q)
    tl.store(lse_ptr + at, peak + tl.log2(total), mask=mask_r)


@triton.jit(do_not_specialize=[*VARYING, "unit"])
def _column_sums_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    q_pos_ptr,
    slot_pos_ptr,
    sums_ptr,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kg,
    stride_lb,
    stride_lh,
    stride_ls,
    stride_rb,
    stride_rs,
    stride_pb,
    stride_ps,
    Q,
    S,
    left,
    scale,
    softcap,
    unit,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    VECTOR: tl.constexpr,
    CAPPED: tl.constexpr,
):
    # one program takes BLOCK_N slots of one key head over all rows that may see them, BLOCK_R at a time
    pid_g, pid_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    slot_pos = slot_positions(slot_pos_ptr, offs_n, offs_n < S, stride_pb, stride_ps, pid_b)
    k_ptr += tl.multiple_of(pid_b * stride_kb + pid_g * stride_kg, VECTOR)
    key = _load_keys(k_ptr, offs_n, offs_n < S, stride_ks, D, BLOCK_D, VECTOR)

    # the first and the last query that may see one of them
    lowest = tl.min(tl.where(slot_pos < 0, 2147483647, slot_pos), 0)
    highest = tl.max(slot_pos, 0)
    first, last = Q, -1
    for start in range(0, Q, BLOCK_Q):
        offs_q = start + tl.arange(0, BLOCK_Q)
        position = tl.load(q_pos_ptr + pid_b * stride_rb + offs_q * stride_rs, mask=offs_q < Q, other=-1)
        sees = (position >= lowest) & (position - left <= highest)
        first = tl.minimum(first, tl.min(tl.where(sees, offs_q, Q), 0))
        last = tl.maximum(last, tl.max(tl.where(sees, offs_q, -1), 0))

    sums = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(first * R // BLOCK_R * BLOCK_R, (last + 1) * R, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        mask_r = offs_r < Q * R
        row, head = tl.minimum(offs_r // R, Q - 1), pid_g * R + offs_r % R
        row_pos = tl.where(mask_r, row_positions(q_pos_ptr, row, S, stride_rb, stride_rs, pid_b, Q), -1)
        query = _load_heads(q_ptr, pid_b, row, head, stride_qb, stride_qs, stride_qh, mask_r, D, BLOCK_D, VECTOR)
        lse = tl.load(lse_ptr + pid_b * stride_lb + head * stride_lh + row * stride_ls, mask=mask_r, other=0.0)
        seen = (slot_pos >= 0)[None, :] & (slot_pos[None, :] <= row_pos[:, None])
        seen = seen & (slot_pos[None, :] >= row_pos[:, None] - left)
        logits = row_logits(query, key, seen, scale, softcap, CAPPED)
        weights = tl.exp2(logits - (lse * unit)[:, None])
        sums += tl.where(logits == float("-inf"), 0.0, weights)  # an empty row: -inf less an infinity
    at = (pid_b * tl.num_programs(1) + pid_g) * S + offs_n  # of (B, G, S)
    tl.store(sums_ptr + at, tl.sum(sums, 0) / R, mask=offs_n < S)


@remember
def _attention_column_sums_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor | None,
    q_pos: torch.Tensor,
    slot_pos: torch.Tensor | None,
    scale: float,
    left: int,
    softcap: float,
) -> torch.Tensor:
    (B, Q, H, D), (S, G) = q.shape, k.shape[1:3]
    if q.numel() == 0 or S == 0:
        return reference.attention_column_sums(q, k, lse, q_pos, slot_pos, scale, left, softcap)
    R, vector = H // G, head_vector(q, k)
    config = column_sums_config(Q * R, D, q.dtype, vector, architecture(q.device))
    bound = window_bounds(left, 0, q_pos)[0]
    rows = (*q_pos.stride(), *((0, 0) if slot_pos is None else slot_pos.stride()))
    sizes = {"D": D, "R": R, "BLOCK_R": config.block_r, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
    sizes |= {"VECTOR": vector, "num_warps": config.num_warps, "num_stages": config.num_stages}
    unit = LOG2_E
    if lse is None:
        lse, unit = empty((B, H, Q), dtype=torch.float32, device=q.device), 1.0
        launch(
            _query_sums_kernel,
            (triton.cdiv(Q * R, config.block_r), G, B),
            *(q, k, q_pos, slot_pos, lse),
            *(*q.stride()[:3], *k.stride()[:3], *rows),
            *(Q, S, bound, scale, softcap),
            CAPPED=softcap > 0,
            **sizes,
        )
    sums = empty((B, G, S), dtype=torch.float32, device=q.device)
    launch(
        _column_sums_kernel,
        (triton.cdiv(S, config.block_n), G, B),
        *(q, k, lse, q_pos, slot_pos, sums),
        *(*q.stride()[:3], *k.stride()[:3], *lse.stride(), *rows),
        *(Q, S, bound, scale, softcap, unit),
        CAPPED=softcap > 0,
        BLOCK_Q=1024,
        **sizes,
    )
    return sums


def _attention_column_sums_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor | None,
    q_pos: torch.Tensor,
    slot_pos: torch.Tensor | None,
    scale: float,
    left: int,
    softcap: float,
) -> torch.Tensor:
    return q.new_empty((q.shape[0], k.shape[2], k.shape[1]), dtype=torch.float32)


_attention_column_sums = define_op(
    "attention_column_sums(Tensor q, Tensor k, Tensor? lse, Tensor q_pos, Tensor? slot_pos, float scale, SymInt left, "
    "float softcap) -> Tensor",
    reference=reference.attention_column_sums,
    triton=_attention_column_sums_triton,
    fake=_attention_column_sums_fake,
)


def attention_column_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    q_pos: torch.Tensor,
    slot_pos: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    window: int = -1,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """How much attention each key receives from all queries: the column sums of the attention matrix, without it.

    Args:
        q: ``(B, Q, H, D)`` fp32, fp16 or bf16, any strides but the last.
        k: ``(B, S, G, D)``, the G heads shared by ``H / G`` query heads each.
        q_pos: ``(B, Q)`` int32 or int64: the position of each query; negative: no query, which adds nothing.
        slot_pos: ``(B, S)`` int32: the position of each key; negative: nobody sees it. None: 0 to S - 1. A query sees
            the keys with ``0 <= slot_pos <= q_pos``; one position for all queries (S - 1) is attention without a
            causal mask.
        softmax_scale: of the logits; ``D ** -0.5`` if None.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 is no cap.
        window: a query also sees no key more than so many positions before its own; -1 is no bound. (A sliding window
            of W tokens, the own one included, is ``window=W - 1``.)
        lse: ``(B, H, Q)`` fp32: the natural logarithm of each query's sum, of the same scale, cap, window and slots,
            where attention has it already. It spares one of two passes.
    Returns:
        ``(B, G, S)`` fp32: the sum over queries, the mean over the query heads of each K/V head. 0 where nobody looks.
    Raises:
        ValueError: on rank, size, dtype, device or stride mismatch, or an input that requires grad in grad mode.

    Work is that of attention's logits, once or twice; memory is the result, one number a query and a block of logits.
    The order of every sum depends on sizes only: a sample has the same bits alone and in any batch. Does not
    synchronise.
    """
    arguments.check_heads(q, k, None, ("q", "k", "v"))
    B, Q, H, D = q.shape
    check_shape("q_pos", q_pos, (B, Q))
    check_dtype("q_pos", q_pos, arguments.INTEGERS)
    check_device("q_pos", q_pos, q)
    if slot_pos is not None:
        check_shape("slot_pos", slot_pos, (B, k.shape[1]))
        check_dtype("slot_pos", slot_pos, (torch.int32,))
        check_device("slot_pos", slot_pos, q)
    if lse is not None:
        check_shape("lse", lse, (B, H, Q))
        check_dtype("lse", lse, (torch.float32,))
        check_device("lse", lse, q)
    check_no_grad("attention_column_sums", q=q, k=k, lse=lse)
    if isinstance(window, bool) or not isinstance(window, int) or window < -1:
        raise ValueError(f"window must be a whole number of -1 or more, got {window!r}")
    scale = arguments.scale(softmax_scale, softcap, D)
    left = min(window, arguments.LARGEST)
    rows = q_pos if q_pos.dtype == torch.int32 else q_pos.clamp(-1, arguments.LARGEST).to(torch.int32)
    sums: torch.Tensor = _attention_column_sums(q, k, lse, rows, slot_pos, scale, left, float(softcap))
    return sums
