"""Tokens that resemble others go: of those at even places in rank the most similar to one at an odd place, by rounds.

The choice of VisPruner (arXiv:2412.01818), and of FlashVLM (arXiv:2512.20561) after it.
"""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import check_device, check_dtype, check_no_grad, check_places, check_shape
from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.launch import empty, launch, remember
from asymvlm_kernels.prefill.greedy import arguments, reference
from asymvlm_kernels.prefill.greedy.ranks import first_rank, rank, wanted
from asymvlm_kernels.tuning.greedy import drop_config


@triton.jit
def _append(tokens, stays, rest_ptr, length, BLOCK_M: tl.constexpr):
    """Write those of ``tokens`` that stay behind the ``length`` ones that are there; the new length."""
    flags = stays.to(tl.int32)
    tl.store(rest_ptr + length + tl.cumsum(flags, 0) - flags, tokens.to(tl.int32), mask=stays)
    return length + tl.sum(flags, 0)


@triton.jit
def _rank_even(similarity_ptr, rest_ptr, ranks_ptr, length, N, BLOCK_E: tl.constexpr, BLOCK_O: tl.constexpr):
    """Rank each token at an even place of a list of ``length`` by its largest similarity to one at an odd place."""
    for first in range(0, (length + 1) // 2, BLOCK_E):
        offs_e = first + tl.arange(0, BLOCK_E)  # [BLOCK_E]
        mask_e = 2 * offs_e < length
        even = tl.load(rest_ptr + 2 * offs_e, mask=mask_e, other=0).to(tl.int64)
        row_ptrs = similarity_ptr + even * N  # [BLOCK_E]
        near = tl.full((BLOCK_E, BLOCK_O), float("-inf"), tl.float32)
        for start in range(0, length // 2, BLOCK_O):
            place = 2 * (start + tl.arange(0, BLOCK_O)) + 1  # [BLOCK_O]
            odd = tl.load(rest_ptr + place, mask=place < length, other=0)
            mask = mask_e[:, None] & (place < length)[None, :]
            found = tl.load(row_ptrs[:, None] + odd[None, :], mask=mask, other=float("-inf"))
            near = tl.maximum(near, tl.where(found != found, float("-inf"), found))
        own = tl.load(row_ptrs + even, mask=mask_e, other=0.0)
        best = tl.where(own != own, float("inf"), tl.max(near, 1))  # what nobody knows goes first
        tl.store(ranks_ptr + offs_e, rank(best, mask_e, offs_e).to(tl.int64, bitcast=True), mask=mask_e)


@triton.jit
def _last_rank(ranks_ptr, length, gone, BLOCK_M: tl.constexpr):
    """The ``gone``-th largest rank: ranks are all different."""
    last = first_rank()
    for _ in range(gone):
        top = tl.zeros((BLOCK_M,), tl.uint64)
        for start in range(0, (length + 1) // 2, BLOCK_M):
            offs = start + tl.arange(0, BLOCK_M)
            ranks = tl.load(ranks_ptr + offs, mask=2 * offs < length, other=0).to(tl.uint64, bitcast=True)
            top = tl.maximum(top, tl.where(ranks < last, ranks, 0))
        last = tl.max(top, 0)
    return last


@triton.jit(do_not_specialize=["N", "M"])
def _drop_similar_kernel(
    similarity_ptr, order_ptr, counts_ptr, rest_ptr, ranks_ptr, left_ptr, N, M,
    ROUND: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # one program: a sample, a round a step; the list of what is left is copied to and fro between two halves of `rest`
    pid_b = tl.program_id(0).to(tl.int64)
    similarity_ptr += pid_b * N * N
    rest_ptr += pid_b * 2 * M
    ranks_ptr += pid_b * M
    left_ptr += pid_b * N
    for start in range(0, N, BLOCK_M):
        offs_n = start + tl.arange(0, BLOCK_M)
        tl.store(left_ptr + offs_n, tl.zeros((BLOCK_M,), tl.int8), mask=offs_n < N)
    length = tl.zeros((), tl.int32)
    for start in range(0, M, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        token = tl.load(order_ptr + pid_b * M + offs_m, mask=offs_m < M, other=-1)
        length = _append(token, token >= 0, rest_ptr, length, BLOCK_M)
    count = wanted(counts_ptr, pid_b, length)
    half = tl.zeros((), tl.int32)  # where the list begins: 0 or M
    tl.debug_barrier()
    while length > count:
        _rank_even(similarity_ptr, rest_ptr + half, ranks_ptr, length, N, BLOCK_E, BLOCK_O)
        tl.debug_barrier()
        gone = tl.minimum(tl.minimum(length - count, ROUND), (length + 1) // 2)
        last = _last_rank(ranks_ptr, length, gone, BLOCK_M)
        new = tl.zeros((), tl.int32)
        for start in range(0, length, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            token = tl.load(rest_ptr + half + offs_m, mask=offs_m < length, other=0)
            is_even = (offs_m % 2 == 0) & (offs_m < length)
            ranks = tl.load(ranks_ptr + offs_m // 2, mask=is_even, other=0).to(tl.uint64, bitcast=True)
            stays = (offs_m < length) & ((is_even == 0) | (ranks < last))
            new = _append(token, stays, rest_ptr + (M - half), new, BLOCK_M)
        length = new
        half = M - half
        tl.debug_barrier()
    for start in range(0, length, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        token = tl.load(rest_ptr + half + offs_m, mask=offs_m < length, other=0)
        tl.store(left_ptr + token, tl.full((BLOCK_M,), 1, tl.int8), mask=offs_m < length)


@remember
def _drop_similar_triton(similarity: torch.Tensor, order: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    (B, N, _), M = similarity.shape, order.shape[1]
    if similarity.numel() == 0 or M == 0:
        return reference.drop_similar(similarity, order, counts)
    config = drop_config(M)
    rest = empty((B, 2, M), dtype=torch.int32, device=similarity.device)
    ranks = empty((B, M), dtype=torch.int64, device=similarity.device)
    left = empty((B, N), dtype=torch.bool, device=similarity.device)
    launch(
        _drop_similar_kernel,
        (B,),
        *(similarity.contiguous(), order.contiguous(), counts.contiguous(), rest, ranks, left, N, M),
        ROUND=reference.ROUND,
        BLOCK_E=config.block_e,
        BLOCK_O=config.block_o,
        BLOCK_M=config.block_m,
        num_warps=config.num_warps,
        maxnreg=config.registers,
    )
    return left


def _drop_similar_fake(similarity: torch.Tensor, order: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return similarity.new_empty(similarity.shape[:2], dtype=torch.bool)


def _check_order(similarity: torch.Tensor, order: torch.Tensor, counts: torch.Tensor) -> None:
    check_places("order", order, similarity.shape[1])


_drop_similar = define_op(
    "drop_similar(Tensor similarity, Tensor order, Tensor counts) -> Tensor",
    reference=reference.drop_similar,
    triton=_drop_similar_triton,
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
    other; any other NaN counts as -inf. The same tokens on every backend and in any batch. One launch, one
    program a sample, which looks at all pairs of every round: 1 GB of cosines from 2880 tokens to 640, milliseconds
    for one processor. Synchronises a GPU only where the reference runs there.
    """
    arguments.check_matrix("similarity", similarity, counts)
    check_shape("order", order, (similarity.shape[0], "M"))
    check_dtype("order", order, (torch.int64,))
    check_device("order", order, similarity)
    check_no_grad("drop_similar", similarity=similarity)
    left: torch.Tensor = _drop_similar(similarity, order, counts)
    return left
