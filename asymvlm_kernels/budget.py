"""How many vision tokens a sample keeps: importance gap -> keep ratio -> count, or the sample's own scores -> count.

A ratio is carried as an integer number of millionths, so that ``K = N * millionths // 1_000_000`` is exact. A floating
``floor(N * r)`` is off by one for pairs as plain as N = 90, r = 0.7.

Every `Budget` answers ``millionths(gap)`` on the device of ``gap``, without synchronising; a `ScoreBudget` answers
``counts(scores, mask)``. A gap of NaN (no token, no
text, or a non-finite score at a quartile) says nothing about the sample, so the largest ratio of the budget is used.

Source: AsymVLM section 3.3 (arXiv:2605.29535).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from asymvlm_kernels.millionths import MILLION, to_millionths
from asymvlm_kernels.prefill.relative import relative_counts

if TYPE_CHECKING:
    from typing_extensions import TypeIs

RELEVANT = 0.2  # beta of the threshold above which a token looks relevant
TIERS = ("conservative", "moderate", "aggressive")


@runtime_checkable
class Budget(Protocol):
    """What every budget offers."""

    @property
    def max_ratio(self) -> float:
        """Largest keep ratio this budget can give, in (0, 1]."""
        ...

    def millionths(self, gap: torch.Tensor) -> torch.Tensor:
        """``(B,)`` fp32 gaps -> ``(B,)`` int64 keep ratios in millionths."""
        ...

    def keep_ratio(self, gap: torch.Tensor) -> torch.Tensor:
        """``(B,)`` fp32 gaps -> ``(B,)`` float64 keep ratios."""
        ...


@runtime_checkable
class ScoreBudget(Protocol):
    """A budget that looks at all scores of a sample, not only at their gap."""

    @property
    def max_ratio(self) -> float:
        """Largest share of the tokens this budget can keep, in (0, 1]."""
        ...

    def counts(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``(B, N)`` fp32 scores and bool mask (True = prunable) -> ``(B,)`` int32, K of each sample."""
        ...


