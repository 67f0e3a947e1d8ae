"""The floor of relevant tokens beneath a budget: what loops count, before scores spread, row by row."""

from __future__ import annotations

import pytest
import torch

import asymvlm_kernels as ak
from asymvlm_kernels import AtLeastRelevant, RelativeThresholdBudget, Spread, UniformBudget, prune_sequence

B, S, D = 3, 40, 8


def counted(scores: list[float], beta: float) -> int:
    ascending = sorted(scores)
    low, high = (ascending[percent * (len(scores) - 1) // 100] for percent in (5, 98))
    return max(sum(score > low + beta * (high - low) for score in scores), 1)


@pytest.fixture
def case():
    torch.manual_seed(3)
    embeds = torch.randn(B, S, D)
    vision = torch.rand(B, S) < 0.8
    scores = torch.rand(B, S).square()
    lines = torch.arange(S).div(5, rounding_mode="floor").expand(B, S).masked_fill(~vision, -1)
    return embeds, vision, ~vision, scores, lines


@pytest.mark.parametrize("budget", [UniformBudget(0.3), RelativeThresholdBudget(0.6)])
@pytest.mark.parametrize("spread", [None, Spread()])
@pytest.mark.parametrize("floor", [AtLeastRelevant(), AtLeastRelevant(0.5), AtLeastRelevant(usual=0.55)])
def test_a_row_keeps_no_fewer_than_look_relevant(case, budget, spread, floor):
    embeds, vision, text, scores, lines = case
    how = dict(budget=budget, scores=scores, spread=spread, lines=lines)
    plain = prune_sequence(embeds, vision, text, **how)
    found = prune_sequence(embeds, vision, text, **how, floor=floor)
    wanted = []
    for row in range(B):
        own = scores[row, vision[row]].tolist()
        many = counted(own, floor.beta)
        wanted.append(max(int(plain.counts[row]), many if many > floor.usual * len(own) else 0))
    assert found.counts.tolist() == wanted
    assert found.counts.tolist() != plain.counts.tolist() or floor.usual
    assert torch.equal(found.own[vision], scores[vision])
    assert torch.equal(found.scores, plain.scores)
    assert (found.own is found.scores) == (spread is None)
    for row in range(B):  # the best of the ranked scores, and a row alone keeps the same
        ranked = sorted(vision[row].nonzero()[:, 0].tolist(), key=lambda place: -float(found.scores[row, place]))
        kept = set(found.index[row].tolist()) - {-1}
        assert kept == set(ranked[: wanted[row]]) | set(text[row].nonzero()[:, 0].tolist())
        one = slice(row, row + 1)
        alone = prune_sequence(
            embeds[one], vision[one], text[one], floor=floor, **{**how, "scores": scores[one], "lines": lines[one]}
        )
        assert set(alone.index[0].tolist()) == kept


def test_images_ranked_by_themselves_keep_that_share_each(case):
    embeds, vision, text, scores, _ = case
    groups = (torch.arange(S) >= S // 2).long().expand(B, S)
    found = prune_sequence(
        embeds, vision, text, budget=0.2, scores=scores, groups=groups, per_image=True, floor=AtLeastRelevant()
    )
    for row in range(B):
        n, many = int(vision[row].sum()), counted(scores[row, vision[row]].tolist(), 0.2)
        of_image = [int((vision[row] & (groups[row] == image)).sum()) for image in (0, 1)]
        share = -(-many * 1_000_000 // n)
        assert int(found.counts[row]) == sum(max(size * share // 1_000_000, min(8, size)) for size in of_image)


def test_scores_that_say_nothing_keep_everything(case):
    embeds, vision, text, scores, _ = case
    found = prune_sequence(embeds, vision, text, scores=scores.fill_(float("nan")), floor=AtLeastRelevant())
    assert found.counts.tolist() == vision.sum(-1).tolist()


def test_refusals(case):
    with pytest.raises(ValueError, match=r"usual must be a share in \[0, 1\], got 2"):
        AtLeastRelevant(usual=2)
    with pytest.raises(ValueError, match="beta must be a finite number"):
        AtLeastRelevant(beta=float("nan"))
    embeds, vision, text, *_ = case
    with pytest.raises(ValueError, match="floor must be None or AtLeastRelevant"):
        prune_sequence(embeds, vision, text, floor=True)
    assert ak.AtLeastRelevant is AtLeastRelevant
