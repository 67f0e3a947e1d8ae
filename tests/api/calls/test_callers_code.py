"""What `generate` hands to the caller's own code speaks of the caller's prompt, and their forwards are their own."""

from __future__ import annotations

import pytest
import torch
from checks import GREEDY, uniform
from tiny import make_batch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import asymvlm
from asymvlm.hf import callers
from asymvlm.hf.errors import MechanismError

MODES = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, top_k=5, num_return_sequences=2),
    "beams": dict(do_sample=False, num_beams=2),
    "no cache": dict(do_sample=False, use_cache=False),
}


class Seen(LogitsProcessor, StoppingCriteria):
    """Notes the ids it is called with; as a criterion it stops after ``stop`` new tokens."""

    def __init__(self, columns: int, stop: int = 99) -> None:
        self.columns, self.stop = columns, stop
        self.ids: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.ids.append(input_ids.clone())
        done = input_ids[:, self.columns :].shape[1] >= self.stop
        return torch.full((len(input_ids),), done, device=input_ids.device)


class Noting(LogitsProcessor):
    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.ids.append(input_ids.clone())
        return scores


@pytest.mark.parametrize("mode", MODES)
def test_processors_and_criteria_get_the_whole_prompt(family, model, mode):
    inputs = make_batch(family, "left_padded")
    prompt = inputs["input_ids"]
    processor, criterion = Noting(), Seen(prompt.shape[1], stop=3)
    with asymvlm.patch(model, vision=uniform(0.5)) as handle:
        found = model.generate(
            **inputs, **MODES[mode], max_new_tokens=8, min_new_tokens=8, pad_token_id=0,
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList([criterion]),
        )  # fmt: skip
        assert handle.last.index.shape[1] < prompt.shape[1]
    assert found.shape[1] == prompt.shape[1] + 3, "the criterion counts from the caller's prompt"
    for seen in (*processor.ids, *criterion.ids):
        rows = prompt.repeat_interleave(len(seen) // len(prompt), 0)
        assert torch.equal(seen[:, : prompt.shape[1]], rows)
    assert [ids.shape[1] - prompt.shape[1] for ids in processor.ids] == [0, 1, 2]


def test_a_later_turn_speaks_of_the_whole_conversation(family, model):
    inputs = make_batch(family, "single")
    with asymvlm.patch(model, vision=uniform(0.5)):
        first = model.generate(**inputs, **GREEDY, max_new_tokens=3)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
        cache = asymvlm.hf.arguments.cache_of(first)
        processor = Noting()
        name = asymvlm.hf.generation.generate_callee(model).cache
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **{name: cache}, **GREEDY, max_new_tokens=2,
            logits_processor=LogitsProcessorList([processor]),
        )  # fmt: skip
    assert torch.equal(processor.ids[0], ids)
    assert processor.ids[1].shape[1] == ids.shape[1] + 1


def test_penalties_count_dropped_placeholders(family, model, monkeypatch):
    """A penalty sees the same ids with and without a patch, so at a keep ratio of 0.5 each placeholder counts too."""
    inputs = make_batch(family, "single")
    seen = []
    original = callers.Restated.__call__

    def noting(self, input_ids, *args, **kwargs):
        seen.append((type(self._inner).__name__, self._original(input_ids).shape[1]))
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(callers.Restated, "__call__", noting)
    with asymvlm.patch(model, vision=uniform(0.5)):
        model.generate(**inputs, **GREEDY, max_new_tokens=2, repetition_penalty=1.3, no_repeat_ngram_size=2)
    columns = inputs["input_ids"].shape[1]
    assert seen == [
        (name, columns + step)
        for step in (0, 1)
        for name in ("RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor")
    ]


@pytest.mark.parametrize("mode", ["greedy", "beams", "no cache"])
def test_a_forward_inside_generate_is_its_own(family, plain, model, mode):
    """A processor asks the model for a second opinion: about text, and about the prompt with its images."""
    inputs = make_batch(family, "single")
    text = torch.tensor([[5, 9, 11, 8]])
    with torch.no_grad():
        wanted = plain(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits
    found = []

    class SecondOpinion(LogitsProcessor):
        def __call__(self, input_ids, scores):
            found.append(model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits)
            found.append(model(input_ids=text, attention_mask=torch.ones_like(text)).logits)
            return scores

    with asymvlm.patch(model, vision=uniform(0.5)):
        alone = model.generate(**inputs, **MODES[mode], max_new_tokens=4)
        with_opinions = model.generate(
            **inputs, **MODES[mode], max_new_tokens=4, logits_processor=LogitsProcessorList([SecondOpinion()])
        )
        with torch.no_grad():
            pruned = model(**inputs).logits
        kept = []

        class OfThePrompt(LogitsProcessor):
            def __call__(self, input_ids, scores):
                kept.append(model(**inputs).logits)
                return scores

        again = model.generate(
            **inputs, **MODES[mode], max_new_tokens=4, logits_processor=LogitsProcessorList([OfThePrompt()])
        )
    assert torch.equal(with_opinions, alone)
    assert torch.equal(again, alone)
    assert len(found) >= 8
    for logits in found:
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
    for logits in kept:
        torch.testing.assert_close(logits, pruned, rtol=0, atol=1e-5)


def test_code_that_could_not_be_told_stops_the_call(family, model):
    inputs = make_batch(family, "single")
    with asymvlm.patch(model, vision=uniform(0.5)):
        for method in (callers.PROCESSORS, callers.CRITERIA):
            model.__dict__[method] = getattr(type(model), method).__get__(model)  # what a renamed method amounts to
        for name, items in (
            ("logits_processor", LogitsProcessorList([Noting()])),
            ("stopping_criteria", StoppingCriteriaList([Seen(0)])),
        ):
            with pytest.raises(MechanismError, match=f"telling {name} the original prompt"):
                model.generate(**inputs, **GREEDY, max_new_tokens=2, **{name: items})
