"""soft_mask is the literal formula, row by row, and its gradient takes theta along or not."""

from __future__ import annotations

import math

import pytest
import torch

from asymvlm_kernels.training.soft_mask import soft_mask

NAN, INF = float("nan"), float("inf")


def literal(scores: list[float], count: int, strength: float, temperature: float) -> list[float]:
    theta = sorted(scores, reverse=True)[count - 1]
    return [-strength / (1 + math.exp(-(theta - score) / temperature)) for score in scores]


def test_rows_equal_the_formula(device):
    torch.manual_seed(0)
    scores = torch.randn(3, 20, device=device)
    mask = torch.rand(3, 20, device=device) < 0.7
    counts = torch.tensor([1, 4, int(mask[2].sum())], device=device)
    result = soft_mask(scores, counts, mask, strength=3.0, temperature=0.2)
    for b in range(3):
        wanted = literal(scores[b][mask[b]].tolist(), int(counts[b]), 3.0, 0.2)
        assert torch.allclose(result[b][mask[b]].cpu(), torch.tensor(wanted), rtol=1e-5, atol=1e-7)
        assert not result[b][~mask[b]].any()


@pytest.mark.parametrize("theta_grad", [False, True])
def test_gradient(theta_grad):
    torch.manual_seed(0)
    mask = torch.rand(2, 8) < 0.8
    counts = torch.tensor([2, 3])
    scores = torch.randn(2, 8, dtype=torch.double, requires_grad=True)
    held = scores.detach().masked_fill(~mask, -INF).sort(-1, descending=True).values.gather(-1, counts[:, None] - 1)

    def formula(values):
        theta = values.masked_fill(~mask, -INF).sort(-1, descending=True).values.gather(-1, counts[:, None] - 1)
        return (-5 * torch.sigmoid((theta if theta_grad else held) - values)).masked_fill(~mask, 0)

    weights = torch.randn(2, 8, dtype=torch.double)
    (wanted,) = torch.autograd.grad((formula(scores) * weights).sum(), scores)
    (found,) = torch.autograd.grad((soft_mask(scores, counts, mask, theta_grad=theta_grad) * weights).sum(), scores)
    assert torch.allclose(found, wanted)
    if theta_grad:  # raising all scores alike changes nothing: the free direction is gone
        assert torch.allclose(found.sum(-1), torch.zeros(2, dtype=torch.double))


def test_special_scores_get_the_whole_penalty_and_no_gradient():
    scores = torch.tensor([[0.5, NAN, 0.1, -INF, 0.9]], requires_grad=True)
    result = soft_mask(scores, torch.tensor([2]), torch.ones(1, 5, dtype=torch.bool))
    assert result[0, [1, 3]].tolist() == [-5, -5]
    result.sum().backward()
    assert scores.grad[0, [1, 3]].tolist() == [0, 0]
    assert bool(scores.grad.isfinite().all())


def test_rows_without_a_threshold_are_left_alone():
    scores = torch.tensor([[0.5, 0.1], [-INF, -INF]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    assert not soft_mask(scores, torch.tensor([0, 1]), mask).any()
    assert soft_mask(torch.empty(2, 0), torch.tensor([0, 0]), torch.empty(2, 0, dtype=torch.bool)).shape == (2, 0)


@pytest.mark.parametrize("name", ["strength", "temperature"])
def test_values_that_are_not_positive_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        soft_mask(torch.zeros(1, 2), torch.tensor([1]), torch.ones(1, 2, dtype=torch.bool), **{name: 0})
