"""The quality bench measures the library: its selections and its calibration are the library's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asymvlm
from asymvlm import VisionPruning
from asymvlm_kernels import RelativeThresholdBudget, UniformBudget
from bench.quality import __main__ as command
from bench.quality import safety
from bench.quality.answers import answers
from bench.quality.beyond import Centred
from bench.quality.budgets import answered, batches, even_counts
from bench.quality.scorers import SCORERS, load_model, model_inputs, portable
from bench.quality.study import CONTROLS, FULL, Study, key, uniform
from bench.tinyvlm.evaluate import Samples, exact_match, features, make_samples
from bench.tinyvlm.glyphs import BOS, EOS, IMAGE
from bench.tinyvlm.model import CHECKPOINT, NUM_VISION


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(CHECKPOINT)


@pytest.fixture(scope="module")
def samples() -> Samples:
    return make_samples("validation", 24, seed=4)


@pytest.fixture(scope="module")
def scorer() -> asymvlm.Scorer:
    return asymvlm.Scorer.from_pretrained(SCORERS / "default-0")


def similarity(model: Any, samples: Samples, weight: torch.Tensor | None = None, centred: bool = False) -> torch.Tensor:
    """``(B, 144)``, a row and a text token at a time: the best weighted cosine to begin-of-text and the question."""
    vision = features(model, samples)
    vision = vision - vision.mean(1, keepdim=True) if centred else vision
    weight = torch.ones(vision.shape[-1]) if weight is None else weight
    embed, rows = model.get_input_embeddings().weight.detach(), []
    for row, text in enumerate(samples.text):
        words = embed[[BOS, *text[samples.question[row]].tolist()]]
        each = [vision[row] @ (weight * word) / vision[row].norm(dim=-1) / word.norm() for word in words]
        rows.append(torch.stack(each).amax(0))
    return torch.stack(rows)


def best(scores: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """``(B, 144)`` bool: the ``counts`` highest of each row."""
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for row, count in enumerate(counts):
        kept[row, scores[row].topk(count).indices] = True
    return kept


def test_patched_model_keeps_and_answers_as_a_mask_says(model: Any, samples: Samples, scorer: asymvlm.Scorer) -> None:
    for method, wanted in {
        asymvlm.methods.AsymVLM(): similarity(model, samples),
        asymvlm.methods.AsymVLM(scorer.weight): similarity(model, samples, scorer.weight),
        Centred(): similarity(model, samples, centred=True),
    }.items():
        found = answers(model, samples, VisionPruning(method=method, budget=UniformBudget(0.35)))
        kept = best(wanted, [50] * len(samples))
        assert torch.allclose(found.scores, wanted, atol=1e-5)
        assert torch.equal(found.kept, kept)
        assert torch.equal(found.right, exact_match(model, samples, keep=kept))


def test_rows_keep_the_counts_they_are_given(model: Any, samples: Samples) -> None:
    counts = even_counts(1001, len(samples))
    found = answers(model, samples, VisionPruning(), counts=counts)
    assert torch.equal(found.counts, counts)
    assert torch.equal(found.kept, best(similarity(model, samples), counts.tolist()))


def test_controls_keep_what_their_names_say(model: Any, samples: Samples) -> None:
    study = Study(model, samples, {})
    half = {
        name: [answers(model, samples, VisionPruning(method=run)).kept for run in study.runs(name)] for name in CONTROLS
    }
    assert [len(half[name]) for name in CONTROLS] == [study.seeds, 1, 1, 1]
    gaps = half["stride"][0][0].nonzero()[:, 0].diff()
    assert gaps.max() <= 3, "stride leaves no hole"
    centre = half["spiral"][0][0].view(12, 12)
    assert centre[2:10, 2:10].all(), "spiral keeps the centre"
    assert not centre[0].any()
    first, second = half["random"][:2]
    assert not torch.equal(first, second), "another seed"
    assert not torch.equal(first[0], first[1]), "another row"


def test_study_counts_the_patched_models_own_answers(model: Any, samples: Samples, scorer: asymvlm.Scorer) -> None:
    study = Study(model, samples, {"learned": [scorer.weight]})
    found = study.uniform("learned", 0.25)[0]
    asked = [number for number, turn in enumerate(samples.turns) if turn.kind == "value"][:5]
    for number in asked:
        inputs = model_inputs(samples, [number], answers=False)
        with asymvlm.patch(model, vision=asymvlm.VisionPruning(scorer, UniformBudget(0.25))):
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answer = samples.text[number][samples.labels[number] >= 0]
        assert (output[0, -4:].tolist() == answer.tolist()) == bool(found[number])


@pytest.mark.slow
def test_learned_scorer_loses_nothing_at_half_where_cosine_does(model: Any, scorer: asymvlm.Scorer) -> None:
    samples = make_samples("validation", 60, seed=7)
    study = Study(model, samples, {"learned": [scorer.weight]}, seeds=1)
    part = uniform(study, (0.65, 0.5))
    rates = {method: part["rates"][method]["0.5"]["mean"] for method in study.methods}
    assert rates["learned"] > part["full"]["mean"] - 0.05
    assert rates["learned"] > rates["cosine"] + 0.15 > rates["random"] + 0.3
    assert part["rates"]["random"]["0.5"]["runs"] == [rates["random"]]
    kinds = part["full"]["kinds"]
    assert sum(kinds[kind]["samples"] for kind in kinds) == len(samples)
    assert study.compare(key("cosine", 0.5), FULL)["worse"] > 0


def test_the_floor_is_compared_with_the_same_setting_without_it(model: Any, scorer: asymvlm.Scorer) -> None:
    dense = make_samples("validation", 20, seed=4, entries=(14, 18))
    chosen = {
        safety.FULL: [VisionPruning(budget=UniformBudget(1.0))],
        "half": [VisionPruning(scorer, UniformBudget(0.5))],
        f"half{safety.FLOOR}": [VisionPruning(scorer, UniformBudget(0.5), at_least_relevant=True)],
    }
    rows = safety.measure(model, dense, chosen)
    kept, right = (
        {
            name: getattr(found, what).double()
            for name, (run,) in chosen.items()
            for found in [answers(model, dense, run)]
        }
        for what in ("counts", "right")
    )
    for name, row in rows.items():
        assert row["kept"] == pytest.approx(float(kept[name].mean()) / NUM_VISION, abs=1e-4)
        assert row["mean"] == pytest.approx(float(right[name].mean()), abs=1e-4)
        assert row["full"]["difference"] == pytest.approx(float((right[name] - right[safety.FULL]).mean()), abs=1e-4)
    floor = rows[f"half{safety.FLOOR}"]
    assert floor["floor"]["difference"] == pytest.approx(float((right[f"half{safety.FLOOR}"] - right["half"]).mean()))
    assert floor["warned"] == 0
    assert rows["half"]["warned"] == float((kept[f"half{safety.FLOOR}"] > kept["half"]).double().mean()) > 0.5
    assert safety.PAGES["dense, 14 to 18 entries"] == {"entries": (14, 18)}


def test_batches_of_one_length_give_the_same_answers(model: Any, samples: Samples) -> None:
    parts = batches(samples)
    assert all(bool(part["attention_mask"].all()) for part in parts)
    assert sum(len(part["input_ids"]) for part in parts) == len(samples)
    with torch.inference_mode():
        right = sum(sum(answered(model, part)) for part in parts)
        pruned = 0.0
        for part in parts:  # scored against the prompt alone, as calibration does it: an answer is not known in use
            policy = asymvlm.VisionPruning(budget=RelativeThresholdBudget(0.4), text=part["labels"] < 0)
            with asymvlm.patch(model, vision=policy):
                pruned += sum(answered(model, part))
    assert right == exact_match(model, samples).sum()
    scores = similarity(model, samples)
    low, high = (scores.sort().values[:, share * (NUM_VISION - 1) // 100, None] for share in (5, 98))
    kept = scores > low + 0.4 * (high - low)
    assert pruned == exact_match(model, samples, keep=kept).sum()


def test_model_inputs_are_the_processors(samples: Samples) -> None:
    inputs = model_inputs(samples, [0, 3])
    assert inputs["input_ids"][:, 0].tolist() == [BOS, BOS]
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [NUM_VISION, NUM_VISION]
    labels = inputs["labels"] >= 0
    assert torch.equal(inputs["labels"][labels], inputs["input_ids"][labels])
    assert (inputs["input_ids"][labels] == EOS).sum() == 2


def test_committed_scorers_belong_to_the_checkpoint(model: Any) -> None:
    found = command.read_scorers(SCORERS)
    assert (len(found["paper"]), len(found["default"])) == (3, 3)
    for many in found.values():
        for one in many:
            one.check_model(model)
            assert one.base.model_id == "bench/tinyvlm/checkpoint" == portable(one).base.model_id
    assert not found["paper"][0].training["settings"]["theta_grad"]
    assert found["default"][0].training["settings"]["theta_grad"]


def test_command_writes_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "uniform", lambda study: {"full": study.summary(FULL)})
    monkeypatch.setattr(command, "beyond", lambda study, baseline, learned: {"baseline": baseline, "of": list(learned)})
    arguments = ["--out", tmp_path, "--samples", "10", "--name", "try"]
    for part in ("uniform", "beyond"):
        assert command.console.run_app(command.app, [*map(str, arguments), "--part", part], name="quality") == 0
    content = json.loads((tmp_path / "try.json").read_text())
    assert content["parts"]["uniform"]["full"]["samples"] == 10
    assert len(content["parts"]["uniform"]["gaps"]) == 10
    assert content["parts"]["beyond"]["baseline"] == command.PAPER
    assert [content["parts"][part]["run"] for part in ("uniform", "beyond")] == [0, 1]
    assert np.isfinite(content["parts"]["uniform"]["gaps"]).all()
    assert command.console.run_app(command.app, ["--part", "speed"], name="quality") == 2
