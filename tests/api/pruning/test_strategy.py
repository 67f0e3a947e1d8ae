"""``strategy="auto"``: the paper's choice by token composition, call by call, and what it says about it."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from checks import GREEDY, assert_close, uniform
from evicted_reference import Masked
from masked_reference import masked_greedy, select
from windowed import ATOL, windowed

import asymvlm
from asymvlm import AutoStrategy, TextEviction, TurnEviction
from asymvlm.settings.strategy import Choice

TABLE_1 = {  # vision, query, generated, and what the paper does about it
    "MME": (737, 30, 4, True), "DocVQA": (2231, 36, 10, True), "OCRVQA": (2312, 30, 6, True),
    "TextVQA": (2044, 31, 6, True), "ChartQA": (2236, 37, 10, True), "LLaVA-Bench": (256, 150, 375, False),
    "MMDU": (1280, 500, 2900, False),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE_1)
def test_the_rule_on_the_papers_table(name):
    vision, query, generated, prunes = TABLE_1[name]
    choice = Choice(vision, query, generated)
    assert choice.prunes_vision == prunes
    assert f"{choice.vision_share:.0%}" in choice.reason


def auto(model, **settings):
    return asymvlm.patch(copy.deepcopy(model), strategy="auto", **settings)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
def test_short_answers_are_pruned_and_long_ones_evicted(family):
    model, inputs = windowed(family), tiny.make_inputs(family, (tiny.ONE,))
    short, long, text = 4, 24, dict(threshold=6, retention=0.5)
    with auto(model, vision=uniform(0.5), text=TextEviction.paper(**text)) as handle:
        found = handle.model.generate(**inputs, **GREEDY, max_new_tokens=short)
        ids, logits = masked_greedy(model, inputs, select(model, inputs, 0.5).keep, steps=short)
        assert_close(torch.stack(found.logits, 1), logits, atol=ATOL)
        assert handle.last.strategy.prunes_vision
        assert handle.last.kept == [8]
        assert handle.last.eviction.evicted == [0]
        found = handle.model.generate(**inputs, **GREEDY, max_new_tokens=long)
        ids, logits = Masked(model, inputs, **text).generate(long)
        assert torch.equal(found.sequences[:, -long:], ids)
        assert_close(torch.stack(found.logits, 1), logits, atol=ATOL)
        assert not handle.last.strategy.prunes_vision
        assert handle.last.kept == [16]
        assert handle.last.eviction.evicted[0] > 0
        assert "generated text is evicted: vision is" in handle.last.notes[0]
        assert handle.last.to_dict()["strategy"]["new_tokens"] == long


def test_what_is_not_given_is_the_papers():
    with auto(windowed("llava")) as handle:
        assert (handle.text, handle.turns) == (TextEviction(90, 0.5), TurnEviction(512, 0.5))
        assert handle.vision.budget.ratio == 0.5
        assert handle.strategy == AutoStrategy(vision=handle.vision)


def test_the_length_that_generate_would_take_counts():
    model, inputs = windowed("llava"), tiny.make_inputs("llava", (tiny.ONE,))
    columns = inputs["input_ids"].shape[1]
    with auto(model) as handle:
        for options, new in (({}, 20), ({"max_length": columns + 7}, 7), ({"max_new_tokens": 3}, 3)):
            handle.model.generate(**inputs, do_sample=False, **options)
            choice = handle.last.strategy
            assert (choice.vision_tokens, choice.text_tokens, choice.new_tokens) == (16, columns - 16, new)


def test_a_forward_goes_by_its_prompt_and_text_alone_is_text():
    model, inputs = windowed("llava"), tiny.make_inputs("llava", (tiny.ONE,))
    with auto(model) as handle, torch.no_grad():
        logits = handle.model(**inputs).logits
        assert logits.shape[1] == inputs["input_ids"].shape[1] - 8
        assert handle.last.strategy.new_tokens == 0
        handle.model.generate(**tiny.make_batch("llava", "text_only"), max_new_tokens=2, do_sample=False)
        assert not handle.last.strategy.prunes_vision
        handle.enabled = False
        expected = model.generate(**inputs, **GREEDY, max_new_tokens=3)
        found = handle.model.generate(**inputs, **GREEDY, max_new_tokens=3)
        assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=0.0)


@pytest.mark.parametrize("first,second", [(4, 30), (30, 4)])
def test_a_dialogue_may_change_sides(first, second):
    """A pruned prompt stays pruned; a whole one stays whole, whatever the next call asks for."""
    model, inputs = windowed("llava"), tiny.make_inputs("llava", (tiny.ONE,))
    text = dict(threshold=6, retention=0.5)
    keep = select(model, inputs, 0.5).keep if first < second else None
    reference = Masked(model, inputs, keep)
    with auto(model, vision=uniform(0.5), text=TextEviction.paper(**text)) as handle:
        sent, cache = dict(inputs), {}
        for turn, new in enumerate((first, second)):
            reference.policy |= text if turn or new > 10 else {}
            ids, logits = reference.generate(new)
            found = handle.model.generate(**sent, **cache, **GREEDY, max_new_tokens=new)
            assert torch.equal(found.sequences[:, -new:], ids), turn
            assert_close(torch.stack(found.logits, 1), logits, atol=ATOL)
            reference.append(torch.tensor([[31, 32, 33]]))
            sent = {name: reference.inputs[name] for name in ("input_ids", "attention_mask")}
            cache = {"past_key_values": found.past_key_values}


def test_another_strategy_is_refused():
    with pytest.raises(ValueError, match="strategy must be None or 'auto', got 'best'"):
        asymvlm.patch(copy.deepcopy(windowed("llava")), strategy="best")
