"""Gap -> ratio -> count: exact integers, tiers, Method B in float64, NaN gaps, refused settings."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from asymvlm_kernels import Budget, LinearBudget, ThresholdBudget, UniformBudget, keep_counts

RATIOS = ("0.3", "0.35", "0.5", "0.55", "0.65", "0.7", "0.75", "0.95")
NAN, INF = float("nan"), float("inf")


def gaps(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("ratio", RATIOS)
def test_counts_are_exact_integers(ratio, device):
    N = torch.arange(3000, device=device)
    counts = keep_counts(torch.zeros(3000, device=device), N, UniformBudget(float(ratio)))
    assert counts.dtype == torch.int32
    assert counts.tolist() == [min(max(math.floor(n * Fraction(ratio)), 1), n) for n in range(3000)]


def test_a_floating_floor_would_differ():
    assert keep_counts(gaps(0.0), 90, UniformBudget(0.7)).item() == 63
    assert math.floor(90 * 0.7) == 62


def test_count_stays_between_one_and_all():
    tiny, whole = UniformBudget(1e-9), UniformBudget(1.0)
    assert [keep_counts(gaps(0.0), n, tiny).item() for n in (0, 1, 5, 1000)] == [0, 1, 1, 1]
    assert [keep_counts(gaps(0.0), n, whole).item() for n in (0, 1, 5, 65536)] == [0, 1, 5, 65536]


def test_threshold_tiers_meet_at_their_borders():
    budget = ThresholdBudget(0.1, 0.3, 0.9, 0.5, 0.2)
    low, high = torch.tensor(0.1, dtype=torch.float32).item(), torch.tensor(0.3, dtype=torch.float32).item()
    just = 1e-8
    at = gaps(-INF, low - just, low, 0.2, high - 4 * just, high, INF, NAN)
    assert budget.tier(at).tolist() == [0, 0, 1, 1, 1, 2, 2, 0]
    assert budget.millionths(at).tolist() == [900000, 900000, 500000, 500000, 500000, 200000, 200000, 900000]
    assert budget.max_ratio == 0.9


@pytest.mark.parametrize("slope", [-1.7, 0.0, 2.3])
def test_linear_budget_is_computed_in_float64(slope):
    budget = LinearBudget(0.6, slope, 0.2, minimum=0.3, maximum=0.95)
    torch.manual_seed(0)
    at = torch.rand(2000)
    wanted = [round(min(max(0.6 + slope * (g - 0.2), 0.3), 0.95) * 1_000_000) for g in at.double().tolist()]
    assert budget.millionths(at).tolist() == wanted
    assert budget.keep_ratio(at).dtype == torch.float64
    assert budget.keep_ratio(at).tolist() == [m / 1_000_000 for m in wanted]


def test_linear_budget_clamps():
    budget = LinearBudget(0.6, 1.0, 0.2, minimum=0.3, maximum=0.95)
    assert budget.millionths(gaps(-INF, -5.0, 0.2, 5.0, INF)).tolist() == [300000, 300000, 600000, 950000, 950000]


@pytest.mark.parametrize(
    "budget",
    [
        UniformBudget(0.4),
        ThresholdBudget(0.1, 0.2, 0.8, 0.6, 0.4),
        LinearBudget(0.5, 0.0, 0.1),
        LinearBudget(0.5, 1, 0),
    ],
    ids=str,
)
def test_unknown_gap_keeps_most(budget):
    assert isinstance(budget, Budget)
    assert budget.keep_ratio(gaps(NAN)).item() == pytest.approx(budget.max_ratio, abs=5e-7)
    assert keep_counts(gaps(NAN), 100, budget).item() == round(100 * budget.max_ratio)


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.0001, NAN, INF, True, "0.5", None])
def test_ratio_outside_zero_to_one_is_refused(ratio):
    message = r"must be a keep ratio in \(0, 1\], got "
    with pytest.raises(ValueError, match="^ratio " + message):
        UniformBudget(ratio)
    with pytest.raises(ValueError, match="^moderate " + message):
        ThresholdBudget(0.1, 0.2, 0.9, ratio, 0.1)
    with pytest.raises(ValueError, match="^maximum " + message):
        LinearBudget(0.5, 1.0, 0.1, maximum=ratio)


@pytest.mark.parametrize("value", [NAN, INF, -INF, True, "0.1", None])
def test_threshold_that_is_not_finite_is_refused(value):
    message = "must be a finite number, got "
    with pytest.raises(ValueError, match="^gap_low " + message):
        ThresholdBudget(value, 0.2, 0.9, 0.5, 0.1)
    with pytest.raises(ValueError, match="^slope " + message):
        LinearBudget(0.5, value, 0.1)


def test_settings_out_of_order_are_refused():
    with pytest.raises(ValueError, match=r"gap_low must not exceed gap_high, got gap_low=0\.3, gap_high=0\.2"):
        ThresholdBudget(0.3, 0.2, 0.9, 0.5, 0.1)
    for ratios in ((0.5, 0.9, 0.1), (0.9, 0.1, 0.5), (0.9, 0.5, 0.5)):
        with pytest.raises(ValueError, match=r"conservative > moderate > aggressive, got 0\.\d, 0\.\d, 0\.\d"):
            ThresholdBudget(0.1, 0.2, *ratios)
    with pytest.raises(ValueError, match=r"minimum must not exceed maximum, got 0\.9 and 0\.5"):
        LinearBudget(0.5, 1.0, 0.1, minimum=0.9, maximum=0.5)


def test_keep_counts_names_what_it_found():
    budget = UniformBudget(0.5)
    with pytest.raises(ValueError, match=r"gap must be a \(B,\) float32 tensor, got \(2, 3\) torch.float32"):
        keep_counts(torch.zeros(2, 3), 5, budget)
    with pytest.raises(ValueError, match=r"gap must be a \(B,\) float32 tensor, got \(2,\) torch.float64"):
        keep_counts(torch.zeros(2).double(), 5, budget)
    with pytest.raises(ValueError, match=r"num_tokens must be an integer tensor of shape \(2,\) .* got \(3,\)"):
        keep_counts(torch.zeros(2), torch.ones(3, dtype=torch.int64), budget)
    with pytest.raises(ValueError, match=r"num_tokens must be an integer tensor .* got \(2,\) torch.float32"):
        keep_counts(torch.zeros(2), torch.ones(2), budget)
