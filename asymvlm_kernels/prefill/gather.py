"""Copy the kept rows into a dense tensor: ``out[b, k] = rows[b, index[b, k]]``."""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import check_device, check_dtype, check_no_grad, check_shape
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.prefill import reference


def _gather_rows_fake(rows: torch.Tensor, index: torch.Tensor, pad: float) -> torch.Tensor:
    return rows.new_empty((*index.shape, *rows.shape[2:]))


_gather_rows = define_op(
    "gather_rows(Tensor rows, Tensor index, Scalar pad) -> Tensor",
    reference=reference.gather_rows,
    triton=None,
    fake=_gather_rows_fake,
)


def gather_rows(rows: torch.Tensor, index: torch.Tensor, *, pad: float = 0) -> torch.Tensor:
    """Gather the kept rows of any per-token tensor.

    Args:
        rows: ``(B, S, ...)``, any dtype and strides.
        index: ``(B, K)`` int64 in ``[-1, S)``. Values are not checked: that would synchronise.
        pad: what a row of index -1 is filled with.
    Returns:
        ``(B, K, ...)``, contiguous, dtype and device of ``rows``. Bitwise equal on every backend.
    Raises:
        ValueError: on rank, size, dtype or device mismatch, or if ``rows`` requires grad in grad mode.
    """
    if rows.ndim < 2:
        raise ValueError(f"rows must have shape (B, S, ...), got {tuple(rows.shape)}")
    check_shape("index", index, (rows.shape[0], "K"))
    check_dtype("index", index, (torch.int64,))
    check_device("index", index, rows)
    check_no_grad("gather_rows", rows=rows)
    out: torch.Tensor = _gather_rows(rows, index, pad)
    return out
