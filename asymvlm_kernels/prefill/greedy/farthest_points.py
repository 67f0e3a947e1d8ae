"""Tokens that lie far from each other: each time the one whose nearest chosen token is farthest, ``d = 1 - cos``.

The choice of DivPrune (arXiv:2503.02175).
"""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import check_mask, check_no_grad
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.prefill.greedy import arguments, reference


def _farthest_points_fake(similarity: torch.Tensor, mask: torch.Tensor | None, counts: torch.Tensor) -> torch.Tensor:
    return similarity.new_empty(similarity.shape[:2], dtype=torch.bool)


_farthest_points = define_op(
    "farthest_points(Tensor similarity, Tensor? mask, Tensor counts) -> Tensor",
    reference=reference.farthest_points,
    triton=None,
    fake=_farthest_points_fake,
)


def farthest_points(similarity: torch.Tensor, mask: torch.Tensor | None, counts: torch.Tensor) -> torch.Tensor:
    """Choose ``counts`` tokens of each sample, as far from each other as a greedy choice gets.

    The first is the token whose nearest other token is farthest; then each time the one whose nearest chosen token is
    farthest. The distance is ``1 - similarity``.

    Args:
        similarity: ``(B, N, N)`` fp32, symmetric (`cosine_matrix`); row ``i`` says how far the others are from ``i``.
        mask: ``(B, N)`` bool, True = may be chosen; None: all. Masked tokens are no neighbours either.
        counts: ``(B,)`` int32 or int64, on the device of ``similarity``; never more than the tokens of a sample are
            chosen, and none for a negative number.
    Returns:
        ``(B, N)`` bool: True = chosen.
    Raises:
        ValueError: on rank, size, dtype or device mismatch, or if ``similarity`` requires grad in grad mode.

    Ties: the lowest index. A token with a NaN similarity to itself is chosen last; any other NaN is no distance. The
    same tokens on every backend and in any batch. Synchronises a GPU only where the reference runs there.
    """
    arguments.check_matrix("similarity", similarity, counts)
    check_mask("mask", mask, similarity)
    check_no_grad("farthest_points", similarity=similarity)
    chosen: torch.Tensor = _farthest_points(similarity, mask, counts)
    return chosen
