"""The order in which scores rank, in plain PyTorch: one total order for selection, floors of images and soft masks."""

from __future__ import annotations

import torch


def order_key(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """fp32 scores -> int64 keys that rank as the method does: -0 equals +0, NaN below -inf, masked below NaN."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # -0.0 + 0.0 is +0.0
    key = torch.where(bits < 0, -bits - 2**31, bits)  # negative floats grow downwards
    key = key.masked_fill(scores.isnan(), -(2**31) - 1)
    return key if mask is None else key.masked_fill(~mask, -(2**31) - 2)
