"""Rows too long for registers: bins of scores, the bin that holds a wanted key, and what happens where it overflows."""

from __future__ import annotations

import pytest
import torch
from sequences import BUDGETS, assert_same, sequence

from asymvlm_kernels import UniformBudget
from asymvlm_kernels._triton import tl, triton
from asymvlm_kernels.prefill.order import order_key
from asymvlm_kernels.prefill.prune import scratch, two_launches
from asymvlm_kernels.prefill.prune.keys import bin_of
from asymvlm_kernels.tuning.prune import RankConfig, rank_config

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def in_chunks(monkeypatch):
    """Rows of 128 places count as long, and a bin of more than 128 keys overflows."""
    monkeypatch.setattr(two_launches, "rank_config", lambda S: RankConfig(128, chunked=True))


@triton.jit
def _bins_kernel(scores_ptr, bins_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    keys = order_key(tl.load(scores_ptr + offs, mask=offs < N, other=0.0), offs < N)
    tl.store(bins_ptr + offs, bin_of(keys), mask=offs < N)


def bins_of(*scores: float, device) -> list[int]:
    values = torch.tensor(scores, device=device)
    bins = torch.empty(len(scores), dtype=torch.int32, device=device)
    _bins_kernel[(1,)](values, bins, len(scores), BLOCK=1 << (len(scores) - 1).bit_length())
    return bins.tolist()


def test_bins_ascend_with_the_scores(device):
    torch.manual_seed(0)
    spread = torch.randn(900) * 10 ** torch.empty(900).uniform_(-6, 3)
    edges = torch.tensor([2.0**e for e in range(-14, 6)])
    scores = torch.cat([spread, edges, -edges, torch.tensor([INF, -INF, 0.0])]).sort().values.tolist()
    bins = bins_of(*scores, device=device)
    assert bins == sorted(bins)
    assert min(bins) == 0
    assert max(bins) == scratch.BINS - 2  # the last one is for tokens that must stay
    assert bins_of(NAN, -INF, -0.0, 2.0**-13, device=device) == [0, 0, 1023, 1023]
    near, far = bins_of(0.125, 0.1875, device=device)
    assert far - near == 32  # 64 bins an octave


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
# keys that spread over the bins; too many in the middle; too many in the last; few enough, all in the middle
@pytest.mark.parametrize("S,scale", [(400, 1.0), (400, 1e-6), (400, 1e4), (110, 1e-6)])
def test_long_rows_rank_as_short_ones(S, scale, budget, device, monkeypatch):
    case = sequence(1, S, 8, exact=False, seed=5, device=device)
    assert case.weight is not None
    case.weight *= scale
    short = case.score_select(budget)
    monkeypatch.setattr(two_launches, "rank_config", lambda S: RankConfig(128, chunked=True))
    assert_same(case.score_select(budget), short)


@pytest.mark.parametrize("budget", [BUDGETS[2], UniformBudget(0.9)], ids=str)
def test_ties_overflow_a_bin_and_are_still_exact(budget, device, in_chunks):
    case = sequence(2, 300, 4, seed=5, device=device)
    case.embeds[1, 7] = NAN
    assert_same(case.score_select(budget), case.score_select(budget, reference=True))


@pytest.mark.parametrize("capacity", [300, 20, 0])  # 20: fewer than the tokens that must stay
def test_capacity_cuts_a_long_row(capacity, device, in_chunks):
    case = sequence(2, 300, 8, text=0.2, device=device)
    expected = case.score_select(BUDGETS[3], reference=True, capacity=capacity)
    assert_same(case.score_select(BUDGETS[3], capacity=capacity), expected)


def test_long_rows_without_text_or_vision(device, in_chunks):
    case = sequence(3, 200, 8, device=device)
    case.text_mask[0] = False
    case.vision_mask[1] = False
    case.text_mask[2] = case.vision_mask[2] = case.protect[2] = False
    result = case.score_select(UniformBudget(0.25))
    assert_same(result, case.score_select(UniformBudget(0.25), reference=True))
    assert all(not counters.any() for counters in scratch._counters.values())  # the bins too


@pytest.mark.slow
def test_a_really_long_row(device):
    S = 8200
    assert rank_config(S).chunked
    case = sequence(1, S, 4, torch.bfloat16, text=0.002, device=device)
    assert_same(case.score_select(BUDGETS[2]), case.score_select(BUDGETS[2], reference=True))
