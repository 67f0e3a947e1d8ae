"""How far two runs are apart, and how far they may be."""

from __future__ import annotations

import math
from typing import Any

import torch

from asymvlm.verification.report import FAIL, PASS, CheckRow

# noise is the largest of a few samples; where a right patch left the floor, on tiny models of 34 families in bf16 and
# fp16 on a CPU, it came to 2.3 times the noise at most
TIMES_NOISE = 4
NOISE_LIMIT = 10  # a model further from itself than so many floors, or than a quarter of a standard deviation, whose
NOISE_MOST = 0.25  # fourfold is a standard deviation, leaves nothing to verify
FLOAT32_FLOOR = 1e-4


def logits_apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference of logits ``(..., V)`` in standard deviations of the wanted ones over the vocabulary."""
    found, wanted = found.float(), wanted.float()
    return _largest((found - wanted).abs().amax(-1) / wanted.std(-1))


def hidden_apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference of hidden states ``(..., D)``: norm of a token's difference over the norm of the token.

    By token and not by number: a few features are thousands of times larger than the rest, and round accordingly.
    """
    found, wanted = found.float(), wanted.float()
    return _largest((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-12))


def floor(model: Any, layers: int) -> float:
    """The difference that is always allowed.

    fp32: 1e-4, thirty times what the test suite finds between pruned and masked runs. Below that: a decoder of L layers
    rounds its residual stream 2 L times, each time by a part of the unit roundoff u that is independent of the others;
    such errors add up as a random walk does, to about sqrt(2 L) u / 2, and the largest of many is some four times that.
    So 2 sqrt(2 L) u: with 28 layers 0.06 in bf16 (u = 2**-8) and 0.007 in fp16 (u = 2**-11). fp32 with TF32 matrix
    products counts as fp16, whose 10 bits they have.
    """
    dtype = model.dtype
    tf32 = model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    if dtype == torch.float32 and tf32:
        dtype = torch.float16
    if dtype not in (torch.float16, torch.bfloat16):
        return FLOAT32_FLOOR
    return 2 * math.sqrt(2 * layers) * torch.finfo(dtype).eps / 2


def judge(check: str, difference: float, noise: float, lowest: float, note: str = "") -> CheckRow:
    """A row: passed where the difference is within the tolerance (NaN is not)."""
    tolerance = max(TIMES_NOISE * noise, lowest)
    return CheckRow(check, PASS if difference <= tolerance else FAIL, difference, noise, tolerance, note)


def _largest(values: torch.Tensor) -> float:
    return float(values.amax()) if values.numel() else 0.0
