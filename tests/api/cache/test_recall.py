"""Vision tokens that come back before a later question: equal to the whole conversation with columns closed by turn."""

from __future__ import annotations

import pytest
import torch
from checks import GREEDY, assert_close, uniform
from masked_reference import masked_greedy, select
from test_multi_turn import longer, without_images
from tiny import FAMILIES, make_batch
from torch import Tensor

import asymvlm

ANSWER = 3
NEVER = 99
SERVED = [name for name in FAMILIES if name in ("llava", "gemma3", "qwen2_5_vl", "phi3_v", "paligemma")]


def recalled_turns(plain, conversation: dict[str, Tensor], when: Tensor, known: int, turn: int, ratio: float) -> Tensor:
    """Turn of every column (B, S): of those that the new question ranks into the budget and that never came, this."""
    new = torch.arange(conversation["input_ids"].shape[1]) >= known
    wanted = select(plain, conversation, ratio, text_mask=new.expand_as(conversation["input_ids"])).keep
    later = wanted.shape[1] - when.shape[1]
    when = torch.nn.functional.pad(when, (0, later), value=turn - 1)
    when[:, known:] = turn
    return torch.where(wanted & (when == NEVER), turn, when)


def check_conversation(family, plain, model, inputs, ratio=0.25, recall=True, turns=3, **settings):
    """Three questions about the same images; how many tokens came back before each."""
    keep = select(plain, inputs, ratio).keep
    real = inputs["attention_mask"].bool()
    when = torch.where(keep | ~real, 0, NEVER)
    counts = []
    with asymvlm.patch(model, vision=uniform(ratio, recall=recall, **settings)) as handle:
        result = model.generate(**inputs, **GREEDY, max_new_tokens=ANSWER)
        assert handle.last.recall is None
        for turn in range(1, turns):
            conversation = longer(family, inputs, result.sequences, seed=turn)
            cache, known = result.past_key_values, result.sequences.shape[1] - 1
            result = model.generate(
                **without_images(conversation), past_key_values=cache, **GREEDY, max_new_tokens=ANSWER
            )
            before = when
            when = recalled_turns(plain, conversation, when, known, turn, ratio)
            came = ((when == turn)[:, : before.shape[1]] & (before == NEVER)).sum(-1).tolist()
            assert handle.last.recall.recalled == came
            counts.append(came)
            ids, logits = masked_greedy(plain, conversation, when, steps=ANSWER)
            assert torch.equal(result.sequences, torch.cat([conversation["input_ids"], ids], 1))
            assert_close(torch.stack(result.logits, 1), logits)
    return counts


@pytest.mark.parametrize("family", SERVED, indirect=True)
@pytest.mark.parametrize("batch", ["single", "left_padded", "two_images"])
def test_generate(family, plain, model, batch):
    counts = check_conversation(family, plain, model, make_batch(family, batch))
    assert sum(map(sum, counts)) > 0
