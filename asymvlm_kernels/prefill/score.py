"""Importance score of each vision token: ``s_i = max_j <v_i/||v_i|| * w, t_j/||t_j||>`` (AsymVLM, Eq. 1).

Computed as ``max_j <v_i, t'_j> / ||v_i||`` with ``t'_j = w * t_j / ||t_j||``: V stays in its own dtype, and its squared
norms come from the very tiles that the products read. One bf16 t' would cost 6e-4 of score, enough to swap near ties; a
sum of two (``high + low``) costs 2e-6 and a second MMA.
"""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import FLOATS, check_device, check_dtype, check_mask, check_no_grad, check_shape
from asymvlm_kernels._triton import INTERPRETED, tl, triton
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.prefill import reference
from asymvlm_kernels.tuning.prefill import ScoreConfig, architecture, fold_config, row_vector, score_config

if INTERPRETED:

    @triton.jit
    def multiply(a, b, sums):
        """``sums + a @ b`` in fp32. (The interpreter would multiply the raw bits of bf16.)"""
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")

else:

    @triton.jit
    def multiply(a, b, sums):
        """``sums + a @ b`` in fp32."""
        return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def lift_exponent(peak):
    """Biased exponent of the power of two that lifts ``peak`` to [2**13, 2**14): in fp16 ``low`` would underflow."""
    exponent = ((peak.to(tl.uint32, bitcast=True) >> 23) & 0xFF).to(tl.int32)
    return tl.minimum(tl.maximum(127 + 13 + 127 - exponent, 1), 253)  # its inverse is a normal number too


