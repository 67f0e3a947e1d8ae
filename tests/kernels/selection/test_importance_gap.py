"""importance_gap is the difference of two order statistics, exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asymvlm_kernels import importance_gap

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=("reference", "triton", "cuda"), autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("ASYMVLM_BACKEND", request.param)
    if request.param == "cuda":
        request.getfixturevalue("cuda_library")


def expected_gap(values: np.ndarray) -> float:
    """numpy sorts NaN to the end; the method ranks it below -inf."""
    N = len(values)
    if N == 0:
        return NAN
    ascending = np.sort(values)
    ascending = np.roll(ascending, int(np.isnan(values).sum()))
    k = max(1, N // 4)
    with np.errstate(invalid="ignore"):
        return float(ascending[N - k] - ascending[k - 1])


def check(scores, mask=None):
    result = importance_gap(scores, mask)
    full = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    expected = [expected_gap(row[keep].numpy()) for row, keep in zip(scores.cpu(), full.cpu(), strict=True)]
    assert result.dtype == torch.float32
    assert np.array_equal(result.cpu().numpy(), np.array(expected, dtype=np.float32), equal_nan=True)


@pytest.mark.parametrize("N", [*range(10), 127, 128, 129, 256, 2500, 4097])
def test_order_statistics(N, device):
    torch.manual_seed(N)
    check(torch.randn(2, N, device=device))
    check(torch.randn(2, N, device=device).mul(4).round())  # ties
    check(torch.randn(3, N, device=device), torch.rand(3, N, device=device) < 0.6)


def test_ragged_masks(device):
    torch.manual_seed(0)
    scores = torch.randn(6, 300, device=device)
    mask = torch.arange(300, device=device) < torch.tensor([[0], [1], [3], [4], [150], [300]], device=device)
    scores[~mask] = INF
    check(scores, mask)


@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_special_values(special, share, device):
    torch.manual_seed(0)
    scores = torch.randn(2, 400, device=device)
    scores[torch.rand(2, 400, device=device) < share] = special
    check(scores)


def test_signed_zeros_are_equal(device):
    check(torch.tensor([[0.0, -0.0, -0.0, 0.0], [-0.0, -1.0, 0.0, 1.0]], device=device))


@pytest.mark.parametrize("N", [16384, 16385, 65536])
def test_long_rows(N, device):
    torch.manual_seed(0)
    check(torch.randn(1, N, device=device), torch.rand(1, N, device=device) < 0.9)
    check(torch.randn(1, N, device=device).mul(3).round())


def test_strided_scores_and_mask(device):
    torch.manual_seed(0)
    check(torch.randn(50, 3, device=device).mT, torch.rand(3, 100, device=device)[:, ::2] < 0.7)


def test_no_rows(device):
    assert importance_gap(torch.empty(0, 5, device=device)).shape == (0,)
