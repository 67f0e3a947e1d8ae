"""Gradient of the score for the weight: ``dw = sum_i grad_i * v_i / ||v_i|| * t_best(i) / ||t_best(i)||``.

The maximum picks one text for each row, so a step of the sum is one product of two rows, and V is read once more. Rows
whose gradient is 0 are not read.
"""

from __future__ import annotations

from typing import Any

import torch

from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.dispatch import define_backward, define_op
from asymvlm_kernels.launch import launch
from asymvlm_kernels.prefill import reference
from asymvlm_kernels.tuning.prefill import grad_config, row_vector


@triton.jit(do_not_specialize=["stride_vb", "stride_tb", "N", "L"])  # a new length compiles nothing new
def _score_tokens_grad_kernel(
    grad_ptr,
    vision_ptr,
    text_ptr,
    best_ptr,
    norm_ptr,
    text_norm_ptr,
    parts_ptr,
    stride_vb,
    stride_vn,
    stride_vd,
    stride_tb,
    stride_tl,
    stride_td,
    N,
    L,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # one program sums BLOCK_D columns over ROWS rows of one sample
    tiles = tl.cdiv(N, ROWS)
    pid_b = (tl.program_id(0) // tiles).to(tl.int64)
    first_n = tl.program_id(0) % tiles * ROWS
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_d = offs_d < D
    offs_b = pid_b * N
    vision_ptr += tl.multiple_of(pid_b * stride_vb, VECTOR)
    text_ptr += tl.multiple_of(pid_b * stride_tb, VECTOR)
    col_v = offs_d.to(tl.int64) * stride_vd
    col_t = offs_d.to(tl.int64) * stride_td
    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start_n in range(first_n, tl.minimum(first_n + ROWS, N), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask_n = offs_n < N
        grad = tl.load(grad_ptr + offs_b + offs_n, mask=mask_n, other=0.0)
        best = tl.load(best_ptr + offs_b + offs_n, mask=mask_n, other=-1)
        taken = (best >= 0) & (grad != 0)
        norm = tl.load(norm_ptr + offs_b + offs_n, mask=taken, other=1.0)
        text_norm = tl.load(text_norm_ptr + pid_b * L + best, mask=taken, other=1.0)
        row_v = tl.multiple_of(offs_n.to(tl.int64) * stride_vn, VECTOR)  # int64: N * D may pass 2**31
        row_t = tl.multiple_of(best.to(tl.int64) * stride_tl, VECTOR)
        mask = taken[:, None] & mask_d[None, :]
        vision = tl.load(vision_ptr + row_v[:, None] + col_v[None, :], mask=mask, other=0.0).to(tl.float32)
        text = tl.load(text_ptr + row_t[:, None] + col_t[None, :], mask=mask, other=0.0).to(tl.float32)
        share = tl.where(taken, tl.div_rn(grad, norm), 0.0)
        inverse = tl.div_rn(tl.full((BLOCK_N,), 1.0, tl.float32), text_norm)
        sums += (vision * share[:, None]) * (text * inverse[:, None])
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * D + offs_d, tl.sum(sums, 0), mask=mask_d)


def _score_tokens_grad_triton(
    grad: torch.Tensor, vision: torch.Tensor, text: torch.Tensor, best: torch.Tensor, norm: torch.Tensor
) -> torch.Tensor:
    (B, N, D), L = vision.shape, text.shape[1]
    if B * N * L == 0:
        return torch.zeros(D, dtype=torch.float32, device=grad.device)
    vector = min(row_vector(vision), row_vector(text))
    config = grad_config(D, vision.itemsize, vector)
    programs = B * triton.cdiv(N, config.rows)
    lifted, factor = reference.lift_rows(text.float())
    text_norm = torch.linalg.vector_norm(lifted, dim=-1).clamp_min_(reference.EPSILON) / factor[..., 0]
    parts = torch.empty((programs, D), dtype=torch.float32, device=grad.device)
    launch(
        _score_tokens_grad_kernel,
        (programs, triton.cdiv(D, config.block_d)),
        grad.contiguous(),
        vision,
        text,
        best,
        norm,
        text_norm,
        parts,
        *vision.stride(),
        *text.stride(),
        N,
        L,
        D=D,
        ROWS=config.rows,
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_d,
        VECTOR=vector,
        num_warps=config.num_warps,
    )
    return parts.sum(0)  # in a fixed order: the same bits each time


def _score_tokens_grad_fake(
    grad: torch.Tensor, vision: torch.Tensor, text: torch.Tensor, best: torch.Tensor, norm: torch.Tensor
) -> torch.Tensor:
    return torch.empty(vision.shape[2], dtype=grad.dtype, device=grad.device)


score_tokens_grad = define_op(
    "score_tokens_grad(Tensor grad, Tensor vision, Tensor text, Tensor best, Tensor norm) -> Tensor",
    reference=reference.score_tokens_grad,
    triton=_score_tokens_grad_triton,
    fake=_score_tokens_grad_fake,
)


def _refuse_backward(ctx: Any, *grads: torch.Tensor) -> None:
    raise RuntimeError("score_tokens is differentiable once, and a gradient of its gradient was asked for")


define_backward("score_tokens_grad", _refuse_backward, lambda ctx, inputs, output: None)
