"""Scores behind any attention kernel that returns its logsumexp: ``score[b, s] = mean_h exp(logit[h, s] - lse[h])``."""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import check_device, check_dtype, check_no_grad, check_shape
from asymvlm_kernels.decode import arguments, reference
from asymvlm_kernels.dispatch import define_op


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


_score_from_lse = define_op(
    "score_from_lse(Tensor q, Tensor k, Tensor lse, Tensor? seqlens, Tensor? leftpad, Tensor? slot_pos, "
    "Tensor? q_pos, float scale, SymInt left, SymInt right, float softcap, SymInt score_rows) -> Tensor",
    reference=reference.score_from_lse,
    triton=None,
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
    cache_seqlens: torch.Tensor | None = None,
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
    scale = float(D**-0.5 if softmax_scale is None else softmax_scale)
    scores: torch.Tensor = _score_from_lse(q, k, lse, *slots, scale, left, right, float(softcap), score_rows)
    return scores
