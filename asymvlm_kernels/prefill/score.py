"""Importance score of each vision token: ``s_i = max_j <v_i/||v_i|| * w, t_j/||t_j||>`` (AsymVLM, Eq. 1).

Computed as ``max_j <v_i, t'_j> / ||v_i||`` with ``t'_j = w * t_j / ||t_j||``: V stays in its own dtype, and its squared
norms come from the very tiles that the products read. t' is a sum of two numbers (see `fold`), hence two MMAs.
"""

from __future__ import annotations

from typing import Any

import torch

from asymvlm_kernels._checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_mask,
    check_no_grad,
    check_no_transform,
    check_shape,
)
from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.dispatch import define_backward, define_op
from asymvlm_kernels.launch import empty, launch, remember
from asymvlm_kernels.prefill import reference
from asymvlm_kernels.prefill.fold import fold_text
from asymvlm_kernels.prefill.score_grad import score_tokens_grad
from asymvlm_kernels.prefill.score_tile import score_tile
from asymvlm_kernels.tuning.prefill import architecture, row_vector, score_config


@triton.jit(do_not_specialize=["stride_vb", "stride_mb", "stride_tb", "N", "L"])  # a new length compiles nothing new
def _score_tokens_kernel(
    vision_ptr,
    folded_ptr,
    unlift_ptr,
    vision_mask_ptr,
    text_mask_ptr,
    scores_ptr,
    best_ptr,
    norm_ptr,
    stride_vb,
    stride_vn,
    stride_vd,
    stride_mb,
    stride_mn,
    stride_tb,
    stride_tm,
    N,
    L,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
    HIGH_LOW: tl.constexpr,
):
    # one program scores BLOCK_N rows of one sample; with `best_ptr` it leaves what the gradient needs
    pid_b = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < N
    real_n = mask_n
    if vision_mask_ptr is not None:
        offs_m = pid_b * stride_mb + offs_n.to(tl.int64) * stride_mn
        real_n = tl.load(vision_mask_ptr + offs_m, mask=mask_n, other=0) != 0
    if text_mask_ptr is not None:
        text_mask_ptr += pid_b * stride_tb
    score, best, norm = score_tile(
        vision_ptr + tl.multiple_of(pid_b * stride_vb, VECTOR),
        folded_ptr + pid_b * L * (1 + HIGH_LOW) * WIDTH,
        unlift_ptr + pid_b * L,
        text_mask_ptr,
        real_n,
        offs_n,
        stride_vn,
        stride_vd,
        stride_tm,
        L,
        EPSILON,
        D,
        WIDTH,
        BLOCK_N,
        BLOCK_L,
        BLOCK_D,
        VECTOR,
        HIGH_LOW,
        best_ptr is not None,
    )
    tl.store(scores_ptr + pid_b * N + offs_n, score, mask=mask_n)
    if best_ptr is not None:
        tl.store(best_ptr + pid_b * N + offs_n, best, mask=mask_n)
        tl.store(norm_ptr + pid_b * N + offs_n, norm, mask=mask_n)


@remember
def _score_tokens_triton(
    vision: torch.Tensor,
    text: torch.Tensor,
    weight: torch.Tensor | None,
    vision_mask: torch.Tensor | None,
    text_mask: torch.Tensor | None,
) -> torch.Tensor:
    scores = _score_tokens_fake(vision, text, weight, vision_mask, text_mask)
    launch_score((scores, None, None), vision, text, weight, vision_mask, text_mask)
    return scores


def launch_score(
    outs: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    vision: torch.Tensor,
    text: torch.Tensor,
    weight: torch.Tensor | None,
    vision_mask: torch.Tensor | None,
    text_mask: torch.Tensor | None,
) -> None:
    """Fill scores and, where they are given, the best text and the norm of each row."""
    B, N, D = vision.shape
    if B * N == 0:
        return
    vector = row_vector(vision)
    config = score_config(vision.dtype, vector, architecture(vision.device))
    folded, unlift = fold_text(text, weight, config)
    launch(
        _score_tokens_kernel,
        (triton.cdiv(N, config.block_n), B),
        vision,
        folded,
        unlift,
        vision_mask,
        text_mask,
        *outs,
        *vision.stride(),
        *((0, 0) if vision_mask is None else vision_mask.stride()),
        *((0, 0) if text_mask is None else text_mask.stride()),
        N,
        text.shape[1],
        EPSILON=reference.EPSILON,
        D=D,
        WIDTH=folded.shape[-1],
        BLOCK_N=config.block_n,
        BLOCK_L=config.block_l,
        BLOCK_D=config.block_d,
        VECTOR=vector,
        HIGH_LOW=folded.shape[1] == 2,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.registers,
    )


