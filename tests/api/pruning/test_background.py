"""Background that stays: the tokens that resemble the question least, beside those of the budget."""

from __future__ import annotations

import logging

import pytest
import torch
from checks import uniform
from tiny import make_batch, single_rows

import asymvlm
from asymvlm import Scorer, Spread, UniformBudget, VisionPruning, calibrate_budget
from asymvlm.prompt.background import background_tokens
from asymvlm.settings.identity import identify

families = pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"], indirect=True)
llava = pytest.mark.parametrize("family", ["llava"], indirect=True)


def reported(model, inputs, vision):
    with torch.no_grad(), asymvlm.patch(model, vision=vision) as handle:
        model(**inputs)
    return handle.last


@families
@pytest.mark.parametrize("spread", [None, Spread(reach=1)], ids=["plain", "spread"])
def test_the_lowest_stay_and_the_budget_rules_over_the_others(family, model, spread):
    inputs = make_batch(family, "one_image_each")
    scores = reported(model, inputs, uniform(0.4, spread=spread)).scores
    report = reported(model, inputs, uniform(0.4, spread=spread, background=2))
    assert torch.equal(report.scores, scores)
    for row, found in enumerate(scores.tolist()):
        order = sorted((place for place, score in enumerate(found) if score > -torch.inf), key=lambda i: found[i])
        lowest, others = order[:2], order[2:]
        best = sorted(others, key=lambda place: (-found[place], place))[
            : max(int(0.4 * len(others)), min(1, len(others)))
        ]
        kept = set(report.index[row].tolist()) & set(order)
        assert kept == {*lowest, *best}
        assert report.kept[row] == len(kept)
        assert report.vision_tokens[row] == len(order)


@families
def test_a_row_keeps_what_it_keeps_alone(family, model):
    vision = uniform(0.3, background=3)
    together = reported(model, make_batch(family, "left_padded"), vision)
    for row, alone in enumerate(single_rows(family, "left_padded")):
        assert reported(model, alone, vision).kept == [together.kept[row]]


@pytest.mark.parametrize(
    "number,wanted",
    [(0, []), (1, [2]), (2, [2, 4]), (3, [0, 2, 4]), (9, [0, 2, 3, 4])],
    ids=["none", "one", "tie-to-the-first", "three", "more-than-there-are"],
)
def test_ties_go_to_the_first_and_nan_ranks_last(number, wanted):
    scores = torch.tensor([[0.5, -9.0, 0.1, float("nan"), 0.1]])
    prunable = torch.tensor([[True, False, True, True, True]])
    scores = torch.where(torch.tensor([[False, False, False, False, True]]), 0.1, scores)
    assert background_tokens(scores, prunable, number)[0].nonzero()[:, 0].tolist() == wanted


@llava
def test_a_calibration_counts_it_in_and_remembers_it(family, model, plain, caplog):
    samples = single_rows(family, "one_image_each")
    found = calibrate_budget(
        model, None, samples, lambda model, sample: 1.0, 0.6, "relative", background=2, progress=False
    )
    vision = VisionPruning(found.scorer, background=2)
    with caplog.at_level(logging.WARNING, "asymvlm"):
        reports = [reported(model, sample, vision) for sample in samples]
        kept = [report.kept[0] / report.vision_tokens[0] for report in reports]
        assert found.average == pytest.approx(sum(kept) / len(kept))
        assert found.scorer.calibration["background"] == 2
        assert "background=" not in caplog.text
        VisionPruning(found.scorer)
        assert "calibrated with background=2 and is used with background=0" in caplog.text
    with pytest.raises(ValueError, match="average must exceed"):
        calibrate_budget(
            model, None, samples, lambda model, sample: 1.0, 0.15, "relative", background=2, progress=False
        )


@llava
def test_what_cannot_keep_a_background_is_refused(family, plain):
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="background must be"):
            uniform(0.5, background=wrong)
    for method in ("divprune", "fastv"):
        with pytest.raises(ValueError, match=f"background=4 with method '{method}'"):
            VisionPruning(method=method, background=4)


@llava
def test_a_scorer_of_before_is_as_it_was(family, plain, caplog):
    """A calibration that says nothing of a background was made without one."""
    width = plain.config.get_text_config().hidden_size
    scorer = Scorer(
        torch.ones(width),
        identify(plain),
        budget=UniformBudget(0.1),
        calibration={"spread": None, "usual_relevant": 1.0},
    )
    with caplog.at_level(logging.WARNING, "asymvlm"):
        VisionPruning(scorer)
    assert caplog.records == []
