"""A budget as numbers that a kernel can take, and back."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

import torch

from asymvlm_kernels.budget import (
    Budget,
    LinearBudget,
    RelativeThresholdBudget,
    ScoreBudget,
    ThresholdBudget,
    UniformBudget,
)
from asymvlm_kernels.millionths import to_millionths
from asymvlm_kernels.prefill.relative import _relative_counts_reference

RATIOS, LINEAR, RELATIVE = range(3)  # kinds of budgets, as kernels know them


def encode_budget(budget: Budget | ScoreBudget) -> tuple[list[int], list[float]] | None:
    """Three ratios in millionths and two gaps, the five numbers of a linear budget, or the two shares in millionths and
    the beta of a relative threshold; None for any other budget."""
    if type(budget) is UniformBudget:
        return [to_millionths(budget.ratio)] * 3, [0.0, 0.0]
    if type(budget) is ThresholdBudget:
        ratios = [to_millionths(ratio) for ratio in (budget.conservative, budget.moderate, budget.aggressive)]
        return ratios, [budget.gap_low, budget.gap_high]
    if type(budget) is LinearBudget:
        return [], [budget.target, budget.slope, budget.mean_gap, budget.minimum, budget.maximum]
    if type(budget) is RelativeThresholdBudget:
        return [to_millionths(budget.minimum), to_millionths(budget.maximum)], [budget.beta]
    return None


def kind_of(ratios: Sequence[int]) -> int:
    """Which of ``RATIOS``, ``LINEAR`` and ``RELATIVE`` `encode_budget` wrote down."""
    return {0: LINEAR, 2: RELATIVE}.get(len(ratios), RATIOS)


def decode_budget(ratios: Sequence[int], numbers: Sequence[float]) -> Budget | ScoreBudget:
    """The budget that `encode_budget` wrote down, in plain PyTorch."""
    return EncodedThreshold(ratios, numbers) if kind_of(ratios) == RELATIVE else EncodedBudget(ratios, numbers)


class EncodedThreshold:
    """A relative threshold that `encode_budget` wrote down."""

    def __init__(self, ratios: Sequence[int], numbers: Sequence[float]) -> None:
        (self.minimum, self.maximum), (self.beta,) = ratios, numbers

    @property
    def max_ratio(self) -> float:
        return self.maximum / 1e6

    def counts(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _relative_counts_reference(scores, mask, self.beta, self.minimum, self.maximum)


class EncodedBudget:
    """A budget by the gap that `encode_budget` wrote down."""

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


def budget_arguments(ratios: Sequence[int], numbers: Sequence[float]) -> list[int]:
    """What a kernel takes: the kind of budget, three ratios or shares in millionths, five float64 numbers as bits."""
    kind = kind_of(ratios)
    return [kind, *[*ratios, 0, 0, 0][:3], *number_bits(numbers, rounded=kind == RATIOS)]


def number_bits(numbers: Sequence[float], rounded: bool) -> list[int]:
    """Float64 numbers as integers: a Python float reaches a kernel as fp32. ``rounded``: to the fp32 of a gap first."""
    wide = [ctypes.c_float(number).value if rounded else number for number in numbers]
    return [struct.unpack("<q", struct.pack("<d", number))[0] for number in [*wide, *[0.0] * 5][:5]]