def _score_tokens_fake(
    vision: torch.Tensor,
    text: torch.Tensor,
    weight: torch.Tensor | None,
    vision_mask: torch.Tensor | None,
    text_mask: torch.Tensor | None,
) -> torch.Tensor:
    return empty(vision.shape[:2], dtype=torch.float32, device=vision.device)


_score_tokens = define_op(
    "score_tokens(Tensor vision, Tensor text, Tensor? weight, Tensor? vision_mask, Tensor? text_mask) -> Tensor",
    reference=reference.score_tokens,
    triton=_score_tokens_triton,
    fake=_score_tokens_fake,
)


@remember
def _score_tokens_best_triton(
    vision: torch.Tensor,
    text: torch.Tensor,
    weight: torch.Tensor,
    vision_mask: torch.Tensor | None,
    text_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outs = _score_tokens_best_fake(vision, text, weight, vision_mask, text_mask)
    launch_score(outs, vision, text, weight, vision_mask, text_mask)
    return outs


def _score_tokens_best_fake(
    vision: torch.Tensor,
    text: torch.Tensor,
    weight: torch.Tensor,
    vision_mask: torch.Tensor | None,
    text_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtypes = (weight.dtype, torch.int32, weight.dtype)
    scores, best, norm = (empty(vision.shape[:2], dtype=dtype, device=vision.device) for dtype in dtypes)
    return scores, best, norm


# a second op, because a formula for gradients on the first would cost every call without one
_score_tokens_best = define_op(
    "score_tokens_best(Tensor vision, Tensor text, Tensor weight, Tensor? vision_mask, Tensor? text_mask) -> "
    "(Tensor scores, Tensor best, Tensor norm)",
    reference=reference.score_tokens_best,
    triton=_score_tokens_best_triton,
    fake=_score_tokens_best_fake,
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    vision, text = inputs[:2]
    _, best, norm = output
    ctx.save_for_backward(vision, text, best, norm)


def _backward(ctx: Any, grad: torch.Tensor, *unused: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return None, None, score_tokens_grad(grad, *ctx.saved_tensors), None, None


define_backward("score_tokens_best", _backward, _save_for_backward)


def score_tokens(
    vision: torch.Tensor,
    text: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    vision_mask: torch.Tensor | None = None,
    text_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score every vision token by its best weighted similarity to any text token.

    Args:
        vision: ``(B, N, D)`` fp32, fp16 or bf16: rows of the merged embeddings, any strides.
        text: ``(B, L, D)``, dtype and device of ``vision``.
        weight: ``(D,)`` fp32; None means ones, which is cosine similarity. The product is not renormalised.
        vision_mask: ``(B, N)`` bool, True = real.
        text_mask: ``(B, L)`` bool, True = real.
    Returns:
        ``(B, N)`` fp32. -inf where ``vision_mask`` is False and in rows without any text; 0 for a zero row; NaN where
        a NaN went in. A row of any length scores its cosine: one that fp32 cannot square is read again, which
        takes time. A row's score does not depend on its batch neighbours.
        Backends sum in different orders, and the kernels hold the weighted text as two numbers of the dtype of
        ``text``: 16 digits in bf16, where the reference has 24. So the scores of two backends differ by up to 2e-6 in
        bf16 (D = 64).
    Raises:
        ValueError: on rank, size, dtype or device mismatch, or if ``vision`` or ``text`` requires grad in grad mode.

    Differentiable in ``weight`` once, backwards and outside torch.func, the same bits each time. Among equal texts the
    gradient goes to the lowest index.
    Masked rows and rows whose gradient is 0 add nothing, whatever they hold; a NaN score with a gradient makes NaN.
    Accumulates in fp32; does not synchronise. Source: Eq. 1 of arXiv:2605.29535.
    """
    check_shape("vision", vision, ("B", "N", "D"))
    B, _, D = vision.shape
    check_shape("text", text, (B, "L", D))
    check_dtype("vision", vision, FLOATS)
    check_dtype("text", text, (vision.dtype,))
    check_device("text", text, vision)
    if weight is not None:
        check_shape("weight", weight, (D,))
        check_dtype("weight", weight, (torch.float32,))
        check_device("weight", weight, vision)
    check_mask("vision_mask", vision_mask, vision)
    check_mask("text_mask", text_mask, text)
    check_no_grad("score_tokens", vision=vision, text=text)
    check_no_transform("score_tokens", weight=weight)
    scores: torch.Tensor
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        scores, _, _ = _score_tokens_best(vision, text, weight, vision_mask, text_mask)
    else:
        scores = _score_tokens(vision, text, weight, vision_mask, text_mask)
    return scores
