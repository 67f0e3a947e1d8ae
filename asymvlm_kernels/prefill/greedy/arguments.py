"""Checks that the greedy choices share. None of them reads a CUDA tensor's values: that would synchronise."""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import check_device, check_dtype, check_shape


def check_matrix(name: str, matrix: torch.Tensor, counts: torch.Tensor) -> None:
    """A square fp32 matrix for each sample, and how many of its tokens are wanted."""
    check_shape(name, matrix, ("B", "N", "N"))
    if matrix.shape[1] != matrix.shape[2]:
        raise ValueError(f"{name} must be square, (B, N, N), got {tuple(matrix.shape)}")
    check_dtype(name, matrix, (torch.float32,))
    check_shape("counts", counts, (matrix.shape[0],))
    check_dtype("counts", counts, (torch.int32, torch.int64))
    check_device("counts", counts, matrix)
