"""Tokens that resemble others go: of those at even places in rank the most similar to one at an odd place, by rounds.

The choice of VisPruner (arXiv:2412.01818), and of FlashVLM (arXiv:2512.20561) after it.
"""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import check_device, check_dtype, check_no_grad, check_places, check_shape
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.prefill.greedy import arguments, reference


def _drop_similar_fake(similarity: torch.Tensor, order: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return similarity.new_empty(similarity.shape[:2], dtype=torch.bool)


def _check_order(similarity: torch.Tensor, order: torch.Tensor, counts: torch.Tensor) -> None:
    check_places("order", order, similarity.shape[1])


_drop_similar = define_op(
    "drop_similar(Tensor similarity, Tensor order, Tensor counts) -> Tensor",
    reference=reference.drop_similar,
    triton=None,
    fake=_drop_similar_fake,
    check=_check_order,
)


def drop_similar(similarity: torch.Tensor, order: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Drop tokens that resemble others until ``counts`` of each sample are left.

    In a round the tokens that are left stand in the order of their rank, at places 0, 1, 2, ...; of those at even
    places the up to 8 with the largest similarity to any at an odd place go, no more than are too many.

    Args:
        similarity: ``(B, N, N)`` fp32 (`cosine_matrix`).
        order: ``(B, M)`` int64: tokens in ranked order, the best first, each at most once; -1 is none, at any place.
            Tokens that it does not name are not left.
        counts: ``(B,)`` int32 or int64, on the device of ``similarity``: how many are to be left; a negative number is
            0. Where ``order`` names fewer, all of them are.
    Returns:
        ``(B, N)`` bool: True = left.
    Raises:
        ValueError: on rank, size, dtype or device mismatch, or if ``similarity`` requires grad in grad mode.
        IndexError: on a CPU, if ``order`` is out of range.

    Ties: of equally similar tokens the first in rank goes. A token with a NaN similarity to itself goes before any
    other; any other NaN counts as -inf. The same tokens on every backend and in any batch. Synchronises a GPU only
    where the reference runs there.
    """
    arguments.check_matrix("similarity", similarity, counts)
    check_shape("order", order, (similarity.shape[0], "M"))
    check_dtype("order", order, (torch.int64,))
    check_device("order", order, similarity)
    check_no_grad("drop_similar", similarity=similarity)
    left: torch.Tensor = _drop_similar(similarity, order, counts)
    return left
