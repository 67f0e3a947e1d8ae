"""RelativeThresholdBudget counts what numpy counts, on every backend, ties and odd values included."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import asymvlm_kernels as ak
from asymvlm_kernels import RelativeThresholdBudget
from asymvlm_kernels.prefill.relative import relative_counts

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=("reference", "triton"), autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("ASYMVLM_BACKEND", request.param)


def expected(values: np.ndarray, beta: float, minimum: float, maximum: float) -> int:
    N = len(values)
    if N == 0:
        return 0
    ascending = np.roll(np.sort(values), int(np.isnan(values).sum())).astype(np.float64)  # NaN ranks below -inf
    low, high = ascending[5 * (N - 1) // 100], ascending[98 * (N - 1) // 100]
    with np.errstate(invalid="ignore"):
        threshold = low + beta * (high - low)
    least, most = (max(N * round(share * 1e6) // 10**6, 1) for share in (minimum, maximum))
    if not math.isfinite(threshold):
        return most
    return int(min(max((values.astype(np.float64) > threshold).sum(), least), most))


def check(scores, mask=None, beta=0.4, minimum=0.05, maximum=1.0):
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    result = relative_counts(scores, mask, beta, minimum, maximum)
    wanted = [expected(row[keep].numpy(), beta, minimum, maximum) for row, keep in zip(scores.cpu(), mask.cpu())]
    assert result.dtype == torch.int32
    assert result.tolist() == wanted


@pytest.mark.parametrize("N", [0, 1, 2, 5, 20, 21, 101, 2500])
def test_counts(N, device):
    torch.manual_seed(N)
    scores = torch.randn(3, N, device=device)
    mask = torch.rand(3, N, device=device) < 0.7
    for beta in (-0.2, 0.0, 0.37, 1.0, 1.5) if N == 21 else (0.37,):
        check(scores, mask, beta)
    check((scores * 4).round(), mask)  # ties stay on one side of the threshold together
    check(scores, None, 0.5, 0.3, 0.4)


@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
def test_special_values(special, share, device):
    torch.manual_seed(0)
    scores = torch.randn(2, 300, device=device)
    scores[torch.rand(2, 300, device=device) < share] = special
    check(scores, maximum=0.8)


def test_a_constant_row_keeps_the_minimum(device):
    check(torch.full((2, 40), 0.25, device=device), minimum=0.1)
    assert relative_counts(torch.ones(1, 40), torch.ones(1, 40, dtype=torch.bool), 0.5, 0.1).item() == 4


def test_a_threshold_on_a_score_excludes_it(device):
    """Quantiles 0 and 1 of a row: with beta 0.5, exactly 0.5 is not above the threshold."""
    scores = torch.tensor([[0.0] * 6 + [0.5] * 20 + [0.75] * 20 + [1.0] * 54], device=device)
    assert relative_counts(scores, torch.ones_like(scores, dtype=torch.bool), 0.5).item() == 74


@pytest.mark.parametrize("N", [16385, 40000])
def test_long_rows(N, device):
    torch.manual_seed(0)
    check(torch.randn(1, N, device=device), torch.rand(1, N, device=device) < 0.9, 0.3)


def test_prune_sequence_keeps_that_many(device):
    torch.manual_seed(0)
    embeds = torch.randn(3, 60, 16, device=device)
    place = torch.arange(60, device=device).expand(3, 60)
    vision, text = (place >= 5) & (place < 50), (place < 5) | (place >= 56)
    text[2] = False  # a row without text keeps everything
    budget = RelativeThresholdBudget(0.5, minimum=0.1)
    pruned = ak.prune_sequence(embeds, vision, text, None, budget)
    wanted = budget.counts(pruned.scores, vision)
    assert pruned.counts.tolist() == [*wanted[:2].tolist(), 45]
    above = (pruned.scores > pruned.scores.masked_fill(~vision, -INF).sort(-1).values[:, -int(wanted[0]) - 1, None])[0]
    assert set(above.nonzero()[:, 0].tolist()) <= set(pruned.index[0].tolist())
    for row in range(2):  # a row alone keeps what it keeps in a batch
        alone = ak.prune_sequence(embeds[row, None], vision[row, None], text[row, None], None, budget)
        assert alone.counts.item() == wanted[row]


def test_images_ranked_apart_share_the_ratio(device):
    torch.manual_seed(1)
    embeds = torch.randn(1, 70, 16, device=device)
    place = torch.arange(70, device=device)[None]
    vision, groups = place < 60, (place >= 20).long()
    budget = RelativeThresholdBudget(0.6, minimum=0.05)
    pruned = ak.prune_sequence(embeds, vision, ~vision, None, budget, groups=groups, per_image=True)
    ratio = budget.counts(pruned.scores, vision).item() / 60
    kept = pruned.index[0][pruned.index[0] < 60]
    assert [int((kept < 20).sum()), int((kept >= 20).sum())] == [max(8, int(20 * ratio)), max(8, int(40 * ratio))]


@pytest.mark.parametrize(
    "values,message",
    [
        (dict(beta=NAN), "beta must be a finite number, got nan"),
        (dict(beta=0.5, minimum=0.0), "minimum must be a keep ratio"),
        (dict(beta=0.5, minimum=0.5, maximum=0.4), "minimum must not exceed maximum, got 0.5 and 0.4"),
    ],
)
def test_bad_budgets_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RelativeThresholdBudget(**values)