@triton.jit
def power_of_two(exponent):
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["stride_tb", "L"])
def _fold_text_kernel(
    text_ptr,
    weight_ptr,
    folded_ptr,
    unlift_ptr,
    stride_tb,
    stride_tl,
    stride_td,
    stride_w,
    L,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # one program folds one text row; columns from D to WIDTH become zeros, so the score kernel loads t' without a mask
    pid_b = (tl.program_id(0) // L).to(tl.int64)
    pid_l = (tl.program_id(0) % L).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_d = offs_d < D
    text_ptr += tl.multiple_of(pid_b * stride_tb + pid_l * stride_tl, VECTOR)
    text = tl.load(text_ptr + offs_d.to(tl.int64) * stride_td, mask=mask_d, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt_rn(tl.sum(text * text, 0)), EPSILON)
    folded = tl.div_rn(text, tl.zeros_like(text) + norm)
    if weight_ptr is not None:
        folded *= tl.load(weight_ptr + offs_d * stride_w, mask=mask_d, other=0.0)
    folded_ptr += (pid_b * L * (1 + SPLIT) + pid_l) * WIDTH  # (B, 1 + SPLIT, L, WIDTH)
    if SPLIT:
        lift = lift_exponent(tl.max(tl.abs(folded), 0))
        tl.store(unlift_ptr + pid_b * L + pid_l, power_of_two(254 - lift))
        folded *= power_of_two(lift)
        high = folded.to(folded_ptr.dtype.element_ty)
        low = tl.where(tl.abs(folded) == float("inf"), 0.0, folded - high.to(tl.float32))
        tl.store(folded_ptr + offs_d, high, mask=offs_d < WIDTH)
        tl.store(folded_ptr + L * WIDTH + offs_d, low.to(high.dtype), mask=offs_d < WIDTH)
    else:
        tl.store(folded_ptr + offs_d, folded, mask=offs_d < WIDTH)


@triton.jit
def score_tile(
    vision_ptr,
    folded_ptr,
    unlift_ptr,
    text_mask_ptr,
    real_n,
    offs_n,
    stride_vn,
    stride_vd,
    stride_tm,
    L,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Scores of the rows ``offs_n`` of one sample; rows outside ``real_n`` are neither read nor scored (-inf)."""
    rows = tl.multiple_of(offs_n.to(tl.int64) * stride_vn, VECTOR)  # [BLOCK_N], int64: N * D may pass 2**31
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    unknown = tl.zeros((BLOCK_N,), tl.int32)  # rows with a NaN: tl.max drops it
    length = tl.where(tl.max(real_n.to(tl.int32), 0) > 0, L, 0)
    for start_l in range(0, length, BLOCK_L):
        offs_l = start_l + tl.arange(0, BLOCK_L)  # [BLOCK_L]
        mask_l = offs_l < L
        real_l = mask_l
        if text_mask_ptr is not None:
            real_l = tl.load(text_mask_ptr + offs_l.to(tl.int64) * stride_tm, mask=mask_l, other=0) != 0
        if tl.max(real_l.to(tl.int32), 0) > 0:
            similarity = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
            squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            text_ptrs = folded_ptr + offs_l.to(tl.int64)[:, None] * WIDTH
            for start_d in range(0, D, BLOCK_D):
                offs_d = start_d + tl.arange(0, BLOCK_D)  # [BLOCK_D]
                mask = real_n[:, None] & (offs_d < D)[None, :]
                cols = offs_d.to(tl.int64) * stride_vd
                vision = tl.load(vision_ptr + rows[:, None] + cols[None, :], mask=mask, other=0.0)
                text = tl.load(text_ptrs + offs_d[None, :], mask=real_l[:, None], other=0.0)
                similarity = multiply(text, tl.trans(vision), similarity)
                if SPLIT:
                    text = tl.load(text_ptrs + L * WIDTH + offs_d[None, :], mask=real_l[:, None], other=0.0)
                    similarity = multiply(text, tl.trans(vision), similarity)
                wide = vision.to(tl.float32)
                squares += wide * wide
            if SPLIT:
                similarity *= tl.load(unlift_ptr + offs_l, mask=real_l, other=1.0)[:, None]
            similarity = tl.where(real_l[:, None], similarity, float("-inf"))
            unknown |= tl.max((similarity != similarity).to(tl.int32), 0)
            best = tl.maximum(best, tl.max(similarity, 0))
            square = tl.sum(squares, 1)
    norm = tl.maximum(tl.sqrt_rn(square), tl.full((BLOCK_N,), EPSILON, tl.float32))
    score = tl.where(unknown > 0, float("nan"), tl.div_rn(best, norm))
    return tl.where(real_n, score, float("-inf"))


@triton.jit(do_not_specialize=["stride_vb", "stride_mb", "stride_tb", "N", "L"])  # a new length compiles nothing new
def _score_tokens_kernel(
    vision_ptr,
    folded_ptr,
    unlift_ptr,
    vision_mask_ptr,
    text_mask_ptr,
    scores_ptr,
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
    SPLIT: tl.constexpr,
):
    # one program scores BLOCK_N rows of one sample
    pid_b = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < N
    real_n = mask_n
    if vision_mask_ptr is not None:
        offs_m = pid_b * stride_mb + offs_n.to(tl.int64) * stride_mn
        real_n = tl.load(vision_mask_ptr + offs_m, mask=mask_n, other=0) != 0
    if text_mask_ptr is not None:
        text_mask_ptr += pid_b * stride_tb
    score = score_tile(
        vision_ptr + tl.multiple_of(pid_b * stride_vb, VECTOR),
        folded_ptr + pid_b * L * (1 + SPLIT) * WIDTH,
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
        SPLIT,
    )
    tl.store(scores_ptr + pid_b * N + offs_n, score, mask=mask_n)


def _score_tokens_triton(
    vision: torch.Tensor,
    text: torch.Tensor,
    weight: torch.Tensor | None,
    vision_mask: torch.Tensor | None,
    text_mask: torch.Tensor | None,
) -> torch.Tensor:
    B, N, D = vision.shape
    L = text.shape[1]
    scores = torch.empty((B, N), dtype=torch.float32, device=vision.device)
    if scores.numel() == 0:
        return scores
    vector = row_vector(vision)
    config = score_config(vision.dtype, vector, architecture(vision.device))
    folded, unlift = _fold_text(text, weight, config)
    _score_tokens_kernel[(triton.cdiv(N, config.block_n), B)](
        vision,
        folded,
        unlift,
        vision_mask,
        text_mask,
        scores,
        *vision.stride(),
        *((0, 0) if vision_mask is None else vision_mask.stride()),
        *((0, 0) if text_mask is None else text_mask.stride()),
        N,
        L,
        EPSILON=reference.EPSILON,
        D=D,
        WIDTH=folded.shape[-1],
        BLOCK_N=config.block_n,
        BLOCK_L=config.block_l,
        BLOCK_D=config.block_d,
        VECTOR=vector,
        SPLIT=folded.shape[1] == 2,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return scores


def _fold_text(
    text: torch.Tensor, weight: torch.Tensor | None, config: ScoreConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """t' as ``(B, 1 or 2, L, WIDTH)`` in the dtype of ``text``, and the ``(B, L)`` factor that undoes its scaling.

    A kernel of its own: as a prologue of the score kernel it would be redone by each of its N / block_n programs.
    """
    B, L, D = text.shape
    split = text.dtype != torch.float32
    width = triton.cdiv(D, config.block_d) * config.block_d
    folded = torch.empty((B, 1 + split, L, width), dtype=text.dtype, device=text.device)
    unlift = torch.empty((B, L), dtype=torch.float32, device=text.device)
    if L > 0:
        launch = fold_config(width)
        _fold_text_kernel[(B * L,)](
            text,
            weight,
            folded,
            unlift,
            *text.stride(),
            0 if weight is None else weight.stride(0),
            L,
            EPSILON=reference.EPSILON,
            D=D,
            WIDTH=width,
            BLOCK_D=launch.block_d,
            VECTOR=row_vector(text),
            SPLIT=split,
            num_warps=launch.num_warps,
        )
    return folded, unlift


def _score_tokens_fake(
    vision: torch.Tensor,
    text: torch.Tensor,
    weight: torch.Tensor | None,
    vision_mask: torch.Tensor | None,
    text_mask: torch.Tensor | None,
) -> torch.Tensor:
    return vision.new_empty(vision.shape[:2], dtype=torch.float32)


_score_tokens = define_op(
    "score_tokens(Tensor vision, Tensor text, Tensor? weight, Tensor? vision_mask, Tensor? text_mask) -> Tensor",
    reference=reference.score_tokens,
    triton=_score_tokens_triton,
    fake=_score_tokens_fake,
)


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
        ``(B, N)`` fp32. -inf where ``vision_mask`` is False and in rows without any text; 0 for a zero row (norms are
        clamped at 1e-12); NaN where a NaN went in. A row's score does not depend on its batch neighbours.
    Raises:
        ValueError: on rank, size, dtype or device mismatch, or on an input that requires grad in grad mode.

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
    check_no_grad("score_tokens", vision=vision, text=text, weight=weight)
    scores: torch.Tensor = _score_tokens(vision, text, weight, vision_mask, text_mask)
    return scores
