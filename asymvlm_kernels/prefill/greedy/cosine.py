"""Cosine similarity of each token to each other: ``out[b, i, j] = <x_i, x_j> / (||x_i|| ||x_j||)``.

Plain PyTorch on every device, one sample at a time in products of one size: no bit depends on the batch.
"""

from __future__ import annotations

import torch

from asymvlm_kernels._checks import FLOATS, check_dtype, check_mask, check_no_grad, check_shape
from asymvlm_kernels.dispatch import define_op
from asymvlm_kernels.prefill.greedy import reference


def _cosine_matrix_fake(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    B, N, _ = x.shape
    return x.new_empty((B, N, N), dtype=torch.float32)


_cosine_matrix = define_op(
    "cosine_matrix(Tensor x, Tensor? mask) -> Tensor",
    reference=reference.cosine_matrix,
    triton=None,
    fake=_cosine_matrix_fake,
)


def cosine_matrix(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Cosine similarity between all tokens of a sample, in fp32.

    Args:
        x: ``(B, N, D)`` fp32, fp16 or bf16.
        mask: ``(B, N)`` bool, True = a token.
    Returns:
        ``(B, N, N)`` fp32, equal to its transpose bit for bit; 0 in the rows and columns that ``mask`` hides and of
        tokens that are zero; NaN in those of a token that is not finite.
    Raises:
        ValueError: on rank, size, dtype or device mismatch, or if ``x`` requires grad in grad mode.

    A token of any size is normalised before the product, so that nothing overflows. Does not synchronise.
    """
    check_shape("x", x, ("B", "N", "D"))
    check_dtype("x", x, FLOATS)
    check_mask("mask", mask, x)
    check_no_grad("cosine_matrix", x=x)
    matrix: torch.Tensor = _cosine_matrix(x, mask)
    return matrix
