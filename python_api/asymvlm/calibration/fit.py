"""Candidates of each method, fitted to a table of metric by row and keep ratio. Plain arithmetic, no model.

Every candidate keeps the wanted share on average over the rows, after clamping. Its metric is predicted from the table,
linearly between measured ratios.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asymvlm.settings.budget_file import AnyBudget
from asymvlm_kernels import LinearBudget, RelativeThresholdBudget, ThresholdBudget

GRID = 20  # gap quantiles of Method A: 1/20, ... 19/20
SLOPES = 25  # of each sign, in Method B
TOLERANCE = 0.005  # by which the average of a candidate may exceed the wanted one


@dataclass(frozen=True)
class Candidate:
    budget: AnyBudget
    average: float  # mean keep ratio of the rows
    predicted: float  # mean metric


@dataclass(frozen=True, eq=False)
class Table:
    """Measured metric: rows by ratios."""

    ratios: torch.Tensor  # (R,) float64, ascending
    metric: torch.Tensor  # (n, R) float64
    gaps: torch.Tensor  # (n,) fp32
    num_tokens: torch.Tensor  # (n,) int64

    def predict(self, ratio: torch.Tensor) -> torch.Tensor:
        """``(n,)`` ratios -> ``(n,)`` metric, linear between measured ratios, constant beyond them."""
        ratio = ratio.clamp(self.ratios[0], self.ratios[-1])
        right = torch.searchsorted(self.ratios, ratio).clamp(1, len(self.ratios) - 1)
        left = right - 1
        part = (ratio - self.ratios[left]) / (self.ratios[right] - self.ratios[left])
        low, high = (self.metric.gather(1, place[:, None])[:, 0] for place in (left, right))
        return low + part * (high - low)


def threshold_candidates(table: Table, average: float) -> list[Candidate]:
    """Method A: every pair of gap quantiles with every falling triple of measured ratios that fits the average."""
    order = table.gaps.argsort()
    gaps, n = table.gaps[order], len(order)
    sums = torch.cat([torch.zeros(1, len(table.ratios), dtype=torch.float64), table.metric[order].cumsum(0)])
    cuts = sorted({max(1, n * i // GRID) for i in range(1, GRID)})
    R = len(table.ratios)
    triples = torch.combinations(torch.arange(R), 3).flip(-1)  # conservative, moderate, aggressive: falling
    found = []
    for i, low in enumerate(cuts):
        for high in cuts[i:]:
            if gaps[low - 1] == gaps[low] or (high < n and gaps[high - 1] == gaps[high]):
                continue  # equal gaps cannot be told apart
            parts = torch.stack([sums[low], sums[high] - sums[low], sums[n] - sums[high]])  # (3, R)
            shares = torch.tensor([low, high - low, n - high], dtype=torch.float64) / n
            means = (table.ratios[triples] * shares).sum(-1)
            metric = torch.stack([parts[tier, triples[:, tier]] for tier in range(3)]).sum(0) / n
            allowed = means <= average + TOLERANCE
            if not bool(allowed.any()):
                continue
            best = int(torch.where(allowed, metric + 1e-9 * means, -torch.inf).argmax())
            tiers = table.ratios[triples[best]].tolist()
            budget = ThresholdBudget(float(gaps[low]), float(gaps[min(high, n - 1)]), *tiers)
            found.append(Candidate(budget, float(means[best]), float(metric[best])))
    return _best_first(found)


def linear_candidates(table: Table, average: float, minimum: float, maximum: float) -> list[Candidate]:
    """Method B: slopes of both signs, each with the target that gives the average after clamping; then finer."""
    gaps = table.gaps.double()
    mean, spread = float(gaps.mean()), float(gaps.std(correction=0))
    if spread == 0:
        slopes = torch.zeros(1, dtype=torch.float64)
    else:
        steepest = 2 * (maximum - minimum) / spread  # one standard deviation crosses the whole range twice
        slopes = torch.linspace(-1, 1, 2 * SLOPES + 1, dtype=torch.float64) ** 3 * steepest  # dense around 0
    found = [_linear(table, float(slope), mean, average, minimum, maximum) for slope in slopes]
    best = _best_first(found)[0].budget
    assert isinstance(best, LinearBudget)
    near = sorted(slopes.tolist(), key=lambda slope: abs(slope - best.slope))[:3]
    fine = torch.linspace(min(near), max(near), 11, dtype=torch.float64).tolist() if len(near) == 3 else []
    found += [_linear(table, slope, mean, average, minimum, maximum) for slope in fine]
    return _best_first(found)


def _linear(table: Table, slope: float, mean: float, average: float, minimum: float, maximum: float) -> Candidate:
    away = slope * (table.gaps.double() - mean)

    def ratios(target: float) -> torch.Tensor:
        return (target + away).clamp(minimum, maximum)

    reach = float(away.abs().max())
    target = bisect(lambda value: float(ratios(value).mean()) - average, minimum - reach, maximum + reach)
    kept = ratios(target)
    budget = LinearBudget(target, slope, mean, minimum, maximum)
    return Candidate(budget, float(kept.mean()), float(table.predict(kept).mean()))


def relative_candidates(
    table: Table, scores: torch.Tensor, mask: torch.Tensor, average: float, bounds: list[tuple[float, float]]
) -> list[Candidate]:
    """The relative threshold: beta from the average, for each pair of clamps. Scores and mask are ``(n, N)``."""
    found = []
    for minimum, maximum in bounds:

        def kept(beta: float, minimum: float = minimum, maximum: float = maximum) -> torch.Tensor:
            counts = RelativeThresholdBudget(beta, minimum, maximum).counts(scores, mask)
            return counts.double() / table.num_tokens

        beta = bisect(lambda value, kept=kept: average - float(kept(value).mean()), -2.0, 3.0, steps=24)
        ratios = kept(beta)
        budget = RelativeThresholdBudget(beta, minimum, maximum)
        found.append(Candidate(budget, float(ratios.mean()), float(table.predict(ratios).mean())))
    return _best_first(found)


def bisect(rising: object, low: float, high: float, steps: int = 60) -> float:
    """Where a rising function is 0, between two bounds."""
    for _ in range(steps):
        middle = (low + high) / 2
        if rising(middle) < 0:  # type: ignore[operator]
            low = middle
        else:
            high = middle
    return high


def _best_first(candidates: list[Candidate]) -> list[Candidate]:
    """By falling metric; among equals the one that keeps less."""
    return sorted(candidates, key=lambda candidate: (-round(candidate.predicted, 9), candidate.average))
