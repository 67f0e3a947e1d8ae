"""All methods on the small VLM: equal tokens where the tables say so, and answers that are the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import asymvlm
from asymvlm.methods import FastV
from bench.quality.answers import answers
from bench.quality.caches import ENTRIES, caches
from bench.quality.methods import CONTROL, INSIDE, all_names, compared, costs, settings
from bench.quality.scorers import load_model, model_inputs
from bench.quality.study import Study
from bench.tinyvlm.evaluate import make_samples
from bench.tinyvlm.model import CHECKPOINT, NUM_VISION


@pytest.fixture(scope="module")
def study() -> Study:
    return Study(load_model(CHECKPOINT), make_samples("validation", 4, seed=4), {}, seeds=1)


def test_methods_hold_equal_tokens(study: Study) -> None:
    found = costs(study, (0.5,))["costs"]
    assert set(found) == {"full", *all_names(study)}
    for name in all_names(study):
        one = found[name]["0.5"]
        assert one["kv"] == pytest.approx(found["random"]["0.5"]["kv"], abs=0.006), name
        assert one["flops"] < 0.5
    assert 0.5 < found["random"]["0.5"]["kv"] < 0.53, "text stays"
    assert settings(study, FastV.name, 0.22) is None, "the first of four layers holds a quarter"
    table = compared(study, "cosine", (0.5,))
    assert {pair["second"] for pair in table["paired"]} == {"cosine/0.5", f"{CONTROL}/0.5"}
    assert set(table["rates"]) == set(all_names(study))


def test_answers_fed_along_are_those_the_model_generates(study: Study) -> None:
    """A method between layers must not see the answer that teacher forcing feeds along."""
    samples, model = study.samples, study.model
    for name in INSIDE:
        vision = settings(study, name, 0.75)[0]  # type: ignore[index]
        right = answers(model, samples, vision).right
        with asymvlm.patch(model, vision=vision):
            for row in range(len(samples)):
                inputs: dict[str, Any] = model_inputs(samples, [row], answers=False)
                prompt = inputs["input_ids"].shape[1]
                label = samples.labels[row, prompt - 1 - NUM_VISION :]
                label = label[label >= 0]
                with torch.inference_mode():
                    said = model.generate(**inputs, max_new_tokens=len(label), do_sample=False)[0, prompt:]
                assert bool(right[row]) == torch.equal(said, label)


def test_methods_of_the_cache_hold_equal_bytes(study: Study) -> None:
    samples = make_samples("validation", 2, seed=5, mix={"read": 1.0}, entries=(2, 2))
    found = caches(study.model, samples, (0.25,))  # 6 of up to 12 tokens, and a prompt
    assert set(found["rates"]) == {entry.title for entry in ENTRIES}
    held = {title: one["0.25"] for title, one in found["bytes"].items()}
    token = 2 * 4 * 4 * 96  # K and V, four layers, fp32
    for title, size in held.items():
        assert abs(size - (found["prompt"] + 6) * token) <= token, title
