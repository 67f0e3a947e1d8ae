"""The fits of calibration on made-up tables: averages kept, signs found, the best of a small search space."""

from __future__ import annotations

import itertools

import pytest
import torch

from asymvlm.calibration import fit
from asymvlm_kernels import RelativeThresholdBudget, ThresholdBudget

RATIOS = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)


def table_of(need: torch.Tensor, gaps: torch.Tensor) -> fit.Table:
    """A row scores 1 from the ratio on that it needs."""
    metric = (need[:, None] <= RATIOS).double()
    return fit.Table(RATIOS, metric, gaps, torch.full(need.shape, 100))


@pytest.fixture
def gaps() -> torch.Tensor:
    return torch.rand(200, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_slope_has_the_sign_of_the_need(gaps, sign):
    need = 0.5 + sign * 0.6 * (gaps.double() - 0.5)
    table = table_of(need, gaps)
    best = fit.linear_candidates(table, 0.52, 0.1, 0.9)[0]
    assert best.budget.slope * sign > 0.2
    assert best.predicted > float(table.predict(torch.full((200,), 0.52).double()).mean()) + 0.02
    kept = best.budget.keep_ratio(gaps)
    assert float(kept.mean()) == pytest.approx(0.52, abs=1e-3)  # after clamping
    assert best.average == pytest.approx(float(kept.mean()), abs=1e-5)


def test_every_linear_candidate_keeps_the_average(gaps):
    table = table_of(torch.rand(200).double(), gaps)
    for candidate in fit.linear_candidates(table, 0.4, 0.1, 0.9):
        assert float(candidate.budget.keep_ratio(gaps).mean()) == pytest.approx(0.4, abs=1e-4)


def test_equal_gaps_leave_a_slope_of_zero():
    table = table_of(torch.rand(20).double(), torch.full((20,), 0.25))
    (best,) = fit.linear_candidates(table, 0.4, 0.1, 0.9)
    assert best.budget.slope == 0
    assert fit.threshold_candidates(table, 0.4) == []


def test_thresholds_are_the_best_of_all(gaps):
    """Against a plain search over the same quantiles and ratios, through the budget itself."""
    gaps = gaps[:20]
    table = table_of(0.9 - 0.7 * gaps.double(), gaps)
    best = fit.threshold_candidates(table, 0.5)[0]
    ordered = gaps.sort().values
    wanted = 0.0
    for low, high in itertools.combinations_with_replacement(range(1, 20), 2):
        for aggressive, moderate, conservative in itertools.combinations(RATIOS.tolist(), 3):
            budget = ThresholdBudget(float(ordered[low]), float(ordered[high]), conservative, moderate, aggressive)
            ratio = budget.keep_ratio(gaps)
            if float(ratio.mean()) <= 0.5 + fit.TOLERANCE:
                wanted = max(wanted, float(table.predict(ratio).mean()))
    assert best.predicted == pytest.approx(wanted)
    ratio = best.budget.keep_ratio(gaps)
    assert float(ratio.mean()) == pytest.approx(best.average)
    assert float(table.predict(ratio).mean()) == pytest.approx(best.predicted)
    assert best.average <= 0.5 + fit.TOLERANCE


def test_beta_gives_the_average():
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(50, 120, generator=generator) ** torch.linspace(0.3, 3, 50)[:, None]
    mask = torch.arange(120) < torch.randint(60, 121, (50, 1), generator=generator)
    table = fit.Table(RATIOS, torch.rand(50, 5).double(), torch.rand(50), mask.sum(-1))
    candidates = fit.relative_candidates(table, scores, mask, 0.35, [(0.05, 1.0), (0.2, 0.6)])
    assert {(c.budget.minimum, c.budget.maximum) for c in candidates} == {(0.05, 1.0), (0.2, 0.6)}
    for candidate in candidates:
        assert isinstance(candidate.budget, RelativeThresholdBudget)
        kept = candidate.budget.counts(scores, mask).double() / mask.sum(-1)
        assert float(kept.mean()) == pytest.approx(candidate.average)
        assert candidate.average == pytest.approx(0.35, abs=0.01)


def test_predictions_are_linear_between_rungs():
    table = fit.Table(RATIOS, torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]]).double(), torch.zeros(1), torch.tensor([10]))
    for ratio, value in ((0.05, 0), (0.1, 0), (0.2, 0.5), (0.4, 1), (0.6, 2), (0.9, 3), (1.0, 3)):
        assert table.predict(torch.tensor([ratio], dtype=torch.float64)).item() == pytest.approx(value)
