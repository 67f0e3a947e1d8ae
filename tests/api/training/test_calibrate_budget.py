"""calibrate_budget on a tiny model, with metrics whose best budget is known."""

from __future__ import annotations

import json
import logging
import math

import pytest
import tiny
import torch
from model_state import changes, snapshot

import asymvlm
from asymvlm import LinearBudget, RelativeThresholdBudget, Scorer, ThresholdBudget, UniformBudget, calibrate_budget
from asymvlm.patch import HANDLE
from asymvlm.settings.identity import identify

pytestmark = pytest.mark.parametrize("family", ["llava"], indirect=True)
ROWS = (tiny.ONE, tiny.LONGER, tiny.LONGEST)


@pytest.fixture
def samples():
    return [tiny.make_inputs("llava", (ROWS[i % 3],), seed=i) for i in range(14)]


class Need:
    """1 where a row keeps at least what it needs, less below: more with a larger gap (sign 1) or a smaller one (-1)."""

    def __init__(self, gaps: list[float], sign: int) -> None:
        order = sorted(gaps, reverse=sign < 0)
        self.need = {gap: 0.2 + 0.6 * order.index(gap) / len(order) for gap in gaps}
        self.calls = 0

    def __call__(self, model, sample) -> list[float]:
        self.calls += 1
        model(**sample)
        report = getattr(model, HANDLE).last
        kept = [k / n for k, n in zip(report.kept, report.vision_tokens)]
        return [min(ratio / self.need[gap], 1.0) for ratio, gap in zip(kept, report.gap)]


@pytest.fixture
def gaps(plain, samples) -> list[float]:
    found = []
    with asymvlm.patch(plain) as handle:
        for sample in samples:
            plain(**sample)
            found += handle.last.gap
    return found


def calibrate(model, samples, metric, **options):
    return calibrate_budget(model, None, samples, metric, **{"average": 0.5, "progress": False, **options})


@pytest.mark.parametrize(
    "method,budget,sign",
    [
        ("threshold", ThresholdBudget, -1),  # its tiers fall with the gap: the other sign is out of reach
        ("linear", LinearBudget, 1),
        ("linear", LinearBudget, -1),
        ("relative", RelativeThresholdBudget, 1),
    ],
)
def test_methods(model, samples, gaps, method, budget, sign):
    before = snapshot(model)
    result = calibrate(model, samples, Need(gaps, sign), method=method, minimum=0.1, maximum=0.95)
    assert not changes(before, snapshot(model))
    assert isinstance(result.budget, budget)
    assert result.average == pytest.approx(0.5, abs=0.05)
    assert result.scorer.budget == result.budget
    assert result.scorer.gaps.mean == pytest.approx(sum(gaps) / len(gaps))
    assert result.difference == pytest.approx(result.metric - result.uniform_metric)
    if method == "linear":
        assert result.budget.slope * sign > 0
        assert result.metric > result.uniform_metric + 0.02
    if method == "threshold":
        assert result.metric > result.uniform_metric + 0.02
    metric = Need(gaps, sign)
    with asymvlm.patch(model, vision=asymvlm.VisionPruning(scorer=result.scorer)) as handle:
        values = [metric(model, sample)[0] for sample in samples]  # what was measured is what the budget does
        assert handle.vision.budget == result.budget
    assert sum(values) / len(values) == pytest.approx(result.metric)
    json.dumps(result.to_dict())


@pytest.mark.slow
def test_measurements_are_kept_and_taken_up_again(model, samples, gaps, tmp_path):
    class Stop(Exception):
        pass

    def interrupted(model, sample):
        if metric.calls == 30:
            raise Stop
        return metric(model, sample)

    metric = Need(gaps, -1)
    with pytest.raises(Stop):
        calibrate(model, samples, interrupted, method="linear", checkpoint=tmp_path)
    file = tmp_path / "measurements.jsonl"
    file.write_text(file.read_text()[:-20])  # cut short in the middle of a line
    again = Need(gaps, -1)
    result = calibrate(model, samples, again, method="linear", checkpoint=tmp_path)
    whole = Need(gaps, -1)
    plain = calibrate(model, samples, whole, method="linear")
    assert result.to_dict() == plain.to_dict()
    assert again.calls == whole.calls - 29
    with pytest.raises(ValueError, match="holds measurements of another run"):
        calibrate(model, samples[:5], again, checkpoint=tmp_path)


