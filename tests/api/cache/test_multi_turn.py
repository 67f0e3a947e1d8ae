"""A later turn on the cache of a pruned prompt is the turn of the masked conversation."""

from __future__ import annotations

import pytest
import torch
from checks import GREEDY, assert_close, uniform
from masked_reference import masked_greedy, select
from tiny import FAMILIES, make_batch
from torch import Tensor

import asymvlm

ANSWER, QUESTION = 4, 5
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


def longer(family: str, inputs: dict[str, Tensor], sequences: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """The conversation so far and another question, as a processor would return it."""
    rows, generator = sequences.shape[0], torch.Generator().manual_seed(seed)
    question = torch.randint(20, 60, (rows, QUESTION), generator=generator)
    ids = torch.cat([sequences, question], 1)
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    conversation = {**inputs, "input_ids": ids}
    for name, fill in {"attention_mask": 1, **dict.fromkeys(PER_TOKEN, 0), **FAMILIES[family].generated}.items():
        if name in inputs:
            conversation[name] = torch.nn.functional.pad(inputs[name], (0, new), value=fill)
    return conversation


def without_images(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask", *PER_TOKEN)}


@pytest.mark.parametrize("batch", ["single", "left_padded", "two_images"])
@pytest.mark.parametrize("images", ["dropped", "sent again"])
def test_second_and_third_turn(family, plain, model, batch, images):
    inputs = make_batch(family, batch)
    keep = select(plain, inputs, 0.5).keep
    with asymvlm.patch(model, vision=uniform(0.5)):
        result = model.generate(**inputs, **GREEDY, max_new_tokens=ANSWER)
        for turn in range(2):
            conversation = longer(family, inputs, result.sequences, seed=turn)
            sent = without_images(conversation) if images == "dropped" else conversation
            cache = result.past_key_values
            result = model.generate(**sent, past_key_values=cache, **GREEDY, max_new_tokens=ANSWER)
            new = conversation["input_ids"].shape[1] - keep.shape[1]
            kept = torch.nn.functional.pad(keep, (0, new), value=True)
            ids, logits = masked_greedy(plain, conversation, kept, steps=ANSWER)
            assert torch.equal(result.sequences, torch.cat([conversation["input_ids"], ids], 1))
            assert_close(torch.stack(result.logits, 1), logits)
            assert result.past_key_values.get_seq_length() < result.sequences.shape[1] - 1


def test_max_length_and_an_inferred_mask(family, plain, model):
    inputs = make_batch(family, "left_padded")
    with asymvlm.patch(model, vision=uniform(0.5)):
        result = model.generate(**inputs, **GREEDY, max_new_tokens=ANSWER)
        conversation = without_images(longer(family, inputs, result.sequences))
        del conversation["attention_mask"]
        length = conversation["input_ids"].shape[1] + 3
        found = model.generate(**conversation, past_key_values=result.past_key_values, max_length=length)
    assert found.shape[1] == length
    assert torch.equal(found[:, :-3], conversation["input_ids"])


def test_another_conversation_is_refused(family, model):
    inputs = make_batch(family, "single")
    with asymvlm.patch(model, vision=uniform(0.5)):
        result = model.generate(**inputs, **GREEDY, max_new_tokens=ANSWER)
        conversation = without_images(longer(family, inputs, result.sequences))
        conversation["input_ids"][0, 1] += 1
        with pytest.raises(ValueError, match="must go on from the prompt of the pruned cache"):
            model.generate(**conversation, past_key_values=result.past_key_values, max_new_tokens=2)
