"""prune_sequence with scores of the caller's own: ranked as its own scores are, on every backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sequences import BUDGETS, Sequence, sequence

from asymvlm_kernels import (
    BackendError,
    PrunedSequence,
    RelativeThresholdBudget,
    Spread,
    UniformBudget,
    prune_sequence,
    use_backend,
)
from asymvlm_kernels.prefill.prune import scratch, two_launches

NAN, INF = float("nan"), float("inf")
EVERY_BUDGET = (*BUDGETS, RelativeThresholdBudget(0.4))
any_budget = pytest.mark.parametrize("budget", EVERY_BUDGET, ids=str)


def given(case: Sequence, seed: int = 1) -> torch.Tensor:
    """Scores that tie often, also where no vision token may be dropped."""
    generator = torch.Generator().manual_seed(seed)
    B, S, _ = case.embeds.shape
    return (torch.randint(-20, 20, (B, S), generator=generator) / 64).to(case.embeds.device)


def prune(case: Sequence, scores: torch.Tensor | None, budget: Any, backend: str, **options: Any) -> PrunedSequence:
    weight = case.weight if scores is None else None
    tokens = (case.embeds, case.vision_mask, case.text_mask, weight, budget)
    with use_backend(backend):
        return prune_sequence(*tokens, scores=scores, protect=case.protect, **options)


def assert_same(result: PrunedSequence, expected: PrunedSequence) -> None:
    for name in ("embeds", "index", "lengths", "counts", "scores", "gap"):
        got, want = getattr(result, name), getattr(expected, name)
        assert torch.equal(got.nan_to_num(7.5), want.nan_to_num(7.5)), name
    for name, want in expected.carry.items():
        assert torch.equal(result.carry[name], want), name


def both(case: Sequence, scores: torch.Tensor, budget: Any, **options: Any) -> PrunedSequence:
    """The result of the kernels, which is that of the reference."""
    result = prune(case, scores, budget, "triton", **options)
    assert_same(result, prune(case, scores, budget, "reference", **options))
    return result


@any_budget
@pytest.mark.parametrize("static", [False, True])
def test_the_best_of_each_row_are_kept_in_place(static, budget, device):
    case = sequence(3, 90, 16, seed=3, device=device)
    case.text_mask[1] = False
    case.vision_mask[2] = False
    ids = torch.arange(270, device=device).view(3, 90)
    scores = given(case)
    result = both(case, scores, budget, static=static, carry={"ids": ids, "positions": ids.expand(3, 3, 90)})
    prunable = case.vision_mask & ~case.protect
    assert torch.equal(result.scores, torch.where(prunable, scores, -INF))
    for row, index in enumerate(result.index):
        kept = torch.zeros(90, dtype=torch.bool, device=device)
        kept[index[index >= 0]] = True
        assert kept[(case.text_mask | case.protect)[row] & ~prunable[row]].all()
        assert (kept & prunable[row]).sum() == result.counts[row]
        best = scores[row].masked_fill(~prunable[row], -INF).argsort(descending=True, stable=True)
        assert kept[best[: result.counts[row]]].all()
    assert result.counts[2] == 0
    if budget == UniformBudget(0.5):  # given scores need no text
        assert result.counts[1] == prunable[1].sum() // 2


@any_budget
@pytest.mark.parametrize("per_image", [False, True])
def test_images_with_floors_of_their_own(per_image, budget, device):
    case = sequence(3, 90, 16, device=device)
    case.text_mask[1] = False
    groups = (torch.arange(90, device=device) // 31).expand(3, 90).contiguous()
    result = both(case, given(case), budget, groups=groups, per_image=per_image)
    scored = prune(case, None, budget, "reference")
    again = prune(case, scored.scores, budget, "reference", groups=groups, per_image=per_image)
    own = prune(case, None, budget, "reference", groups=groups, per_image=per_image)
    for row in (0, 2):  # row 1 has no text
        assert again.index[row][again.index[row] >= 0].tolist() == own.index[row][own.index[row] >= 0].tolist()
    assert result.lengths[1] < 90


@any_budget
@pytest.mark.parametrize("options", [{}, {"static": True, "capacity": 40}], ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_given_its_own_scores_it_answers_the_same(backend, options, budget, device):
    case = sequence(2, 75, 40, device=device)
    scored = prune(case, None, budget, backend, **options)
    assert_same(prune(case, scored.scores, budget, backend, **options), scored)


def test_they_spread_along_lines(device):
    case = sequence(2, 60, 16, device=device)
    lines = (torch.arange(60, device=device) // 7).expand(2, 60).contiguous()
    scores = given(case)
    result = both(case, scores, UniformBudget(0.3), spread=Spread(), lines=lines)
    plain = torch.where(case.vision_mask & ~case.protect, scores, -INF)
    assert torch.equal(result.scores, Spread().apply(plain, lines))


@pytest.mark.parametrize("S", [1, 700, 9000])  # 9000: too long for registers
def test_rows_of_any_length(S, device):
    case = sequence(2, S, 4, device=device)
    case.weight = None
    for scores in (given(case), torch.randn(2, S, generator=torch.Generator().manual_seed(0)).to(device)):
        both(case, scores, BUDGETS[2])
    assert all(not counters.any() for counters in scratch._counters.values())


@pytest.mark.parametrize("capacity", [0, 9, 40, 90])
def test_a_capacity_drops_the_worst_first(capacity, device):
    case = sequence(2, 75, 8, device=device)
    result = both(case, given(case), UniformBudget(0.6), static=True, capacity=capacity)
    assert result.index.shape[1] == capacity


def test_special_values_rank_as_those_of_the_op(device):
    case = sequence(1, 40, 8, protected=0, device=device)
    case.text_mask[0, 39], case.vision_mask[0, 39] = True, False
    places = case.vision_mask[0].nonzero()[:, 0]
    scores = given(case)
    scores[0, places[0]], scores[0, places[1]], scores[0, places[2]] = NAN, INF, torch.finfo(torch.float32).max
    scores[0, places[3]], scores[0, places[4]] = -INF, 3.0
    for count in (1, 2, 3, len(places) - 2, len(places) - 1, len(places)):
        result = both(case, scores, UniformBudget(min(1.0, count / len(places) + 1e-3)))
        kept = [place for place in result.index[0].tolist() if case.vision_mask[0, place]]
        assert len(kept) == count
        assert {int(place) for place in places[[1, 2, 4]][:count]} <= set(kept)
        assert (int(places[0]) in kept) == (count == len(places))
        assert (int(places[3]) in kept) == (count >= len(places) - 1)
        text = (case.text_mask & ~case.vision_mask)[0].nonzero()[:, 0].tolist()
        assert set(text) <= set(result.index[0].tolist())


def test_a_batch_equals_its_samples(device):
    case = sequence(3, 80, 16, device=device)
    scores = given(case)
    together = both(case, scores, BUDGETS[2], static=True)
    for row in range(3):
        parts = {name: value[row : row + 1] for name, value in vars(case).items() if name != "weight"}
        alone = both(replace(case, **parts), scores[row : row + 1], BUDGETS[2], static=True)
        for name in ("index", "counts", "gap", "scores"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row]), name


def test_strided_and_missing_masks(device):
    case = sequence(2, 50, 8, device=device)
    wide = torch.zeros(2, 101, device=device)
    wide[:, 1::2] = given(case)
    masks = torch.zeros(2, 101, 3, dtype=torch.bool, device=device)
    expected = both(case, given(case), BUDGETS[3])
    for place, name in enumerate(("vision_mask", "text_mask", "protect")):
        masks[:, 1::2, place] = getattr(case, name)
        setattr(case, name, masks[:, 1::2, place])
    assert_same(both(case, wide[:, 1::2], BUDGETS[3]), expected)
    case.protect = None
    both(case, wide[:, 1::2], BUDGETS[3])


@pytest.mark.parametrize("B,S", [(0, 5), (2, 0)])
@pytest.mark.parametrize("static", [False, True])
def test_empty_axes(B, S, static, device):
    mask = torch.zeros(B, S, dtype=torch.bool, device=device)
    case = Sequence(torch.empty(B, S, 4, device=device), mask, mask, None, None)
    result = both(case, torch.empty(B, S, device=device), 0.5, static=static)
    assert result.lengths.tolist() == [0] * B


def test_wrong_scores_are_refused_by_name(device):
    case = sequence(2, 20, 8, device=device)
    scores = given(case)
    tokens = (case.embeds, case.vision_mask, case.text_mask)
    with pytest.raises(ValueError, match="weight belongs to the similarity that scores replace"):
        prune_sequence(*tokens, case.weight, scores=scores)
    for wrong, message in (
        (scores[:, :-1], r"scores must have shape \(2, 20\), got \(2, 19\)"),
        (scores.double(), "scores must be float32, got float64"),
        (scores.to("meta"), "scores must be on"),
        (scores.clone().requires_grad_(), "not differentiable in scores"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_sequence(*tokens, scores=wrong)


@pytest.mark.parametrize("static", [False, True])
def test_the_cuda_library_has_no_kernel_for_them(static, cuda_backend, device):
    case = sequence(1, 20, 8, device=device)
    with pytest.raises(BackendError, match=r"cannot run \w+: it scores vision tokens itself, and scores were given"):
        prune_sequence(case.embeds, case.vision_mask, case.text_mask, scores=given(case), static=static)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_ops_take_them_well(backend, monkeypatch, device):
    monkeypatch.undo()  # opcheck compares the storage of a result with that of its fake
    case = sequence(2, 20, 8, device=device)
    ratios, numbers = two_launches.encode_budget(BUDGETS[2])  # type: ignore[misc]
    ids = torch.arange(40, device=device).view(2, 20)
    tokens = (case.embeds, case.vision_mask, case.text_mask, case.protect, None, ratios, numbers)
    with use_backend(backend):
        torch.library.opcheck(torch.ops.asymvlm.score_select, (*tokens, 20, given(case)))
        carry = ([ids, ids.expand(3, 2, 20)], [-1, 2.5], [False, True], 13, True)
        torch.library.opcheck(torch.ops.asymvlm.prune_static, (*tokens, *carry, given(case)))


def test_traces_without_a_graph_break(monkeypatch, device):
    monkeypatch.undo()
    case = sequence(2, 20, 8, device=device)

    def shortened(embeds: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masks = (case.vision_mask, case.text_mask)
        return prune_sequence(embeds, *masks, budget=0.5, scores=scores * 2, static=True).embeds

    with use_backend("reference"):
        compiled = torch.compile(shortened, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(case.embeds, given(case)), shortened(case.embeds, given(case)))
