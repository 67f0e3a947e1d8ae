"""Tokens that look relevant: counted for each row, warned of where fewer are kept, and kept where that is asked for."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from checks import uniform
from tiny import make_batch, single_rows

import asymvlm
from asymvlm import AtLeastRelevant, Scorer, Spread, UniformBudget, VisionPruning
from asymvlm.models import adapter_for
from asymvlm.prompt.selection import Selection
from asymvlm.report.pruning import report_of
from asymvlm.settings.identity import identify

every_family = pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl", "phi3_v"], indirect=True)
llava = pytest.mark.parametrize("family", ["llava"], indirect=True)


def counted(scores: torch.Tensor) -> int:
    """Tokens of a row above the threshold on its own scale, by sorting; ``scores`` are -inf where not prunable."""
    row = sorted(score for score in scores.tolist() if score > float("-inf"))
    if not row:
        return 0
    low, high = (row[percent * (len(row) - 1) // 100] for percent in (5, 98))
    return max(sum(score > low + 0.2 * (high - low) for score in row), 1)


def reported(model, inputs, vision):
    with torch.no_grad(), asymvlm.patch(model, vision=vision) as handle:
        model(**inputs)
    return handle.last


@every_family
def test_each_row_is_counted_and_keeps_what_looks_relevant(family, model):
    inputs = make_batch(family, "left_padded")
    plain = reported(model, inputs, uniform(0.4))
    wanted = [counted(row) for row in plain.scores]
    assert plain.above_threshold == wanted
    assert plain.oversubscription == [many / kept for many, kept in zip(wanted, plain.kept)]
    assert reported(model, inputs, uniform(0.4, spread=Spread(reach=1))).above_threshold == wanted  # before they spread
    safe = reported(model, inputs, uniform(0.4, at_least_relevant=True))
    assert safe.kept == [max(many, kept) for many, kept in zip(wanted, plain.kept)]
    assert safe.kept != plain.kept
    for row, alone in enumerate(single_rows(family, "left_padded")):
        assert reported(model, alone, uniform(0.4, at_least_relevant=True)).kept == [safe.kept[row]]
    for row, found in enumerate(safe.scores):  # the best of them, ties to the first
        best = sorted((found > float("-inf")).nonzero()[:, 0].tolist(), key=lambda place: -float(found[place]))
        dropped = set(best) - set(safe.index[row].tolist())
        assert dropped == set(best[safe.kept[row] :])


@llava
def test_one_warning_for_all_calls_under_the_same_settings(family, model, caplog):
    inputs = make_batch(family, "image_free_row")
    vision = uniform(0.1)
    with caplog.at_level(logging.WARNING, "asymvlm"), torch.no_grad(), asymvlm.patch(model, vision=vision) as handle:
        model(**inputs)
        model.generate(**inputs, max_new_tokens=2)
    report = handle.last
    words = f"{report.above_threshold[0]} tokens look relevant and {report.kept[0]} are kept"
    assert report.above_threshold[1] == 0
    assert report.oversubscription[1] == 0.0
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        f"row 0: {words}, likewise in 1 other rows"
    ]
    assert f"row 0: {words}" in report.notes
    told = json.loads(json.dumps(report.to_dict()))
    assert told["above_threshold"] == report.above_threshold
    assert told["oversubscription"] == report.oversubscription
    caplog.clear()
    reported(model, inputs, uniform(0.1, at_least_relevant=True))
    assert caplog.records == []


@llava
def test_a_calibration_says_what_is_usual(family, model, plain, caplog):
    inputs = make_batch(family, "left_padded")
    budget = UniformBudget(0.1)
    many = reported(model, inputs, uniform(0.1)).above_threshold
    base, width = identify(plain), plain.config.get_text_config().hidden_size
    for usual, floor in ((0.99, 0), (0.0, 1)):
        scorer = Scorer(torch.ones(width), base, budget=budget, calibration={"usual_relevant": usual})
        caplog.clear()
        report = reported(model, inputs, VisionPruning(scorer))
        assert report.above_threshold == many  # the count is the same, only the limit differs
        assert len(caplog.records) == floor
        safe = reported(model, inputs, VisionPruning(scorer, at_least_relevant=True))
        assert safe.kept == (many if floor else report.kept)
        other = VisionPruning(scorer, UniformBudget(0.2), at_least_relevant=True)  # not the budget that was calibrated
        assert other.relevance == AtLeastRelevant(usual=0.0)


@llava
def test_what_does_not_score_against_the_question_is_not_counted(family, model, caplog):
    for method in ("random", "divprune"):
        report = reported(model, make_batch(family, "single"), VisionPruning(method=method, budget=UniformBudget(0.25)))
        assert report.above_threshold is None
        assert report.oversubscription is None
    report = reported(model, make_batch(family, "single"), uniform(1.0, at_least_relevant=True))
    assert report.to_dict()["above_threshold"] is None
    assert caplog.records == []


@llava
def test_a_device_is_not_waited_for(family, plain):
    """Tensors without values: whoever read one would raise."""

    def empty(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    scores = empty(2, 20, dtype=torch.float32)
    parts = dict.fromkeys(("lengths_before", "lengths_after", "num_vision", "counts"), empty(2))
    selection = Selection(
        **parts,
        gaps=empty(2, dtype=torch.float32),
        scores=scores,
        own=scores,
        index=empty(2, 9),
        has_text=empty(2, dtype=torch.bool),
        columns_before=20,
        image_grids=None,
    )
    report = report_of(selection, plain, adapter_for(plain), uniform(0.5), make_batch(family, "single"))
    with pytest.raises(NotImplementedError, match="meta"):
        _ = report.above_threshold


@pytest.mark.parametrize("method", ["random", "divprune", "fastv"])
def test_refusals(method):
    with pytest.raises(ValueError, match=f"at_least_relevant needs a method that scores .* got method '{method}'"):
        VisionPruning(method=method, at_least_relevant=True)
    with pytest.raises(ValueError, match="at_least_relevant must be True, False or AtLeastRelevant"):
        VisionPruning(at_least_relevant=0.3)