class _KeepRatio:
    def millionths(self, gap: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def keep_ratio(self, gap: torch.Tensor) -> torch.Tensor:
        """``(B,)`` fp32 gaps -> ``(B,)`` float64 keep ratios."""
        return self.millionths(gap).to(torch.float64) / MILLION


@dataclass(frozen=True)
class UniformBudget(_KeepRatio):
    """The same ratio for every sample. ``ratio`` in (0, 1]; 1 bypasses pruning bit for bit."""

    ratio: float

    def __post_init__(self) -> None:
        _check_ratio("ratio", self.ratio)

    @property
    def max_ratio(self) -> float:
        return self.ratio

    def millionths(self, gap: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gap, to_millionths(self.ratio), dtype=torch.int64)


@dataclass(frozen=True)
class ThresholdBudget(_KeepRatio):
    """Method A: ``conservative`` below ``gap_low``, ``aggressive`` from ``gap_high`` on, ``moderate`` between.

    Thresholds are compared in fp32, the type of a gap. They belong to one (model, weight) pair.
    """

    gap_low: float
    gap_high: float
    conservative: float
    moderate: float
    aggressive: float

    def __post_init__(self) -> None:
        for name in ("gap_low", "gap_high"):
            _check_finite(name, getattr(self, name))
        for name in TIERS:
            _check_ratio(name, getattr(self, name))
        if self.gap_low > self.gap_high:
            raise ValueError(f"gap_low must not exceed gap_high, got gap_low={self.gap_low}, gap_high={self.gap_high}")
        if not self.conservative > self.moderate > self.aggressive:
            raise ValueError(
                "keep ratios must satisfy conservative > moderate > aggressive, got "
                f"{self.conservative}, {self.moderate}, {self.aggressive}"
            )

    @property
    def max_ratio(self) -> float:
        return self.conservative

    def tier(self, gap: torch.Tensor) -> torch.Tensor:
        """``(B,)`` int64: 0 conservative, 1 moderate, 2 aggressive (see ``TIERS``)."""
        return (gap >= self.gap_low).long() + (gap >= self.gap_high).long()  # NaN compares false: conservative

    def millionths(self, gap: torch.Tensor) -> torch.Tensor:
        conservative, moderate, aggressive = (to_millionths(getattr(self, name)) for name in TIERS)
        tier = self.tier(gap)  # no table of ratios on the device: the copy to it would synchronise
        return torch.where(tier == 2, aggressive, torch.where(tier == 1, moderate, conservative))


@dataclass(frozen=True)
class LinearBudget(_KeepRatio):
    """Method B: ``clamp(target + slope * (gap - mean_gap), minimum, maximum)``, computed in float64.

    The sign of ``slope`` is free: the paper finds it negative, a document model may want it positive.
    """

    target: float
    slope: float
    mean_gap: float
    minimum: float = 0.3
    maximum: float = 0.95

    def __post_init__(self) -> None:
        for name in ("target", "slope", "mean_gap"):
            _check_finite(name, getattr(self, name))
        _check_range(self.minimum, self.maximum)

    @property
    def max_ratio(self) -> float:
        return self.maximum

    def millionths(self, gap: torch.Tensor) -> torch.Tensor:
        ratio = self.target + self.slope * (gap.to(torch.float64) - self.mean_gap)
        ratio = ratio.nan_to_num(nan=self.maximum).clamp(self.minimum, self.maximum)
        return (ratio * MILLION).round().to(torch.int64)


@dataclass(frozen=True)
class RelativeThresholdBudget:
    """Keep the tokens whose score exceeds ``q05 + beta * (q98 - q05)``, quantiles of the sample's own scores.

    A threshold on the scale of the sample: a page with much to read keeps more of it. ``q05`` and ``q98`` are order
    statistics of the N prunable tokens, number ``p * (N - 1) // 100`` in ascending order from 0, without interpolation.
    K is clamped to the shares ``minimum`` and ``maximum`` of N, and to at least one token. Ours, not the paper's.

    ``beta`` belongs to one (model, weight) pair. A ``beta`` below 0 keeps more than the top 95 %, above 1 next to none.
    """

    beta: float
    minimum: float = 0.05
    maximum: float = 1.0

    def __post_init__(self) -> None:
        _check_finite("beta", self.beta)
        _check_range(self.minimum, self.maximum)

    @property
    def max_ratio(self) -> float:
        return self.maximum

    def counts(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``(B, N)`` fp32 scores, bool mask -> ``(B,)`` int32; 0 where N is 0, the largest where a quantile is NaN."""
        return relative_counts(scores, mask, self.beta, self.minimum, self.maximum)


@dataclass(frozen=True)
class AtLeastRelevant:
    """A floor beneath any budget: keep no fewer tokens than look relevant, where they are unusually many.

    Relevant are tokens whose own score, before any `Spread`, exceeds ``q05 + beta * (q98 - q05)``, as
    `RelativeThresholdBudget` counts them. Where quantiles are not finite, all tokens count.

    Args:
        beta: place of the threshold between the two quantiles.
        usual: share of the tokens, in [0, 1], up to which their number is nothing unusual and the budget alone decides.
            `asymvlm.calibration.calibrate_budget` notes that of its samples; 0 holds the floor always.
    Raises:
        ValueError: naming the value found and the value wanted.
    """

    beta: float = RELEVANT
    usual: float = 0.0

    def __post_init__(self) -> None:
        _check_finite("beta", self.beta)
        if not isinstance(self.usual, (int, float)) or isinstance(self.usual, bool) or not 0 <= self.usual <= 1:
            raise ValueError(f"usual must be a share in [0, 1], got {self.usual!r}")

    def relevant(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``(B, N)`` fp32 scores, bool mask -> ``(B,)`` int32: tokens above the threshold; at least 1 of any."""
        return relative_counts(scores, mask, self.beta, minimum=1 / MILLION)

    def is_unusual(self, relevant: Any, num_tokens: Any) -> Any:
        """Is that number of tokens more than the usual share of them? Of numbers, or of integer tensors."""
        return relevant * MILLION > num_tokens * round(self.usual * MILLION)

    def floor(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``(B, N)`` fp32 scores, bool mask -> ``(B,)`` int32, the least K of each sample. Does not synchronise."""
        found = self.relevant(scores, mask)
        return torch.where(self.is_unusual(found.long(), mask.sum(-1)), found, 0)


def counts_scores(budget: object) -> TypeIs[ScoreBudget]:
    """``isinstance(budget, ScoreBudget)``, which torch.compile cannot trace."""
    return hasattr(budget, "counts")


def as_budget(budget: float | Budget | ScoreBudget) -> Budget | ScoreBudget:
    """A number is the keep ratio of every sample.

    Raises:
        ValueError: if it is neither a ratio in (0, 1] nor a budget.
    """
    if isinstance(budget, (int, float)):
        return UniformBudget(budget)
    if not (hasattr(budget, "millionths") or counts_scores(budget)):
        raise ValueError(f"budget must be a keep ratio in (0, 1] or a Budget, got {budget!r}")
    return budget


def budget_counts(
    budget: Budget | ScoreBudget, scores: torch.Tensor, gap: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """K of each sample under any budget, ``(B,)`` int32. Scores and mask are ``(B, N)``, gaps ``(B,)``."""
    if counts_scores(budget):
        return budget.counts(scores, mask)
    return keep_counts(gap, mask.sum(-1), budget)


def keep_counts(gap: torch.Tensor, num_tokens: torch.Tensor | int, budget: float | Budget) -> torch.Tensor:
    """Number of vision tokens each sample keeps: ``K = N * millionths // 1_000_000``, clamped to ``[1, N]``.

    Args:
        gap: ``(B,)`` fp32, from `importance_gap`.
        num_tokens: ``(B,)`` integer tensor on the device of ``gap``, or one int for all: prunable vision tokens N.
        budget: `UniformBudget`, `ThresholdBudget`, `LinearBudget`, or anything that satisfies `Budget`; a number is a
            ratio for all samples.
    Returns:
        ``(B,)`` int32 on the device of ``gap``; 0 where N is 0. Exact; does not synchronise.
    Raises:
        ValueError: if ``gap`` is not a 1-D fp32 tensor, ``num_tokens`` does not match it, or ``budget`` is no such.
    """
    known = as_budget(budget)
    if counts_scores(known):
        raise ValueError(f"budget must give a ratio for a gap, got {budget!r}, which counts scores")
    if gap.ndim != 1 or gap.dtype != torch.float32:
        raise ValueError(f"gap must be a (B,) float32 tensor, got {tuple(gap.shape)} {gap.dtype}")
    if isinstance(num_tokens, int):
        if num_tokens < 0:
            raise ValueError(f"num_tokens must be 0 or more, got {num_tokens}")
        num_tokens = torch.full_like(gap, num_tokens, dtype=torch.int64)
    if num_tokens.shape != gap.shape or num_tokens.dtype.is_floating_point or num_tokens.device != gap.device:
        raise ValueError(
            f"num_tokens must be an integer tensor of shape {tuple(gap.shape)} on {gap.device}, got "
            f"{tuple(num_tokens.shape)} {num_tokens.dtype} on {num_tokens.device}"
        )
    n = num_tokens.to(torch.int64)
    counts = (n * known.millionths(gap) // MILLION).clamp_min(1)
    return torch.minimum(counts, n.clamp_min(0)).to(torch.int32)


def _check_ratio(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a keep ratio in (0, 1], got {value!r}")


def _check_range(minimum: float, maximum: float) -> None:
    _check_ratio("minimum", minimum)
    _check_ratio("maximum", maximum)
    if minimum > maximum:
        raise ValueError(f"minimum must not exceed maximum, got {minimum} and {maximum}")


def _check_finite(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
