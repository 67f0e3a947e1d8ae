"""The most probable tokens of a determinantal point process, by greedy choice with an incremental Cholesky factor.

The choice of CDPruner (arXiv:2506.10967), by the algorithm of arXiv:1709.05135.
"""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import check_mask, check_no_grad
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.prefill.greedy import arguments, reference


def _dpp_map_fake(kernel: torch.Tensor, mask: torch.Tensor | None, counts: torch.Tensor, capacity: int) -> torch.Tensor:
    return kernel.new_empty(kernel.shape[:2], dtype=torch.bool)


_dpp_map = define_op(
    "dpp_map(Tensor kernel, Tensor? mask, Tensor counts, SymInt capacity) -> Tensor",
    reference=reference.dpp_map,
    triton=None,
    fake=_dpp_map_fake,
)


def dpp_map(
    kernel: torch.Tensor, mask: torch.Tensor | None, counts: torch.Tensor, *, capacity: int | None = None
) -> torch.Tensor:
    """Choose ``counts`` tokens of each sample, each time the one that makes the determinant of the chosen largest.

    Where no further token makes it larger than 0 (by its gain, ``d_i^2``), as with tokens that repeat or a relevance
    of 0, the tokens with the largest diagonal fill up the number.

    Args:
        kernel: ``(B, N, N)`` fp32, symmetric and positive semidefinite, such as ``relevance_i * cos_ij * relevance_j``.
        mask: ``(B, N)`` bool, True = may be chosen; None: all.
        counts: ``(B,)`` int32 or int64, on the device of ``kernel``; never more than the tokens of a sample, or than
            ``capacity``, are chosen, and none for a negative number.
        capacity: most that are chosen, known to the host: the factor is ``(B, capacity, N)`` fp32. N if None.
    Returns:
        ``(B, N)`` bool: True = chosen.
    Raises:
        ValueError: on rank, size, dtype or device mismatch, a negative ``capacity``, or if ``kernel`` requires grad in
            grad mode.

    Ties: the lowest index; -0 equals +0; a NaN gain ranks last. The same tokens on every backend and in any batch.
    Synchronises a GPU only where the reference runs there.
    """
    arguments.check_matrix("kernel", kernel, counts)
    check_mask("mask", mask, kernel)
    check_no_grad("dpp_map", kernel=kernel)
    N = kernel.shape[1]
    capacity = N if capacity is None else capacity
    if capacity < 0:
        raise ValueError(f"capacity must be 0 or more, got {capacity}")
    chosen: torch.Tensor = _dpp_map(kernel, mask, counts, min(capacity, N))
    return chosen