def test_rows_of_a_batch_and_rows_without_vision(model, family, gaps, samples):
    """One entry of several rows; a row without an image takes no part."""
    batch = tiny.make_inputs(family, (tiny.ONE, tiny.TEXT_ONLY, tiny.LONGER))
    found = []
    with asymvlm.patch(model) as handle:
        model(**batch)
        found = [gap for gap in handle.last.gap if gap == gap]

    def metric(model, sample):
        model(**sample)
        return torch.tensor(getattr(model, HANDLE).last.keep_ratio)

    result = calibrate(model, [batch], metric, method="linear")
    assert result.samples == len(found) == 2


def test_teacher_forced_answers_are_not_scored_against(model, family):
    inputs = tiny.make_inputs(family, (tiny.LONGER,))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    seen = []

    def metric(model, sample):
        model(**sample)
        report = getattr(model, HANDLE).last
        seen.extend(report.gap if report.scores is not None else [])  # keep 1 scores nothing
        return 1.0

    found = []
    for answer in ([70, 71, 72], [73, 74, 75]):
        sample = {**inputs, "labels": labels, "input_ids": inputs["input_ids"].clone()}
        sample["input_ids"][:, -3:] = torch.tensor(answer)
        result = calibrate(model, [sample, sample], metric, method="relative")
        found.append(result.scorer.gaps.mean)
    assert found[0] == found[1]
    assert set(seen) == {found[0]}


def test_a_budget_below_uniform_is_told(model, samples, caplog):
    """A metric that no adaptive budget serves: only exactly half will do."""

    def metric(model, sample):
        model(**sample)
        return float(getattr(model, HANDLE).last.kept == [8])

    with caplog.at_level(logging.WARNING):
        result = calibrate(model, samples, metric, method="threshold")
    assert result.difference < 0
    assert "below 1 of a uniform one" in caplog.text


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(method="magic"), "method must be one of 'threshold', 'linear', 'relative', got 'magic'"),
        (dict(average=1.0), r"average must be in \(0, 1\), got 1.0"),
        (dict(minimum=0.6), "minimum < average < maximum must hold"),
        (dict(ratios=[0.3]), "ratios must be three or more"),
    ],
)
def test_bad_arguments_are_named(plain, samples, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(plain, samples, lambda model, sample: 1.0, **options)


def test_bad_metrics_and_scorers_are_named(model, samples):
    with pytest.raises(ValueError, match=r"one finite number for each of the 1 rows, got \[1.0, 2.0\]"):
        calibrate(model, samples, lambda model, sample: [1, 2])
    with pytest.raises(ValueError, match="needs samples, got none"):
        calibrate(model, [], lambda model, sample: 1.0)
    other = Scorer(torch.ones(32), identify(model)).replace(
        base=asymvlm.settings.identity.ModelIdentity(32, "gemma3", "", "f")
    )
    with pytest.raises(ValueError, match="trained for another model"):
        calibrate_budget(model, other, samples, lambda model, sample: 1.0)
    assert UniformBudget(0.5)  # nothing is left patched
    asymvlm.patch(model).remove()


def test_a_budget_for_spread_scores(model, samples, caplog):
    """Fitted to spread scores it keeps the wanted share of those, and whoever uses it otherwise is told."""
    spread = asymvlm.Spread(reach=2, share=0.5)

    def kept(model, sample) -> list[float]:
        model(**sample)
        report = getattr(model, HANDLE).last
        return [k / n for k, n in zip(report.kept, report.vision_tokens)]

    result = calibrate(model, samples, kept, method="relative", spread=spread)
    assert result.metric == pytest.approx(result.average)  # what was predicted from spread scores is what was kept
    assert result.scorer.calibration["spread"] == {"reach": 2, "share": 0.5}
    shares = []
    with asymvlm.patch(model) as handle:  # without Spread: what looks relevant is counted before scores spread
        for sample in samples:
            model(**sample)
            shares += [many / n for many, n in zip(handle.last.above_threshold, handle.last.vision_tokens)]
    usual = sorted(shares)[math.ceil(0.95 * len(shares)) - 1]
    assert result.scorer.calibration["usual_relevant"] == pytest.approx(usual)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        used = asymvlm.VisionPruning(scorer=result.scorer, spread=spread)
        asymvlm.VisionPruning(scorer=result.scorer, budget=UniformBudget(0.5))
    assert not caplog.records
    with asymvlm.patch(model, vision=used):
        values = [kept(model, sample)[0] for sample in samples]
    assert sum(values) / len(values) == pytest.approx(result.average)
    with caplog.at_level(logging.WARNING):
        asymvlm.VisionPruning(scorer=result.scorer)
    assert "calibrated with spread=Spread(reach=2, share=0.5) and is used with spread=None" in caplog.text
