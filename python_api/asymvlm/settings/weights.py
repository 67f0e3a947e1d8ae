"""The one check of every learned weight that comes in."""

from __future__ import annotations

import torch

LARGEST = 1e16  # squares of a weight and its products with embeddings then stay far below fp32's 3.4e38


def fp32_weight(name: str, weight: torch.Tensor) -> torch.Tensor:
    """``weight`` as fp32 on its device, detached, checked as scoring will see it. Waits for the device.

    Args:
        name: of the argument, for the error. weight: any shape and dtype.
    Raises:
        ValueError: if a value is NaN, infinite, or beyond `LARGEST` in fp32.
    """
    single = weight.detach().to(torch.float32)
    wrong = ~(single.abs() <= LARGEST)  # also true of NaN
    if bool(wrong.any()):
        first = float(weight.detach()[wrong][0])
        raise ValueError(
            f"{name} must be finite, got {int(wrong.sum())} values that are not, or beyond {LARGEST:g}, the most that "
            f"scores in float32 hold; the first is {first:g}"
        )
    return single
