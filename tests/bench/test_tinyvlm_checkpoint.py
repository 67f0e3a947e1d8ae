"""The committed checkpoint loads by the auto classes and reads pages, with all and with half of the vision tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import asymvlm
from bench.tinyvlm.evaluate import Samples, exact_match, exact_match_by_kind, features, make_samples
from bench.tinyvlm.model import CHECKPOINT, NUM_VISION


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()


@pytest.fixture(scope="module")
def samples() -> Samples:
    return make_samples("validation", 60, seed=1)


def generate(model: Any, processor: Any, samples: Samples, number: int) -> str:
    """The greedy answer to one sample, as a user gets it."""
    content = [
        {"type": "image", "image": samples.pages.image(number, 8)},
        {"type": "text", "text": samples.turns[number].question},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return str(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_checkpoint_reads_pages_it_never_saw(model: Any, samples: Samples) -> None:
    rates = exact_match_by_kind(model, samples)
    assert rates["all"] > 0.85
    assert rates["value"] > 0.95


def test_teacher_forcing_equals_greedy_decoding(model: Any, processor: Any, samples: Samples) -> None:
    forced = exact_match(model, samples)[:10].tolist()
    assert forced == [
        generate(model, processor, samples, number) == samples.turns[number].answer for number in range(10)
    ]


def test_patched_model_answers_with_half_of_the_tokens(model: Any, processor: Any, samples: Samples) -> None:
    asked = [number for number, turn in enumerate(samples.turns) if turn.kind == "value"][:4]
    with asymvlm.patch(model, vision=asymvlm.VisionPruning(budget=asymvlm.UniformBudget(0.5))) as handle:
        answers = [generate(model, processor, samples, number) for number in asked]
        assert handle.last.kept == [NUM_VISION // 2]
    assert answers == [samples.turns[number].answer for number in asked]


def test_kept_tokens_matter(model: Any, samples: Samples) -> None:
    vision = features(model, samples)
    entries = torch.from_numpy(samples.pages.owner) >= 0
    for wanted, few, most in ((entries, 0.85, 1.0), (~entries, 0.0, 0.3)):
        order = wanted.to(torch.float32).sort(dim=1, descending=True, stable=True).indices
        half = torch.zeros_like(wanted).scatter(1, order[:, : NUM_VISION // 2], True)
        assert few <= exact_match(model, samples, vision, half).float().mean() <= most


def test_samples_repeat_and_have_one_question_a_page(samples: Samples) -> None:
    again = make_samples("validation", 60, seed=1)
    assert torch.equal(again.text, samples.text)
    assert len(samples) == len(samples.pages) == 60
    assert set(samples.kinds) == {"value", "exists", "count", "list"}
    answers = samples.labels >= 0
    assert torch.equal(samples.labels[answers], samples.text[answers])
    assert not (answers & samples.question).any()
