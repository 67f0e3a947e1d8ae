"""A budget as numbers that a kernel can take, and back."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

import torch

from asymvlm_kernels.budget import Budget, LinearBudget, ScoreBudget, ThresholdBudget, UniformBudget
from asymvlm_kernels.millionths import to_millionths


def encode_budget(budget: Budget | ScoreBudget) -> tuple[list[int], list[float]] | None:
    """Three ratios in millionths and two gaps, or the five numbers of a linear budget; None for any other."""
    if type(budget) is UniformBudget:
        return [to_millionths(budget.ratio)] * 3, [0.0, 0.0]
    if type(budget) is ThresholdBudget:
        ratios = [to_millionths(ratio) for ratio in (budget.conservative, budget.moderate, budget.aggressive)]
        return ratios, [budget.gap_low, budget.gap_high]
    if type(budget) is LinearBudget:
        return [], [budget.target, budget.slope, budget.mean_gap, budget.minimum, budget.maximum]
    return None


class EncodedBudget:
    """The budget that `encode_budget` wrote down."""

    def __init__(self, ratios: Sequence[int], numbers: Sequence[float]) -> None:
        self.ratios, self.numbers = ratios, numbers

    @property
    def max_ratio(self) -> float:
        return max(self.ratios) / 1e6 if self.ratios else self.numbers[4]

    def keep_ratio(self, gap: torch.Tensor) -> torch.Tensor:
        return self.millionths(gap).to(torch.float64) / 1e6

    def millionths(self, gap: torch.Tensor) -> torch.Tensor:
        if not self.ratios:
            return LinearBudget(*self.numbers).millionths(gap)
        low, high = (torch.tensor(number, dtype=torch.float32, device=gap.device) for number in self.numbers)
        return torch.tensor(self.ratios, device=gap.device)[(gap >= low).long() + (gap >= high).long()]


def number_bits(numbers: Sequence[float], rounded: bool) -> list[int]:
    """Float64 numbers as integers: a Python float reaches a kernel as fp32. ``rounded``: to the fp32 of a gap first."""
    wide = [ctypes.c_float(number).value if rounded else number for number in numbers]
    return [struct.unpack("<q", struct.pack("<d", number))[0] for number in [*wide, 0.0, 0.0, 0.0][:5]]
