"""select_tokens equals ``sort(descending, stable)[:K].sort()``: ties, signed zeros, NaN, masks, counts, lengths."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from asymvlm_kernels import select_tokens

BACKENDS = ("reference", "triton", "cuda")
NAN, INF = float("nan"), float("inf")
TIED = (0.5, -0.5, 0.0, -0.0, 1e-45, -1e-45, 3e38, INF, -INF, NAN)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("ASYMVLM_BACKEND", request.param)
    if request.param == "cuda":
        request.getfixturevalue("cuda_library")


def expected_index(scores: torch.Tensor, count: int, mask: torch.Tensor, capacity: int) -> list[int]:
    """One row by Python's stable sort, best first: numbers by value (so -0 ties with 0), then NaN."""
    places = [i for i in range(len(scores)) if mask[i]]
    values = scores.tolist()
    ranked = sorted(places, key=lambda i: (values[i] != values[i], -values[i] if values[i] == values[i] else 0))
    kept = sorted(ranked[: max(min(count, capacity), 0)])
    return kept + [-1] * (capacity - len(kept))


def check(scores, counts, mask=None, capacity=None):
    result = select_tokens(scores, counts, mask=mask, capacity=capacity)
    full = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    width = scores.shape[1] if capacity is None else capacity
    rows = zip(scores.cpu(), counts.tolist(), full.cpu(), strict=True)
    assert result.dtype == torch.int64
    assert result.tolist() == [expected_index(*row, width) for row in rows]


@pytest.mark.parametrize("N", [1, 2, 3, 5, 127, 128, 129, 1000])
def test_every_count(N, device):
    torch.manual_seed(N)
    scores = torch.randn(6, N, device=device)
    check(scores, torch.tensor([0, 1, N // 3, N - 1, N, N + 9], device=device))
    check(scores, torch.tensor([-1, 1, N // 3, N - 1, N, 2**40], device=device))
    check(scores, torch.tensor([0, 1, N // 3, N - 1, N, 2**31 - 1], device=device, dtype=torch.int32))


@pytest.mark.parametrize("capacity", [0, 1, 40, 128, 129, 700])
def test_capacity_smaller_and_larger(capacity, device):
    torch.manual_seed(0)
    check(torch.randn(4, 128, device=device), torch.tensor([0, 39, 64, 128], device=device), capacity=capacity)


def test_equal_to_a_stable_sort(device):
    torch.manual_seed(0)
    scores = torch.randn(3, 2500, device=device).mul(20).round()  # about 60 values: ties everywhere
    for count in (1, 625, 1625, 2500):
        best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values
        counts = torch.full((3,), count, device=device)
        assert torch.equal(select_tokens(scores, counts, capacity=count), best)


def test_kept_scores_are_not_below_dropped_ones(device):
    torch.manual_seed(0)
    scores = torch.randn(2, 4096, device=device)
    index = select_tokens(scores, torch.full((2,), 1300, device=device), capacity=1300)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, index, True)
    assert kept.sum(-1).tolist() == [1300, 1300]
    assert bool((scores.masked_fill(~kept, INF).amin(-1) >= scores.masked_fill(kept, -INF).amax(-1)).all())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_scores(device, data):
    N = data.draw(st.integers(1, 40))
    value = st.one_of(st.sampled_from(TIED), st.floats(width=32))
    scores = torch.tensor([data.draw(st.lists(value, min_size=N, max_size=N))], device=device)
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=N, max_size=N))], device=device)
    count = torch.tensor([data.draw(st.integers(-1, N + 1))], device=device)
    check(scores, count, data.draw(st.sampled_from([None, mask])), data.draw(st.sampled_from([None, 3, N + 2])))


def test_ragged_masks(device):
    torch.manual_seed(0)
    scores = torch.randn(4, 300, device=device)
    mask = torch.arange(300, device=device) < torch.tensor([[0], [1], [150], [300]], device=device)
    check(scores, torch.tensor([5, 5, 200, 200], device=device), mask)
    scores[~mask] = INF  # what lies outside the mask never counts
    check(scores, torch.tensor([5, 5, 200, 200], device=device), mask)


@pytest.mark.parametrize("N", [100, 3000])
def test_equal_scores_keep_the_first_and_write_no_more(N, device):
    check(torch.ones(2, N, device=device), torch.tensor([40, 40], device=device), capacity=40)


def test_outliers_do_not_blur_the_others(device):
    torch.manual_seed(0)
    scores = torch.randn(3, 2000, device=device).mul(0.01)  # all but one fall into one bin of a histogram
    scores[0, 7], scores[1, 9], scores[2, 11] = 1e30, -1e30, INF
    for count in (1, 500, 1301, 1999):
        check(scores, torch.full((3,), count, device=device))


def test_signed_zeros_tie(device):
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1e-45, 1e-45]], device=device)
    for count in range(7):
        check(scores, torch.tensor([count], device=device))


def test_not_a_number_ranks_last_but_before_nothing(device):
    scores = torch.tensor([[NAN, -INF, NAN, 1.0]], device=device)
    for count in range(5):
        check(scores, torch.tensor([count], device=device))
    negative = torch.tensor([-1], dtype=torch.int32).view(torch.float32).item()  # all bits set: a NaN too
    check(torch.tensor([[negative, -INF, NAN, INF]], device=device), torch.tensor([3], device=device))


@pytest.mark.parametrize("N", [16384, 16385, 65536])  # the longest row in registers, and rows read in chunks
def test_long_rows(N, device):
    torch.manual_seed(0)
    scores = torch.randn(1, N, device=device).mul(300).round()
    mask = torch.rand(1, N, device=device) < 0.8
    check(scores, torch.tensor([N // 2], device=device), mask)
    check(torch.zeros(1, N, device=device), torch.tensor([N - 1], device=device))  # all equal


def test_strided_scores_mask_and_counts(device):
    torch.manual_seed(0)
    scores = torch.randn(50, 3, device=device).mT
    mask = torch.rand(3, 100, device=device)[:, ::2] < 0.7
    check(scores, torch.tensor([10, 0, 20, 0, 30], device=device)[::2], mask)
    check(scores, torch.tensor([10], device=device).expand(3), mask)


def test_empty_axes(device):
    assert (
        select_tokens(torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device)).numel() == 0
    )
    nothing = select_tokens(torch.empty(2, 0, device=device), torch.tensor([0, 1], device=device), capacity=3)
    assert nothing.tolist() == [[-1] * 3] * 2
