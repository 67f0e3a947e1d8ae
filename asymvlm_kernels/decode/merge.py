"""The second launch of `attend_slots`: partial outputs become the output, logits become scores.

Part i of a row has an output ``o_i`` and a logsumexp ``l_i``. With ``l = log sum_i exp(l_i)`` the row's output is
``sum_i exp(l_i - l) o_i``, and slot s scores ``mean_h exp(logit[h, s] - l[h])``. A part that saw nothing has
``l_i = -inf`` and changes no bit, so a longer cache with the same parts gives the same output.
"""

from __future__ import annotations

import torch

from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.decode.logits import VARYING, slot_range
from asymvlm_kernels.launch import launch
from asymvlm_kernels.tuning.decode import merge_config, power_of_two


@triton.jit
def part_weights(sums_ptr, at, offs_p, mask, parts, peak, total):
    """One more block of parts joins a running logsumexp: weights of the block, factor of what was before, new state."""
    sums = tl.load(sums_ptr + at[:, None] * parts + offs_p[None, :], mask=mask, other=float("-inf"))
    new_peak = tl.maximum(peak, tl.max(sums, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(sums - base[:, None])
    shrink = tl.exp2(peak - base)
    return weights, shrink, new_peak, total * shrink + tl.sum(weights, 1)


@triton.jit
def merge_row(
    parts_ptr, sums_ptr, out_ptr, lse_ptr, at, parts, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Output and logsumexp of row ``at`` (a block of one) from its parts."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    peak = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    merged = tl.zeros((BLOCK_D,), tl.float32)
    for part in range(0, parts, BLOCK_P):
        offs_p = part + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        mask_p = offs_p < parts
        weights, shrink, peak, total = part_weights(sums_ptr, at, offs_p, mask_p[None, :], parts, peak, total)
        weight = tl.reshape(weights, (BLOCK_P,))
        rows = (tl.sum(at, 0) * parts + offs_p) * D
        # parts without a slot were never written
        tile = tl.load(
            parts_ptr + rows[:, None] + offs_d[None, :], mask=(weight != 0)[:, None] & mask_d[None, :], other=0.0
        )
        merged = merged * tl.sum(shrink, 0) + tl.sum(tile * weight[:, None], 0)
    alive = total != 0
    merged /= tl.sum(tl.where(alive, total, 1.0), 0)
    if lse_ptr is not None:
        tl.store(lse_ptr + at, tl.where(alive, (peak + tl.log2(total)) * 0.6931471805599453, float("inf")))
    tl.store(out_ptr + offs_d, merged.to(out_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def score_slots(
    sums_ptr,
    logits_ptr,
    offs_s,
    first,
    end,
    pid_b,
    H,
    Q,
    S,
    parts,
    scored,
    left,
    right,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Mean over heads and scored rows of ``exp(logit - lse)`` at slots ``offs_s``."""
    score = tl.zeros((BLOCK_S,), tl.float32)
    for start in range(0, H * scored, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H)  # [BLOCK_H]
        mask_h = offs_h < H * scored
        row = Q - scored + offs_h % scored
        at = (pid_b * H + offs_h // scored) * Q + row  # of (B, H, Q)
        peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        for part in range(0, parts, BLOCK_P):
            offs_p = part + tl.arange(0, BLOCK_P)
            mask = mask_h[:, None] & (offs_p < parts)[None, :]
            _, _, peak, total = part_weights(sums_ptr, at, offs_p, mask, parts, peak, total)
        lse = peak + tl.log2(tl.where(total == 0, 1.0, total))
        rows = (pid_b * H * scored + offs_h) * S  # of (B, H * scored, S)
        # what lies outside was not visited: its logits were never written
        row_pos = (end - Q + row)[:, None]
        seen = (offs_s[None, :] >= row_pos - left) & (offs_s[None, :] <= row_pos + right)
        mask = mask_h[:, None] & ((offs_s >= first) & (offs_s < end))[None, :] & seen
        logits = tl.load(logits_ptr + rows[:, None] + offs_s[None, :], mask=mask, other=float("-inf"))
        score += tl.sum(tl.where(logits == float("-inf"), 0.0, tl.exp2(logits - lse[:, None])), 0)
    return score / (H * scored)


@triton.jit(do_not_specialize=VARYING)
def _merge_parts_kernel(
    parts_ptr,
    sums_ptr,
    logits_ptr,
    seqlens_ptr,
    leftpad_ptr,
    out_ptr,
    lse_ptr,
    scores_ptr,
    H,
    Q,
    S,
    parts,
    scored,
    left,
    right,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # the first H * Q programs of a sample merge a row each, the others score BLOCK_S slots each
    pid = tl.program_id(0)
    pid_b = tl.program_id(1).to(tl.int64)
    if pid < H * Q:
        at = pid_b * H * Q + pid + tl.zeros((1,), tl.int64)  # of (B, H, Q)
        out_ptr += ((pid_b * Q + pid % Q) * H + pid // Q) * D  # of (B, Q, H, D)
        merge_row(parts_ptr, sums_ptr, out_ptr, lse_ptr, at, parts, D, BLOCK_P, BLOCK_D)
    elif logits_ptr is not None:
        offs_s = (pid - H * Q) * BLOCK_S + tl.arange(0, BLOCK_S)
        first, end = slot_range(seqlens_ptr, leftpad_ptr, pid_b, S)
        score = score_slots(
            sums_ptr,
            logits_ptr,
            offs_s,
            first,
            end,
            pid_b,
            H,
            Q,
            S,
            parts,
            scored,
            left,
            right,
            BLOCK_P,
            BLOCK_H,
            BLOCK_S,
        )
        tl.store(scores_ptr + pid_b * S + offs_s, score, mask=offs_s < S)


def merge_parts(
    partial: torch.Tensor,
    sums: torch.Tensor,
    logits: torch.Tensor | None,
    seqlens: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    bounds: tuple[int, int],
    out: torch.Tensor,
    lse: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """``(B, H, Q, parts, D)``, ``(B, H, Q, parts)``, ``(B, H * scored, S)`` -> ``out``, ``lse``, ``scores``."""
    B, H, Q, parts, D = partial.shape
    block_d = max(power_of_two(D), 16)
    config = merge_config(block_d)
    S = 0 if logits is None else logits.shape[2]
    launch(
        _merge_parts_kernel,
        (H * Q + triton.cdiv(S, config.block_s), B),
        partial,
        sums,
        logits,
        seqlens,
        leftpad,
        out,
        lse if lse.numel() else None,
        scores,
        H,
        Q,
        S,
        parts,
        0 if logits is None else logits.shape[1] // H,
        *bounds,
        D=D,
        BLOCK_P=config.block_p,
        BLOCK_H=config.block_h,
        BLOCK_S=config.block_s,
        BLOCK_D=block_d,
        num_warps=config.num_warps,
    )
