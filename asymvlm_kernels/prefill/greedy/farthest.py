"""Tokens that lie far from each other: each time the one whose nearest chosen token is farthest, ``d = 1 - cos``.

The choice of DivPrune (arXiv:2503.02175).
"""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import check_mask, check_no_grad
from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.launch import empty, launch, remember
from asymvlm_kernels.prefill.greedy import arguments, reference
from asymvlm_kernels.prefill.greedy.ranks import place_of, rank, wanted
from asymvlm_kernels.tuning.greedy import LONGEST, farthest_config


@triton.jit
def _distances(similarity):
    """``1 - similarity``; what nobody knows is no distance."""
    distance = 1.0 - similarity
    return tl.where(distance != distance, float("inf"), distance)


@triton.jit
def _nearest_points_kernel(similarity_ptr, mask_ptr, nearest_ptr, N, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr):
    # one program: the distance of each of BLOCK_I tokens to its nearest other one
    pid_b = tl.program_id(1).to(tl.int64)
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)  # [BLOCK_I]
    rows = similarity_ptr + (pid_b * N + offs_i) * N  # [BLOCK_I]
    nearest = tl.full((BLOCK_I, BLOCK_N), float("inf"), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask_n = offs_n < N
        mask = mask_n[None, :] & (offs_i < N)[:, None]
        found = _distances(tl.load(rows[:, None] + offs_n[None, :], mask=mask, other=float("nan")))
        real = mask_n
        if mask_ptr is not None:
            real = tl.load(mask_ptr + pid_b * N + offs_n, mask=mask_n, other=0) != 0
        other = real[None, :] & (offs_n[None, :] != offs_i[:, None])
        nearest = tl.minimum(nearest, tl.where(other, found, float("inf")))
    own = tl.load(rows + offs_i, mask=offs_i < N, other=0.0)
    result = tl.where(own != own, float("nan"), tl.min(nearest, 1))  # nobody knows this token
    tl.store(nearest_ptr + pid_b * N + offs_i, result, mask=offs_i < N)


@triton.jit
def _farthest_points_kernel(similarity_ptr, mask_ptr, counts_ptr, nearest_ptr, chosen_ptr, N, BLOCK_N: tl.constexpr):
    # one program: a sample, a token a step
    pid_b = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < N
    real = mask_n
    if mask_ptr is not None:
        real = tl.load(mask_ptr + pid_b * N + offs_n, mask=mask_n, other=0) != 0
    distance = tl.load(nearest_ptr + pid_b * N + offs_n, mask=mask_n, other=0.0)
    unknown = distance != distance
    free = real
    for step in range(wanted(counts_ptr, pid_b, tl.sum(real.to(tl.int32), 0))):
        best = tl.max(rank(tl.where(unknown, float("nan"), distance), free, offs_n), 0)
        token = place_of(best)
        free = free & (offs_n != token)
        row = tl.load(similarity_ptr + (pid_b * N + token) * N + offs_n, mask=mask_n, other=0.0)
        found = _distances(row)
        distance = tl.where(step == 0, found, tl.minimum(distance, found))
    tl.store(chosen_ptr + pid_b * N + offs_n, real & (free == 0), mask=mask_n)


@remember
def _farthest_points_triton(similarity: torch.Tensor, mask: torch.Tensor | None, counts: torch.Tensor) -> torch.Tensor:
    B, N, _ = similarity.shape
    if similarity.numel() == 0 or N > LONGEST:
        return reference.farthest_points(similarity, mask, counts)
    config = farthest_config(N)
    similarity, mask = similarity.contiguous(), None if mask is None else mask.contiguous()
    nearest = empty((B, N), dtype=torch.float32, device=similarity.device)
    chosen = empty((B, N), dtype=torch.bool, device=similarity.device)
    blocks = (triton.cdiv(N, 8), B)
    launch(_nearest_points_kernel, blocks, similarity, mask, nearest, N, BLOCK_I=8, BLOCK_N=512, num_warps=4)
    launch(
        _farthest_points_kernel,
        (B,),
        *(similarity, mask, counts.contiguous(), nearest, chosen, N),
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
    )
    return chosen


def _farthest_points_fake(similarity: torch.Tensor, mask: torch.Tensor | None, counts: torch.Tensor) -> torch.Tensor:
    return similarity.new_empty(similarity.shape[:2], dtype=torch.bool)


_farthest_points = define_op(
    "farthest_points(Tensor similarity, Tensor? mask, Tensor counts) -> Tensor",
    reference=reference.farthest_points,
    triton=_farthest_points_triton,
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
    same tokens on every backend and in any batch. Two launches: the nearest neighbours, and one program a sample, which
    reads a row of the matrix a step. Synchronises a GPU only where the reference runs there, as for N above 8192.
    """
    arguments.check_matrix("similarity", similarity, counts)
    check_mask("mask", mask, similarity)
    check_no_grad("farthest_points", similarity=similarity)
    chosen: torch.Tensor = _farthest_points(similarity, mask, counts)
    return chosen
