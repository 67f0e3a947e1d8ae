"""Importance score of each vision token: ``s_i = max_j <v_i/||v_i|| * w, t_j/||t_j||>`` (AsymVLM, Eq. 1)."""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import FLOATS, check_device, check_dtype, check_mask, check_no_grad, check_shape
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.prefill import reference


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
    triton=None,
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
