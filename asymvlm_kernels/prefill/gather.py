"""Copy the kept rows into a dense tensor: ``out[b, k] = rows[b, index[b, k]]``."""

from __future__ import annotations

import ctypes
import functools
import math

import torch

from asymvlm_kernels._checks import (
    WORDS,
    check_device,
    check_dtype,
    check_no_grad,
    check_pad,
    check_places,
    check_shape,
)
from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.launch import empty, launch, remember
from asymvlm_kernels.prefill import reference
from asymvlm_kernels.tuning.prefill import gather_config, row_vector


@triton.jit(do_not_specialize=["stride_rb", "stride_ib", "K", "pad"])  # a new length compiles nothing new
def _gather_rows_kernel(
    rows_ptr,
    index_ptr,
    out_ptr,
    stride_rb,
    stride_rs,
    stride_rd,
    stride_ib,
    stride_ik,
    K,
    pad,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # one program copies BLOCK_D columns of BLOCK_K kept rows
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid_b = (tl.program_id(0) // tiles_k).to(tl.int64)
    offs_k = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask_k = offs_k < K
    mask_d = offs_d < D
    src = tl.load(index_ptr + pid_b * stride_ib + offs_k * stride_ik, mask=mask_k, other=-1)
    # int64: B * S * D may pass 2**31
    row = tl.multiple_of(pid_b * stride_rb + src * stride_rs, VECTOR)  # [BLOCK_K]
    col = offs_d.to(tl.int64) * stride_rd
    word = tl.full((), pad, tl.int64).to(out_ptr.dtype.element_ty)
    keep = (src >= 0)[:, None] & mask_d[None, :]
    tile = tl.load(rows_ptr + row[:, None] + col[None, :], mask=keep, other=word)
    out = (pid_b * K + offs_k) * D  # [BLOCK_K]
    tl.store(out_ptr + out[:, None] + offs_d[None, :], tile, mask=mask_k[:, None] & mask_d[None, :])


@remember
def _gather_rows_triton(rows: torch.Tensor, index: torch.Tensor, pad: float) -> torch.Tensor:
    out = empty((*index.shape, *rows.shape[2:]), dtype=rows.dtype, device=rows.device)
    if rows.itemsize not in WORDS:
        return reference.gather_rows(rows, index, pad)
    if out.numel() == 0:
        return out
    B, K = index.shape
    D = math.prod(rows.shape[2:])
    word = WORDS[rows.itemsize]
    source = rows.view(word).reshape(B, rows.shape[1], D)  # copies where the trailing axes are not one axis in memory
    config = gather_config(D, rows.itemsize)
    launch(
        _gather_rows_kernel,
        (B * triton.cdiv(K, config.block_k), triton.cdiv(D, config.block_d)),
        source,
        index,
        out.view(word),
        *source.stride(),
        *index.stride(),
        K,
        _bits(pad, math.copysign(1, pad), rows.dtype),
        D=D,
        BLOCK_K=config.block_k,
        BLOCK_D=config.block_d,
        VECTOR=row_vector(source),
        num_warps=config.num_warps,
    )
    return out


@functools.lru_cache(maxsize=64)
def _bits(pad: float, sign: float, dtype: torch.dtype) -> int:
    """``pad`` as a number of ``dtype``, read as a signed integer of that size. Touches host memory only.

    ``sign`` keeps -0 and 0 apart in the cache.
    """
    word = torch.zeros(1, dtype=dtype) if (pad, sign) == (0, 1) else torch.full((1,), pad, dtype=dtype)
    return int.from_bytes(ctypes.string_at(word.data_ptr(), word.nbytes), "little", signed=True)


def _gather_rows_fake(rows: torch.Tensor, index: torch.Tensor, pad: float) -> torch.Tensor:
    return rows.new_empty((*index.shape, *rows.shape[2:]))


_gather_rows = define_op(
    "gather_rows(Tensor rows, Tensor index, Scalar pad) -> Tensor",
    reference=reference.gather_rows,
    triton=_gather_rows_triton,
    fake=_gather_rows_fake,
    check=lambda rows, index, pad: check_places("index", index, rows.shape[1]),
)


def gather_rows(rows: torch.Tensor, index: torch.Tensor, *, pad: float = 0) -> torch.Tensor:
    """Gather the kept rows of any per-token tensor.

    Args:
        rows: ``(B, S, ...)``, any dtype and strides. Rows are read where they lie, unless their own axes do not form
            one axis in memory: then ``rows`` is copied first.
        index: ``(B, K)`` int64 in ``[-1, S)``. Not checked on a GPU: that would synchronise.
        pad: what a row of index -1 is filled with.
    Returns:
        ``(B, K, ...)``, contiguous, dtype and device of ``rows``. Bitwise equal on every backend.
    Raises:
        ValueError: on rank, size, dtype or device mismatch, a ``pad`` that is no number of that dtype, or if ``rows``
            requires grad in grad mode.
        IndexError: on a CPU, if ``index`` names a row that is not there.
    """
    if rows.ndim < 2:
        raise ValueError(f"rows must have shape (B, S, ...), got {tuple(rows.shape)}")
    check_shape("index", index, (rows.shape[0], "K"))
    check_dtype("index", index, (torch.int64,))
    check_device("index", index, rows)
    check_pad("pad", pad, rows.dtype)
    check_no_grad("gather_rows", rows=rows)
    out: torch.Tensor = _gather_rows(rows, index, pad)
    return out
