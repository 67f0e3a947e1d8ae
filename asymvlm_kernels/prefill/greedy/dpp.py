"""The most probable tokens of a determinantal point process, by greedy choice with an incremental Cholesky factor.

The choice of CDPruner (arXiv:2506.10967), by the algorithm of arXiv:1709.05135.
"""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import check_mask, check_no_grad
from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.device import multiply_f32
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.launch import empty, launch, remember
from asymvlm_kernels.prefill.greedy import arguments, reference
from asymvlm_kernels.prefill.greedy.ranks import place_of, rank, score_of, wanted
from asymvlm_kernels.tuning.greedy import dpp_config


@triton.jit
def _lane(factor_ptr, offs_n, mask_n, token, term, step, N, lane):
    """``lane`` and the product of a term of each column with that of ``token``, each rounded; nothing past ``step``."""
    row_ptr = factor_ptr + tl.minimum(term, step - 1) * (tl.zeros((), tl.int64) + N)
    own = tl.load(row_ptr + token)
    product = multiply_f32(tl.load(row_ptr + offs_n, mask=mask_n, other=0.0), own)
    return lane + tl.where(term < step, product, 0.0)


@triton.jit
def _products(factor_ptr, offs_n, mask_n, token, step, N, BLOCK_N: tl.constexpr):
    """``<c_token, c_i>`` over the first ``step`` terms in four lanes, as the reference adds them."""
    a = tl.zeros((BLOCK_N,), tl.float32)
    b = tl.zeros((BLOCK_N,), tl.float32)
    c = tl.zeros((BLOCK_N,), tl.float32)
    d = tl.zeros((BLOCK_N,), tl.float32)
    for term in range(0, step, 4):
        a = _lane(factor_ptr, offs_n, mask_n, token, term, step, N, a)
        b = _lane(factor_ptr, offs_n, mask_n, token, term + 1, step, N, b)
        c = _lane(factor_ptr, offs_n, mask_n, token, term + 2, step, N, c)
        d = _lane(factor_ptr, offs_n, mask_n, token, term + 3, step, N, d)
    return (a + b) + (c + d)


@triton.jit(do_not_specialize=["capacity"])
def _dpp_map_kernel(
    kernel_ptr, mask_ptr, counts_ptr, factor_ptr, gain_ptr, chosen_ptr, N, capacity, BLOCK_N: tl.constexpr
):
    # one program: a sample, a token a step; what its threads wrote of one step they read in the next
    pid_b = tl.program_id(0).to(tl.int64)
    kernel_ptr += pid_b * N * N
    factor_ptr += pid_b * capacity * N
    gain_ptr += pid_b * N
    chosen_ptr += pid_b * N
    ranks = tl.zeros((BLOCK_N,), tl.uint64)
    reals = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask_n = offs_n < N
        real = mask_n
        if mask_ptr is not None:
            real = tl.load(mask_ptr + pid_b * N + offs_n, mask=mask_n, other=0) != 0
        diagonal = tl.load(kernel_ptr + offs_n.to(tl.int64) * (N + 1), mask=mask_n, other=0.0)
        tl.store(gain_ptr + offs_n, diagonal, mask=mask_n)
        tl.store(chosen_ptr + offs_n, tl.zeros((BLOCK_N,), tl.int8), mask=mask_n)
        ranks = tl.maximum(ranks, rank(diagonal, real, offs_n))
        reals += real.to(tl.int32)
    count = wanted(counts_ptr, pid_b, tl.minimum(tl.sum(reals, 0), capacity))
    best = tl.max(ranks, 0)
    step = tl.zeros((), tl.int32)
    while (step < count) & (score_of(best) > 0):
        token, root = place_of(best), tl.sqrt_rn(score_of(best))
        ranks = tl.zeros((BLOCK_N,), tl.uint64)
        tl.debug_barrier()
        for start in range(0, N, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N
            products = _products(factor_ptr, offs_n, mask_n, token, step, N, BLOCK_N)
            # read behind the loop, beside which they would take registers that it needs
            row = tl.load(kernel_ptr + token.to(tl.int64) * N + offs_n, mask=mask_n, other=0.0)
            gain = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)
            taken = tl.load(chosen_ptr + offs_n, mask=mask_n, other=0)
            free = mask_n & (taken == 0) & (offs_n != token)
            if mask_ptr is not None:
                free = free & (tl.load(mask_ptr + pid_b * N + offs_n, mask=mask_n, other=0) != 0)
            rest = row - products
            part = tl.div_rn(rest, root + tl.zeros_like(rest))
            gain -= multiply_f32(part, part)
            tl.debug_barrier()  # warps may hold copies of one block: all have read what is now written
            tl.store(factor_ptr + step.to(tl.int64) * N + offs_n, part, mask=mask_n)
            tl.store(gain_ptr + offs_n, gain, mask=mask_n)
            tl.store(chosen_ptr + offs_n, tl.full((BLOCK_N,), 1, tl.int8), mask=offs_n == token)
            ranks = tl.maximum(ranks, rank(gain, free, offs_n))
        best = tl.max(ranks, 0)
        step += 1
    while step < count:  # no gain is left: the largest diagonals
        ranks = tl.zeros((BLOCK_N,), tl.uint64)
        tl.debug_barrier()
        for start in range(0, N, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N
            diagonal = tl.load(kernel_ptr + offs_n.to(tl.int64) * (N + 1), mask=mask_n, other=0.0)
            free = mask_n & (tl.load(chosen_ptr + offs_n, mask=mask_n, other=0) == 0)
            if mask_ptr is not None:
                free = free & (tl.load(mask_ptr + pid_b * N + offs_n, mask=mask_n, other=0) != 0)
            ranks = tl.maximum(ranks, rank(diagonal, free, offs_n))
        token = place_of(tl.max(ranks, 0))
        tl.debug_barrier()
        tl.store(chosen_ptr + token, 1)
        step += 1


@remember
def _dpp_map_triton(
    kernel: torch.Tensor, mask: torch.Tensor | None, counts: torch.Tensor, capacity: int
) -> torch.Tensor:
    B, N, _ = kernel.shape
    if kernel.numel() == 0:
        return reference.dpp_map(kernel, mask, counts, capacity)
    config = dpp_config(N)
    factor = empty((B, capacity, N), dtype=torch.float32, device=kernel.device)
    gain = empty((B, N), dtype=torch.float32, device=kernel.device)
    chosen = empty((B, N), dtype=torch.bool, device=kernel.device)
    launch(
        _dpp_map_kernel,
        (B,),
        kernel.contiguous(),
        None if mask is None else mask.contiguous(),
        counts.contiguous(),
        *(factor, gain, chosen, N, capacity),
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        maxnreg=config.registers,
    )
    return chosen


def _dpp_map_fake(kernel: torch.Tensor, mask: torch.Tensor | None, counts: torch.Tensor, capacity: int) -> torch.Tensor:
    return kernel.new_empty(kernel.shape[:2], dtype=torch.bool)


_dpp_map = define_op(
    "dpp_map(Tensor kernel, Tensor? mask, Tensor counts, SymInt capacity) -> Tensor",
    reference=reference.dpp_map,
    triton=_dpp_map_triton,
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

    Ties: the lowest index; -0 equals +0; a NaN gain ranks last. The same tokens on every backend and in any batch. One
    launch, one program a sample, which reads ``count**2 * N / 2`` numbers of the factor: milliseconds where hundreds
    are chosen. Synchronises a GPU only where the reference runs there.
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
