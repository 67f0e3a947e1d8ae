"""Spread, relative thresholds and floors inside the two launches: what the reference keeps, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sequences import Sequence, sequence

from asymvlm_kernels import (
    AtLeastRelevant,
    BackendError,
    LinearBudget,
    PrunedSequence,
    RelativeThresholdBudget,
    Spread,
    UniformBudget,
    prune_sequence,
    use_backend,
)
from asymvlm_kernels.prefill.prune import scratch, two_launches
from asymvlm_kernels.prefill.reference import SECOND_HIGHEST
from asymvlm_kernels.unproven.paths import PrefillPath, use_path

NAN, INF = float("nan"), float("inf")
THRESHOLD, FLOOR = RelativeThresholdBudget(0.5, minimum=0.1, maximum=0.9), AtLeastRelevant(0.3, usual=0.1)
RULES: dict[str, dict[str, Any]] = {
    "spread": {"budget": UniformBudget(0.3), "spread": Spread()},
    "threshold": {"budget": THRESHOLD},
    "both": {"budget": THRESHOLD, "spread": Spread(reach=3, share=0.37)},
    "both with a floor": {"budget": THRESHOLD, "spread": Spread(), "floor": FLOOR},
    "a floor": {"budget": UniformBudget(0.2), "floor": FLOOR},
    "a gap and a floor": {"budget": LinearBudget(0.3, -0.7, 0.2), "spread": Spread(9, 1.0), "floor": FLOOR},
}
any_rule = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))


def prompts(S: int, device: torch.device, B: int = 3) -> tuple[Sequence, torch.Tensor]:
    """Rows of random roles, one of them without an image, and lines of 7 tokens, in a wider tensor."""
    case = sequence(B, S, 4, device=device)
    case.weight = None
    case.vision_mask[1:2] = False
    wide = (torch.arange(S, device=device) // 7).repeat_interleave(2).expand(B, 2 * S).contiguous()
    return case, wide[:, ::2].masked_fill_(wide[:, ::2] == 2, -1)


def given(case: Sequence) -> torch.Tensor:
    """Scores that tie often; few are NaN or infinite, which leaves the quantiles finite."""
    B, S, _ = case.embeds.shape
    scores = torch.randint(-20, 20, (B, S), generator=torch.Generator().manual_seed(1)) / 64
    scores[0, 9], scores[-1, 20:21], scores[-1, 30:31], scores[-1, 33:34] = NAN, -INF, INF, -0.0
    return scores.to(case.embeds.device)


def prune(case: Sequence, backend: str, **options: Any) -> PrunedSequence:
    with use_backend(backend):
        tokens = (case.embeds, case.vision_mask, case.text_mask, case.weight)
        return prune_sequence(*tokens, protect=case.protect, **options)


def both(case: Sequence, lines: torch.Tensor, rule: dict[str, Any], **options: Any) -> PrunedSequence:
    """The result of the kernels, which is that of the reference."""
    options = {**options, **rule, "lines": lines if rule.get("spread") else None}
    result, expected = prune(case, "triton", **options), prune(case, "reference", **options)
    for name in ("embeds", "index", "lengths", "counts", "scores", "own", "gap"):
        got, want = getattr(result, name), getattr(expected, name)
        assert torch.equal(got.nan_to_num(7.5), want.nan_to_num(7.5)), name
    assert (result.own is result.scores) == (rule.get("spread") is None)
    assert all(not counters.any() for counters in scratch._counters.values())
    return result


@any_rule
def test_given_scores_are_ranked_as_by_the_reference(rule, device):
    case, lines = prompts(45, device)
    scores = given(case)
    result = both(case, lines, rule, scores=scores)
    prunable = case.vision_mask & ~case.protect
    wanted = scores[prunable].clamp_max(SECOND_HIGHEST)
    assert torch.equal(result.own[prunable].nan_to_num(7.5), wanted.nan_to_num(7.5))
    assert int(result.counts[1]) == 0
    assert 0 < int(result.counts[0]) < int(prunable[0].sum())
    for row in (0, 2) if int(result.counts[2]) < int(prunable[2].sum()) else (0,):
        kept = torch.zeros(45, dtype=torch.bool, device=device)
        kept[result.index[row][result.index[row] >= 0]] = True
        ranked = result.scores[row].nan_to_num(-INF)
        assert ranked[kept & prunable[row]].min() >= ranked[~kept & prunable[row]].max()


def test_a_row_keeps_what_it_keeps_alone(device):
    case, lines = prompts(45, device)
    scores, rule = given(case), RULES["both with a floor"]
    together = both(case, lines.to(torch.int32), rule, scores=scores, static=True)
    parts = {name: value[2:] for name, value in vars(case).items() if name != "weight"}
    alone = both(replace(case, **parts), lines[2:], rule, scores=scores[2:], static=True)
    for name in ("index", "counts", "gap", "scores"):
        assert torch.equal(getattr(alone, name)[0], getattr(together, name)[2]), name


def test_scores_that_say_nothing_keep_the_most(device):
    case, lines = prompts(40, device, B=1)
    scores, many = given(case), int((case.vision_mask & ~case.protect).sum())
    scores[0, ::3] = NAN
    result = both(case, lines, {"budget": THRESHOLD, "spread": Spread()}, scores=scores)
    assert int(result.counts[0]) == many * 9 // 10
    result = both(case, lines, {**RULES["both with a floor"], "floor": AtLeastRelevant()}, scores=scores)
    assert int(result.counts[0]) == many


@pytest.mark.parametrize("capacity", [3, 25])
def test_a_capacity_drops_the_worst_first(capacity, device):
    case, lines = prompts(40, device, B=1)
    rule = {**RULES["both with a floor"], "spread": Spread(50)}  # further than the row is long
    result = both(case, lines, rule, scores=given(case), static=True, capacity=capacity)
    assert result.index.shape[1] == capacity


def test_rows_too_long_for_registers(device):
    case, lines = prompts(8200, device, B=1)
    result = both(case, lines, RULES["both with a floor"], scores=given(case))
    assert 0 < int(result.counts[0]) < 8000


@pytest.mark.parametrize("launches", [2, 1])
def test_scores_of_the_text_spread_too(launches, device):
    case = sequence(2, 40, 16, device=device)
    case.text_mask[1] = False
    case.vision_mask[1, 30:] = False  # padding
    lines = (torch.arange(40, device=device) // 5).expand(2, 40)
    with use_path(PrefillPath(launches)):
        result = both(case, lines, RULES["both with a floor"], static=True)
    assert int(result.counts[1]) == int((case.vision_mask & ~case.protect)[1].sum())  # no text: all of it stays


def test_a_kind_of_spread_of_somebody_elses_goes_step_by_step(device):
    class Twice(Spread):
        def apply(self, scores: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
            return 2 * scores

    case, lines = prompts(30, device, B=1)
    result = prune(case, "reference", scores=torch.rand(1, 30, device=device), spread=Twice(), lines=lines)
    assert torch.equal(result.scores, 2 * result.own)


def test_the_op_takes_them_well(monkeypatch, device):
    monkeypatch.undo()  # opcheck compares the storage of a result with that of its fake
    case, lines = sequence(2, 20, 8, device=device), torch.arange(20, device=device).expand(2, 20) // 7
    encoded = two_launches.encode_budget(THRESHOLD)
    assert encoded is not None
    with use_backend("reference"):
        given = torch.rand(2, 20, device=device)
        arguments = (*vars(case).values(), *encoded, 20, given, lines, 3, 0.5, [0.2, 0.1])
        torch.library.opcheck(torch.ops.asymvlm.score_select, arguments)


def test_traces_without_a_graph_break(monkeypatch, device):
    monkeypatch.undo()
    case, lines = prompts(20, device, B=2)

    def counted(embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        masks, rule = (case.vision_mask, case.text_mask), RULES["both with a floor"]
        result = prune_sequence(embeds, *masks, lines=lines, static=True, **rule)
        return result.counts, result.own

    with use_backend("reference"):
        compiled = torch.compile(counted, fullgraph=True, backend="aot_eager")
        for got, want in zip(compiled(case.embeds), counted(case.embeds), strict=True):
            assert torch.equal(got, want)


@any_rule
def test_the_cuda_library_has_no_kernel_for_them(rule, cuda_backend, device):
    case, lines = prompts(20, device, B=1)
    with pytest.raises(BackendError, match="cannot run score_select: it knows no spread, no relative threshold and no"):
        prune_sequence(case.embeds, case.vision_mask, case.text_mask, lines=lines, **rule)
