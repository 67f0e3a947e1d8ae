"""Order statistics of the scores: the importance gap, and the exact top-K as an ascending index."""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import check_device, check_dtype, check_mask, check_no_grad, check_shape
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.prefill import reference


def _importance_gap_fake(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return scores.new_empty(scores.shape[:1])


def _select_tokens_fake(
    scores: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor | None, capacity: int
) -> torch.Tensor:
    return scores.new_empty((scores.shape[0], capacity), dtype=torch.int64)


_importance_gap = define_op(
    "importance_gap(Tensor scores, Tensor? mask) -> Tensor",
    reference=reference.importance_gap,
    triton=None,
    fake=_importance_gap_fake,
)
_select_tokens = define_op(
    "select_tokens(Tensor scores, Tensor counts, Tensor? mask, SymInt capacity) -> Tensor",
    reference=reference.select_tokens,
    triton=None,
    fake=_select_tokens_fake,
)


def importance_gap(scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Spread between the top and the bottom quartile: ``g = s^(k) - s^(N-k+1)``, ``k = max(1, N // 4)``.

    Args:
        scores: ``(B, N)`` fp32.
        mask: ``(B, N)`` bool, True = a prunable token; N of a row counts these only.
    Returns:
        ``(B,)`` fp32. Exact order statistics of the total order of `select_tokens`, no interpolation. NaN for a row
        without tokens or whose quartile is NaN.
    Raises:
        ValueError: on rank, size, dtype or device mismatch, or if ``scores`` requires grad in grad mode.

    Does not synchronise. Source: section 3.3 of arXiv:2605.29535.
    """
    check_shape("scores", scores, ("B", "N"))
    check_dtype("scores", scores, (torch.float32,))
    check_mask("mask", mask, scores)
    check_no_grad("importance_gap", scores=scores)
    gap: torch.Tensor = _importance_gap(scores, mask)
    return gap


def select_tokens(
    scores: torch.Tensor, counts: torch.Tensor, *, mask: torch.Tensor | None = None, capacity: int | None = None
) -> torch.Tensor:
    """Index of the ``counts`` best tokens of each row, in ascending order.

    Args:
        scores: ``(B, N)`` fp32.
        counts: ``(B,)`` int32 or int64, on the device of ``scores``: how many to keep. Never more than a row's real
            tokens, or than ``capacity``, are kept.
        mask: ``(B, N)`` bool, True = may be kept.
        capacity: width of the result; N if None (a smaller one is known to the host only).
    Returns:
        ``(B, capacity)`` int64, ascending, padded with -1.
    Raises:
        ValueError: on rank, size, dtype or device mismatch, a negative ``capacity``, or ``scores`` that require grad in
            grad mode.

    Ties: higher score first, then lower index; -0 equals +0; NaN ranks below -inf. Equal to
    ``sort(descending=True, stable=True)`` on every backend and for every batch size. Does not synchronise.
    """
    check_shape("scores", scores, ("B", "N"))
    check_dtype("scores", scores, (torch.float32,))
    check_shape("counts", counts, (scores.shape[0],))
    check_dtype("counts", counts, (torch.int32, torch.int64))
    check_device("counts", counts, scores)
    check_mask("mask", mask, scores)
    check_no_grad("select_tokens", scores=scores)
    capacity = scores.shape[1] if capacity is None else capacity
    if capacity < 0:
        raise ValueError(f"capacity must be 0 or more, got {capacity}")
    index: torch.Tensor = _select_tokens(scores, counts, mask, capacity)
    return index
