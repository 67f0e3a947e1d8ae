"""Order statistics of the scores: the importance gap, and the exact top-K as an ascending index."""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import check_device, check_dtype, check_mask, check_no_grad, check_shape
from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.launch import empty, launch, remember
from asymvlm_kernels.prefill import reference
from asymvlm_kernels.prefill.order import (
    count_keys,
    keep_best,
    key_score,
    kth_key,
    kth_key_chunked,
    kth_keys,
    kth_keys_chunked,
    load_keys,
    places_of,
)
from asymvlm_kernels.tuning.prefill import select_config


@triton.jit(do_not_specialize=["N"])
def _importance_gap_kernel(scores_ptr, mask_ptr, gap_ptr, N, BLOCK_N: tl.constexpr, CHUNKED: tl.constexpr):
    # one program ranks one row: held in registers, or read from the cache 33 times
    pid_b = tl.program_id(0).to(tl.int64)
    scores_ptr += pid_b * N
    if mask_ptr is not None:
        mask_ptr += pid_b * N
    if CHUNKED:
        one = tl.full((), 1, tl.uint32)
        real, _ = count_keys(scores_ptr, mask_ptr, one, one, N, BLOCK_N)
        k = tl.maximum(real // 4, 1)
        high, low = kth_keys_chunked(scores_ptr, mask_ptr, k, real - k + 1, N, BLOCK_N)
    else:
        keys = load_keys(scores_ptr, mask_ptr, tl.arange(0, BLOCK_N), N)
        real = tl.sum((keys != 0).to(tl.int32), 0)
        k = tl.maximum(real // 4, 1)
        high, low = kth_keys(keys, k, real - k + 1)
    tl.store(gap_ptr + pid_b, key_score(high) - key_score(low))  # no token: high is key 0, so NaN


@triton.jit(do_not_specialize=["N", "capacity"])
def _select_tokens_kernel(
    scores_ptr,
    counts_ptr,
    mask_ptr,
    index_ptr,
    N,
    capacity,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKED: tl.constexpr,
):
    # one program ranks one row: held in registers, or read from the cache 33 times; then writes its index in order
    pid_b = tl.program_id(0).to(tl.int64)
    scores_ptr += pid_b * N
    index_ptr += pid_b * capacity
    if mask_ptr is not None:
        mask_ptr += pid_b * N
    count = tl.load(counts_ptr + pid_b).to(tl.int64)
    if CHUNKED:
        one = tl.full((), 1, tl.uint32)
        real, _ = count_keys(scores_ptr, mask_ptr, one, one, N, BLOCK_N)
        kept = clamp_count(count, real, capacity)
        kth, above = kth_key_chunked(scores_ptr, mask_ptr, kept, N, BLOCK_N)
    else:
        keys = load_keys(scores_ptr, mask_ptr, tl.arange(0, BLOCK_N), N)
        kept = clamp_count(count, tl.sum((keys != 0).to(tl.int32), 0), capacity)
        kth, above = kth_key(keys, kept)
    better = tl.zeros((), tl.int32)
    equal = tl.zeros((), tl.int32)
    for start in range(0, N, ROWS * WIDTH):
        offs_n = places_of(start, ROWS, WIDTH)
        block = load_keys(scores_ptr, mask_ptr, offs_n, N)
        keep, slot, better, equal = keep_best(block, kth, better, equal, kept - above)
        tl.store(index_ptr + slot, offs_n.to(tl.int64), mask=keep)
    for start in range(0, capacity, ROWS * WIDTH):
        slot = start + tl.arange(0, ROWS * WIDTH)
        tl.store(index_ptr + slot, tl.full((ROWS * WIDTH,), -1, tl.int64), mask=(slot >= kept) & (slot < capacity))


@triton.jit
def clamp_count(count, real, capacity):
    """An int64 ``count`` cut to ``[0, min(real, capacity)]``, int32."""
    return tl.maximum(tl.minimum(count, tl.minimum(real, capacity)), 0).to(tl.int32)


@remember
def _importance_gap_triton(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    B, N = scores.shape
    gap = empty((B,), dtype=torch.float32, device=scores.device)
    if B == 0:
        return gap
    config = select_config(N)
    launch(
        _importance_gap_kernel,
        (B,),
        scores.contiguous(),
        None if mask is None else mask.contiguous(),
        gap,
        N,
        BLOCK_N=config.block_n,
        CHUNKED=config.chunked,
        num_warps=config.num_warps,
    )
    return gap


@remember
def _select_tokens_triton(
    scores: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor | None, capacity: int
) -> torch.Tensor:
    B, N = scores.shape
    index = empty((B, capacity), dtype=torch.int64, device=scores.device)
    if index.numel() == 0:
        return index
    config = select_config(N)
    launch(
        _select_tokens_kernel,
        (B,),
        scores.contiguous(),
        counts.contiguous(),
        None if mask is None else mask.contiguous(),
        index,
        N,
        capacity,
        BLOCK_N=config.block_n,
        ROWS=32 * config.num_warps,
        WIDTH=config.width,
        CHUNKED=config.chunked,
        num_warps=config.num_warps,
    )
    return index


def _importance_gap_fake(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return scores.new_empty(scores.shape[:1])


def _select_tokens_fake(
    scores: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor | None, capacity: int
) -> torch.Tensor:
    return scores.new_empty((scores.shape[0], capacity), dtype=torch.int64)


_importance_gap = define_op(
    "importance_gap(Tensor scores, Tensor? mask) -> Tensor",
    reference=reference.importance_gap,
    triton=_importance_gap_triton,
    fake=_importance_gap_fake,
)
_select_tokens = define_op(
    "select_tokens(Tensor scores, Tensor counts, Tensor? mask, SymInt capacity) -> Tensor",
    reference=reference.select_tokens,
    triton=_select_tokens_triton,
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
