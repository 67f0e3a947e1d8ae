"""Tokens above a threshold on the scale of their own sample: ``s > q05 + beta * (q98 - q05)``, counted for each row.

The two quantiles are exact order statistics found bit by bit from the top, as in `order`; the threshold is float64, one
rounding an operation, so that every backend counts the same tokens of equal scores.
"""

from __future__ import annotations

import struct

import torch

from asymvlm_kernels._checks import check_dtype, check_mask, check_no_grad, check_number, check_shape
from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.device import multiply_f64
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.launch import empty, launch, remember
from asymvlm_kernels.millionths import to_millionths
from asymvlm_kernels.prefill import reference
from asymvlm_kernels.prefill.order import count_keys, key_score, kth_keys, kth_keys_chunked, load_keys
from asymvlm_kernels.tuning.prefill import select_config

LOW, HIGH = 5, 98  # percent


@triton.jit
def count_above(keys, threshold):
    """How many keys belong to scores above ``threshold`` (float64): neither NaN nor a missing token ever does."""
    return (key_score(keys).to(tl.float64) > threshold).to(tl.int32)


@triton.jit
def quantile_ranks(N, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Places of the quantiles of ``HIGH`` and ``LOW`` percent among ``N`` tokens, counted from the largest, from 1."""
    last = tl.maximum(N - 1, 0).to(tl.int64)
    k = tl.maximum(N - (last * HIGH // 100).to(tl.int32), 1)
    m = tl.maximum(N - (last * LOW // 100).to(tl.int32), 1)
    return k, m


@triton.jit
def threshold_of(high, low, beta):
    """Float64 threshold between the scores of two keys; ``beta``: the bits of a float64, as an integer."""
    q_low = key_score(low).to(tl.float64)
    spread = key_score(high).to(tl.float64) - q_low
    return q_low + multiply_f64(beta.to(tl.int64).to(tl.float64, bitcast=True), spread)


@triton.jit
def limit_relative(above, N, threshold, minimum, maximum):
    """Number of ``N`` tokens that a threshold keeps, int32, for ``above`` tokens above it; shares in millionths."""
    least = tl.maximum(N.to(tl.int64) * minimum // 1000000, 1)
    most = tl.maximum(N.to(tl.int64) * maximum // 1000000, 1)
    count = tl.minimum(tl.maximum(above.to(tl.int64), least), most)
    count = tl.where(threshold - threshold == 0.0, count, most)  # not for a NaN, nor for an infinity
    return tl.minimum(count, N.to(tl.int64)).to(tl.int32)


@triton.jit(do_not_specialize=["N", "beta", "minimum", "maximum"])
def _relative_counts_kernel(
    scores_ptr,
    mask_ptr,
    counts_ptr,
    N,
    beta,
    minimum,
    maximum,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKED: tl.constexpr,
):
    # one program ranks one row: held in registers, or read from the cache 34 times
    pid_b = tl.program_id(0).to(tl.int64)
    scores_ptr += pid_b * N
    mask_ptr += pid_b * N
    if CHUNKED:
        one = tl.full((), 1, tl.uint32)
        real, _ = count_keys(scores_ptr, mask_ptr, one, one, N, BLOCK_N)
    else:
        keys = load_keys(scores_ptr, mask_ptr, tl.arange(0, BLOCK_N), N)
        real = tl.sum((keys != 0).to(tl.int32), 0)
    k, m = quantile_ranks(real, LOW, HIGH)
    if CHUNKED:
        high, low = kth_keys_chunked(scores_ptr, mask_ptr, k, m, N, BLOCK_N)
    else:
        high, low = kth_keys(keys, k, m)
    threshold = threshold_of(high, low, beta)
    if CHUNKED:
        found = tl.zeros((BLOCK_N,), tl.int32)
        for start in range(0, N, BLOCK_N):
            found += count_above(load_keys(scores_ptr, mask_ptr, start + tl.arange(0, BLOCK_N), N), threshold)
        above = tl.sum(found, 0)
    else:
        above = tl.sum(count_above(keys, threshold), 0)
    tl.store(counts_ptr + pid_b, limit_relative(above, real, threshold, minimum, maximum))


def _relative_counts_reference(
    scores: torch.Tensor, mask: torch.Tensor, beta: float, minimum: int, maximum: int
) -> torch.Tensor:
    return reference.relative_counts(scores, mask, beta, minimum, maximum, LOW, HIGH)


@remember
def _relative_counts_triton(
    scores: torch.Tensor, mask: torch.Tensor, beta: float, minimum: int, maximum: int
) -> torch.Tensor:
    B, N = scores.shape
    counts = empty((B,), dtype=torch.int32, device=scores.device)
    if B == 0:
        return counts
    config = select_config(N)
    launch(
        _relative_counts_kernel,
        (B,),
        scores.contiguous(),
        mask.contiguous(),
        counts,
        N,
        struct.unpack("<q", struct.pack("<d", beta))[0],  # a Python float would reach the kernel as fp32
        minimum,
        maximum,
        LOW=LOW,
        HIGH=HIGH,
        BLOCK_N=config.block_n,
        CHUNKED=config.chunked,
        num_warps=config.num_warps,
    )
    return counts


def _relative_counts_fake(
    scores: torch.Tensor, mask: torch.Tensor, beta: float, minimum: int, maximum: int
) -> torch.Tensor:
    return scores.new_empty(scores.shape[:1], dtype=torch.int32)


_relative_counts = define_op(
    "relative_counts(Tensor scores, Tensor mask, float beta, int minimum, int maximum) -> Tensor",
    reference=_relative_counts_reference,
    triton=_relative_counts_triton,
    fake=_relative_counts_fake,
)


def relative_counts(
    scores: torch.Tensor, mask: torch.Tensor, beta: float, minimum: float = 0.05, maximum: float = 1.0
) -> torch.Tensor:
    """How many tokens of each row score above ``q05 + beta * (q98 - q05)`` of that row.

    Args:
        scores: ``(B, N)`` fp32.
        mask: ``(B, N)`` bool, True = a prunable token; N of a row counts these only.
        beta: place of the threshold between the two quantiles.
        minimum, maximum: shares of N that the count is clamped to, in (0, 1].
    Returns:
        ``(B,)`` int32; at least 1 where there is a token, 0 where there is none. Where a quantile is not finite the
        scores say nothing about the sample, and the maximum is used. The same on every backend.
    Raises:
        ValueError: on rank, size, dtype or device mismatch, or if ``scores`` requires grad in grad mode.

    Does not synchronise.
    """
    check_shape("scores", scores, ("B", "N"))
    check_dtype("scores", scores, (torch.float32,))
    check_mask("mask", mask, scores)
    check_no_grad("relative_counts", scores=scores)
    check_number("beta", beta)
    for name, share in (("minimum", minimum), ("maximum", maximum)):
        check_number(name, share, above=0)
    counts: torch.Tensor = _relative_counts(scores, mask, beta, to_millionths(minimum), to_millionths(maximum))
    return counts
